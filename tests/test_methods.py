"""The methods: each one does what its name says, over two tasks of either model, and its folder reloads as it was."""

import functools
import json
import logging
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

import methods
import run_uie_lora
from command_line import parse_arguments
from errors import InputError
from helpers import (
    ADAM,
    LLAMA,
    LLAMA_MODULES,
    PREFIX,
    ROOT,
    T5,
    T5_MODULES,
    arguments,
    fit,
    method_of,
    predictions,
    tiny_t5,
    train,
)
from loranew import loranew_layers
from methods import find_method, method_names
from methods.seqlora import Seqlora
from order_config import read_order
from prompts import read_prompts
from task_examples import sample_places
from task_setup import load_examples
from uie_trainer_lora import UIETrainer

SHORT = ["--max_steps", "4", "--max_predict_samples", "4", "--max_train_samples", "40"]


# Through the entry


@pytest.mark.parametrize("engine", ["dense", "cores"])
def test_lamda_3_starts_from_the_weights_as_they_train(engine, tmp_path):
    """A model that is cast after `prepare`, as DeepSpeed casts it, has changed by exactly 0 before the first step."""
    flags = ["--galore_engine", engine, "--lamda_3", "1", "--lamda_1", "0"]
    method = method_of("gorp", *flags, folder=tmp_path)
    model = method.prepare(tiny_t5(), None, decoder_only=False)
    method.create_optimizer(**ADAM)
    model.to(torch.bfloat16)
    method.begin_training()
    method.begin_micro_batch(True)
    of_no_change = sum(layer.weight.shape[0] ** 0.5 for layer in method.targets.values())  # ||0 - I|| of each
    assert method.penalty().item() == pytest.approx(of_no_change, rel=1e-6)
    assert all(method.start[name].device == layer.weight.device for name, layer in method.targets.items())


@pytest.fixture(scope="module", params=["t5_adapter", "llama_adapter"])
def family(request):
    return request.param, *PREFIX[request.param]


@pytest.mark.parametrize("name", [name for name in method_names() if name != "gorp"])
def test_two_tasks_then_the_folder_predicts_what_the_run_did(name, family, mini_benchmark, tmp_path):
    adapter_name, model, modules = family
    first, second, again = tmp_path / "1-dbpedia", tmp_path / "2-amazon", tmp_path / "again"
    method = ["--method", name, *SHORT]
    assert run_uie_lora.main(arguments(mini_benchmark, first, "dbpedia", model, modules, *method)) == 0
    adapter = first / adapter_name
    assert run_uie_lora.main(arguments(mini_benchmark, second, "amazon", adapter, modules, *method)) == 0
    command = arguments(mini_benchmark, again, "amazon", second / adapter_name, modules, *method)
    command.remove("--do_train")
    assert run_uie_lora.main(command) == 0
    assert len(predictions(second)) == 8 and predictions(again) == predictions(second)
    last = list(read_prompts(second / adapter_name)["heads"])[-1]
    assert last == ("TC/dbpedia" if name == "multitask" else "SC/amazon")
    before, after = ({f"{path.name}: {key}": tensor for path in (folder / adapter_name).glob("*.safetensors")
                      for key, tensor in load_file(path).items()} for folder in (first, second))
    same = before.keys() == after.keys() and all(
        before[key].shape == after[key].shape and torch.equal(before[key], after[key]) for key in before
    )
    assert same == (name == "multitask")


def test_the_time_of_training_counts_the_methods_own_passes(mini_benchmark, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(run_uie_lora, "time", SimpleNamespace(monotonic=lambda: clock.now))
    for hook, seconds in (("begin_task", 100), ("revisit", 20), ("end_task", 3)):
        def spend(method, *given, own=getattr(Seqlora, hook), seconds=seconds):
            clock.now += seconds
            return own(method, *given)

        monkeypatch.setattr(Seqlora, hook, spend)
    output = tmp_path / "1-dbpedia"
    run = arguments(mini_benchmark, output, "dbpedia", T5, T5_MODULES, "--method", "seqlora", *SHORT)
    assert run_uie_lora.main(run) == 0
    assert json.loads((output / "train_results.json").read_text())["train_runtime"] == 123


def test_multitask_trains_all_tasks_first_and_passes_its_folder_on(mini_benchmark, tmp_path, capfd):
    first, second = tmp_path / "1-dbpedia", tmp_path / "2-amazon"
    method = ["--method", "multitask", *SHORT]
    assert run_uie_lora.main(arguments(mini_benchmark, first, "dbpedia", T5, T5_MODULES, *method)) == 0
    assert json.loads((first / "trainer_state.json").read_text())["global_step"] == 4 * 4
    assert run_uie_lora.main(
        arguments(mini_benchmark, second, "amazon", first / "t5_adapter", T5_MODULES, *method)
    ) == 0
    results = json.loads((second / "train_results.json").read_text())
    assert (results["train_samples"], results["train_runtime"]) == (0, 0.0)
    late = arguments(mini_benchmark, tmp_path / "late", "amazon", T5, T5_MODULES, *method)
    assert run_uie_lora.main(late) == 2
    assert "multitask continues from its first step's folder" in capfd.readouterr().err


def test_a_first_task_without_training_examples_is_refused(mini_benchmark, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Seqlora, "training_examples", lambda method, own, order: own.select([]))
    run = arguments(mini_benchmark, tmp_path / "1", "dbpedia", T5, T5_MODULES, "--method", "seqlora", *SHORT)
    assert run_uie_lora.main(run) == 2
    assert "--method seqlora: chose no training examples for the first task" in capfd.readouterr().err
    assert not list((tmp_path / "1").rglob("*.safetensors"))


# What a method trains on


@pytest.fixture
def rows_of(mini_benchmark, tmp_path):
    """The training rows that a method chooses at a step of order 1."""
    def choose(name: str, dataset: str, *extra: str):
        flags = ["--method", name, *extra]
        model, data, options, training = parse_arguments(
            arguments(mini_benchmark, tmp_path / "out", dataset, T5, T5_MODULES, *flags)
        )
        method = find_method(name)(options)
        return load_examples(data, training, method)["train"], training
    return choose


def count(rows) -> dict[str, int]:
    names = rows["Dataset"]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def test_replay_adds_the_same_few_rows_of_every_earlier_task(rows_of):
    flags = ["--replay_rows", "5", "--max_train_samples", "30"]
    rows, _ = rows_of("replay", "yahoo", *flags)
    assert count(rows) == {"yahoo": 30, "dbpedia": 5, "amazon": 5}
    earlier, _ = rows_of("replay", "amazon", *flags)
    assert count(earlier) == {"amazon": 30, "dbpedia": 5}
    buffers = [[row["id"] for row, name in zip(part["Instance"], part["Dataset"]) if name == "dbpedia"]
               for part in (rows, earlier)]
    own, _ = rows_of("replay", "dbpedia", *flags)
    assert count(own) == {"dbpedia": 30}
    assert buffers[0] == buffers[1] and set(buffers[0]) < {row["id"] for row in own["Instance"]}
    other, _ = rows_of("replay", "amazon", *flags, "--seed", "7")
    assert [row["id"] for row in other["Instance"]][30:] != buffers[1]


def test_multitask_gives_every_task_equal_steps(rows_of, mini_benchmark):
    rows, training = rows_of("multitask", "dbpedia")
    counts = count(rows)
    assert list(counts) == [step.dataset for step in read_order(ROOT / "configs" / "order1_configs")]
    assert len(set(counts.values())) == 1 and training.max_steps == 4 * 12
    rows, training = rows_of("multitask", "dbpedia", "--max_steps", "-1")
    sizes = {name: len(json.loads((next(mini_benchmark.glob(f"*/{name}")) / "train.json").read_text()))
             for name in counts}
    assert count(rows) == sizes and training.max_steps == -1
    assert len(rows_of("multitask", "amazon")[0]) == 0


def test_a_step_outside_an_order_has_no_earlier_tasks(mini_benchmark, tmp_path, capfd):
    step = tmp_path / "alone" / "amazon"
    shutil.copytree(ROOT / "configs" / "order1_configs" / "amazon", step)
    command = arguments(mini_benchmark, tmp_path / "out", "dbpedia", T5, T5_MODULES, "--method", "replay")
    command[command.index("--task_config_dir") + 1] = str(step)
    assert run_uie_lora.main(command) == 2
    assert "lists TC/dbpedia, which no step up to this one trains" in capfd.readouterr().err


# What a method does to the model


def test_a_task_that_trains_no_full_rank_weight_passes_earlier_ones_on(tmp_path):
    train(method_of("gorp", folder=tmp_path), None, tmp_path / "1")
    train(method_of("inclora", folder=tmp_path), tmp_path / "1", tmp_path / "2")
    before, after = (load_file(tmp_path / task / "full_rank_weights.safetensors") for task in "12")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_weight_that_is_shared_is_refused(tmp_path):
    method = method_of("gorp", "--optim_target_modules", "lm_head", folder=tmp_path)
    with pytest.raises(InputError, match="--optim_target_modules: the weight of lm_head is shared"):
        method.prepare(tiny_t5(), None, decoder_only=False)


def test_seqlora_goes_on_with_the_one_lora(tmp_path):
    train(method_of("seqlora", folder=tmp_path), None, tmp_path / "first")
    saved = load_file(tmp_path / "first" / "adapter_model.safetensors")
    second = method_of("seqlora", folder=tmp_path)
    second.prepare(tiny_t5(), tmp_path / "first", decoder_only=False)
    factors = dict(second.factors())
    assert len(factors) == len(saved) and all(factor.requires_grad for factor in factors.values())
    for name, factor in factors.items():
        assert torch.equal(factor, saved[f"base_model.model.{name}"]) and factor.abs().max() > 0
    assert not [name for name, _ in second.model.named_parameters() if ".lora_" in name]


@pytest.mark.parametrize("name", ["olora", "seqlora"])
def test_the_optimizer_of_a_lora_has_the_settings_of_the_flags(name, tmp_path):
    method = method_of(name, folder=tmp_path)
    method.prepare(tiny_t5(), None, decoder_only=False)
    given = {"lr": 2e-3, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.3}
    [group] = method.create_optimizer(**given).param_groups
    assert {key: group[key] for key in given} == given


@pytest.mark.parametrize("name, flags", [
    ("olora", []),
    ("gorp", ["--galore_engine", "dense"]),
    ("gorp", ["--galore_engine", "cores"]),
    ("sgorp", ["--space_from", "moments"]),
])  # fmt: skip
def test_penalties_are_those_of_the_formulas(name, flags, tmp_path):
    """lamda_1: sum |A_old A^T|; lamda_2: ||A|| + ||B||; lamda_3: ||dW dW^T - I||. A counts as it acts, without S."""
    train(method_of(name, *(flags if name == "sgorp" else []), folder=tmp_path), None, tmp_path / "first")
    full_rank = ["--lamda_3", "0.1"] if name != "olora" else []
    method = method_of(name, *flags, "--lamda_1", "0.5", "--lamda_2", "0.2", *full_rank, folder=tmp_path)
    model = method.prepare(tiny_t5(), tmp_path / "first", decoder_only=False).train()
    targets = getattr(method, "targets", {})
    before = {name: layer.weight.detach().clone() for name, layer in targets.items()}
    fit(method, model, steps=1)
    method.begin_micro_batch(True)
    torch.manual_seed(0)
    expected = 0.0
    for place, layer in loranew_layers(model).items():
        old, A, B = (part["default"].weight for part in (layer.lora_A, layer.loranew_A, layer.loranew_B))
        for factor in (old, A, B):
            torch.nn.init.normal_(factor)
        seen = A
        if name == "sgorp":
            S = method.space.get(f"{place}.loranew_A")
            seen = A - A @ S @ S.T
            assert (seen - A).norm() > 0.1
        expected += 0.5 * (old @ seen.T).abs().sum() + 0.2 * (seen.norm() + B.norm())
    for place in targets:
        layer = model.get_base_model().get_submodule(place)
        change = layer(torch.eye(layer.in_features)).T - before[place]
        assert change.norm() > 1e-3
        expected += 0.1 * (change @ change.T - torch.eye(len(change))).norm()
    assert bool(targets) == (name != "olora")
    torch.testing.assert_close(method.penalty(), expected)
    trained = [param for param in model.parameters() if param.requires_grad]
    gradients = [torch.autograd.grad(value, trained) for value in (method.penalty(), expected)]
    for ours, wanted in zip(*gradients):
        assert wanted.any()
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_nlora_makes_the_change_sparser(mini_benchmark, tmp_path):
    small = {}
    for lamda in ("0", "1e-3"):
        out = tmp_path / lamda
        flags = ["--method", "nlora", "--nlora_lamda", lamda, "--max_predict_samples", "1"]
        assert run_uie_lora.main(arguments(mini_benchmark, out, "dbpedia", T5, T5_MODULES, *flags)) == 0
        factors = load_file(out / "t5_adapter" / "adapter_model.safetensors")
        changes = [factors[name.replace("lora_A", "lora_B")] @ A for name, A in factors.items() if "lora_A" in name]
        small[lamda] = sum((change.abs() < 1e-3).float().mean().item() for change in changes) / len(changes)
    assert small["1e-3"] > small["0"] + 0.1


def test_galore_changes_the_named_weights_alone_by_low_rank_steps(tmp_path):
    flags = ["--galore_rank", "3", "--galore_update_proj_gap", "100", "--galore_lr", "1e-2"]
    method = method_of("galore", *flags, folder=tmp_path)
    train(method, None, tmp_path / "first", steps=5)
    model = method.model
    base = dict(tiny_t5().named_parameters())
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, base[name])}
    assert moved == {f"{name}.weight" for name in method.targets}
    for name, layer in method.targets.items():
        assert torch.linalg.matrix_rank(layer.weight - base[f"{name}.weight"], rtol=1e-4) == 3
    second = method_of("galore", *flags, folder=tmp_path).prepare(tiny_t5(), tmp_path / "first", decoder_only=False)
    for name, weight in second.named_parameters():
        assert torch.equal(weight, dict(model.named_parameters())[name])


def osf_layers(model) -> dict:
    return {name: module for name, module in model.named_modules() if hasattr(module, "osf_svd_params")}


def test_osf_keeps_gradients_off_the_leading_directions_and_preserves_more_each_task(tmp_path):
    first = method_of("osf", "--osf_preserved", "0.25", "--osf_growth", "0.25", folder=tmp_path)
    base = tiny_t5()
    weights = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    model = first.prepare(base, None, decoder_only=False)
    tokens = torch.arange(5, 21).reshape(2, 8)
    model(input_ids=tokens, labels=tokens[:, :3].contiguous()).loss.backward()
    layers = osf_layers(model.get_base_model())
    assert layers.keys() == first.targets.keys()
    for name, layer in layers.items():
        U, _, Vt = torch.linalg.svd(weights[f"{name}.weight"], full_matrices=False)
        factors = layer.osf_svd_params["default"]
        assert factors["U_low"].shape[1] == 96 and factors["U_low"].grad.norm() > 0
        assert (U[:, :32].T @ factors["U_low"].grad).norm() < 1e-4 * factors["U_low"].grad.norm()
        assert (factors["V_low"].grad @ Vt[:32].T).norm() < 1e-4 * factors["V_low"].grad.norm()
    train(method_of("osf", "--osf_preserved", "0.25", "--osf_growth", "0.25", folder=tmp_path), None, tmp_path / "1")
    second = method_of("osf", "--osf_preserved", "0.25", "--osf_growth", "0.25", folder=tmp_path)
    model = second.prepare(tiny_t5(), tmp_path / "1", decoder_only=False)
    saved = load_file(tmp_path / "1" / "full_rank_weights.safetensors")
    for name, layer in osf_layers(model.get_base_model()).items():
        assert layer.osf_svd_params["default"]["U_low"].shape[1] == 64
        assert torch.equal(layer.base_layer.weight, saved[f"{name}.weight"])
        assert not torch.equal(layer.base_layer.weight, weights[f"{name}.weight"])


def test_osf_preserves_more_with_every_task_up_to_its_limit(tmp_path):
    previous, shares = None, []
    for task in range(4):
        method = method_of("osf", "--osf_preserved", "0.25", "--osf_growth", "0.3", folder=tmp_path)
        train(method, previous, tmp_path / str(task), steps=1)
        previous = tmp_path / str(task)
        shares.append(method.share)
    assert shares == pytest.approx([0.25, 0.55, 0.85, 0.95])


@pytest.mark.parametrize("name", ["galore", "osf"])
def test_a_method_without_lora_refuses_a_folder_that_holds_one(name, tmp_path, mini_benchmark, capfd):
    train(method_of("inclora", folder=tmp_path), None, tmp_path / "t5_adapter")
    out = tmp_path / "out"
    command = arguments(mini_benchmark, out, "amazon", tmp_path / "t5_adapter", T5_MODULES, "--method", name)
    assert run_uie_lora.main(command) == 2
    assert f"--method {name}: {tmp_path / 't5_adapter'} holds a LoRA" in capfd.readouterr().err


@pytest.mark.parametrize("before, after", [("galore", "osf"), ("osf", "galore")])
def test_methods_without_lora_refuse_each_others_folders(before, after, tmp_path):
    train(method_of(before, folder=tmp_path), None, tmp_path / "before", steps=1)
    with pytest.raises(InputError, match=f"--method {after}: .*before was saved by {before}; one saved by {after} is"):
        method_of(after, folder=tmp_path).prepare(tiny_t5(), tmp_path / "before", decoder_only=False)
    method_of(before, folder=tmp_path).prepare(tiny_t5(), tmp_path / "before", decoder_only=False)


@pytest.mark.parametrize("text, found", [
    ("", "none"),
    ("from methods.base import Method\nclass One(Method): pass\nclass Two(One): pass", "One, Two"),
])  # fmt: skip
def test_a_file_of_methods_defines_one(text, found, tmp_path, monkeypatch):
    (tmp_path / "odd_one.py").write_text(text)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "methods.odd_one", raising=False)
    with pytest.raises(InputError, match=f"odd_one.py defines {found}; exactly one"):
        find_method("odd_one")


# Options


def test_the_three_gorps_have_their_own_defaults(tmp_path):
    def settings(*flags: str) -> tuple:
        command = arguments(tmp_path, tmp_path / "out", "dbpedia", LLAMA, LLAMA_MODULES, *flags)
        at = command.index("--lamda_1")
        options = parse_arguments(command[:at] + command[at + 2 :])[2]
        return (options.method, options.protect, options.protect_side, options.space_from, options.lamda_1,
                options.galore_svd)

    assert settings() == ("gorp", "gp_first", "output", "moments", 0.5, "lowrank")
    assert settings("--method", "sgorp") == ("sgorp", "structural", "input", "inputs", 0.0, "lowrank")
    released = settings("--preset", "released")
    assert (released[1], *released[4:]) == ("none", 0.0, "exact")


def test_gp_second_acts_as_such_in_the_second_task(tmp_path):
    train(method_of("gorp", folder=tmp_path), None, tmp_path / "first")
    ends = {}
    for way in ("gp_first", "gp_second"):
        method = method_of("gorp", "--protect", way, folder=tmp_path)
        train(method, tmp_path / "first", tmp_path / way)
        assert method.engine.plan.way == way and method.engine.plan.spaces
        ends[way] = load_file(tmp_path / way / "full_rank_weights.safetensors")
    assert all(not torch.equal(ends["gp_first"][name], ends["gp_second"][name]) for name in ends["gp_first"])


@pytest.mark.parametrize("name", ["gorp", "sgorp"])
def test_every_new_factor_a_is_protected_unless_flags_say_otherwise(name):
    modules = {"lora_modules": ".*SelfAttention.(q|v).*", "optim_target_modules": ".*EncDecAttention.(q|v).*"}
    method = methods.make_method(name, **modules)
    model = method.prepare(tiny_t5(), None, decoder_only=False)
    assert len(method.protected) == len(loranew_layers(model)) == 8
    assert "shared space of 8 LoRA factors and 4 full-rank weights" in method.summary()[1]
    none = methods.make_method(name, **modules, proj_lora_modules="none")
    none.prepare(tiny_t5(), None, decoder_only=False)
    assert not none.protected and "shared space of 0 LoRA factors" in none.summary()[1]


def test_what_trains_is_counted_alike_by_both_engines(tmp_path):
    sizes = []
    for engine in ("dense", "cores"):
        method = method_of("gorp", "--galore_engine", engine, folder=tmp_path)
        method.prepare(tiny_t5(), None, decoder_only=False)
        sizes.append(method.sizes())
    base = sum(parameter.numel() for parameter in tiny_t5().parameters())
    assert sizes[0] == sizes[1] == (base + 16384, 16384 + 4 * 128 * 128)


@pytest.mark.parametrize("name, examples", [("sgorp", 64), ("inflora", 80), ("ewc", 80)])
def test_a_method_sees_as_many_examples_as_it_asks_for(name, examples, mini_benchmark, tmp_path, monkeypatch):
    kind, seen = find_method(name), []

    def revisit(method, model, batches, own=kind.revisit):
        batches = list(batches)
        seen.extend(tuple(ids.tolist()) for batch in batches for ids in batch["labels"])
        return own(method, model, iter(batches))

    monkeypatch.setattr(kind, "revisit", revisit)
    run = arguments(mini_benchmark, tmp_path / "out", "dbpedia", T5, T5_MODULES, "--method", name, "--max_steps", "1",
                    "--max_train_samples", "80", "--max_predict_samples", "1")  # fmt: skip
    assert run_uie_lora.main(run) == 0
    assert len(seen) == examples


def test_the_trainer_shows_the_sample_in_batches():
    def shown(shares: bool, rank: int = 0) -> list[list[int]]:
        return list(UIETrainer.shown_batches(SimpleNamespace(
            model=None, model_wrapped=object(), name="", _quiet=True,
            method=SimpleNamespace(shown_examples=64, shares_examples=shares),
            args=SimpleNamespace(per_device_train_batch_size=10, process_index=rank, world_size=2),
            _batch=lambda examples: [one["id"] for one in examples],
            train_dataset=Dataset.from_list([{"id": number} for number in range(200)]))))  # fmt: skip

    assert sum(shown(False), []) == sum(shown(False, 1), []) == list(sample_places(200, 64))
    assert [len(one) for one in shown(False)] == [10] * 6 + [4]
    first, second = (sum(shown(True, rank), []) for rank in (0, 1))
    assert len(first) == len(second) == 32 and sorted(first + second) == list(sample_places(200, 64))


@pytest.mark.parametrize("averages, expected", [(False, 4.0), (True, 3.5)])
def test_a_micro_batchs_share_of_a_short_step_on_two_ranks(averages, expected):
    """3 of the step's 6 answer tokens, 2 micro-batches where others have 4; the penalty, 6, counts once."""
    class Model:
        training = True

        def __call__(self, **inputs):
            return SimpleNamespace(loss=torch.tensor(1.0))

    method = SimpleNamespace(averages_micro_batches=averages, penalty=lambda: torch.tensor(6.0))
    made = SimpleNamespace(
        method=method, label_smoother=None, _penalties=[], _examples=[], state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(num_processes=2), args=SimpleNamespace(gradient_accumulation_steps=4),
        current_gradient_accumulation_steps=2, non_finite=SimpleNamespace(note_micro_batch=lambda *_: None),
    )
    made.answer_loss = functools.partial(UIETrainer.answer_loss, made)
    inputs = {"labels": torch.tensor([[1, 2, 3, -100]])}
    assert UIETrainer.compute_loss(made, Model(), inputs, num_items_in_batch=6).item() == expected


def test_the_examples_that_a_method_sees_are_a_sample_and_the_same_in_every_run():
    drawn = sample_places(1000, 64)
    assert len(drawn) == len(set(drawn)) == 64 and list(drawn) == sorted(drawn) == list(sample_places(1000, 64))
    assert len({place // 100 for place in drawn}) > 5  # labels of a file that is sorted by them
    assert all(sample_places(1000, limit) == range(1000) for limit in (None, 1000, 2000))


def test_ablations_of_gorp_by_flags(tmp_path):
    """LoRA and full-rank weights without a space; LoRA and space without full-rank weights."""
    train(method_of("gorp", folder=tmp_path), None, tmp_path / "first")
    full_rank = method_of("gorp", "--protect", "none", folder=tmp_path)
    full_rank.prepare(tiny_t5(), tmp_path / "first", decoder_only=False)
    assert full_rank.targets and not full_rank.engine.plan.spaces
    both = method_of("gorp", folder=tmp_path)
    both.prepare(tiny_t5(), tmp_path / "first", decoder_only=False)
    assert both.engine.plan.spaces.keys() == {*both.targets, *both.protected}
    space = method_of("gorp", "--optim_target_modules", "none", folder=tmp_path)
    space.prepare(tiny_t5(), None, decoder_only=False)
    assert space.protected and not space.targets


def test_what_the_space_stops_and_a_space_that_is_missing_are_said(tmp_path, caplog):
    train(method_of("gorp", folder=tmp_path), None, tmp_path / "first")
    file = tmp_path / "first" / "gradient_space.safetensors"
    assert "do not train" not in prepared(tmp_path).summary()[0]
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    spaces = {name: torch.eye(len(S)) if name.endswith("loranew_A") else S for name, S in load_file(file).items()}
    save_file(spaces, file, metadata)
    method = prepared(tmp_path)
    stopped = f"; {len(method.protected)} of {len(method.protected)} protected factors do not train: S holds all"
    assert stopped in method.summary()[0]  # the line that the terminal shows in every task
    file.unlink()
    with caplog.at_level(logging.WARNING, "gorp"):
        prepared(tmp_path)
    assert "has no gradient_space.safetensors, so nothing of earlier tasks is protected" in caplog.text


def prepared(folder):
    """The paper's method for the second task."""
    method = method_of("gorp", folder=folder)
    method.prepare(tiny_t5(), folder / "first", decoder_only=False)
    return method


def test_cores_protect_the_lora_alone_where_no_full_rank_weight_trains(mini_benchmark, tmp_path, capfd):
    none = ["--optim_target_modules", "none", "--galore_engine", "cores", *SHORT]
    first, second = tmp_path / "1-dbpedia", tmp_path / "2-amazon"
    assert run_uie_lora.main(arguments(mini_benchmark, first, "dbpedia", T5, T5_MODULES, *none)) == 0
    assert run_uie_lora.main(
        arguments(mini_benchmark, second, "amazon", first / "t5_adapter", T5_MODULES, *none)
    ) == 0
    assert "directions in 8 bases" in capfd.readouterr().out
    assert load_file(second / "t5_adapter" / "gradient_space.safetensors")


@pytest.mark.parametrize("name, flags, fault", [
    ("sgorp", ["--proj_lora_modules", ".*SelfAttention.q.loranew_[AB].*"],
     "--proj_lora_modules: .*only loranew_A factors"),
    ("gorp", ["--optim_target_modules", ".*SelfAttention.q", "--galore_engine", "cores"],
     "--optim_target_modules: matches .*SelfAttention.q, a LoraNewLinear; .*without a LoRA"),
])  # fmt: skip
def test_what_gorp_cannot_protect_or_project_is_refused(name, flags, fault, tmp_path):
    with pytest.raises(InputError, match=fault):
        method_of(name, *flags, folder=tmp_path).prepare(tiny_t5(), None, decoder_only=False)


@pytest.mark.parametrize("before, after", [("inclora", "seqlora"), ("replay", "gorp")])
def test_one_lora_for_all_tasks_and_one_for_each_are_not_mixed(before, after, tmp_path):
    train(method_of(before, folder=tmp_path), None, tmp_path / "before", steps=1)
    with pytest.raises(InputError, match=f"--method {after}: .*before was saved by a method that"):
        method_of(after, folder=tmp_path).prepare(tiny_t5(), tmp_path / "before", decoder_only=False)


def test_a_later_task_says_which_lora_flags_have_no_effect(tmp_path, caplog):
    train(method_of("olora", folder=tmp_path), None, tmp_path / "first", steps=1)
    with caplog.at_level("WARNING", logger="gorp"):
        method_of("olora", folder=tmp_path).prepare(tiny_t5(), tmp_path / "first", decoder_only=False)
    assert not caplog.messages
    flags = ["--lora_dim", "4", "--lora_alpha", "8", "--lora_dropout", "0.5"]
    other = method_of("olora", *flags, modules=["--lora_modules", ".*SelfAttention.q"], folder=tmp_path)
    with caplog.at_level("WARNING", logger="gorp"):
        other.prepare(tiny_t5(), tmp_path / "first", decoder_only=False)
    said = "\n".join(caplog.messages)
    for part in ("--lora_dim 4 .*with 8,", "--lora_alpha 8.* with 32", "_dropout 0.5 .*with 0.0", "4 layers.*in 8"):
        assert re.search(part, said), said
    assert len(list(other.factors())) == 2 * 8


@pytest.mark.parametrize("name, vain, read", [
    ("inclora", ["optim_target_modules", "proj_lora_modules", "lamda_1", "lamda_3", "galore_lr"], ["lora_dim"]),
    ("seqlora", ["optim_target_modules", "proj_lora_modules", "lamda_1", "lamda_3", "galore_lr"], ["lora_dim"]),
    ("olora", ["optim_target_modules", "proj_lora_modules", "lamda_3", "galore_lr"], ["lamda_1", "lora_dim"]),
    ("galore", ["lora_modules", "lora_dim", "proj_lora_modules", "lamda_1"], ["optim_target_modules", "galore_lr"]),
    ("osf", ["lora_dim", "lamda_1", "galore_lr"], ["optim_target_modules", "osf_growth"]),
    ("gorp --optim_target_modules none", ["lamda_3", "galore_lr"], ["proj_lora_modules", "lamda_1", "lora_dim"]),
    ("gorp", [], ["optim_target_modules", "proj_lora_modules", "lamda_1", "lamda_3", "galore_lr"]),
])  # fmt: skip
def test_a_run_says_which_options_it_ignores(name, vain, read, tmp_path):
    name, *own = name.split()
    values = "--lora_dim 4 --galore_lr 1e-3 --lamda_1 0.1 --lamda_3 1".split()
    method = method_of(name, *values, *own, folder=tmp_path)
    method.prepare(tiny_t5(), None, decoder_only=False)
    lines = [line for line in method.summary() if line.startswith("ignored by")]
    said = {word.rstrip(",").removeprefix("--") for word in " ".join(lines).split() if word.startswith("--")}
    assert said >= set(vain) and not said & set(read) and len(lines) == bool(vain)
    # The report tells runs apart by what is left: at the default or not, what is not read is not among it.
    assert method.effective_options().keys() >= set(read) and not method.effective_options().keys() & set(vain)


def test_the_example_of_the_docs_is_a_method(mini_benchmark, tmp_path, monkeypatch):
    """The file from docs/METHODS.md, found beside the other methods, runs by name and pulls the LoRA back."""
    text = (ROOT / "docs" / "METHODS.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    assert 25 <= len(example.splitlines()) <= 35
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "pull.py").write_text(example, encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "more")])

    def task(folder: str, dataset: str, start: Path, pull: str) -> dict:
        flags = [*SHORT, "--method", "pull", "--pull", pull]
        assert run_uie_lora.main(arguments(mini_benchmark, tmp_path / folder, dataset, start, T5_MODULES, *flags)) == 0
        return load_file(tmp_path / folder / "t5_adapter" / "adapter_model.safetensors")

    start = task("first", "dbpedia", T5, "0")
    method = find_method("pull")(find_method("pull").Arguments(method="pull", lora_modules=T5_MODULES[1]))
    model = AutoModelForSeq2SeqLM.from_pretrained(T5)
    method.prepare(model, tmp_path / "first" / "t5_adapter", decoder_only=False).to("meta")  # as to a GPU
    method.create_optimizer(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    method.begin_training()
    method.penalty().backward()
    moved = {}
    for pull in ("0", "10"):
        factors = task(f"second{pull}", "amazon", tmp_path / "first" / "t5_adapter", pull)
        moved[pull] = sum((factors[name] - start[name]).square().sum().item() for name in start)
    assert moved["10"] < 0.7 * moved["0"]


def test_tensorboard_gets_loss_and_penalty(mini_benchmark, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--method", "olora", "--lamda_2", "0.1", *SHORT, "--report_to", "tensorboard"]
    command = arguments(mini_benchmark, tmp_path / "out", "dbpedia", T5, T5_MODULES, *flags)
    assert run_uie_lora.main(command) == 0
    files = (tmp_path / "out" / "runs").glob("*/events.*")  # of training, and of the accuracies after it
    tags = {tag for events in files for tag in EventAccumulator(str(events)).Reload().Tags()["scalars"]}
    assert {"train/loss", "train/penalty", "train/learning_rate"} <= tags
