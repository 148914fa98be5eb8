"""The exceptions that end a run with one line: bad input, which `check` finds in flags, and failures during the run."""

import difflib
import errno
import functools
import math
import sys
from collections.abc import Callable, Iterable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FULL_TEXTS = ("No space left on device", "File too large", "Disk quota exceeded")

MOST = 2000  # characters of a message, which may quote a label of a megabyte


class InputError(Exception):
    """Bad input, in one line: which file or flag, what was found, what is allowed.

    Entry points print the message after ``error: `` and exit with code 2. Characters that are not printable (control
    codes, changes of direction, halves of surrogate pairs) are escaped, so that no file can control the terminal.
    """

    def __init__(self, message: str):
        line = " ".join(str(message).split())
        line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
        super().__init__(line if len(line) <= MOST else f"{line[: MOST // 2]} ... {line[-MOST // 2 :]}")


def check(holds: bool, flag: str, found, allowed: str) -> None:
    """Reject the value of a flag unless `holds`, saying what is allowed."""
    if not holds:
        raise InputError(f"--{flag}: found {found}; allowed: {allowed}")


def check_number(group, flag: str, *, above: float | None = None, least: float = -math.inf) -> None:
    """Reject the value of a flag unless it is None, or finite and above `above`, or at least `least`."""
    found = getattr(group, flag)
    holds = found is None or math.isfinite(found) and (found > above if above is not None else found >= least)
    check(holds, flag, found, f"a number above {above}" if above is not None else f"{least} or more")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message about an unknown word: the most similar known word, if there is one."""
    found = difflib.get_close_matches(word, sorted(known), n=1, cutoff=cutoff)
    return f"; did you mean {found[0]!r}?" if found else ""


def entry_point(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate `main` to return an exit code: 2 after bad input, 1 if a disk is full, 130 after Ctrl-C, with one line
    on stderr."""

    @functools.wraps(main)
    def program(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except InputError as error:
            status, line = 2, f"error: {error}"
        except KeyboardInterrupt:
            status, line = 130, "interrupted"  # 130 as in a shell
        except Exception as error:
            if not is_disk_full(error):
                raise
            status, line = 1, f"error: a disk is full ({first_line(error)})"
        print(line, file=sys.stderr)
        return status

    return program


class RunStopped(Exception):
    """A run that cannot continue although its input is valid; exit code 1."""


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether a write failed for lack of space, whichever library reports it."""
    while error is not None:
        if getattr(error, "errno", None) in DISK_FULL or any(text in str(error) for text in DISK_FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False
