"""`--bf16` without DeepSpeed: frozen weights in 16 bits, what trains in float32, evaluation as training computes."""

import collections
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import run_uie_lora
from evaluation.generate import Prediction
from full_rank import FILE_NAME, exact_weight, load_weights, save_weights, set_weight
from helpers import LLAMA, LLAMA_MODULES, arguments
from methods import find_method
from model.loading import load_model_and_tokenizer
from module_matching import match_linear
from Proj_torch.plan import Plan
from Proj_torch.zero_core import CoreEngine
from run_uie_lora import base_dtype

GATES = ".*mlp.gate_proj.*"


class ProductsByDtype(TorchDispatchMode):
    """Counts matrix products with more than `least` numbers in their second factor, by dtype."""

    def __init__(self, counts: collections.Counter, least: int):
        super().__init__()
        self.counts, self.least = counts, least

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        factors = [x for x in args if isinstance(x, torch.Tensor)]
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and factors[-1].numel() >= self.least:
            self.counts[factors[-1].dtype] += 1
        return func(*args, **kwargs or {})


@pytest.fixture
def trained(mini_benchmark, tmp_path, monkeypatch):
    """A function that trains one task of the tiny LLaMA: its trainer, dtypes before training, and those of the products
    in `generate`."""
    build, generate = run_uie_lora.build_trainer, Prediction._generate

    def train(*extra: str):
        trainers, frozen, counts = [], [], collections.Counter()

        def keep(model, *rest):
            trainers.append(build(model, *rest))
            frozen.extend((p.requires_grad, p.dtype, p.ndim) for p in model.parameters())
            return trainers[-1]

        def counted(*args):
            with ProductsByDtype(counts, least=128 * 128):
                return generate(*args)

        monkeypatch.setattr(run_uie_lora, "build_trainer", keep)
        monkeypatch.setattr(Prediction, "_generate", counted)
        command = arguments(mini_benchmark, tmp_path / "out", "dbpedia", LLAMA, LLAMA_MODULES, "--max_steps", "2",
                            "--max_predict_samples", "1", "--overwrite_output_dir", "True", *extra)  # fmt: skip
        assert run_uie_lora.main(command) == 0
        return trainers[0], frozen, counts

    return train


def test_frozen_weights_are_16_bit_and_evaluation_computes_as_training(trained):
    trainer, parameters, products = trained("--bf16", "True")
    assert {dtype for trains, dtype, _ in parameters if not trains} == {torch.bfloat16}
    assert {dtype for trains, dtype, _ in parameters if trains} == {torch.float32}
    assert trainer.method.engine.name == "trainable cores, AdamW"
    assert set(products) == {torch.bfloat16}
    targets = trainer.method.targets.values()
    assert {layer.weight.dtype for layer in targets} == {torch.bfloat16}
    assert {exact_weight(layer).dtype for layer in targets} == {torch.float32}


def test_dense_gradients_need_float32_weights(trained):
    trainer, parameters, _ = trained("--bf16", "True", "--galore_engine", "dense")
    assert {dtype for _, dtype, _ in parameters} == {torch.float32} and trainer.method.engine.name == "ProjAdamW"


@pytest.mark.parametrize("given, method, dtype", [
    ({"bf16": True}, "gorp", torch.bfloat16),
    ({"fp16": True}, "gorp", torch.float32),  # autocast
    ({"fp16": True, "deepspeed": "ds.json"}, "gorp", torch.float16),
    ({"fp16": True, "deepspeed": "ds.json", "do_train": False}, "gorp", torch.float16),  # as in training
    ({"bf16": True}, "galore", torch.float32),
    ({}, "gorp", torch.float32),
])  # fmt: skip
def test_the_base_is_read_in_the_dtype_in_which_it_trains(given, method, dtype):
    arguments = SimpleNamespace(**{"bf16": False, "fp16": False, "deepspeed": None, "do_train": True} | given)
    assert base_dtype(arguments, SimpleNamespace(float32_base=find_method(method).float32_base)) == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_continues_from_the_float32_value_that_was_saved(dtype, tmp_path):
    """The rounding error is kept, in 16 bits too, so what is lost is 2^-9 of it: 2^-17 of the weight."""
    model = load_model_and_tokenizer(str(LLAMA), dtype=dtype).model
    layers = match_linear(model, [GATES], "--optim_target_modules")
    saved = {name: layer.weight.float() + 1e-5 * torch.randn(layer.weight.shape) for name, layer in layers.items()}
    save_weights(saved, tmp_path)
    stored = load_file(tmp_path / FILE_NAME)
    assert all(torch.equal(stored.pop(f"{name}.weight"), weight) for name, weight in saved.items()) and not stored
    loaded = load_weights(model, tmp_path)
    projection = {"rank": 8, "update_proj_gap": 4, "scale": 1.0, "proj_type": "std", "svd": "exact", "lr": 1e-3}
    engine = CoreEngine(model, Plan(loaded, projection))
    for name, layer in engine.layers.items():
        tolerance = (2.0**-16 * saved[name].abs()).clamp(min=2.0**-35)  # fp16's least positive number, scaled
        assert layer.weight.dtype == dtype
        assert ((layer.weight - saved[name]).abs() > tolerance).any()  # 16 bits alone do not hold it
        for held in (exact_weight(loaded[name]), layer.trained_weight(torch.zeros(layer.core_shape))):
            assert ((held - saved[name]).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_16_bit_weight_that_was_saved_is_read_as_the_one_that_was_evaluated(dtype):
    """Also entries that lie about half a unit beside a 16-bit number, whose kept error is rounded to that half."""
    torch.manual_seed(0)
    any_, near = torch.randn(2, 50, 100)
    near = near.to(dtype).float()
    W = torch.cat([any_, near * (1 + torch.finfo(dtype).eps / 2 * (1 - 1e-3 * torch.rand_like(near)))])
    held, loaded = (torch.nn.Linear(100, 100, bias=False, dtype=dtype) for _ in range(2))
    set_weight(held, W.clone())
    exact = exact_weight(held)
    assert torch.allclose(exact, W, rtol=2**-16, atol=1e-7)
    set_weight(loaded, exact.clone())
    assert torch.equal(loaded.weight, held.weight) and torch.equal(exact_weight(loaded), exact)


def test_full_rank_weights_are_put_where_the_model_is():
    """A 4-bit base is on the GPU when the previous task's weights are loaded. Here `meta` stands for the GPU."""
    layer = torch.nn.Linear(3, 2, bias=False, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        set_weight(layer, torch.ones(2, 3))
    assert layer.rounding.device.type == "meta" and layer.rounding.dtype == torch.bfloat16
