"""Nothing lost: a run that was ended at any point resumes, and ends as one that was not interrupted.

Ends within one process are provoked here; a whole order that is killed by SIGKILL runs through the real scripts at the
end (`benchmarks/kill_and_resume.py` is its long form).
"""

import contextlib
import errno
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import Seq2SeqTrainer, TrainerCallback

import checkpoints
import files
import full_rank
import run_record
import run_uie_lora
from command_line import parse_arguments
from errors import InputError, RunStopped, entry_point, is_disk_full
from helpers import (
    ENVIRONMENT, HostReads, LLAMA, LLAMA_MODULES, ROOT, T5, T5_MODULES, arguments, edit, free_port, predictions,
)  # fmt: skip
from methods import find_method
from non_finite import NonFiniteGuard
from order_config import write_order
from Proj_torch import ProjAdamW
from task_setup import input_files, load_examples
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


# --- resuming ---


@pytest.mark.parametrize("engine", ["dense", "cores", pytest.param("stage2", marks=pytest.mark.recipe)])
def test_a_checkpoint_holds_no_pickle_and_resumes_to_the_same_bits(engine, mini_benchmark, tmp_path, capfd):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--save_strategy", "steps", "--save_steps", "6", "--lr_scheduler_type", "linear"]
    stage_2 = ["--deepspeed", "configs/ds_configs/stage2.config"]
    flags += stage_2 if engine == "stage2" else ["--galore_engine", engine]

    def run(folder: Path, *extra: str) -> None:
        words = arguments(mini_benchmark, folder, "dbpedia", T5, T5_MODULES, *flags, *extra)
        if engine != "stage2":
            assert run_uie_lora.main(words) == 0
            return
        launcher = ["deepspeed", "--num_accelerators", "1", "--master_port", str(free_port()), "src/run_uie_lora.py"]
        subprocess.run([*launcher, *words], cwd=ROOT, env=ENVIRONMENT, check=True)

    run(whole)
    names = {"training_state.safetensors", "schedule.json", "random_state_0.json", "trainer_state.json"}
    assert {path.name for path in (whole / "checkpoint-6").rglob("*")} == names | {"manifest.json"}
    for path in whole.rglob("*.*"):
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.is_file() and path.suffix != ".lock":
            path.read_text(encoding="utf-8")  # no pickle is UTF-8
    shutil.copytree(whole / "checkpoint-6", cut / "checkpoint-6")
    run(cut, "--resume_from_checkpoint", "True")
    assert "resuming from" in capfd.readouterr().out
    assert same_results(whole, cut)


def test_the_best_step_is_loaded_at_the_end(mini_benchmark, tmp_path):
    step, output = tmp_path / "step", tmp_path / "out"
    shutil.copytree(ROOT / "configs" / "order1_configs" / "dbpedia", step)
    shutil.copy(step / "test_tasks.json", step / "dev_tasks.json")
    words = command(mini_benchmark, output, "--eval_strategy", "steps", "--eval_steps", "3", "--max_eval_samples", "8",
                    "--load_best_model_at_end", "True", "--metric_for_best_model", "loss", "--greater_is_better",
                    "True")  # fmt: skip
    words[words.index("--task_config_dir") + 1] = str(step)
    assert run_uie_lora.main(words) == 0
    best = Path(json.loads((output / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert best.name == "checkpoint-3"  # the highest loss is the first
    saved, adapter = load_file(best / checkpoints.TENSORS), load_file(output / "t5_adapter/adapter_model.safetensors")
    factor = next(name for name in adapter if "lora_A" in name)
    assert torch.equal(saved[factor.replace(".lora_A.", ".loranew_A.default.")], adapter[factor])


def test_random_numbers_resume_where_they_were_saved(tmp_path, capfd):
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), *numpy.random.randn(3), *torch.rand(3).tolist()]

    draw()  # leaves one normal number of Python's and NumPy's in hand, which is part of their state
    checkpoints.write_random_state(tmp_path, 0)
    once = draw()
    checkpoints.load_random_state(tmp_path, 0)
    assert draw() == once
    checkpoints.load_random_state(tmp_path, 1)  # of a rank that was not there
    assert draw() != once


def test_optimizer_state_is_restored_by_name():
    """Moments, bases, steps and counts of a projected and of a plain parameter, one step of which was left out."""

    def built() -> tuple[dict[str, torch.nn.Parameter], ProjAdamW]:
        torch.manual_seed(0)
        named = {name: torch.nn.Parameter(torch.randn(6, 4)) for name in ("projected.weight", "plain.weight")}
        projected = {"rank": 2, "update_proj_gap": 2, "scale": 1.0, "proj_type": "std"}
        groups = [{"params": [named["projected.weight"]], **projected}, {"params": [named["plain.weight"]]}]
        return named, ProjAdamW(groups, lr=0.1)

    def step(named, optimizer, number: int) -> None:
        for name, parameter in named.items():
            left_out = number == 1 and "plain" in name
            parameter.grad = None if left_out else (torch.arange(24.0).reshape(6, 4).sin() + 1) * (number + 1)
        optimizer.step()

    (named, optimizer), (others, other) = built(), built()
    for number in range(3):
        step(named, optimizer, number)
    saved = safetensors.torch.load(safetensors.torch.save(checkpoints.training_state(named, optimizer)))
    checkpoints.load_training_state(others, other, saved)
    assert other.projection_report() == optimizer.projection_report()
    for number in range(3, 6):
        step(named, optimizer, number)
        step(others, other, number)
    assert all(torch.equal(named[name], others[name]) for name in named)
    before = others["plain.weight"].clone()
    for wrong in (saved | {"more.exp_avg": torch.ones(2)}, saved | {"plain.weight": torch.ones(2)},
                  {name: value for name, value in saved.items() if name != "projected.weight"}):  # fmt: skip
        with pytest.raises(InputError, match="more|plain.weight: found|projected.weight: found nothing"):
            checkpoints.load_training_state(others, other, wrong)
    assert torch.equal(before, others["plain.weight"])


def test_the_loss_scale_of_fp16_is_saved_as_numbers(monkeypatch):
    """DeepSpeed's scaler and PyTorch's; only a GPU trains with them."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def deepspeeds(scale: float) -> DynamicLossScaler:
        return DynamicLossScaler(scale, 1000, 1, 1, False)

    def pytorchs(scale: float) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=scale)

    trainer = object.__new__(UIETrainer)
    for make in (deepspeeds, pytorchs):
        saving, loading = make(2.0**20), make(2.0**10)
        monkeypatch.setattr(UIETrainer, "_loss_scaler", lambda self: saving)
        saved = json.loads(json.dumps(trainer._loss_scale()))
        monkeypatch.setattr(UIETrainer, "_loss_scaler", lambda self: loading)
        assert trainer._loss_scale() != saved
        trainer._load_loss_scale(saved)
        assert trainer._loss_scale() == saved and 2.0**20 in saved.values()


OVERRIDDEN = {  # private method of Hugging Face's Trainer: its parameters, and why no public one does
    "_prepare_for_training": (
        "max_steps train_dataloader resume_from_checkpoint",
        "the one place between the engine and the first step; it would read the parent's pickles",
    ),
    "_load_from_checkpoint": ("resume_from_checkpoint model", "it would look for the parent's weights"),
    "_load_rng_state": ("checkpoint", "only the parent's loop knows where the random numbers have to be set"),
    "_load_best_model": ("", "it would look for the parent's weights"),
    "_save_checkpoint": ("model trial", "the parent writes pickles, and removes older checkpoints too early"),
    "_run_epoch": (
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval start_time "
        "resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
        "the parent takes a step before it looks whether the last one is done",
    ),
    "_get_grad_norm": ("model grad_norm", "on_pre_optimizer_step is not told the norm"),
}


def test_the_overridden_private_methods_are_those_that_the_trainer_has():
    """Fails where another version of Transformers has renamed one, or gives it other parameters."""
    parent = Seq2SeqTrainer.__mro__
    private = {name for name in vars(UIETrainer) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if any(name in vars(kind) for kind in parent)} == OVERRIDDEN.keys()
    for name, (parameters, _) in OVERRIDDEN.items():
        assert list(inspect.signature(getattr(Seq2SeqTrainer, name)).parameters) == ["self", *parameters.split()], name


def test_ctrl_c_is_one_line_and_the_run_goes_on_to_the_same_bits(ended, uninterrupted, mini_benchmark, tmp_path, capfd):
    output = tmp_path / "out"
    assert ended(output, 8, KeyboardInterrupt()) == 130
    said = capfd.readouterr().err
    assert "interrupted; the same command resumes" in said and "Traceback" not in said
    assert run_uie_lora.main(command(mini_benchmark, output)) == 0
    assert f"resuming from {output / 'checkpoint-6'}" in capfd.readouterr().out
    assert same_results(output, uninterrupted)
    record, whole = (json.loads((folder / "run_record.json").read_text()) for folder in (output, uninterrupted))
    assert record == whole and record["configuration"]["seed"] == 42 and record["versions"]["torch"]


DAMAGE = {
    "cut short": lambda folder: os.truncate(folder / checkpoints.TENSORS, 1000),
    "a bit flipped": lambda folder: flip(folder / checkpoints.TENSORS),
    "a file gone": lambda folder: (folder / "random_state_0.json").unlink(),
    "never marked": lambda folder: (folder / checkpoints.MANIFEST).unlink(),
    "mark cut short": lambda folder: (folder / checkpoints.MANIFEST).write_text('{"schedule.json": '),
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
    assert f"resuming from {output / 'checkpoint-6'}" in capfd.readouterr().out
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
    assert "trained before; only the evaluation runs" in capfd.readouterr().out
    assert predictions(output) == predictions(whole)
    assert (output / "trainer_state.json").read_bytes() == state
    scores = [json.loads((folder / "all_results.json").read_text()) for folder in (output, whole)]
    timed = ("runtime", "per_second", "preparation_time")
    kept = [{key: value for key, value in score.items() if not key.endswith(timed)} for score in scores]
    assert kept[0] == kept[1] and kept[0]["predict_global_step"] == 12


def test_an_evaluation_alone_has_the_precision_of_the_one_after_training(mini_benchmark, tmp_path):
    """Under DeepSpeed in bf16, which rounds neither the LoRA nor LLaMA's rotary frequencies."""
    flags = ["--deepspeed", "configs/ds_configs/stage2.config", "--bf16", "True", "--max_steps", "4", "--predict_loss",
             "True", "--max_predict_samples", "4"]
    words = arguments(mini_benchmark, tmp_path, "dbpedia", LLAMA, LLAMA_MODULES, *flags)
    found = []
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}  # as a launcher sets them
    for said in ("gorp trains", "trained before; only the evaluation runs"):
        done = subprocess.run([sys.executable, "src/run_uie_lora.py", *words], cwd=ROOT, capture_output=True, text=True,
                              env=ENVIRONMENT | rank | {"MASTER_PORT": str(free_port())})
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
        found.append(json.loads((tmp_path / "predict_results.json").read_text())["predict_loss"])
        (tmp_path / "completed.json").unlink()
    assert found[0] == found[1]


def test_an_evaluation_without_memory_goes_on_with_smaller_batches(mini_benchmark, tmp_path, monkeypatch, capfd):
    words = arguments(mini_benchmark, tmp_path, "dbpedia", T5, T5_MODULES)

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(run_uie_lora, "predict", no_memory)
        assert run_uie_lora.main(words) == 1
    said = capfd.readouterr().err
    assert "error: CUDA out of memory. Tried to allocate 2.00 GiB. Training takes less with" in said
    assert "Traceback" not in said
    monkeypatch.setattr(UIETrainer, "train", None)  # training would fail
    assert run_uie_lora.main([*words, "--per_device_eval_batch_size", "4", "--eval_batch_tokens", "900"]) == 0


def test_a_smaller_micro_batch_with_as_many_examples_a_step_goes_on(mini_benchmark, tmp_path, capfd):
    words = arguments(mini_benchmark, tmp_path, "dbpedia", T5, T5_MODULES, "--num_beams", "2")
    assert run_uie_lora.main(words) == 0
    shown = json.loads((tmp_path / "run_record.json").read_text())["report"]["options"]
    assert shown["num_beams"] == 2 and shown["max_train_samples"] is None and "repetition_penalty" not in shown
    assert run_uie_lora.main([*words, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]) == 0
    assert "nothing to do" in capfd.readouterr().out
    assert run_uie_lora.main([*words, "--per_device_train_batch_size", "4"]) == 2
    assert "per_device_train_batch_size x gradient_accumulation_steps was 8, is 4" in capfd.readouterr().err


def test_an_output_folder_of_one_name(mini_benchmark, tmp_path, monkeypatch):
    words = arguments(mini_benchmark, tmp_path, "dbpedia", T5, T5_MODULES)
    words[words.index("--output_dir") + 1] = "out"
    monkeypatch.chdir(tmp_path)
    assert run_uie_lora.main(words) == 0
    assert (tmp_path / "out" / "completed.json").exists()


# --- not resuming ---


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
    assert "holds a run that differs: TC/dbpedia/test.json has changed; undo" in capfd.readouterr().err


@pytest.mark.parametrize("method, task, changed, differs", [
    ("multitask", "dbpedia", "SC/amazon/train.json", True),
    ("replay", "amazon", "TC/dbpedia/train.json", True),
    ("replay", "dbpedia", "SC/amazon/train.json", False),
    ("seqlora", "dbpedia", "SC/amazon/train.json", False),
])  # fmt: skip
def test_the_data_of_other_tasks_count_where_a_method_reads_them(
    method, task, changed, differs, mini_benchmark, tmp_path
):
    benchmark = Path(shutil.copytree(mini_benchmark, tmp_path / "benchmark"))
    flags = arguments(benchmark, tmp_path / "out", task, T5, T5_MODULES, "--method", method)
    _, data_args, method_args, training_args = parse_arguments([str(flag) for flag in flags])

    def digests() -> dict[str, str]:
        found = input_files(data_args, training_args, find_method(method)(method_args))
        return {name: files.digest(path) for name, path in found.items()}

    before = digests()
    edit(benchmark / changed, lambda rows: rows[1:])
    assert (digests() != before) is differs


def test_a_longer_order_is_another_one_for_a_method_that_counts_its_tasks(mini_benchmark, tmp_path, capfd):
    """InfLoRA's energy depends on the number of tasks; other methods' finished tasks stay when one is added."""
    for method, status in (("inflora", 2), ("inclora", 0)):
        order = tmp_path / method / "mine_configs"
        for tasks in ([("TC", "dbpedia")], [("TC", "dbpedia"), ("SC", "amazon")]):
            shutil.rmtree(order, ignore_errors=True)
            write_order(order, tasks)
            words = command(mini_benchmark, tmp_path / method / "out", "--method", method)
            words[words.index("--task_config_dir") + 1] = str(order / "dbpedia")
            found = run_uie_lora.main(words)
        assert found == status
        said = capfd.readouterr()
        assert ("differs: place in the order has changed" in said.err) is bool(status)


def test_a_method_reads_what_it_declares(mini_benchmark, tmp_path):
    flags = arguments(mini_benchmark, tmp_path / "out", "amazon", T5, T5_MODULES, "--method", "replay")
    _, data_args, method_args, training_args = parse_arguments([str(flag) for flag in flags])
    method = find_method("replay")(method_args)
    method.reads = "no"
    with pytest.raises(AssertionError, match="Method.reads is 'no'"):
        load_examples(data_args, training_args, method)


def test_every_part_of_a_record_is_compared(finished):
    record = json.loads((finished / "run_record.json").read_text())
    for section in run_record.COMPARED:
        name = next(iter(record[section]))
        changed = record | {section: record[section] | {name: "other"}}
        assert len(run_record.differences(record, changed)) == 1
        assert name in run_record.differences(changed, record)[0]
    assert any(name == "src/non_finite.py" for name in record["code"])
    assert "model_name_or_path" not in record["configuration"] and "base/model.safetensors" in record["model"]
    assert run_record.differences(record, record | {"git_revision": "other", "machine": {}}) == []


def test_what_decides_a_result_is_compared(finished, mini_benchmark, tmp_path):
    record = json.loads((finished / "run_record.json").read_text())
    decisive = """ranks seed data_seed learning_rate weight_decay max_grad_norm max_steps num_train_epochs warmup_steps
        lr_scheduler_type bf16 dataloader_drop_last max_source_length max_target_length max_train_samples num_beams
        repetition_penalty add_task_name add_dataset_name instruction_strategy num_examples predict_tasks lora_dim
        lora_alpha lora_dropout lamda_1 lamda_2 lamda_3 galore_lr galore_rank galore_scale galore_update_proj_gap
        galore_proj_type galore_svd protect protect_side space_energy space_from"""
    assert set(decisive.split()) <= record["configuration"].keys()
    assert set(record["data"]) == {"instructions", "train_tasks.json", "dev_tasks.json", "test_tasks.json",
                                   *(f"TC/dbpedia/{name}.json" for name in ("train", "test", "labels"))}
    of_next = run_record.model_files(str(finished / "t5_adapter"))  # what a next task starts from
    assert {f"adapter/{name}.safetensors" for name in FACTOR_FILES} | {"base/model.safetensors"} <= of_next.keys()
    model_args, data_args, method_args, training_args = parse_arguments(command(mini_benchmark, tmp_path / "out"))
    method, made = find_method("gorp")(method_args), []
    for stage in (1, 2):
        training_args.deepspeed = str(ROOT / f"configs/ds_configs/stage{stage}.config")
        made.append(run_record.make_record({}, model_args, data_args, method, training_args))
    assert run_record.differences(*made) == ["DeepSpeed config has changed"]


def test_what_decides_a_result_beside_another_flag_is_compared(mini_benchmark, tmp_path):
    def recorded(*flags: str) -> dict:
        groups = parse_arguments([*command(mini_benchmark, tmp_path / "out"), *flags])
        return run_record.make_record({}, *groups[:2], find_method("gorp")(groups[2]), groups[3])

    def change(shared: list[str], first: list[str], second: list[str]) -> list[str]:
        return run_record.differences(recorded(*shared, *first), recorded(*shared, *second))

    micro = [["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(8 // size)]
             for size in (2, 4)]  # fmt: skip
    assert change([], *micro) == []
    assert change(["--dataloader_drop_last"], *micro) == ["--per_device_train_batch_size was 2, is 4"]
    saved = [["--save_steps", "4"], ["--save_steps", "8"]]
    assert change(["--save_strategy", "steps"], *saved) == []
    best = ["--load_best_model_at_end", "--save_strategy", "steps", "--eval_strategy", "steps", "--eval_steps", "4"]
    assert change(best, *saved) == ["--save_steps was 4, is 8"]
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(T5, tokenizer)
    before = recorded("--tokenizer_name", str(tokenizer))
    (tokenizer / "tokenizer_config.json").write_text("{}")
    after = recorded("--tokenizer_name", str(tokenizer))
    assert run_record.differences(before, after) == ["tokenizer_name/tokenizer_config.json has changed"]


@pytest.mark.parametrize("recorded", [True, False])
def test_starting_over_removes_all_that_a_resume_would_take_for_its_own(recorded, tmp_path):
    parts = [f"{part}_results.json" for part in ("zero_shot", "train", "eval", "predict", "unseen", "all")]
    for name in ("completed.json", *parts, "predict_eval_predictions.jsonl", "trainer_state.json",
                 "t5_adapter/adapter_config.json", "llama_adapter/adapter_config.json", "checkpoint-3/schedule.json",
                 *["run_record.json"] * recorded):
        files.write_json(tmp_path / name, {})
    checkpoints.write_manifest(tmp_path / "checkpoint-3")
    run_record.begin(tmp_path, {}, run_record.Progress.NEW, keep_checkpoints=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run_record.json"]


def test_the_latest_checkpoint_has_the_most_steps(tmp_path):
    for step in (900, 1000):
        files.write_json(tmp_path / f"checkpoint-{step}" / "schedule.json", {})
        checkpoints.write_manifest(tmp_path / f"checkpoint-{step}")
    assert checkpoints.latest_complete(tmp_path).name == "checkpoint-1000"


def test_the_score_before_training_stays_where_only_the_evaluation_runs(mini_benchmark, tmp_path, monkeypatch):
    words = arguments(mini_benchmark, tmp_path, "dbpedia", T5, T5_MODULES, "--zero_shot", "True",
                      "--max_predict_samples", "4")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(run_uie_lora, "predict", no_space)
        assert run_uie_lora.main(words) == 1
    before = (tmp_path / "zero_shot_results.json").read_bytes()
    assert run_uie_lora.main(words) == 0
    assert (tmp_path / "zero_shot_results.json").read_bytes() == before


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A copy of src/ that a test may edit; its record is made from it."""
    copy = Path(shutil.copytree(run_record.SOURCE, tmp_path / "project" / "src"))
    monkeypatch.setattr(run_record, "SOURCE", copy)
    return copy


def test_comments_docstrings_and_other_methods_change_no_record(source):
    digests = run_record.code_digests.__wrapped__  # not cached
    before = digests("gorp")
    methods = source / "methods"
    subspace = (source / "subspace.py").read_text()
    (source / "subspace.py").write_text(f'"""Another docstring."""\n# And a comment.\n{subspace}')
    (methods / "olora.py").write_text("from methods import nowhere\n")
    (methods / "new.py").write_text("from methods.seqlora import Seqlora\n\n\nclass New(Seqlora):\n    pass\n")
    (source / "check.py").unlink()
    assert digests("gorp") == before
    (source / "subspace.py").write_text(f"{subspace}CHANGED = 1\n")
    changes = run_record.differences({"code": before}, {"code": digests("gorp")})
    assert changes == ["src/subspace.py has changed"]
    new = digests("new")  # of a method, what it is built on counts
    assert {"src/methods/new.py", "src/methods/seqlora.py", "src/methods/base.py"} <= new.keys()
    assert not {"src/methods/olora.py", "src/report/page.py", "src/plan_memory.py", "src/export.py"} & new.keys()


@pytest.mark.parametrize("method", ["gorp", pytest.param("nlora", marks=pytest.mark.recipe)])
def test_every_module_that_a_run_imports_counts(method):
    lines = f"""import sys, run_uie_lora, methods
methods.find_method({method!r})
for module in list(sys.modules.values()):
    print(getattr(module, "__file__", None))"""
    command = [sys.executable, "-c", lines]
    done = subprocess.run(command, env=ENVIRONMENT | {"PYTHONPATH": "src"}, cwd=ROOT, capture_output=True, text=True)
    paths = [Path(line) for line in done.stdout.splitlines()]
    loaded = {f"src/{path.relative_to(ROOT / 'src')}" for path in paths if path.is_relative_to(ROOT / "src")}
    assert loaded and loaded <= run_record.code_digests(method).keys()


def test_a_revision_is_that_of_the_projects_own_repository(source, tmp_path, monkeypatch):
    def git(*words: str) -> None:
        own = ["-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(["git", "-C", str(source.parent), *own], check=True, capture_output=True)

    revision = run_record._git_revision.__wrapped__  # not cached
    git("init")
    git("commit", "--allow-empty", "-m", "of another project, into which src/ was unpacked")
    assert revision() is None
    git("add", "src/run_record.py")
    git("commit", "-m", "src/ as a part of another project")
    assert revision() is None
    shutil.copytree(ROOT / "scripts", source.parent / "scripts")
    git("add", "scripts/lib.sh")
    git("commit", "-m", "ours")
    own = revision()
    assert len(own) == 40
    subprocess.run(["git", "init", tmp_path / "other"], check=True, capture_output=True)
    for variable, value in (("GIT_DIR", tmp_path / "other" / ".git"), ("GIT_WORK_TREE", tmp_path / "other")):
        monkeypatch.setenv(variable, str(value))  # as in a hook of another repository
        assert revision() == own
        monkeypatch.delenv(variable)
    git("mv", "src", "vendor")
    git("commit", "-m", "elsewhere in another project")
    run_record.SOURCE = source.with_name("vendor")  # the fixture puts it back
    assert revision() is None


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
    assert "holds completed.json but no run_record.json" in capfd.readouterr().err
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize("bad", [["--model_name_or_path", "initial_model/none"], ["--lora_modules", ".*nothing.*"],
                                 ["--galore_rank", "4096"], ["--max_source_length", "5"]], ids=lambda bad: bad[0])
def test_bad_input_loses_nothing_even_when_starting_over(bad, finished, mini_benchmark, capfd):
    def files_now() -> dict[Path, int]:
        files = (path for path in finished.rglob("*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in files if path.name != ".lock"}  # which opening may change

    before = files_now()
    assert run_uie_lora.main(command(mini_benchmark, finished, "--overwrite_output_dir", *bad)) == 2
    assert files_now() == before


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


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_a_lock_that_cannot_be_written(error, mini_benchmark, tmp_path, monkeypatch, capfd):
    def acquire(lock):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert run_uie_lora.main(command(mini_benchmark, tmp_path)) == 2
    assert f".lock: cannot be locked ({error.strerror})" in capfd.readouterr().err


# --- losses and gradients that are not finite ---


def poisoned(steps: set[int], value: float):
    """UIETrainer.answer_loss whose loss is `value` at the given steps (from 1), and so is every gradient."""
    compute = UIETrainer.answer_loss

    def answer_loss(self, model, *args):
        loss, outputs = compute(self, model, *args)
        bad = model.training and self.state.global_step + 1 in steps
        return (loss * value if bad else loss), outputs

    return answer_loss


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
    monkeypatch.setattr(UIETrainer, "answer_loss", poisoned({3, 4, 7}, value))
    monkeypatch.setattr(UIETrainer, "_get_grad_norm", watch)
    assert run_uie_lora.main(command(mini_benchmark, tmp_path, "--method", method, "--lamda_3", "0")) == 0
    assert [count for count, changed in seen if not changed] == [3, 4, 7]
    assert "[gorp] step 3: loss is" in capfd.readouterr().out
    for path in tmp_path.glob("t5_adapter/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_three_such_steps_in_a_row_end_the_run_with_their_rows(mini_benchmark, tmp_path, monkeypatch, capfd):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(UIETrainer, "answer_loss", poisoned({5, 7, 8, 9}, float("nan")))
        assert run_uie_lora.main(command(mini_benchmark, output)) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "step 9: loss is nan, the last of 3 such steps in a row" in said[0]
    assert said[0].count("dbpedia, train example ") == 8  # the batch's
    assert run_uie_lora.main(command(mini_benchmark, output)) == 0  # resumes from checkpoint-6
    assert f"resuming from {output / 'checkpoint-6'}" in capfd.readouterr().out


def test_a_gradient_that_is_not_finite_leaves_parameters_moments_and_counts_as_they_are():
    """As under DeepSpeed, where the gradient is checked in the backward pass, and its norm is not noted."""
    layer = torch.nn.Linear(2, 2)
    optimizer, guard = torch.optim.AdamW(layer.parameters()), NonFiniteGuard(2)
    guard.watch(optimizer, layer.parameters())
    states = []
    for number, factor in enumerate((1.0, float("nan"), 1.0, float("inf"), float("nan")), start=1):
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 2)).sum()
        guard.note_micro_batch(number, loss, [f"row {number}"])
        (loss * factor).backward()
        with HostReads() as reads:
            if number == 5:
                with pytest.raises(RunStopped, match="step 5: gradient is not finite.*row 5"):
                    optimizer.step()
            else:
                guard.skips_step()
        assert reads.count == 1 or factor != 1.0
        if number < 5:
            optimizer.step()
        state = [*layer.parameters(), *(value for each in optimizer.state.values() for value in each.values())]
        states.append([value.detach().clone() for value in state])
        assert guard.skips_step() is (factor != 1.0)
    for before, after, same in zip(states, states[1:], (True, False, True, True)):
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)) is same


def test_a_gradient_that_alone_is_not_finite_ends_the_run_at_the_limit(mini_benchmark, tmp_path, monkeypatch, capfd):
    compute = UIETrainer.answer_loss

    def answer_loss(self, model, *args):
        loss, outputs = compute(self, model, *args)
        bad = model.training and self.state.global_step == 2
        return (loss + (loss * 0).sqrt() if bad else loss), outputs  # as large; the root's derivative at 0 is infinite

    monkeypatch.setattr(UIETrainer, "answer_loss", answer_loss)
    words = arguments(mini_benchmark, tmp_path, "dbpedia", T5, T5_MODULES, "--method", "inclora", "--max_steps", "4",
                      "--max_predict_samples", "1", "--max_non_finite_steps", "1")  # fmt: skip
    assert run_uie_lora.main(words) == 1
    assert "step 3: gradient is not finite, the last of 1 such steps in a row" in capfd.readouterr().err


@pytest.mark.parametrize("worst, said", [
    (2.0, "step 1: loss is not finite, the last of 1 such steps in a row (--max_non_finite_steps); found on another"),
    (1.0, "step 1: gradient is not finite, the last of 1 such steps in a row (--max_non_finite_steps); found on"),
])
def test_what_another_rank_has_lost_is_named_as_such(worst, said, monkeypatch):
    """Even where the sum over ranks has made this rank's gradients bad."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda found, operation: found.fill_(worst))
    guard = NonFiniteGuard(1)
    guard.note_micro_batch(1, torch.tensor(1.0), ["row 1"])
    guard.note_gradient_norm(float("nan") if worst == 2 else 1.0)
    with pytest.raises(RunStopped) as stopped:
        guard.skips_step()
    assert str(stopped.value).startswith(said) and "row 1" not in str(stopped.value)


def test_gradients_of_passes_after_training_are_neither_watched_nor_kept():
    """EWC takes one of each example, which would add up."""
    layer = torch.nn.Linear(2, 2)
    optimizer, guard = torch.optim.AdamW(layer.parameters()), NonFiniteGuard(2)
    guard.watch(optimizer, layer.parameters())
    loss = layer(torch.ones(1, 2)).sum()
    guard.note_micro_batch(1, loss, ["row"])
    loss.backward()
    optimizer.step()
    kept = len(guard._gradients_bad)
    for _ in range(3):
        torch.autograd.grad(layer(torch.ones(1, 2)).sum(), list(layer.parameters()))
    assert len(guard._gradients_bad) == kept == 2


@pytest.mark.recipe
def test_a_rank_whose_loss_is_nan_ends_the_run_under_zero(mini_benchmark, tmp_path):
    """No rank's factors change in such a step, and at the third in a row it says why it ends."""
    stage_2 = ["--deepspeed", "configs/ds_configs/stage2.config"]
    words = arguments(mini_benchmark, tmp_path, "dbpedia", T5, T5_MODULES, *stage_2)
    launched = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "tests/poisoned_entry.py",
                *words]  # fmt: skip
    done = subprocess.run(launched, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert said.count("error: step 6: loss is nan, the last of 3 such steps in a row") == 1
    assert "RuntimeError" not in said
    assert said.count("dbpedia, train example ") == 8


# --- full disks ---


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("target, name", [
    (checkpoints, "write_json"), (safetensors.torch, "save_file"), (run_uie_lora, "write_json"),
    (run_record, "write_json"),
])  # fmt: skip
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


@pytest.mark.parametrize("error, status, line", [
    (InputError("--flag: bad"), 2, "error: --flag: bad\n"),
    (OSError(errno.ENOSPC, "No space left on device"), 1,
     "error: a disk is full ([Errno 28] No space left on device)\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])  # fmt: skip
def test_a_command_that_trains_nothing_ends_with_one_line_too(error, status, line, capsys):
    @entry_point
    def main():
        raise error

    assert main() == status
    assert capsys.readouterr().err == line


def test_what_other_libraries_say_of_a_full_disk():
    assert is_disk_full(safetensors.SafetensorError("I/O error: No space left on device (os error 28)"))
    nested = ValueError("outer")
    nested.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert is_disk_full(nested) and not is_disk_full(OSError(errno.EACCES, "Permission denied"))


def test_full_rank_weights_are_written_in_rows_whatever_their_strides(tmp_path):
    W = torch.arange(12.0).reshape(3, 4).T
    full_rank.save_weights({"layer": W}, tmp_path)
    assert torch.equal(load_file(tmp_path / full_rank.FILE_NAME)["layer.weight"], W)


def test_full_rank_weights_on_a_full_disk(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def full(path):
        yield Path("/dev/full")

    monkeypatch.setattr(full_rank, "atomic_file", full)
    with pytest.raises(OSError) as raised:
        full_rank.save_weights({"layer": torch.ones(300, 300)}, tmp_path)
    assert is_disk_full(raised.value)


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
        whole = [path for path in output.glob("checkpoint-*") if checkpoints.is_complete(path)]
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
