"""examples/: a method stands on its hooks alone, in a plain loop and under Hugging Face's stock Trainer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

import run_uie_lora
from errors import InputError
from examples import loop, own_trainer
from helpers import ROOT
from methods import find_method, make_method
from methods.base import LoraMethod, Method

EPOCHS, MOST = 2, 28  # three batches of 8 and one of 4 in an epoch
T5_LORA = ".*SelfAttention.(q|v).*"


def entry_command(benchmark: Path, output: Path, model: Path, task: str, method: str) -> list[str]:
    """What the entry takes to train as examples/loop.py does."""
    options = [part for name, value in loop.OPTIONS.items() for part in (f"--{name}", str(value))]
    return [
        "--model_name_or_path", str(model), "--data_dir", str(benchmark), "--output_dir", str(output),
        "--task_config_dir", str(ROOT / "configs" / "order1_configs" / Path(task).name),
        "--instruction_file", str(ROOT / "configs" / "instruction_config.json"),
        "--do_train", "--method", method, "--seed", str(loop.SEED), "--learning_rate", str(loop.LEARNING_RATE),
        "--num_train_epochs", str(EPOCHS), "--max_train_samples", str(MOST),
        "--per_device_train_batch_size", str(loop.BATCH), "--lr_scheduler_type", "constant",
        "--report_to", "none", "--use_cpu", "--save_strategy", "no", *options,
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["sgorp", "olora", "slao", "magmax", "ewc"])
def test_the_plain_loop_ends_both_tasks_with_the_weights_of_the_entry(method, mini_benchmark, tmp_path, capsys):
    loop.main(method, mini_benchmark, tmp_path / "loop", EPOCHS, MOST)
    printed = capsys.readouterr().out
    assert all(f"{task}: loss" in printed for task in loop.TASKS)
    model = loop.BASE
    for task in loop.TASKS:
        output = tmp_path / Path(task).name
        assert run_uie_lora.main(entry_command(mini_benchmark, output, model, task, method)) == 0
        model = output / "t5_adapter"
        names = {path.name for path in model.glob("*.safetensors")}
        assert names == {path.name for path in (tmp_path / "loop" / method / task).glob("*.safetensors")}
        assert ("full_rank_weights.safetensors" in names) == (method in ("sgorp", "magmax"))
        for name in names:
            theirs, ours = load_file(model / name), load_file(tmp_path / "loop" / method / task / name)
            assert theirs.keys() == ours.keys() and theirs
            for key, value in theirs.items():
                assert value.shape == ours[key].shape, key
                assert (value - ours[key]).abs().max() < 1e-6, key


def test_the_plain_loop_rejects_a_method_that_needs_the_order(mini_benchmark, tmp_path):
    with pytest.raises(AssertionError, match="replay reads other tasks' files"):
        loop.main("replay", mini_benchmark, tmp_path, 1, 8)


@pytest.mark.parametrize("method", ["sgorp", "olora", "slao", "magmax", "ewc", "inflora"])
def test_own_rows_train_under_the_stock_trainer(method, tmp_path, capsys):
    own_trainer.main(method, tmp_path, epochs=2)
    assert f"{method} after edible: loss" in capsys.readouterr().out
    first, second = (load_file(tmp_path / method / task / "adapter_model.safetensors") for task in own_trainer.TASKS)
    assert first.keys() == second.keys() and first
    if method in ("slao", "magmax", "ewc"):  # one LoRA for both tasks
        assert all(factor.shape == second[name].shape for name, factor in first.items())
        return
    for name, factor in first.items():  # the first task's LoRA is frozen, the second's beside it
        dim = 0 if "lora_A" in name else 1
        old, new = second[name].split([factor.shape[dim]] * 2, dim)
        assert (old == factor).all() and new.abs().max() > 0


def test_the_examples_are_short():
    assert len(Path(loop.__file__).read_text().splitlines()) <= 80
    assert len(Path(own_trainer.__file__).read_text().splitlines()) <= 96


@pytest.mark.parametrize("given", ["encoder.*", ["encoder.*"]])
def test_options_are_made_without_a_command_line(given):
    options = find_method("sgorp").Arguments(method="sgorp", lora_modules=T5_LORA, optim_target_modules=given)
    assert options.optim_target_modules == ["encoder.*"]


def test_a_made_method_ignores_other_methods_options_and_rejects_unknown_ones():
    method = make_method("olora", lora_modules=T5_LORA, galore_rank=4, optim_target_modules="decoder.*")
    assert method.ignored() == ["galore_rank", "optim_target_modules"] and method.full_name == "olora"
    with pytest.raises(TypeError, match="galore_rang"):
        make_method("olora", lora_modules=T5_LORA, galore_rang=4)
    with pytest.raises(InputError, match="lora_modules"):
        make_method("sgorp")


@pytest.mark.parametrize("name, options, fault", [
    ("gorp", {"preset": "relaesed"}, "--preset: found relaesed; allowed: released"),
    ("olora", {"preset": "released"}, "--preset: found released; allowed: none with"),
    ("gorp", {"preset": "released", "lamda_1": 0.5}, "--lamda_1: found 0.5; allowed: 0.0 with --preset released"),
    ("gorp", {"protect": "gpfirst"}, "--protect: found gpfirst; allowed: gp_first, gp_second, none"),
    ("nlora", {"nlora_form": "prodct"}, "--nlora_form: found prodct; allowed: "),
    ("magmax", {"magmax_merge": "TIES"}, "--magmax_merge: found TIES; allowed: "),
    ("seqlora", {"lora_optimizer": "sgd"}, "--lora_optimizer: found sgd; allowed: adamw, muon"),
    ("sgorp", {"galore_scale": 0}, "--galore_scale: found 0; allowed: "),
])
def test_a_made_method_rejects_a_value_that_its_flag_does_not_take(name, options, fault):
    with pytest.raises(InputError, match=fault):
        make_method(name, lora_modules=T5_LORA, **options)


@pytest.mark.parametrize("name, options", [
    ("sgorp", {"galore_engine": "dense"}), ("gorp", {"protect": "gp_second"}), ("galore", {}), ("osf", {}),
    ("magmax", {}), ("inclora", {"merge_old": True}),
])  # fmt: skip
def test_16_bit_weights_that_would_lose_small_changes_are_rejected(name, options):
    model = AutoModelForSeq2SeqLM.from_pretrained(loop.BASE, dtype="bfloat16")
    method = make_method(name, lora_modules=T5_LORA, optim_target_modules=".*EncDecAttention.q", **options)
    with pytest.raises(InputError, match="changes and is in torch.bfloat16; allowed: float32"):
        method.prepare(model, None, decoder_only=False)


def test_cores_train_16_bit_weights_without_being_asked():
    model = AutoModelForSeq2SeqLM.from_pretrained(loop.BASE, dtype="bfloat16")
    method = make_method("sgorp", lora_modules="auto", optim_target_modules="auto")
    method.prepare(model, None, decoder_only=False)
    assert "cores" in method.engine.name and method.options.lora_modules == T5_LORA


def test_a_made_method_has_what_its_preset_fixes():
    options = make_method("gorp", lora_modules=T5_LORA, preset="released").options
    assert (options.protect, options.lamda_1, options.galore_svd) == ("none", 0.0, "exact")


def test_cores_do_not_take_the_space_from_a_moment():
    method = make_method("gorp", lora_modules=T5_LORA, optim_target_modules=".*EncDecAttention.q",
                         protect="gp_second", galore_engine="cores")  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_pretrained(loop.BASE)
    with pytest.raises(InputError, match="--protect: found gp_second with cores"):
        method.prepare(model, None, decoder_only=False)


@pytest.mark.parametrize("name, is_read", [("seqlora", False), ("magmax", False), ("inclora", True), ("gorp", True)])
def test_merging_old_loras_is_ignored_where_there_are_none(name, is_read):
    method = make_method(name, lora_modules=T5_LORA, merge_old=True)
    assert ("merge_old" in method.ignored()) is not is_read


def test_a_method_from_scratch_does_not_train_under_deepspeed_unless_it_says_so():
    assert (Method.zero_stage, LoraMethod.zero_stage) == (None, 3)


def test_installing_adds_no_module(tmp_path):
    """The wheel is built from a copy, as building writes beside the sources."""
    shutil.copytree(ROOT / "src", tmp_path / "copy" / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples", tmp_path / "copy" / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / "copy")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tmp_path / "copy", check=True, env=os.environ)
    [wheel] = tmp_path.glob("*.whl")
    with ZipFile(wheel) as files:
        installed = [name for name in files.namelist() if ".dist-info/" not in name]
        [top] = [files.read(name).split() for name in files.namelist() if name.endswith("top_level.txt")] or [[]]
    assert installed == [] and top == []
