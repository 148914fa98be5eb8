"""The entry script on the embedded models: what a task writes, and what the next one finds.

What is refused is in test_bad_input.py.
"""

import collections
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import run_uie_lora
import uie_trainer_lora
from helpers import PREFIX, ROOT, T5, T5_MODULES, arguments, losses, predictions
from uie_collator import DataCollatorForUIE


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


def test_a_task_leaves_its_results(two_tasks):
    adapter_name, _, second = two_tasks
    results = json.loads((second / "predict_results.json").read_text())
    for metric in ("exact_match", "rouge1", "rougeL"):
        for suffix in ("", "_for_SC", "_for_TC", "_for_amazon", "_for_dbpedia"):
            assert f"predict_{metric}{suffix}" in results
    assert results["predict_samples"] == 24 and "predict_loss" not in results  # nobody asked
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


def test_merged_old_lora_predicts_and_leaves_the_same(two_tasks, mini_benchmark, tmp_path):
    adapter_name, first, second = two_tasks
    _, modules = PREFIX[adapter_name]
    again = arguments(mini_benchmark, tmp_path / "again", "amazon", second / adapter_name, modules, "--merge_old")
    again.remove("--do_train")
    assert run_uie_lora.main(again) == 0
    assert predictions(tmp_path / "again") == predictions(second)
    exact = ["--lora_dropout", "0", "--adam_epsilon", "1e-4", "--max_steps", "4", "--learning_rate", "1e-3",
             "--galore_lr", "1e-3"]  # fmt: skip
    folders = []
    for merged in ([], ["--merge_old"]):
        folders.append(tmp_path / f"trained{len(merged)}")
        command = arguments(mini_benchmark, folders[-1], "amazon", first / adapter_name, modules, *exact, *merged)
        assert run_uie_lora.main(command) == 0
    factors = [load_file(folder / adapter_name / "adapter_model.safetensors") for folder in folders]
    assert factors[0].keys() == factors[1].keys()
    for name, factor in factors[0].items():
        old = (factor[:8], factors[1][name][:8]) if "lora_A" in name else (factor[:, :8], factors[1][name][:, :8])
        assert torch.equal(*old)
        assert (factors[1][name] - factor).norm() < 1e-2 * factor.norm()
    penalties = [
        [entry["penalty"] for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]
         if "penalty" in entry] for folder in folders
    ]  # fmt: skip
    assert penalties[0] and penalties[1] == pytest.approx(penalties[0], rel=1e-3)


def test_loss_of_the_test_rows_where_it_is_asked_for(two_tasks, mini_benchmark, tmp_path):
    adapter_name, first, _ = two_tasks
    _, modules = PREFIX[adapter_name]
    command = arguments(mini_benchmark, tmp_path, "dbpedia", first / adapter_name, modules, "--predict_loss")
    command.remove("--do_train")
    assert run_uie_lora.main(command) == 0
    assert json.loads((tmp_path / "predict_results.json").read_text())["predict_loss"] > 0
    assert predictions(tmp_path) == predictions(first)


def test_validation_sees_dev_examples_alone_and_within_their_own_limit(mini_benchmark, tmp_path, monkeypatch):
    step = tmp_path / "step"
    shutil.copytree(ROOT / "configs" / "order1_configs" / "dbpedia", step)
    shutil.copy(step / "test_tasks.json", step / "dev_tasks.json")
    seen, collate = collections.defaultdict(set), DataCollatorForUIE.__call__

    def note(collator, examples):
        for one in examples:
            seen[one["subset"]].add(int(one["Instance"]["id"]))
        return collate(collator, examples)

    monkeypatch.setattr(DataCollatorForUIE, "__call__", note)
    command = arguments(mini_benchmark, tmp_path / "out", "dbpedia", T5, T5_MODULES, "--method", "inclora", "--do_eval",
                        "--max_steps", "1", "--max_eval_samples", "3", "--max_predict_samples", "5")  # fmt: skip
    command[command.index("--task_config_dir") + 1] = str(step)
    assert run_uie_lora.main(command) == 0
    assert (seen["dev"], seen["test"]) == (set(range(3)), set(range(5)))


def test_flags_of_the_evaluation_reach_it(mini_benchmark, tmp_path, monkeypatch):
    made, scored = [], []
    kind, evaluate = uie_trainer_lora.Prediction, uie_trainer_lora.evaluate_predictions
    monkeypatch.setattr(uie_trainer_lora, "Prediction",
                        lambda *given, **named: made.append(kind(*given, **named)) or made[-1])
    monkeypatch.setattr(uie_trainer_lora, "evaluate_predictions",
                        lambda *given, multilingual: scored.append(multilingual) or evaluate(*given))
    monkeypatch.setattr(run_uie_lora, "gpt2_folder", lambda: None)
    command = arguments(mini_benchmark, tmp_path, "dbpedia", T5, T5_MODULES, "--multilingual", "True",
                        "--eval_batch_tokens", "900", "--num_beams", "2", "--per_device_eval_batch_size", "3",
                        "--max_predict_samples", "2")  # fmt: skip
    command.remove("--do_train")
    assert run_uie_lora.main(command) == 0
    [one] = made
    assert (one.most_tokens, one.batch_size, one.generation["num_beams"], scored) == (900, 3, 2, [True])


def test_summary_says_what_trains_and_is_protected(two_tasks, mini_benchmark, tmp_path, capsys):
    adapter_name, first, _ = two_tasks
    _, modules = PREFIX[adapter_name]
    command = arguments(mini_benchmark, tmp_path / "out", "amazon", first / adapter_name, modules, "--max_steps", "1")
    assert run_uie_lora.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("[gorp] ")]
    layers = len(load_file(first / adapter_name / "full_rank_weights.safetensors"))
    assert any(f"in {layers} full-rank weights (gradients projected to rank 8)" in line for line in said)
    assert any("projection std, new bases every 4 steps" in line for line in lines)
    space = load_file(first / adapter_name / "gradient_space.safetensors")
    directions = sum(basis.shape[1] for basis in space.values())
    assert any(f"{directions} directions of earlier tasks" in line for line in said)
    assert not any("cuts prompts" in line for line in said)


def test_cut_prompts_are_reported_for_the_splits_that_are_used(mini_benchmark, tmp_path, capsys):
    command = arguments(mini_benchmark, tmp_path, "dbpedia", T5, T5_MODULES, "--max_source_length", "90")
    command.remove("--do_train")
    assert run_uie_lora.main(command) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "cuts prompts" in line]
    assert line == "[gorp] --max_source_length 90 cuts prompts: 8 of 12 in test"  # nothing of train, which is not used


def test_the_seed_decides_the_initial_factors(mini_benchmark, tmp_path):
    factors = []
    for seed in ("42", "7"):
        flags = ["--method", "inclora", "--seed", seed, "--learning_rate", "0", "--max_steps", "1",
                 "--max_predict_samples", "1"]  # fmt: skip
        assert run_uie_lora.main(arguments(mini_benchmark, tmp_path / seed, "dbpedia", T5, T5_MODULES, *flags)) == 0
        factors.append(load_file(tmp_path / seed / "t5_adapter" / "adapter_model.safetensors"))
    assert not any(torch.equal(A, factors[1][name]) for name, A in factors[0].items() if "lora_A" in name)


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


@pytest.mark.parametrize("source, projection", [("moments", "std"), ("inputs", "std"), ("inputs", "reverse_std")])
def test_change_of_sgorp_is_orthogonal_to_the_space(source, projection, mini_benchmark, tmp_path):
    side = ["--method", "sgorp", "--space_from", source, "--space_energy", "0.7",
            "--galore_proj_type", projection]  # reverse_std projects these square weights on their output side
    first, second = tmp_path / "1", tmp_path / "2"
    assert run_uie_lora.main(arguments(mini_benchmark, first, "dbpedia", T5, T5_MODULES, *side)) == 0
    adapter = first / "t5_adapter"
    assert run_uie_lora.main(arguments(mini_benchmark, second, "amazon", adapter, T5_MODULES, *side)) == 0
    space = load_file(adapter / "gradient_space.safetensors")
    before, after = (load_file(folder / "t5_adapter" / "full_rank_weights.safetensors") for folder in (first, second))
    for name, weight in before.items():
        change, basis = after[name] - weight, space[name.removesuffix(".weight")]
        assert change.norm() > 1e-3
        assert (change @ basis).norm() < 1e-4 * change.norm()
    factors = [load_file(folder / "t5_adapter" / "adapter_model.safetensors") for folder in (first, second)]
    for name in (name for name in factors[0] if "lora_A" in name):
        basis = space[name.removeprefix("base_model.model.").replace("lora_A.weight", "loranew_A")]
        added = factors[1][name][8:]
        assert (added @ basis).norm() < 1e-5 * added.norm()


@pytest.mark.parametrize("micro_batches", [1, 2])  # of the cores; one of the dense gradients
@pytest.mark.parametrize("adapter_name", [*PREFIX])
def test_cores_train_what_dense_gradients_train(adapter_name, micro_batches, mini_benchmark, tmp_path):
    """With one basis, for the sign of a singular vector may differ with the last digits, and kept moments show it;
    and without clipping, since the norm is that of the cores' gradients."""
    model, modules = PREFIX[adapter_name]
    exact = ["--lora_dropout", "0", "--galore_update_proj_gap", "20", "--adam_epsilon", "1e-4", "--logging_steps", "1",
             "--max_grad_norm", "0", "--learning_rate", "1e-3", "--galore_lr", "1e-3",
             "--gradient_accumulation_steps", str(micro_batches), "--lamda_2", "0.1", "--lamda_3", "0.1"]  # fmt: skip
    found = {}
    for engine in ("dense", "cores"):
        out = tmp_path / engine
        flags = [*exact, "--galore_engine", engine, "--per_device_train_batch_size",
                 str(8 if engine == "dense" else 8 // micro_batches)]  # fmt: skip
        if engine == "dense":
            flags += ["--gradient_accumulation_steps", "1"]
        assert run_uie_lora.main(arguments(mini_benchmark, out, "dbpedia", model, modules, *flags)) == 0
        found[engine] = losses(out), load_file(out / adapter_name / "full_rank_weights.safetensors"), predictions(out)
    assert found["cores"][0] == pytest.approx(found["dense"][0], rel=1e-4)
    assert found["cores"][2] == found["dense"][2]
    base = load_file(model / "model.safetensors")
    for name, weight in found["dense"][1].items():
        moved = weight - base[name].float()
        apart = (found["cores"][1][name] - weight).norm() / moved.norm()
        assert moved.norm() > 0 and apart < (0.01 if micro_batches == 1 else 0.05), name


def test_cores_train_a_later_task_as_dense_gradients_do(two_tasks, mini_benchmark, tmp_path):
    """Penalties count the new factors as they act, so it is the same whether their part in S moves (cores) or not."""
    adapter_name, first, _ = two_tasks
    exact = ["--lora_dropout", "0", "--galore_update_proj_gap", "20", "--adam_epsilon", "1e-4", "--logging_steps", "1",
             "--max_grad_norm", "0", "--learning_rate", "1e-3", "--galore_lr", "1e-3", "--lamda_2", "0.1"]  # fmt: skip
    found = {}
    for engine in ("dense", "cores"):
        out, flags = tmp_path / engine, [*exact, "--galore_engine", engine]
        command = arguments(mini_benchmark, out, "amazon", first / adapter_name, PREFIX[adapter_name][1], *flags)
        assert run_uie_lora.main(command) == 0
        found[engine] = losses(out)
    assert found["cores"] == pytest.approx(found["dense"], rel=1e-4)


def test_cores_refresh_from_a_sketch_in_one_process(mini_benchmark, tmp_path, capfd):
    flags = ["--galore_engine", "cores", "--galore_svd", "sketch"]
    assert run_uie_lora.main(arguments(mini_benchmark, tmp_path, "dbpedia", T5, T5_MODULES, *flags)) == 0
    assert "engine trainable cores, AdamW" in capfd.readouterr().out
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["train_loss"] > 0


def test_zero_shot_and_unseen_datasets_are_scored_and_change_nothing(two_tasks, mini_benchmark, tmp_path):
    adapter_name, first, second = two_tasks
    model, modules = PREFIX[adapter_name]
    flags = ["--zero_shot", "--unseen_config_dir", str(ROOT / "configs" / "order4_configs" / "COPA")]
    out = tmp_path / "out"
    assert run_uie_lora.main(arguments(mini_benchmark, out, "amazon", first / adapter_name, modules, *flags)) == 0
    parts = {part: json.loads((out / f"{part}_results.json").read_text()) for part in ("zero_shot", "unseen")}
    assert set(parts["zero_shot"]["zero_shot_datasets"]) == {"amazon", "yahoo", "agnews"}
    assert set(parts["unseen"]["unseen_datasets"]) == {"MNLI", "CB", "WiC", "COPA"}
    assert parts["unseen"]["unseen_samples"] == 4 * 12 and "unseen_exact_match_for_CB" in parts["unseen"]
    for name in ("adapter_model", "full_rank_weights", "gradient_space"):
        once, again = (load_file(folder / adapter_name / f"{name}.safetensors") for folder in (second, out))
        assert all(torch.equal(once[key], again[key]) for key in once)
    run = json.loads((out / "run_record.json").read_text())["report"]
    assert (run["method"], run["order"], run["seed"], run["base_model"]) == ("gorp", "order1", 42, str(model))
    assert 0 < run["trained_values"] < run["values"]


@pytest.mark.parametrize(
    "dataset, tested", [("amazon", ["amazon"]), ("agnews", ["amazon", "dbpedia", "yahoo", "agnews"])]
)
def test_ends_only_tests_a_task_alone_but_for_the_last_one(mini_benchmark, tmp_path, dataset, tested):
    command = arguments(mini_benchmark, tmp_path / "out", dataset, T5, T5_MODULES, "--predict_tasks", "ends")
    command.remove("--do_train")
    assert run_uie_lora.main(command) == 0
    assert {row["Dataset"] for row in predictions(tmp_path / "out")} == set(tested)


def test_evaluation_during_training_and_denser(mini_benchmark, tmp_path):
    step = tmp_path / "step"
    shutil.copytree(ROOT / "configs" / "order1_configs" / "dbpedia", step)
    shutil.copy(step / "test_tasks.json", step / "dev_tasks.json")
    command = arguments(mini_benchmark, tmp_path / "out", "dbpedia", T5, T5_MODULES, "--eval_strategy", "steps",
                        "--eval_steps", "10", "--denser_evaluation", "--max_eval_samples", "2", "--do_eval",
                        "--per_device_train_batch_size", "2", "--max_predict_samples", "1",
                        "--gradient_accumulation_steps", "2", "--gradient_checkpointing", "--bf16",
                        "--lamda_2", "0.1", "--lamda_3", "0.01")  # fmt: skip
    command[command.index("--task_config_dir") + 1] = str(step)
    assert run_uie_lora.main(command) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["step"] for entry in history if "eval_exact_match_for_dbpedia" in entry]
    assert evaluated[:2] == [1, 10]
    assert all(entry["penalty"] > 0 for entry in history if "loss" in entry)


def test_results_of_an_earlier_run_are_kept_and_what_changed_is_said(two_tasks, mini_benchmark, capfd):
    adapter_name, first, _ = two_tasks
    model, modules = PREFIX[adapter_name]
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*.json*")}
    same = arguments(mini_benchmark, first, "dbpedia", model, modules)
    assert run_uie_lora.main(same) == 0
    assert "finished before with the same settings" in capfd.readouterr().out
    assert run_uie_lora.main([*same, "--seed", "7", "--galore_rank", "4"]) == 2
    said = capfd.readouterr().err
    assert "--galore_rank was 8, is 4; --seed was 42, is 7" in said and "--overwrite_output_dir" in said
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*.json*")} == before
