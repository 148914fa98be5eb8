"""The exceptions that end a run with one line: bad input, and what stops a run that was well begun."""

import errno
import functools
import sys
from collections.abc import Callable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FULL_TEXTS = ("No space left on device", "File too large", "Disk quota exceeded")

MOST = 2000  # characters of a message; a label of a megabyte is not repeated whole


class InputError(Exception):
    """Bad input, said in one line: which file or flag, what was found, what is allowed.

    Entry points print the message after ``error: `` and exit with code 2. What a file brings into the message cannot
    act on a terminal: characters without a shape of their own (control codes, changes of direction, halves of
    surrogate pairs) are written as escapes.
    """

    def __init__(self, message: str):
        line = " ".join(str(message).split())
        line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
        super().__init__(line if len(line) <= MOST else f"{line[: MOST // 2]} ... {line[-MOST // 2 :]}")


def entry_point(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a program's `main`: it returns an exit code, 2 after one line on stderr about bad input."""

    @functools.wraps(main)
    def program(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return program


class RunStopped(Exception):
    """A run that cannot go on although nothing was wrong with its input; exit code 1."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a write failed for want of space, whichever library said so."""
    while error is not None:
        if getattr(error, "errno", None) in DISK_FULL or any(text in str(error) for text in DISK_FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False
