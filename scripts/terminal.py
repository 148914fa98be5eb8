"""Copy a program's output to a log, and the part meant for the user to the terminal.

    program 2>&1 | python scripts/terminal.py [--all] LOG

LOG (appended to) gets every line, and only the last state of each progress bar. Standard output gets the lines that
begin with `[gorp] ` (with --all, every line) and, on a terminal, the progress bars, which overwrite one another; lines
that begin with `error: ` go to standard error, each once, as several ranks may report one fault. The value of
`--hub_token` and other tokens of Hugging Face are masked everywhere. If the log cannot be written, it warns once and
continues; if the terminal cannot, it continues too.
"""

import codecs
import os
import re
import shutil
import signal
import sys

FOR_THE_USER, ERROR = "[gorp] ", "error: "
CLEAR_LINE = "\r\x1b[K"
# tqdm's bars: "name:  40%|####    | 4/10 [00:01<00:02,  3.1it/s]" and, without a total, "name: 4it [00:01, 3.1it/s]"
BAR = re.compile(r"[^\r\n]*?(\d{1,3}%\|[^|\r\n]*\| *\S+/\S+|\d{1,12} ?[a-z]{1,12}) \[\d+:\d\d[^\]\r\n]*\]")

# In a command, however it is quoted; and Hugging Face's tokens anywhere.
SECRET = re.compile(r"(--hub[_-]token\W+)[^\s'\",]+|\b(hf_)[A-Za-z0-9]{20,}")


class Terminal:
    """Splits a stream of text into lines and progress bars, and writes each where it belongs."""

    def __init__(self, log, out, errors, *, show_bars: bool, show_all: bool = False):
        self.log, self.out, self.errors, self.show_bars, self.show_all = log, out, errors, show_bars, show_all
        self.rest = ""  # text after the last line end
        self.bar = ""  # the bar's current state, not logged yet
        self.reported: set[str] = set()

    def feed(self, text: str) -> None:
        """Process the next piece of output, which may end anywhere."""
        *ended, self.rest = re.split(r"(?<=[\r\n])", self.rest + text)
        for piece in ended:
            self._piece(piece[:-1], ends_line=piece[-1] == "\n")
        if BAR.fullmatch(self.rest):  # tqdm ends no line while a bar is running
            self._show(self.rest)
            self.rest = ""

    def close(self) -> None:
        """Write the rest: a line without an end, a bar that ran until the program stopped."""
        if self.rest or self.bar:
            self._piece(self.rest, ends_line=True)
        self._clear_bar()

    def _piece(self, text: str, *, ends_line: bool) -> None:
        """Process a text between two line ends: a bar, a line, or a line right after a bar."""
        if bar := BAR.match(text):
            self._show(bar[0])
            text = text[bar.end():]
        if text.strip():
            self._line(text)
        elif ends_line:
            if self.bar:
                self._line(self.bar.strip())
                self.bar = ""
            else:
                self.log.write("\n")
                if self.show_all:
                    self.out.write("\n")

    def _line(self, line: str) -> None:
        line = SECRET.sub(lambda found: f"{found[1] or found[2]}***", line)
        self.log.write(line + "\n")
        if line.startswith(ERROR):
            self._clear_bar()
            if line not in self.reported:
                self.errors.write(f"{line}\n")
                self.reported.add(line)
        elif self.show_all or line.startswith(FOR_THE_USER):
            self._clear_bar()
            self.out.write(f"{line}\n")

    def _show(self, bar: str) -> None:
        self.bar = bar
        if self.show_bars:
            width = shutil.get_terminal_size().columns - 1  # a bar that wraps could not be cleared
            self.out.write(CLEAR_LINE + bar[:width])

    def _clear_bar(self) -> None:
        if self.show_bars:
            self.out.write(CLEAR_LINE)


class Stream:
    """Writes through to standard output or error. After a failed write (a full disk, a closed pipe) it writes no more,
    and the run continues."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def write(self, text: str) -> None:
        # As on stderr: the encoding may lack a path's characters.
        rest = text.encode(sys.stdout.encoding, errors="backslashreplace")
        while rest and self.descriptor is not None:
            try:
                rest = rest[os.write(self.descriptor, rest):]
            except OSError:
                self.descriptor = None


class Log:
    """A file that is appended to. A deleted folder is created again; a failed write warns once."""

    def __init__(self, path: str):
        self.path = path
        self.file = None
        self.failed = False

    def write(self, text: str) -> None:
        try:
            if self.file is None or not os.path.exists(self.path):
                os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
                self.file = open(self.path, "a", encoding="utf-8", buffering=1)
            self.file.write(text)
        except OSError as error:
            if not self.failed:
                print(f"[gorp] {self.path}: cannot be written ({error.strerror}); the run continues", flush=True)
            self.failed, self.file = True, None


def main(path: str, *, show_all: bool = False) -> None:
    """Copy standard input until it ends; Ctrl-C is ignored, so that the program's last lines are still copied."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    terminal = Terminal(Log(path), Stream(1), Stream(2), show_bars=sys.stdout.isatty(), show_all=show_all)
    while chunk := os.read(sys.stdin.fileno(), 65536):
        terminal.feed(decoder.decode(chunk))
    terminal.close()


if __name__ == "__main__":
    main(sys.argv[-1], show_all="--all" in sys.argv[1:-1])
