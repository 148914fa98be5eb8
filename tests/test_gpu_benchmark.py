"""`benchmarks/gpu.sh` runs to its end, on a CPU and tiny shapes; its figures mean nothing here."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu
from helpers import ROOT, bash

CONTENDERS = ("gorp", "sgorp", "lora", "gorp, sketch", "galore-torch")


def rows(tmp_path, *sections: str) -> dict[str, dict]:
    pytest.importorskip("galore_torch")
    done = bash("benchmarks/gpu.sh", "--tiny", *sections, OUT=str(tmp_path / "rows.jsonl"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["what"] for row in found] == [line.split(" | ")[0][2:] for line in done.stdout.splitlines()
                                              if line.startswith("| ") and not line.startswith("| what")]  # fmt: skip
    return {row["what"]: row for row in found}


def test_every_contender_steps(tmp_path):
    found = rows(tmp_path, "step")
    for model in ("llama", "t5"):
        assert all(found[f"{model}: {name}, tokens a second"]["value"] > 0 for name in CONTENDERS)
        for name in ("gorp", "sgorp", "gorp, sketch"):
            assert found[f"{model}: {name}, a task's end without saving"]["value"] > 0
        ratio, speed = found[f"{model}: gorp / lora, time"], "tokens a second"
        assert ratio["value"] == pytest.approx(
            found[f"{model}: lora, {speed}"]["value"] / found[f"{model}: gorp, {speed}"]["value"], rel=1e-2)
        assert ratio["target"] == "at most 1.1 x" and ratio["met"] is (ratio["value"] <= 1.1)


@pytest.mark.recipe
def test_the_other_sections(tmp_path):
    found = rows(tmp_path, "zero", "agree", "resume", "svd")
    assert found["llama: a step under ZeRO-2 on one rank / without DeepSpeed"]["value"] > 0
    agree = found["the tiny T5: a loss of the first 5 steps, GPU / CPU - 1"]
    [resume] = [row for what, row in found.items() if "resumed" in what]
    assert found["t5: exact SVDs of all 4 weights (one timed, multiplied)"]["value"] > 0
    assert agree["met"] and resume["met"] and resume["value"] == 0


@pytest.mark.parametrize("words, said", [(["steps", "--tiny"], "SECTION: found steps; allowed: step, zero, "),
                                         ([], "no GPU was found; --tiny runs on a CPU")])
def test_what_it_does_not_run(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main([*words, "--out", str(tmp_path / "rows")])
    assert ended.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.recipe
@pytest.mark.parametrize("name", ["t5-large", "llama-2-7b"])
def test_published_shapes_say_where_time_and_memory_go(name):
    done = subprocess.run([sys.executable, "benchmarks/published_shapes.py", name, "--tiny"], cwd=ROOT, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    seconds = {part: float(took) for part, took, _ in rows}
    assert {"reading the model", "forward and backward", "answering"} <= seconds.keys()
    assert sum(seconds.values()) == pytest.approx(2 * seconds["all"], abs=0.1 * len(rows))
