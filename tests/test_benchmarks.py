"""The programs in benchmarks/: each starts, and none takes results of other settings for its own.

What `continual.py`, `figures.py` and `gpu.py` compute is tested in files of their own.
"""

import argparse
import importlib
from pathlib import Path

import pytest

from benchmarks import orders, stages
from helpers import ROOT

PROGRAMS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")
                  if '__name__ == "__main__"' in path.read_text(encoding="utf-8"))  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_starts_and_explains_itself(name, monkeypatch, capsys):
    program = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        program.main()
    assert program.__doc__.splitlines()[0] in capsys.readouterr().out


def test_every_program_is_in_the_table():
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert [name for name in PROGRAMS if f"`{name}.{'sh' if name == 'gpu' else 'py'}`" not in page] == []


def test_stages_reject_results_of_other_settings(tmp_path):
    def call(steps: int, ways: list[str]) -> None:
        stages.reject_others(argparse.Namespace(family="t5", order="order1", steps=steps, ways=ways, out=tmp_path))

    call(300, ["stage 0, fp32"])
    call(300, ["stage 2, fp32"])
    with pytest.raises(SystemExit, match="--out: .* has results of .*'steps': 300"):
        call(600, [])


def test_two_orders_that_wrote_nothing_are_not_the_same(tmp_path: Path):
    with pytest.raises(SystemExit, match="no predictions"):
        orders.contents(tmp_path)
