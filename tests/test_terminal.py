"""`scripts/terminal.py`: what of a run's output reaches the log, and what the terminal."""

import io
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from helpers import ROOT
from scripts.terminal import Terminal

BARS = [f"\rtrain: {done * 25:3}%|{'█' * done:4}| {done}/4 [00:0{done}<00:01,  1.00it/s]" for done in range(5)]
OUTPUT = "".join([
    "a library's line\n", "[gorp] task begins\n", *BARS[:2], "[gorp] right behind a bar\n", BARS[2],
    "\r", " " * 40, "\r", "{'loss': 1.0}\n", *BARS[3:], "\n", "\n", "error: --flag: bad\n", "no end",
])
LOG = """a library's line
[gorp] task begins
[gorp] right behind a bar
{'loss': 1.0}
train: 100%|████| 4/4 [00:04<00:01,  1.00it/s]

error: --flag: bad
no end
"""


def filtered(pieces: list[str], *, show_bars: bool) -> tuple[str, str, str]:
    """What reaches the log, standard output and standard error."""
    log, out, errors = io.StringIO(), io.StringIO(), io.StringIO()
    terminal = Terminal(log, out, errors, show_bars=show_bars)
    for piece in pieces:
        terminal.feed(piece)
    terminal.close()
    return log.getvalue(), out.getvalue(), errors.getvalue()


def test_an_error_that_several_ranks_report_is_shown_once():
    log, _, errors = filtered(["error: a\n", "error: b\nerror: a\n"], show_bars=False)
    assert (log, errors) == ("error: a\nerror: b\nerror: a\n", "error: a\nerror: b\n")


def test_a_terminal_without_a_character_shows_its_code(tmp_path):
    done = subprocess.run([sys.executable, "scripts/terminal.py", str(tmp_path / "log")], cwd=ROOT, capture_output=True,
                          input="[gorp] 中\n".encode(), env=os.environ | {"PYTHONIOENCODING": "latin-1"})  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"[gorp] \\u4e2d\n")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "[gorp] 中\n"


@given(st.lists(st.integers(0, len(OUTPUT)), max_size=12))
def test_log_and_terminal_do_not_depend_on_where_output_is_cut(cuts):
    ends = [0, *sorted(cuts), len(OUTPUT)]
    pieces = [OUTPUT[start:end] for start, end in zip(ends, ends[1:])]
    log, out, errors = filtered(pieces, show_bars=False)
    assert log == LOG
    assert out == "[gorp] task begins\n[gorp] right behind a bar\n"
    assert errors == "error: --flag: bad\n"


def test_a_terminal_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    said = b"[gorp] one\n" * 3 + b"error: two\n"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, ROOT / "scripts" / "terminal.py", tmp_path / "log"], input=said,
                              stdout=full, stderr=subprocess.PIPE)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"error: two\n") and (tmp_path / "log").read_bytes() == said


def test_a_terminal_sees_the_bars(tmp_path):
    leader, follower = pty.openpty()
    subprocess.run([sys.executable, ROOT / "scripts" / "terminal.py", tmp_path / "log"], stdout=follower, check=True,
                   input=("".join(BARS) + "\n").encode(), env=os.environ | {"COLUMNS": "30"})
    os.close(follower)
    seen = os.read(leader, 65536).decode()
    os.close(leader)
    assert "train: 100%|████|" in seen and "it/s" not in seen  # cut at the width, so that it can be overwritten
    assert "\n" not in seen
    assert (tmp_path / "log").read_text() == "train: 100%|████| 4/4 [00:04<00:01,  1.00it/s]\n"


def test_a_bar_without_a_total_and_one_that_was_stopped():
    log, out, _ = filtered(["\rrows: 4 examples [00:01, 3.10 examples/s]", "\r9it [00:02,  4.1it/s]"], show_bars=True)
    assert log == "9it [00:02,  4.1it/s]\n"
    assert "4 examples" in out


def test_a_long_line_of_digits_takes_no_time():
    log, _, _ = filtered(["7" * 100_000 + "\n"], show_bars=True)
    assert len(log) == 100_001


def through_terminal(log: Path, *pieces: str, between=lambda: None) -> tuple[int, str]:
    """Exit code and output of terminal.py for pieces of input, the second of which follows what `between` does."""
    command = [sys.executable, ROOT / "scripts" / "terminal.py", log]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    run.stdin.write(pieces[0])
    run.stdin.flush()
    assert run.stdout.readline() == pieces[0]
    between()
    out, _ = run.communicate("".join(pieces[1:]))
    return run.returncode, out


def test_a_log_folder_that_is_deleted_is_made_again(tmp_path):
    log = tmp_path / "logs" / "order.log"
    status, out = through_terminal(log, "[gorp] one\n", "[gorp] two\n", between=lambda: shutil.rmtree(log.parent))
    assert (status, out, log.read_text()) == (0, "[gorp] two\n", "[gorp] two\n")


def test_a_log_that_cannot_be_written_is_said_once_and_the_run_goes_on(tmp_path):
    log = tmp_path / "logs" / "order.log"

    def replace():
        shutil.rmtree(log.parent)
        log.parent.touch()

    status, out = through_terminal(log, "[gorp] one\n", "[gorp] two\n", "[gorp] three\n", between=replace)
    assert status == 0 and "two" in out and "three" in out
    assert out.count("cannot be written (") == 1 and "; the run continues" in out
