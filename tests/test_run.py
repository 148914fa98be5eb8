"""The entry script on the embedded models: what a task writes, what the next one finds, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

import run_uie_lora
from conftest import ROOT

T5 = ROOT / "initial_model" / "tiny-t5"
LLAMA = ROOT / "initial_model" / "tiny-llama"
T5_MODULES = [
    "--lora_modules", ".*SelfAttention.(q|v).*",
    "--optim_target_modules", ".*EncDecAttention.(q|v).*",
    "--proj_lora_modules", ".*SelfAttention.(q|v).loranew_A.*",
]
LLAMA_MODULES = [
    "--lora_modules", ".*self_attn.(q_proj|v_proj).*",
    "--optim_target_modules", ".*mlp.gate_proj.*",
    "--proj_lora_modules", ".*self_attn.(q_proj|v_proj).loranew_A.*",
]
PREFIX = {"t5_adapter": (T5, T5_MODULES), "llama_adapter": (LLAMA, LLAMA_MODULES)}


def arguments(benchmark: Path, output: Path, dataset: str, model: Path, modules: list[str], *extra: str) -> list[str]:
    return [
        "--model_name_or_path", str(model),
        "--data_dir", str(benchmark),
        "--task_config_dir", str(ROOT / "configs" / "order1_configs" / dataset),
        "--instruction_file", str(ROOT / "configs" / "instruction_config.json"),
        "--output_dir", str(output),
        "--add_task_name", "True", "--add_dataset_name", "True",
        "--do_train", "--do_predict", "--predict_with_generate",
        "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "32",
        "--max_steps", "12", "--logging_steps", "4",
        "--learning_rate", "1e-2", "--galore_lr", "1e-2", "--lamda_1", "0.01",
        "--lr_scheduler_type", "constant", "--galore_update_proj_gap", "4", "--space_energy", "0.5",
        "--max_predict_samples", "12", "--report_to", "none", "--use_cpu", "--save_strategy", "no",
        *modules, *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["t5_adapter", "llama_adapter"])
def two_tasks(request, mini_benchmark, tmp_path_factory):
    """dbpedia, then amazon from dbpedia's adapter folder; (adapter's name, the two output folders)."""
    model, modules = PREFIX[request.param]
    root = tmp_path_factory.mktemp(request.param)
    first, second = root / "1-dbpedia", root / "2-amazon"
    assert run_uie_lora.main(arguments(mini_benchmark, first, "dbpedia", model, modules)) == 0
    adapter = first / request.param
    assert run_uie_lora.main(arguments(mini_benchmark, second, "amazon", adapter, modules)) == 0
    return request.param, first, second


def predictions(folder: Path) -> list[dict]:
    lines = (folder / "predict_eval_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_task_leaves_its_results(two_tasks):
    adapter_name, _, second = two_tasks
    results = json.loads((second / "predict_results.json").read_text())
    for metric in ("exact_match", "rouge1", "rougeL"):
        for suffix in ("", "_for_SC", "_for_TC", "_for_amazon", "_for_dbpedia"):
            assert f"predict_{metric}{suffix}" in results
    assert results["predict_samples"] == 24 and results["predict_loss"] > 0
    assert {"train_loss", "predict_exact_match"} <= json.loads((second / "all_results.json").read_text()).keys()
    rows = predictions(second)
    assert [row["Dataset"] for row in rows] == ["amazon"] * 12 + ["dbpedia"] * 12
    assert set(rows[0]["Instance"]) == {"id", "sentence", "label", "ground_truth", "instruction"}
    assert json.loads((second / "trainer_state.json").read_text())["global_step"] == 12
    assert not list(second.rglob("*.bin")) and not list(second.rglob("*.pkl"))
    assert not [path for path in second.rglob("*") if ".partial" in path.name]


def test_memory_grows_and_everything_trained(two_tasks):
    adapter_name, first, second = two_tasks
    for folder, rank in ((first, 8), (second, 16)):
        assert json.loads((folder / adapter_name / "adapter_config.json").read_text())["r_sum"] == rank
    old = load_file(first / adapter_name / "adapter_model.safetensors")
    new = load_file(second / adapter_name / "adapter_model.safetensors")
    assert old.keys() == new.keys() and old
    for name, factor in old.items():
        rows = "lora_A" in name
        kept = new[name][:8] if rows else new[name][:, :8]
        torch.testing.assert_close(kept, factor, rtol=0, atol=0)  # what task 1 learned is frozen
        added = new[name][8:] if rows else new[name][:, 8:]
        assert added.abs().max() > 0
    weights = [load_file(folder / adapter_name / "full_rank_weights.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys() and weights[0]
    assert all(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    space = load_file(second / adapter_name / "gradient_space.safetensors")
    assert len(space) >= len(weights[0])
    for basis in space.values():
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)


def test_reloaded_folder_predicts_the_same(two_tasks, mini_benchmark, tmp_path):
    adapter_name, _, second = two_tasks
    _, modules = PREFIX[adapter_name]
    command = arguments(mini_benchmark, tmp_path / "again", "amazon", second / adapter_name, modules)
    command.remove("--do_train")
    assert run_uie_lora.main(command) == 0
    assert predictions(tmp_path / "again") == predictions(second)


def test_the_same_seed_gives_the_same_bits(two_tasks, mini_benchmark, tmp_path):
    adapter_name, first, _ = two_tasks
    model, modules = PREFIX[adapter_name]
    assert run_uie_lora.main(arguments(mini_benchmark, tmp_path / "again", "dbpedia", model, modules)) == 0
    for name in ("adapter_model", "full_rank_weights", "gradient_space"):
        once = load_file(first / adapter_name / f"{name}.safetensors")
        again = load_file(tmp_path / "again" / adapter_name / f"{name}.safetensors")
        assert all(torch.equal(once[key], again[key]) for key in once)


def test_summary_says_what_trains_and_is_protected(two_tasks, mini_benchmark, tmp_path, capsys):
    adapter_name, first, _ = two_tasks
    _, modules = PREFIX[adapter_name]
    command = arguments(mini_benchmark, tmp_path / "out", "amazon", first / adapter_name, modules, "--max_steps", "1")
    assert run_uie_lora.main(command) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[gorp] ")]
    layers = len(load_file(first / adapter_name / "full_rank_weights.safetensors"))
    assert any(f"of {layers} weights train, projected (std) to rank 8 every 4 steps" in line for line in said)
    space = load_file(first / adapter_name / "gradient_space.safetensors")
    directions = sum(basis.shape[1] for basis in space.values())
    assert any(f"{directions} directions of earlier tasks" in line for line in said)


@pytest.mark.parametrize("method", ["inclora", "olora"])
def test_other_methods_train_only_the_new_lora(method, mini_benchmark, tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    assert run_uie_lora.main(arguments(mini_benchmark, first, "dbpedia", T5, T5_MODULES, "--method", method)) == 0
    adapter = first / "t5_adapter"
    flags = ["--method", method, "--lamda_1", "0.5"]
    assert run_uie_lora.main(arguments(mini_benchmark, second, "amazon", adapter, T5_MODULES, *flags)) == 0
    assert not list(tmp_path.rglob("full_rank_weights.safetensors"))
    history = json.loads((second / "trainer_state.json").read_text())["log_history"]
    assert any("penalty" in entry for entry in history) == (method == "olora")


@pytest.mark.parametrize("protect", [["--protect", "gp_second"], ["--protect", "structural"]])
def test_change_of_full_rank_weights_is_orthogonal_to_the_space(protect, mini_benchmark, tmp_path):
    side = ["--protect_side", "input"]
    first, second = tmp_path / "1", tmp_path / "2"
    assert run_uie_lora.main(arguments(mini_benchmark, first, "dbpedia", T5, T5_MODULES, *side)) == 0
    adapter = first / "t5_adapter"
    assert run_uie_lora.main(arguments(mini_benchmark, second, "amazon", adapter, T5_MODULES, *side, *protect)) == 0
    space = load_file(adapter / "gradient_space.safetensors")
    before, after = (load_file(folder / "t5_adapter" / "full_rank_weights.safetensors") for folder in (first, second))
    for name, weight in before.items():
        change, basis = after[name] - weight, space[name.removesuffix(".weight")]
        assert change.norm() > 1e-3
        assert (change @ basis).norm() < 1e-4 * change.norm()
    if "structural" in protect:
        factors = [load_file(folder / "t5_adapter" / "adapter_model.safetensors") for folder in (first, second)]
        for name in (name for name in factors[0] if "lora_A" in name):
            basis = space[name.removeprefix("base_model.model.").replace("lora_A.weight", "loranew_A")]
            added = factors[1][name][8:]
            assert (added @ basis).norm() < 1e-5 * added.norm()


def test_checkpoint_resumes_to_the_same_bits(mini_benchmark, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    saving = ["--save_strategy", "steps", "--save_steps", "6"]
    assert run_uie_lora.main(arguments(mini_benchmark, whole, "dbpedia", T5, T5_MODULES, *saving)) == 0
    shutil.copytree(whole / "checkpoint-6", cut / "checkpoint-6")
    resumed = arguments(mini_benchmark, cut, "dbpedia", T5, T5_MODULES, *saving, "--resume_from_checkpoint", "True")
    assert run_uie_lora.main(resumed) == 0
    for name in ("adapter_model", "full_rank_weights", "gradient_space"):
        once, again = (load_file(folder / "t5_adapter" / f"{name}.safetensors") for folder in (whole, cut))
        assert all(torch.equal(once[key], again[key]) for key in once)


def test_zero_shot_and_unseen_datasets_are_scored_and_change_nothing(two_tasks, mini_benchmark, tmp_path):
    adapter_name, first, second = two_tasks
    model, modules = PREFIX[adapter_name]
    flags = ["--zero_shot", "--unseen_config_dir", str(ROOT / "configs" / "order4_configs" / "COPA")]
    out = tmp_path / "out"
    assert run_uie_lora.main(arguments(mini_benchmark, out, "amazon", first / adapter_name, modules, *flags)) == 0
    parts = {part: json.loads((out / f"{part}_results.json").read_text()) for part in ("zero_shot", "unseen", "train")}
    assert set(parts["zero_shot"]["zero_shot_datasets"]) == {"amazon", "yahoo", "agnews"}
    assert set(parts["unseen"]["unseen_datasets"]) == {"MNLI", "CB", "WiC", "COPA"}
    assert parts["unseen"]["unseen_samples"] == 4 * 12 and "unseen_exact_match_for_CB" in parts["unseen"]
    for name in ("adapter_model", "full_rank_weights", "gradient_space"):
        once, again = (load_file(folder / adapter_name / f"{name}.safetensors") for folder in (second, out))
        assert all(torch.equal(once[key], again[key]) for key in once)
    stored = sum(path.stat().st_size for path in (out / adapter_name).glob("*.safetensors"))
    assert parts["train"]["stored_bytes"] == stored
    run = json.loads((out / "run.json").read_text())
    assert (run["method"], run["order"], run["seed"], run["base_model"]) == ("gorp", "order1", 42, str(model))
    assert 0 < run["trained_values"] < run["values"]


def test_evaluation_during_training_and_denser(mini_benchmark, tmp_path):
    step = tmp_path / "step"
    shutil.copytree(ROOT / "configs" / "order1_configs" / "dbpedia", step)
    shutil.copy(step / "test_tasks.json", step / "dev_tasks.json")
    command = arguments(mini_benchmark, tmp_path / "out", "dbpedia", T5, T5_MODULES, "--eval_strategy", "steps",
                        "--eval_steps", "10", "--denser_evaluation", "--max_eval_samples", "8", "--do_eval",
                        "--gradient_accumulation_steps", "2", "--gradient_checkpointing", "--bf16",
                        "--lamda_2", "0.1", "--lamda_3", "0.01")  # fmt: skip
    command[command.index("--task_config_dir") + 1] = str(step)
    assert run_uie_lora.main(command) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["step"] for entry in history if "eval_exact_match_for_dbpedia" in entry]
    assert evaluated[:2] == [1, 10]
    assert all(entry["penalty"] > 0 for entry in history if "loss" in entry)


BAD = {
    "no such model": (["--model_name_or_path", "initial_model/none"], "initial_model/none"),
    "unknown flag": (["--lamda_4", "1"], "--lamda_4"),
    "unknown method": (["--method", "magic"], "one of galore, gorp, inclora"),
    "lora matches nothing": (["--lora_modules", ".*nothing.*"], "matches no module"),
    "lora on no linear layer": (["--lora_modules", ".*SelfAttention"], "only linear layers"),
    "targets match nothing": (["--optim_target_modules", ".*nothing.*"], "matches no module"),
    "targets are not linear": (["--optim_target_modules", ".*layer_norm.*"], "only linear layers"),
    "no regular expression": (["--optim_target_modules", "(q"], "no regular expression"),
    "factors match nothing": (["--proj_lora_modules", ".*lora_Z.*"], "matches no factor"),
    "galore rank too high": (["--galore_rank", "4096"], "--galore_rank: found 4096; at most"),
    "lora rank too high": (["--lora_dim", "4096"], "--lora_dim: found 4096; at most"),
    "negative penalty": (["--lamda_1", "-1"], "--lamda_1: found -1.0; 0 or more"),
    "two precisions": (["--bf16", "--fp16"], "at most one"),
    "structural on the output side": (["--protect", "structural"], "needs --protect_side input"),
    "no such benchmark": (["--data_dir", "/nonexistent"], "--data_dir"),
    "no such step": (["--task_config_dir", "configs/order1_configs/none"], "--task_config_dir"),
    "nothing unseen": (["--unseen_config_dir", "configs/order1_configs/agnews"], "tests only what this order trains"),
    "zero-shot under DeepSpeed": (["--zero_shot", "--deepspeed", "configs/ds_configs/stage2.config"], "--zero_shot"),
    "prompt does not fit": (["--max_source_length", "5"], "max_source_length"),
    "answer does not fit": (["--max_target_length", "1"], "max_target_length"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_one_line_and_leave_nothing(case, mini_benchmark, tmp_path, capfd):
    extra, wanted = BAD[case]
    output = tmp_path / "out"
    try:
        status = run_uie_lora.main(arguments(mini_benchmark, output, "dbpedia", T5, T5_MODULES, *extra))
    except SystemExit as stop:  # argparse's own refusals
        status = stop.code
    assert status == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and wanted in said[0]
    assert not output.exists() or not list(output.rglob("*.json*"))


def edit(path: Path, change) -> None:
    """Replace a JSON file's value by what `change` makes of it."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def without(key: str):
    return lambda rows: [{name: value for name, value in row.items() if name != key} for row in rows]


def relabelled(rows: list[dict]) -> list[dict]:
    return [*rows[:1], rows[1] | {"label": "Spaceship"}, *rows[2:]]


# What is done to a copy of dbpedia's folder, and what the one line says.
BAD_DATA = {
    "file missing": (lambda folder: (folder / "train.json").unlink(), "train.json"),
    "no JSON": (lambda folder: (folder / "train.json").write_text("[{"), "train.json"),
    "no label": (lambda folder: edit(folder / "train.json", without("label")), "label"),
    "no sentence": (lambda folder: edit(folder / "test.json", without("sentence")), "sentence"),
    "unknown label": (lambda folder: edit(folder / "train.json", relabelled), "Spaceship"),
    "empty split": (lambda folder: edit(folder / "train.json", lambda rows: []), "train.json"),
    "dataset gone": (shutil.rmtree, "dbpedia"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_leaves_nothing(case, mini_benchmark, tmp_path, capfd):
    damage, wanted = BAD_DATA[case]
    folder = tmp_path / "benchmark" / "TC" / "dbpedia"
    shutil.copytree(mini_benchmark / "TC" / "dbpedia", folder)
    damage(folder)
    output = tmp_path / "out"
    assert run_uie_lora.main(arguments(tmp_path / "benchmark", output, "dbpedia", T5, T5_MODULES)) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and wanted in said[0]
    assert not list(output.rglob("*.json*"))


def narrow_base(adapter: Path) -> None:
    """Let the adapter's base be a T5 of half the width."""
    base = adapter.parent / "narrow"
    T5ForConditionalGeneration(T5Config.from_pretrained(T5, d_model=64)).save_pretrained(base)
    for path in T5.glob("tokenizer*"):
        shutil.copy(path, base)
    edit(adapter / "adapter_config.json", lambda config: config | {"base_model_name_or_path": str(base)})


BAD_ADAPTER = {
    "base gone": (lambda folder: edit(folder / "adapter_config.json", lambda config: config | {
        "base_model_name_or_path": "initial_model/gone"}), "initial_model/gone"),
    "base of another shape": (narrow_base, "the base model's is (128, 64)"),
    "config is no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "factors cut short": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x08"),
                          "adapter_model.safetensors"),
    "weights cut short": (lambda folder: (folder / "full_rank_weights.safetensors").write_bytes(b"\x08"),
                          "full_rank_weights.safetensors"),
    "space cut short": (lambda folder: (folder / "gradient_space.safetensors").write_bytes(b"\x08"),
                        "gradient_space.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("two_tasks", ["t5_adapter"], indirect=True)
@pytest.mark.parametrize("case", BAD_ADAPTER)
def test_bad_adapter_is_one_line_and_leaves_nothing(case, two_tasks, mini_benchmark, tmp_path, capfd):
    adapter_name, first, _ = two_tasks
    damage, wanted = BAD_ADAPTER[case]
    adapter = tmp_path / adapter_name
    shutil.copytree(first / adapter_name, adapter)
    damage(adapter)
    output = tmp_path / "out"
    assert run_uie_lora.main(arguments(mini_benchmark, output, "amazon", adapter, T5_MODULES)) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and wanted in said[0]
    assert not list(output.rglob("*.json*"))


def test_output_that_cannot_be_written_is_refused(mini_benchmark, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "out"
    assert run_uie_lora.main(arguments(mini_benchmark, output, "dbpedia", T5, T5_MODULES)) == 2
    assert f"error: {output}: cannot be written" in capfd.readouterr().err


def test_deepspeed_precision_must_agree(mini_benchmark, tmp_path, capfd):
    config = tmp_path / "half.json"
    config.write_text(json.dumps({"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}))
    flags = ["--bf16", "--deepspeed", str(config)]
    command = arguments(mini_benchmark, tmp_path / "out", "dbpedia", T5, T5_MODULES, *flags)
    assert run_uie_lora.main(command) == 2
    assert "half.json, key bf16.enabled: found false against --bf16" in capfd.readouterr().err


def test_fp16_at_stage_0_is_refused(mini_benchmark, tmp_path, capfd):
    stage_0 = ["--fp16", "--deepspeed", str(ROOT / "configs" / "ds_configs" / "stage0.config")]
    assert run_uie_lora.main(arguments(mini_benchmark, tmp_path / "out", "dbpedia", T5, T5_MODULES, *stage_0)) == 2
    assert "stage0.config, key zero_optimization.stage: found 0 with --fp16" in capfd.readouterr().err


def test_decay_of_guarded_factors_is_refused(mini_benchmark, tmp_path, capfd):
    stage_2 = ["--deepspeed", str(ROOT / "configs" / "ds_configs" / "stage2.config")]
    flags = ["--protect", "gp_second", "--weight_decay", "0.1", *stage_2]
    assert run_uie_lora.main(arguments(mini_benchmark, tmp_path / "out", "dbpedia", T5, T5_MODULES, *flags)) == 2
    assert "--weight_decay: found 0.1; only 0 with --protect gp_second under DeepSpeed" in capfd.readouterr().err


def test_a_penalty_at_stage_3_is_refused(mini_benchmark, tmp_path, capfd):
    stage_3 = ["--deepspeed", str(ROOT / "configs" / "ds_configs" / "stage3.config")]
    assert run_uie_lora.main(arguments(mini_benchmark, tmp_path / "out", "dbpedia", T5, T5_MODULES, *stage_3)) == 2
    assert "--lamda_1: found 0.01; only 0 at stage 3" in capfd.readouterr().err


def test_sketch_without_deepspeed_is_refused(mini_benchmark, tmp_path, capfd):
    sketch = ["--galore_svd", "sketch"]
    assert run_uie_lora.main(arguments(mini_benchmark, tmp_path / "out", "dbpedia", T5, T5_MODULES, *sketch)) == 2
    assert "--galore_svd: found sketch without --deepspeed" in capfd.readouterr().err


def test_deepspeed_optimizer_section_is_refused(mini_benchmark, tmp_path, capfd):
    config = tmp_path / "adam.json"
    config.write_text(json.dumps({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}))
    command = arguments(mini_benchmark, tmp_path / "out", "dbpedia", T5, T5_MODULES, "--deepspeed", str(config))
    assert run_uie_lora.main(command) == 2
    assert "without the projection" in capfd.readouterr().err


def test_results_of_an_earlier_run_are_not_replaced_unasked(two_tasks, mini_benchmark, capfd):
    adapter_name, first, _ = two_tasks
    model, modules = PREFIX[adapter_name]
    before = (first / "predict_results.json").read_bytes()
    assert run_uie_lora.main(arguments(mini_benchmark, first, "dbpedia", model, modules)) == 2
    assert "--overwrite_output_dir" in capfd.readouterr().err
    assert (first / "predict_results.json").read_bytes() == before
