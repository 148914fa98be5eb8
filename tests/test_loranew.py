"""LoRA with memory: its mathematics, its life through PEFT's own calls, and the adapter folders it reads."""

import copy
import json
import shlex
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

from errors import InputError
from helpers import edit, put, renew_loranew
from loranew import (
    LoraNewConfig,
    LoraNewLinear,
    add_loranew,
    fold_loranew,
    folded_factors,
    load_loranew,
    loranew_layers,
    save_folded,
    set_input_space,
)

PATTERN = r".*SelfAttention.(q|v).*"
INPUTS = {"input_ids": torch.tensor([[3, 4, 5, 1]]), "labels": torch.tensor([[6, 7, 1]])}


def new_base() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def new_config(**options) -> LoraNewConfig:
    defaults = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": PATTERN, "task_type": "SEQ_2_SEQ_LM"}
    return LoraNewConfig(**defaults | options)


def learn(model: nn.Module, seed: int) -> nn.Module:
    """Give the new factors values as training would: both A and B differ from their start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".loranew_" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.fixture
def folder(tmp_path):
    """The adapter folder after two tasks."""
    model = learn(add_loranew(new_base(), new_config()), seed=1)
    fold_loranew(model)
    renew_loranew(model)
    learn(model, seed=2)
    fold_loranew(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder, change) -> None:
    """Apply `change` to the stored tensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reconfigure(folder, **options) -> None:
    edit(folder / "adapter_config.json", lambda config: config | options)


# Where it is


def test_a_mixture_of_experts_gets_it_in_the_layers_that_the_expression_names(tmp_path):
    """PEFT alone takes the names that an expression ends in, of all layers."""
    config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)  # fmt: skip
    pattern = r".*layers\.0\.self_attn\.(q_proj|v_proj)"
    named = new_config(target_modules=pattern, task_type="CAUSAL_LM")
    model = add_loranew(MixtralForCausalLM(config), named)
    wanted = {f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")}
    assert loranew_layers(model).keys() == wanted
    fold_loranew(learn(model, seed=1))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == pattern
    assert loranew_layers(load_loranew(MixtralForCausalLM(config), tmp_path)).keys() == wanted


# The layer


def test_forward_is_the_equation_and_the_old_branch_has_no_dropout():
    model = add_loranew(nn.Sequential(nn.Linear(6, 5)), new_config(target_modules="0", r_sum=3, task_type=None))
    layer = loranew_layers(model)["0"]
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B, layer.loranew_A, layer.loranew_B):
            nn.init.normal_(factor["default"].weight)
    old_A, old_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    new_A, new_B = layer.loranew_A["default"].weight, layer.loranew_B["default"].weight
    x, s = torch.randn(7, 6), 8 / 4
    base = layer.get_base_layer()
    expected = base(x) + s * x @ old_A.T @ old_B.T + s * x @ new_A.T @ new_B.T
    torch.testing.assert_close(layer.eval()(x), expected)
    layer.train()
    layer.lora_dropout["default"].p = 1.0
    torch.testing.assert_close(layer(x), base(x) + s * x @ old_A.T @ old_B.T)


def test_only_the_new_factors_train_under_the_published_names():
    model = add_loranew(new_base(), new_config(r_sum=2))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 and all(".loranew_" in name for name in trained)
    attention = "base_model.model.encoder.block.0.layer.0.SelfAttention.q"
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith(f"{attention}.lora")}
    assert shapes == {
        f"{attention}.lora_A.default.weight": (2, 16),
        f"{attention}.lora_B.default.weight": (16, 2),
        f"{attention}.loranew_A.default.weight": (4, 16),
        f"{attention}.loranew_B.default.weight": (16, 4),
    }
    assert not any("EncDecAttention" in name for name in loranew_layers(model))


def test_first_task_has_no_old_factors_and_changes_nothing_before_training():
    base = new_base()
    before = logits(base)
    model = add_loranew(base, new_config())
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), before)


def test_gradients_reach_the_new_factors_alone():
    model = learn(add_loranew(new_base(), new_config(r_sum=2)), seed=1)
    model(**INPUTS).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".loranew_" in name}


# Folding


def test_folding_keeps_the_function_and_stacks_the_tasks():
    model = learn(add_loranew(new_base(), new_config()), seed=1)
    first = {name: layer.loranew_A["default"].weight.clone() for name, layer in loranew_layers(model).items()}
    before = logits(model)
    fold_loranew(model)
    assert model.peft_config["default"].r_sum == 4
    torch.testing.assert_close(logits(model), before)
    renew_loranew(model)
    torch.testing.assert_close(logits(model), before)
    learn(model, seed=2)
    before = logits(model)
    fold_loranew(model)
    assert model.peft_config["default"].r_sum == 8
    torch.testing.assert_close(logits(model), before)
    for name, layer in loranew_layers(model).items():
        assert torch.equal(layer.lora_A["default"].weight[:4], first[name])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    renew_loranew(model)
    assert all(p.requires_grad == (".loranew_" in name) for name, p in model.named_parameters())


def test_fresh_factors_are_kaiming_and_zero():
    layer = next(iter(loranew_layers(add_loranew(new_base(), new_config())).values()))
    A, B = layer.loranew_A["default"].weight, layer.loranew_B["default"].weight
    # Kaiming-uniform with a = sqrt(5) is uniform on +-1/sqrt(in).
    assert 0.15 < A.abs().max() <= 16**-0.5 and not B.any()


def test_save_loranew_keeps_the_branches_apart(tmp_path):
    model = learn(add_loranew(new_base(), new_config(save_loranew=True)), seed=1)
    before = logits(model)
    fold_loranew(model)
    model.save_pretrained(tmp_path / "adapter")
    assert model.peft_config["default"].r_sum == 0
    assert {name.split(".")[-2] for name in load_file(tmp_path / "adapter/adapter_model.safetensors")} == {
        "loranew_A",
        "loranew_B",
    }
    assert torch.equal(logits(load_loranew(new_base(), tmp_path / "adapter")), before)


def test_folding_a_merged_adapter_is_refused():
    model = learn(add_loranew(new_base(), new_config()), seed=1)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        fold_loranew(model)


# The input space


def test_training_stays_orthogonal_to_the_input_space_and_folding_keeps_the_function():
    model = add_loranew(new_base(), new_config(lora_dropout=0.0))
    layers = loranew_layers(model)
    spaces = {name: orthonormal(16, 5, seed) for seed, name in enumerate(layers)}
    set_input_space(model, spaces)
    assert not any("space" in name for name in model.state_dict())
    start = {name: layer.loranew_A["default"].weight.clone() for name, layer in layers.items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(**INPUTS).loss.backward()
        for name, layer in layers.items():
            gradient = layer.loranew_A["default"].weight.grad
            torch.testing.assert_close(gradient @ spaces[name], torch.zeros(4, 5), atol=1e-7, rtol=0)
        optimizer.step()
    before = logits(model)
    for name, layer in layers.items():
        assert not torch.equal(layer.loranew_A["default"].weight, start[name])
        change = layer.get_delta_weight("default")
        assert change.norm() > 0.01
        torch.testing.assert_close(change @ spaces[name], torch.zeros(16, 5), atol=2e-6, rtol=0)
    fold_loranew(model)
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)
    for name, layer in layers.items():
        folded = layer.lora_A["default"].weight
        torch.testing.assert_close(folded @ spaces[name], torch.zeros(4, 5), atol=2e-6, rtol=0)


def test_the_old_branch_sees_the_whole_input():
    model = learn(add_loranew(new_base(), new_config()), seed=1)
    fold_loranew(model)
    before = logits(model)
    renew_loranew(model)
    set_input_space(model, {name: orthonormal(16, 16) for name in loranew_layers(model)})
    assert torch.equal(logits(model), before)


def test_a_space_of_every_direction_leaves_nothing_to_train():
    """Not even rounding noise, which Adam would turn into full steps."""
    model = learn(add_loranew(new_base(), new_config()), seed=1)
    set_input_space(model, {name: orthonormal(16, 16) for name in loranew_layers(model)})
    model.train()(**INPUTS).logits.sum().backward()
    for layer in loranew_layers(model).values():
        for factor in (layer.loranew_A["default"].weight, layer.loranew_B["default"].weight):
            assert factor.grad is not None and not factor.grad.any()


def test_in_16_bits_the_saved_change_is_still_clear_of_the_space():
    """S acts in float32, and is not cast with the model (a buffer would be)."""
    S, x = orthonormal(16, 5), torch.randn(3, 7, 16)
    model = add_loranew(nn.Sequential(nn.Linear(16, 12)), new_config(target_modules="0", task_type=None))
    set_input_space(learn(model, seed=1), {"0": S})
    layer = loranew_layers(model)["0"].eval()
    A, B = layer.loranew_A["default"].weight, layer.loranew_B["default"].weight
    seen = x - x @ S @ S.T  # S on x instead of on A: the same numbers
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 2 * seen @ A.T @ B.T, atol=1e-6, rtol=1e-6)
    model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.bfloat16()).sum().backward()
        effective, (folded, _) = layer.loranew_A["default"].effective(), layer.folded("default", torch.Tensor.float)
    for rows in (effective, folded):
        assert rows.dtype == torch.float32 and (rows @ S).abs().max() < 1e-6
    assert layer.loranew_A["default"].space.dtype == torch.float32
    assert A.grad.dtype == torch.bfloat16 and (A.grad.float() @ S).norm() < 1e-2 * A.grad.float().norm()


# PEFT's own calls


def test_merge_unmerge_disable_and_unload_include_both_branches():
    base = new_base()
    plain = logits(base)
    model = learn(add_loranew(base, new_config()), seed=1)
    fold_loranew(model)
    renew_loranew(model)
    learn(model, seed=2)
    set_input_space(model, {name: orthonormal(16, 3) for name in loranew_layers(model)})
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-4)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoraNewLinear) for module in merged.modules())
    torch.testing.assert_close(logits(merged), adapted, atol=1e-5, rtol=1e-4)


def test_safe_merge_refuses_values_that_are_not_finite():
    model = add_loranew(new_base(), new_config())
    layer = next(iter(loranew_layers(model).values()))
    weight = layer.get_base_layer().weight.clone()
    with torch.no_grad():
        layer.loranew_B["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, weight) and not layer.merged


def test_a_second_adapter_gets_its_own_memory_rank():
    model = add_loranew(new_base(), new_config())
    model.add_adapter("other", new_config(r=2, r_sum=6))
    model.set_adapter("other")
    layer = next(iter(loranew_layers(model).values()))
    assert layer.lora_A["other"].weight.shape == (6, 16) and layer.loranew_A["other"].weight.shape == (2, 16)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".loranew_" in name and ".other." in name}


def test_adapters_of_different_layers_stay_apart():
    model = learn(add_loranew(new_base(), new_config()), seed=1)
    first, base = logits(model), logits(new_base())
    model.add_adapter("other", new_config(target_modules=".*EncDecAttention.q"))
    model.set_adapter("other")
    assert torch.equal(logits(model), base) and all("EncDec" in name for name in loranew_layers(model))
    fold_loranew(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), first, atol=1e-5, rtol=1e-4)


def test_from_pretrained_rebuilds_the_config(folder):
    before = logits(load_loranew(new_base(), folder))
    config = LoraNewConfig.from_pretrained(folder)
    assert (type(config), config.r, config.r_sum, config.target_modules) == (LoraNewConfig, 4, 8, PATTERN)
    model = PeftModel.from_pretrained(new_base(), folder, config=config, is_trainable=True)
    assert torch.equal(logits(model), before)
    assert all(p.requires_grad == (".loranew_" in name) for name, p in model.named_parameters())


# Adapter folders


def test_a_folded_folder_holds_the_memory_alone_and_keeps_the_predictions(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.decoder.block.0.layer.0.SelfAttention.v"
    assert tensors[f"{key}.lora_A.weight"].shape == (8, 16) and tensors[f"{key}.lora_B.weight"].shape == (16, 8)
    assert not any("loranew" in name for name in tensors)
    assert json.loads((folder / "adapter_config.json").read_text())["r_sum"] == 8
    model = learn(add_loranew(new_base(), new_config()), seed=1)
    fold_loranew(model)
    renew_loranew(model)
    learn(model, seed=2)
    torch.testing.assert_close(logits(load_loranew(new_base(), folder)), logits(model))


def test_saving_before_folding_loses_nothing(folder, tmp_path):
    model = learn(load_loranew(new_base(), folder), seed=3)
    model.save_pretrained(tmp_path / "unfolded_adapter")
    again = load_loranew(new_base(), tmp_path / "unfolded_adapter")
    assert torch.equal(logits(again), logits(model))
    assert again.peft_config["default"].r_sum == 8


def test_embeddings_that_peft_stored_are_taken_back(tmp_path):
    base = new_base()
    base.resize_token_embeddings(40)
    model = learn(add_loranew(base, new_config()), seed=1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.shared.weight" in load_file(tmp_path / "adapter_model.safetensors")
    again = new_base()
    again.resize_token_embeddings(40)
    assert torch.equal(logits(load_loranew(again, tmp_path)), logits(model))
    with pytest.raises(InputError, match=r"weight is \(40, 16\), \(32, 16\) is needed"):
        load_loranew(new_base(), tmp_path)


def test_loading_for_evaluation_freezes_everything(folder):
    model = load_loranew(new_base(), folder, trainable=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_o_lora_adapter_loads(folder):
    expected = logits(load_loranew(new_base(), folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    published = (
        "base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights lora_alpha lora_dropout "
        "modules_to_save peft_type r r_sum save_loranew task_type"
    )
    config = {key: config[key] for key in published.split()} | {"base_model_name_or_path": "initial_model/t5-large"}
    # O-LoRA names modules by their suffix, and its vendored PEFT had options that are gone.
    config |= {"target_modules": ["SelfAttention.q", "SelfAttention.v"], "enable_lora": None, "merge_weights": True}
    put(folder / "adapter_config.json", config)
    assert torch.equal(logits(load_loranew(new_base(), folder)), expected)


def test_empty_first_memory_of_o_lora_loads(tmp_path):
    model = learn(add_loranew(new_base(), new_config(save_loranew=True)), seed=1)
    model.save_pretrained(tmp_path)

    def add_empty(tensors):
        for name in list(tensors):
            old = name.replace("loranew_", "lora_")
            tensors[old] = torch.zeros(0, 16) if "_A" in name else torch.zeros(16, 0)

    rewrite(tmp_path, add_empty)
    assert torch.equal(logits(load_loranew(new_base(), tmp_path)), logits(model))


def test_a_stock_lora_adapter_becomes_memory(tmp_path):
    model = get_peft_model(new_base(), LoraConfig(r=4, lora_alpha=8, target_modules=PATTERN, init_lora_weights=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    loaded = load_loranew(new_base(), tmp_path)
    assert loaded.peft_config["default"].r_sum == 4
    torch.testing.assert_close(logits(loaded), logits(model))


def test_another_precision_is_cast(folder):
    expected = logits(load_loranew(new_base(), folder))
    rewrite(folder, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    model = load_loranew(new_base(), folder)
    assert {parameter.dtype for parameter in get_peft_model_state_dict(model).values()} == {torch.float32}
    torch.testing.assert_close(logits(model), expected, atol=0.02, rtol=0.02)


def test_factors_of_a_bfloat16_model_train_in_float32(folder):
    model = load_loranew(new_base().bfloat16(), folder)
    layer = next(iter(loranew_layers(model).values()))
    assert layer.loranew_A["default"].weight.dtype == layer.lora_A["default"].weight.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


# What cannot be loaded, beside the cases of test_bad_input.py: one line that names the file, what was found and needed


def test_half_a_new_pair_is_refused(folder):
    name = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.loranew_A.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(4, 16)}))
    with pytest.raises(InputError, match="adapter_model.safetensors.*loranew_.*missing"):
        load_loranew(new_base(), folder)


def test_base_model_of_another_shape_is_refused(folder):
    wide = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=24, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(InputError, match=r"\(8, 16\), \(8, 24\) is needed"):
        load_loranew(wide, folder)
    deep = copy.deepcopy(new_base().config)
    deep.num_layers = 2
    with pytest.raises(InputError, match=r"encoder.block.1.*missing"):
        load_loranew(T5ForConditionalGeneration(deep), folder)


@pytest.mark.parametrize("keep", [0, 5000], ids=["empty", "in the data"])
def test_a_damaged_safetensors_file_is_refused(folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="adapter_model.safetensors: not a readable safetensors file"):
        load_loranew(new_base(), folder)


def test_a_pickle_is_refused_with_a_conversion_that_works(folder):
    expected = logits(load_loranew(new_base(), folder))
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()
    with pytest.raises(InputError, match="adapter_model.bin: a pickle") as error:
        load_loranew(new_base(), folder)
    command = shlex.split(str(error.value).split("its source: ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert torch.equal(logits(load_loranew(new_base(), folder)), expected)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"r": 0}, "r: found 0"),
        ({"lora_alpha": None}, "lora_alpha: found None"),
        ({"rank_pattern": {"q": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ".*nowhere"}, "matches no module"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"target_modules": ".*SelfAttention"}, "only linear layers"),
        ({"r": 17}, "r: found 17; allowed: at most 16"),
    ],
    ids=str,
)
def test_an_unsuitable_adapter_config_is_refused(folder, options, words):
    reconfigure(folder, **options)
    with pytest.raises(InputError, match=f"adapter_.*{words}"):
        load_loranew(new_base(), folder)


def test_a_folder_without_files_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="adapter_config.json: no such file"):
        load_loranew(new_base(), tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="adapter_model.safetensors: no such file"):
        load_loranew(new_base(), folder)


def test_saving_folded_factors_writes_what_folding_and_saving_writes(folder, tmp_path):
    model = learn(load_loranew(new_base(), folder), seed=3)
    set_input_space(model, {name: orthonormal(16, 3) for name in loranew_layers(model)})
    before = logits(model)
    (tmp_path / "gathered").mkdir()
    save_folded(model, folded_factors(model), tmp_path / "gathered")
    assert torch.equal(logits(model), before)  # the model stays as it is
    fold_loranew(model)
    model.save_pretrained(tmp_path / "folded")
    gathered, folded = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("gathered", "folded"))
    assert gathered.keys() == folded.keys() and all(torch.equal(gathered[key], folded[key]) for key in folded)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("gathered", "folded")]
    assert configs[0] == configs[1] and configs[0]["r_sum"] == 12


# The memory in the base weight


def merge_old(model: PeftModel) -> None:
    for layer in loranew_layers(model).values():
        layer.merge_old("default")


def with_memory(tasks: int) -> PeftModel:
    """A model that has folded some tasks, and has trained new factors for the next one."""
    model = add_loranew(new_base(), new_config())
    for seed in range(tasks):
        fold_loranew(learn(model, seed))
        renew_loranew(model)
    return learn(model, tasks)


@pytest.mark.parametrize("tasks", [0, 1, 5])
def test_merged_memory_computes_the_same_and_is_saved_as_it_was(tasks, tmp_path):
    model, merged = with_memory(tasks), with_memory(tasks)
    weights = {name: layer.get_base_layer().weight.clone() for name, layer in loranew_layers(merged).items()}
    merge_old(merged)
    moved = any(
        not torch.equal(weights[name], layer.get_base_layer().weight) for name, layer in loranew_layers(merged).items()
    )
    assert moved == bool(tasks)
    assert not any(layer.has_old_branch("default") for layer in loranew_layers(merged).values())
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    merge_old(merged)  # nothing is left to add
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    for name, factor in folded_factors(model).items():
        assert torch.equal(factor, folded_factors(merged)[name])
    for one in (model, merged):
        fold_loranew(one)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)  # the last ranks beside W
    for name, one in (("plain", model), ("merged", merged)):
        one.save_pretrained(tmp_path / name)
    stored = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "merged")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])
    loaded = load_loranew(new_base(), tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    unloaded = merged.merge_and_unload()
    torch.testing.assert_close(logits(unloaded), logits(model), rtol=1e-4, atol=1e-5)
