"""One task on two ranks under DeepSpeed, through its launcher and the entry script, against one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ENVIRONMENT, PREFIX, ROOT, arguments, free_port, losses, predictions
from safetensors.torch import load_file


pytestmark = pytest.mark.recipe
EXACT = ["--lora_dropout", "0", "--learning_rate", "1e-4", "--galore_lr", "1e-4", "--max_grad_norm", "0",
         "--lamda_1", "0", "--adam_epsilon", "1e-4", "--logging_steps", "1"]  # fmt: skip


def train(
    folder: Path, adapter_name: str, benchmark: Path, *extra: str, ranks: int = 1, stage: int | None = None
) -> str:
    """One task with global batches of 8 rows, under DeepSpeed where `stage` is given; what it printed."""
    model, modules = PREFIX[adapter_name]
    command = [sys.executable]
    if stage is not None:
        command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        extra = ["--deepspeed", f"configs/ds_configs/stage{stage}.config", *extra]
    rows = ["--per_device_train_batch_size", str(8 // ranks)]
    command += ["src/run_uie_lora.py", *arguments(benchmark, folder, "dbpedia", model, modules, *EXACT, *rows, *extra)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("adapter_name", "stage"), [("t5_adapter", 3), ("llama_adapter", 2)])
def test_two_ranks_under_zero_train_what_one_process_trains(adapter_name, stage, mini_benchmark, tmp_path):
    """The losses agree, the factors agree, and the full-rank weights move as far.

    They need not agree entry by entry: moments stay when a basis is renewed, and the sign of a singular vector, which
    may turn with the last digits of a gradient, then decides the direction of the next steps.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, adapter_name, mini_benchmark)
    assert "engine trainable cores" in train(two, adapter_name, mini_benchmark, ranks=2, stage=stage)
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    assert len(predictions(two)) == len(predictions(one))
    factors = [load_file(folder / adapter_name / "adapter_model.safetensors") for folder in (one, two)]
    assert factors[0].keys() == factors[1].keys()
    for name, factor in factors[0].items():
        assert (factors[1][name] - factor).norm() < 1e-2 * factor.norm(), name
    base = load_file(PREFIX[adapter_name][0] / "model.safetensors")
    weights = [load_file(folder / adapter_name / "full_rank_weights.safetensors") for folder in (one, two)]
    for name, weight in weights[0].items():
        moved = (weight - base[name].float()).norm().item()
        moved_sharded = (weights[1][name] - base[name].float()).norm().item()
        assert moved > 0 and moved_sharded == pytest.approx(moved, rel=0.1), name
    spaces = [load_file(folder / adapter_name / "gradient_space.safetensors") for folder in (one, two)]
    assert spaces[0].keys() == spaces[1].keys()
    for name, S in spaces[0].items():  # from the same rows, whoever has them; the last direction may be a near tie
        held = torch.linalg.svdvals(S.T @ spaces[1][name])
        assert (held > 0.99).sum() >= max(S.shape[1], spaces[1][name].shape[1]) - 1, name


@pytest.mark.parametrize("stage", [2, 3])
def test_in_16_bits_factors_are_saved_from_their_float32_values(stage, mini_benchmark, tmp_path):
    """The second task's, so clear of S as in float32, and the first's, which are frozen, bit for bit."""
    first, second = tmp_path / "first" / "llama_adapter", tmp_path / "second" / "llama_adapter"
    penalty = "0.01" if stage == 2 else "0"  # stage 3 allows none
    sgorp = ["--method", "sgorp", "--bf16", "--lamda_1", penalty, "--max_predict_samples", "4"]
    train(first.parent, "llama_adapter", mini_benchmark, *sgorp, stage=2)
    sgorp += ["--model_name_or_path", str(first), "--task_config_dir", str(ROOT / "configs/order1_configs/amazon")]
    train(second.parent, "llama_adapter", mini_benchmark, *sgorp, stage=stage)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    spaces = load_file(first / "gradient_space.safetensors")
    for name, factor in old.items():
        kept, added = (new[name][:8], new[name][8:]) if ".lora_A." in name else (new[name][:, :8], new[name][:, 8:])
        assert torch.equal(kept, factor) and not torch.equal(factor, factor.bfloat16().float())
        if ".lora_A." in name:
            S = spaces[name.removeprefix("base_model.model.").replace(".lora_A.weight", ".loranew_A")]
            assert added.abs().max() > 0.01 and (added @ S).abs().max() < 1e-6


@pytest.mark.parametrize(("adapter_name", "stage"), [("t5_adapter", 2), ("llama_adapter", 3)])
def test_a_sharded_run_goes_on_from_its_checkpoint(adapter_name, stage, mini_benchmark, tmp_path):
    """On as many ranks bit by bit, with a schedule; in one process, here T5's, with other last digits."""
    saving = ["--save_strategy", "steps", "--save_steps", "6", "--lr_scheduler_type", "linear"]
    saving += ["--gradient_accumulation_steps", "2"]
    from_there = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-6")]

    def run(name: str, ranks: int, *extra: str) -> Path:
        rows = ["--per_device_train_batch_size", str(4 // ranks)]
        train(tmp_path / name, adapter_name, mini_benchmark, *saving, *rows, *extra, ranks=ranks, stage=stage)
        return tmp_path / name

    whole, resumed = run("whole", 2), run("resumed", 2, *from_there)
    assert losses(resumed) == losses(whole)
    assert predictions(resumed) == predictions(whole)
    for file in ("adapter_model", "full_rank_weights", "gradient_space"):
        a, b = (load_file(folder / adapter_name / f"{file}.safetensors") for folder in (whole, resumed))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    if stage == 2:
        assert losses(run("alone", 1, *from_there)) == pytest.approx(losses(whole), rel=2e-4)


@pytest.mark.parametrize(("adapter_name", "how"), [("t5_adapter", "torchrun"), ("llama_adapter", "stage3")])
def test_two_ranks_predict_what_one_predicts(adapter_name, how, mini_benchmark, tmp_path):
    """23 rows, so that the ranks' shares differ: by torchrun, and cut up by ZeRO-3, where all must call alike.

    The model is not trained: it rambles, so that some rows are generated again.
    """
    model, modules = PREFIX[adapter_name]
    launcher, ranks = ("torchrun", "--nproc_per_node") if how == "torchrun" else ("deepspeed", "--num_accelerators")
    two = [launcher, ranks, "2", "--master_port", str(free_port())]
    for name, launcher in (("one", [sys.executable]), (how, two)):
        command = arguments(mini_benchmark, tmp_path / name, "dbpedia", model, modules, "--predict_loss",
                            "--max_predict_samples", "23", "--per_device_eval_batch_size", "4")  # fmt: skip
        command.remove("--do_train")
        if name == "stage3":
            command += ["--deepspeed", "configs/ds_configs/stage3.config"]
        launched = [*launcher, "src/run_uie_lora.py", *command]
        done = subprocess.run(launched, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert predictions(tmp_path / how) == predictions(tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "predict_results.json").read_text()) for name in ("one", how))
    assert one["predict_samples"] == two["predict_samples"] == 23
    assert one["predict_gen_len"] == two["predict_gen_len"]
    assert two["predict_loss"] == pytest.approx(one["predict_loss"], rel=1e-4)
