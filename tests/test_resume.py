"""Nothing lost: what a run that was ended at any point goes on from, and that it ends as one that was not.

Ends within one process are provoked here; a whole order that is killed by SIGKILL runs through the real scripts at the
end (`benchmarks/kill_and_resume.py` is its long form).
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import TrainerCallback

import files
import run_record
import run_uie_lora
from errors import RunStopped, is_disk_full
from finite import FiniteSteps
from helpers import ENVIRONMENT, LLAMA, LLAMA_MODULES, ROOT, T5, T5_MODULES, arguments, edit, predictions
from uie_trainer_lora import UIETrainer

FACTOR_FILES = ("adapter_model", "full_rank_weights", "gradient_space")
SAVING = ["--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "2", "--lamda_3", "0.05"]


@pytest.fixture(scope="module")
def uninterrupted(mini_benchmark, tmp_path_factory) -> Path:
    """Twelve steps of dbpedia with every penalty, in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert run_uie_lora.main(command(mini_benchmark, folder)) == 0
    return folder


def command(benchmark: Path, output: Path, *extra: str) -> list[str]:
    return arguments(benchmark, output, "dbpedia", T5, T5_MODULES, *SAVING, *extra)


class EndAt(TrainerCallback):
    """Raises at the end of a step, before that step's checkpoint."""

    def __init__(self, step: int, error: BaseException):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


@pytest.fixture
def ended(monkeypatch, mini_benchmark, tmp_path):
    """A function that has a run end in training; it returns the exit code."""

    def end(output: Path, step: int, error: BaseException) -> int:
        with monkeypatch.context() as patch:
            build = run_uie_lora.build_trainer

            def build_and_end(*args):
                trainer = build(*args)
                trainer.add_callback(EndAt(step, error))
                return trainer

            patch.setattr(run_uie_lora, "build_trainer", build_and_end)
            return run_uie_lora.main(command(mini_benchmark, output))

    return end


def same_results(one: Path, other: Path) -> bool:
    """Whether the predictions and everything the next task starts from agree bitwise."""
    for name in FACTOR_FILES:
        once, again = (load_file(folder / "t5_adapter" / f"{name}.safetensors") for folder in (one, other))
        if once.keys() != again.keys() or not all(torch.equal(once[key], again[key]) for key in once):
            return False
    return predictions(one) == predictions(other)


# --- going on ---


def test_ctrl_c_is_one_line_and_the_run_goes_on_to_the_same_bits(ended, uninterrupted, mini_benchmark, tmp_path, capfd):
    output = tmp_path / "out"
    assert ended(output, 8, KeyboardInterrupt()) == 130
    said = capfd.readouterr().err
    assert "interrupted; the same command goes on where it stood" in said and "Traceback" not in said
    assert run_uie_lora.main(command(mini_benchmark, output)) == 0
    assert f"going on from {output / 'checkpoint-6'}" in capfd.readouterr().out
    assert same_results(output, uninterrupted)
    record, whole = (json.loads((folder / "run_record.json").read_text()) for folder in (output, uninterrupted))
    assert record == whole and record["configuration"]["seed"] == 42 and record["versions"]["torch"]


DAMAGE = {
    "cut short": lambda folder: os.truncate(folder / "optimizer.pt", 1000),
    "a bit flipped": lambda folder: flip(folder / "trainable.safetensors"),
    "a file gone": lambda folder: (folder / "rng_state.pth").unlink(),
    "never marked": lambda folder: (folder / "whole.json").unlink(),
    "mark cut short": lambda folder: (folder / "whole.json").write_text('{"optimizer.pt": '),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage, ended, uninterrupted, mini_benchmark, tmp_path, capfd
):
    output = tmp_path / "out"
    assert ended(output, 11, KeyboardInterrupt()) == 130
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]
    DAMAGE[damage](output / "checkpoint-9")
    assert run_uie_lora.main(command(mini_benchmark, output)) == 0
    assert f"going on from {output / 'checkpoint-6'}" in capfd.readouterr().out
    assert same_results(output, uninterrupted)


@pytest.mark.parametrize("model, modules", [(T5, T5_MODULES), (LLAMA, LLAMA_MODULES)], ids=["t5", "llama"])
def test_a_trained_task_is_only_evaluated(model, modules, mini_benchmark, tmp_path, monkeypatch, capfd):
    output = tmp_path / "out"
    words = arguments(mini_benchmark, output, "dbpedia", model, modules)
    with monkeypatch.context() as patch:
        patch.setattr(run_uie_lora, "predict", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert run_uie_lora.main(words) == 130
    state = (output / "trainer_state.json").read_bytes()
    whole = tmp_path / "whole"
    assert run_uie_lora.main(arguments(mini_benchmark, whole, "dbpedia", model, modules)) == 0
    monkeypatch.setattr(UIETrainer, "train", None)  # training would fail
    capfd.readouterr()
    assert run_uie_lora.main(words) == 0
    assert "trained before; only what is left is evaluated" in capfd.readouterr().out
    assert predictions(output) == predictions(whole)
    assert (output / "trainer_state.json").read_bytes() == state
    scores = [json.loads((folder / "all_results.json").read_text()) for folder in (output, whole)]
    timed = ("runtime", "per_second", "preparation_time")
    kept = [{key: value for key, value in score.items() if not key.endswith(timed)} for score in scores]
    assert kept[0] == kept[1] and kept[0]["predict_global_step"] == 12


# --- not going on ---


@pytest.fixture
def finished(uninterrupted, tmp_path) -> Path:
    """A copy of a finished run that a test may spoil."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "finished"))


def test_a_changed_data_file_is_named(uninterrupted, mini_benchmark, tmp_path, capfd):
    benchmark = tmp_path / "benchmark"
    shutil.copytree(mini_benchmark / "TC" / "dbpedia", benchmark / "TC" / "dbpedia")
    assert run_uie_lora.main(command(benchmark, uninterrupted)) == 0  # another place, the same content
    edit(benchmark / "TC" / "dbpedia" / "test.json", lambda rows: rows[1:])
    assert run_uie_lora.main(command(benchmark, uninterrupted)) == 2
    assert "holds a run that differs: TC/dbpedia/test.json has changed; as it was" in capfd.readouterr().err


def test_every_part_of_a_record_is_compared(finished):
    record = json.loads((finished / "run_record.json").read_text())
    for section in run_record.COMPARED:
        name = next(iter(record[section]))
        changed = record | {section: record[section] | {name: "other"}}
        assert len(run_record.differences(record, changed)) == 1
        assert name in run_record.differences(changed, record)[0]
    assert any(name == "src/finite.py" for name in record["code"])
    assert "model_name_or_path" not in record["configuration"] and "base/model.safetensors" in record["model"]
    assert run_record.differences(record, record | {"git_revision": "other", "machine": {}}) == []


def test_a_large_file_is_told_by_its_size_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WHOLLY_DIGESTED", 100)
    monkeypatch.setattr(files, "DIGESTED_END", 10)
    contents = [bytes(200), bytes(201), b"a" + bytes(199), bytes(199) + b"z", bytes(100)]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    assert len({files.digest(path) for path in paths}) == len(paths)


def test_results_without_a_record_are_not_touched(finished, mini_benchmark, capfd):
    (finished / "run_record.json").unlink()
    before = sorted(finished.rglob("*"))
    assert run_uie_lora.main(command(mini_benchmark, finished)) == 2
    assert "holds completed.json and no run_record.json" in capfd.readouterr().err
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize("bad", [["--model_name_or_path", "initial_model/none"], ["--lora_modules", ".*nothing.*"],
                                 ["--galore_rank", "4096"], ["--max_source_length", "5"]], ids=lambda bad: bad[0])
def test_bad_input_loses_nothing_even_when_starting_over(bad, finished, mini_benchmark, capfd):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert run_uie_lora.main(command(mini_benchmark, finished, "--overwrite_output_dir", *bad)) == 2
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_starting_over_leaves_nothing_of_the_run_before(finished, mini_benchmark):
    again = command(mini_benchmark, finished, "--overwrite_output_dir", "--max_steps", "2")
    assert run_uie_lora.main(again) == 0
    assert [path.name for path in finished.glob("checkpoint-*")] == ["checkpoint-2"]
    assert json.loads((finished / "trainer_state.json").read_text())["global_step"] == 2
    assert json.loads((finished / "run_record.json").read_text())["configuration"]["max_steps"] == 2


def test_two_runs_in_one_folder_are_refused(mini_benchmark, tmp_path, capfd):
    with FileLock(tmp_path / ".lock"):
        assert run_uie_lora.main(command(mini_benchmark, tmp_path)) == 2
    assert f"another run is writing to {tmp_path}" in capfd.readouterr().err


# --- losses and gradients that are not finite ---


def poisoned(steps: set[int], value: float):
    """UIETrainer.compute_loss whose loss is `value` at the given steps (from 1), and so is every gradient."""
    compute = UIETrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        bad = model.training and self.state.global_step + 1 in steps
        return loss * value if bad else loss

    return compute_loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["gorp", "inclora"])
def test_a_step_that_is_not_finite_changes_nothing(method, value, mini_benchmark, tmp_path, monkeypatch, capfd):
    seen = []

    def watch(self, model, grad_norm=None):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        count = self.state.global_step + 1
        result = original(self, model, grad_norm)
        self.optimizer.step()
        changed = any(not torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
        seen.append((count, changed))
        model.zero_grad()  # the step was taken here
        return result

    original = UIETrainer._get_grad_norm
    monkeypatch.setattr(UIETrainer, "compute_loss", poisoned({3, 4, 7}, value))
    monkeypatch.setattr(UIETrainer, "_get_grad_norm", watch)
    assert run_uie_lora.main(command(mini_benchmark, tmp_path, "--method", method, "--lamda_3", "0")) == 0
    assert [count for count, changed in seen if not changed] == [3, 4, 7]
    assert "[gorp] step 3: loss is" in capfd.readouterr().out
    for path in tmp_path.glob("t5_adapter/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_three_such_steps_in_a_row_end_the_run_with_their_rows(mini_benchmark, tmp_path, monkeypatch, capfd):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(UIETrainer, "compute_loss", poisoned({5, 7, 8, 9}, float("nan")))
        assert run_uie_lora.main(command(mini_benchmark, output)) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "step 9: loss is nan, the 3 steps in a row" in said[0]
    assert said[0].count("dbpedia, train row ") == 8  # the batch's rows
    assert run_uie_lora.main(command(mini_benchmark, output)) == 0  # goes on from checkpoint-6
    assert f"going on from {output / 'checkpoint-6'}" in capfd.readouterr().out


def test_under_deepspeed_a_bad_gradient_is_zero_before_it_is_reduced():
    layer = torch.nn.Linear(2, 2)
    steps = FiniteSteps(2)
    steps.clean_gradients(layer)
    for number, factor in enumerate((1.0, float("nan"), 1.0, float("inf")), start=1):
        layer.zero_grad()
        loss = (layer(torch.ones(1, 2)) * factor).sum()
        loss.backward()
        good = factor == 1.0
        assert bool(layer.weight.grad.any()) is good and layer.weight.grad.isfinite().all()
        steps.saw_micro_batch(torch.tensor(1.0), ["row 1"])
        steps.end_of_step(number, 1.0)
        assert steps.in_a_row == (0 if good else 1)
    layer.zero_grad()
    (layer(torch.ones(1, 2)) * float("nan")).sum().backward()
    steps.saw_micro_batch(torch.tensor(1.0), ["row 2"])
    with pytest.raises(RunStopped, match="step 5: gradient is not finite.*row 2"):
        steps.end_of_step(5, 1.0)


@pytest.mark.recipe
def test_a_rank_whose_loss_is_nan_ends_the_run_under_zero(mini_benchmark, tmp_path):
    """Its gradients enter nothing, on any rank, and at the third step in a row it says why it ends."""
    stage_2 = ["--deepspeed", "configs/ds_configs/stage2.config"]
    words = arguments(mini_benchmark, tmp_path, "dbpedia", T5, T5_MODULES, *stage_2)
    launched = ["deepspeed", "--num_accelerators", "2", "--master_port", "29573", "tests/poisoned_entry.py", *words]
    done = subprocess.run(launched, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert said.count("error: step 6: loss is nan, the 3 steps in a row") == 1 and "not finite after" not in said
    assert said.count("dbpedia, train row ") == 8


# --- full disks ---


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("target, name", [
    (torch, "save"), (safetensors.torch, "save_file"), (run_uie_lora, "write_json"), (run_record, "write_json"),
])
def test_a_write_without_space_is_one_line(
    target, name, uninterrupted, mini_benchmark, tmp_path, monkeypatch, capfd
):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(target, name, no_space)
        assert run_uie_lora.main(command(mini_benchmark, output)) == 1
    said = capfd.readouterr().err
    assert "error: a disk is full" in said and "Traceback" not in said
    assert not list(output.rglob("*.partial"))
    assert run_uie_lora.main(command(mini_benchmark, output)) == 0
    assert same_results(output, uninterrupted)


def test_what_other_libraries_say_of_a_full_disk():
    assert is_disk_full(safetensors.SafetensorError("I/O error: No space left on device (os error 28)"))
    for text in ("PytorchStreamWriter failed writing file data/0: file write failed",
                 "basic_ios::clear: iostream error",
                 "[enforce fail at inline_container.cc:672] . unexpected pos 105792 vs 105680"):
        assert is_disk_full(RuntimeError(text))
    nested = ValueError("outer")
    nested.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert is_disk_full(nested) and not is_disk_full(OSError(errno.EACCES, "Permission denied"))


@pytest.fixture
def small_disk(tmp_path):
    """An empty file system, and a function that sets its size in KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", folder], check=True)
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_is_full_at_every_kind_of_write(small_disk, uninterrupted, mini_benchmark, capfd):
    folder, resize = small_disk
    output = folder / "out"
    statuses, furthest = [], 0
    for size in (12, 24, 200, 440, 600, 800, 1100, 1160, 1400, 1600, 8000):
        resize(size)
        statuses.append(run_uie_lora.main(command(mini_benchmark, output)))
        said = capfd.readouterr().err
        assert "Traceback" not in said and (statuses[-1] == 0 or said.count("error: a disk is full") == 1), said
        whole = [path for path in output.glob("checkpoint-*") if run_record.is_whole(path)]
        reached = max([int(path.name.partition("-")[2]) for path in whole], default=0)
        assert reached >= furthest  # nothing that was whole is lost
        furthest = reached
    assert statuses[-1] == 0 and statuses.count(1) >= 6, statuses
    assert same_results(output, uninterrupted)


# --- killed ---


@pytest.mark.recipe
def test_an_order_that_is_killed_ends_as_one_that_is_not(tmp_path):
    script = [sys.executable, "benchmarks/kill_and_resume.py", "--kills", "3", "--steps", "20", "--seed", "0"]
    done = subprocess.run([*script, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills" in done.stdout and "predictions of all 4 tasks are equal" in done.stdout
