"""The memory plan against what really exists: trained values, optimizer state, kept activations, gradients sent."""

import json
import time
from pathlib import Path

import pytest
import torch

import plan_memory
from arguments import MethodArguments
from loranew import fold_loranew, renew_loranew
from methods.gorp import Gorp
from model.loading import load_model_and_tokenizer
from module_matching import match_linear
from plan_memory import GIB, Target, layer_bytes, make_plan, parse_arguments
from Proj_torch.layer_gradient import LayerGradient, sketched_bases
from Proj_torch.proj_projector import mode_ranks

ROOT = Path(__file__).resolve().parent.parent
LORA = {"tiny-t5": ".*SelfAttention.(q|v).*", "tiny-llama": ".*self_attn.(q_proj|v_proj).*"}
WEIGHTS = {"tiny-t5": ".*EncDecAttention.(q|v).*", "tiny-llama": ".*mlp.gate_proj.*"}
LLAMA = (
    "--model_name_or_path", "llama-2-7b", "--lora_modules", LORA["tiny-llama"],
    "--optim_target_modules", WEIGHTS["tiny-llama"], "--gpus", "2", "--bf16", "--activation_checkpointing",
)  # fmt: skip
ROWS, SOURCE, ANSWER = 3, 40, 12


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options_of(name: str, *more: str):
    return parse_arguments([
        "--model_name_or_path", str(ROOT / "initial_model" / name), "--lora_modules", LORA[name],
        "--optim_target_modules", WEIGHTS[name], "--stage", "0", "--lora_dropout", "0",
        "--per_device_train_batch_size", str(ROWS), "--max_source_length", str(SOURCE),
        "--max_target_length", str(ANSWER), *more,
    ])  # fmt: skip


def prepared(name: str) -> Gorp:
    """The method on the real model, as the entry sets it up for a run under DeepSpeed, but trained in one process."""
    loaded = load_model_and_tokenizer(str(ROOT / "initial_model" / name))
    settings = MethodArguments(lora_modules=LORA[name], lora_dropout=0.0, lamda_1=0.0)
    settings.optim_target_modules = [WEIGHTS[name]]
    method = Gorp(settings)
    method.prepare(loaded.model, None, decoder_only=loaded.decoder_only, sharded=True).train()
    method.create_optimizer(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    method.begin_training(None)
    return method


def loss_of(method: Gorp) -> torch.Tensor:
    """Of one padded batch, the planned number of tokens wide."""
    generator = torch.Generator().manual_seed(0)
    source, answer = (torch.randint(3, 1000, (ROWS, n), generator=generator) for n in (SOURCE, ANSWER))
    if not method.model.config.is_encoder_decoder:
        source, answer = torch.cat((source, answer), 1), torch.cat((torch.full_like(source, -100), answer), 1)
    mask = torch.ones_like(source)
    mask[0, :5] = 0
    return method.model(input_ids=source, attention_mask=mask, labels=answer).loss


def step(method: Gorp) -> int:
    """One optimizer step; the bytes that autograd kept for it, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in method.model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
        return tensor

    method.begin_micro_batch(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(method)
    count = sum(size for size, _ in kept.values())
    kept.clear()
    loss.backward()
    method.optimizer.step()
    method.optimizer.zero_grad()
    return count


# ------------------------------------------------------------------------------------------ against real models


@pytest.mark.parametrize("name", LORA)
def test_counts_and_optimizer_state_are_those_of_the_real_run(name):
    plan, method = make_plan(options_of(name)), prepared(name)
    trained = [p for p in method.model.parameters() if p.requires_grad]
    assert plan.trained == sum(p.numel() for p in trained)
    assert plan.lora == sum(factor.numel() for _, factor in method.factors())
    assert plan.parameters == sum(p.numel() for p in method.model.parameters()) - plan.trained
    step(method)
    state = sum(v[key].nbytes for v in method.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert plan.resident["fp32 masters and Adam moments"] == state
    assert plan.resident["trained values in the model"] == sum(p.nbytes for p in trained)
    report = method.cores.report()
    assert (plan.cores, plan.weights) == (report["core_numbers"], report["weights"])
    assert plan.resident["bases"] == report["basis_bytes"] > 0
    sharded = make_plan(options_of(name, "--stage", "2", "--gpus", "1"))
    cores_only = 12 * sharded.cores
    assert cores_only == report["optimizer_bytes"]
    assert sharded.resident["fp32 masters and Adam moments"] == 12 * sharded.trained


@pytest.mark.parametrize("name", LORA)
def test_activations_are_what_autograd_keeps(name):
    options, method = options_of(name), prepared(name)
    plan = make_plan(options)
    model = plan_memory.build_on_meta(plan_memory.read_config(options.model_name_or_path))
    shapes = plan_memory.Shapes.of(model.config)
    layers = match_linear(model, [LORA[name]], "--lora_modules")
    for refresh in (True, False):  # the first step takes bases, the second has them
        planned = sum(layer_bytes(shapes, layers, plan, options, refresh))
        kept = step(method) - 4 * ROWS * ANSWER * shapes.vocabulary  # log-softmax
        assert planned == pytest.approx(kept, rel=0.06)


def test_frozen_lora_is_that_of_folded_tasks():
    method = prepared("tiny-llama")
    for _ in range(2):
        fold_loranew(method.model)
        renew_loranew(method.model)
    old = sum(p.numel() for name, p in method.model.named_parameters() if ".lora_A." in name or ".lora_B." in name)
    assert make_plan(options_of("tiny-llama", "--tasks_before", "2")).lora_old == old > 0


@pytest.mark.parametrize("micro_batches", (1, 2, 8))
def test_collected_gradient_is_as_large_as_the_real_one(micro_batches):
    shape, tokens = (24, 16), 4
    gradient = LayerGradient(shape)
    for _ in range(micro_batches):
        gradient.add(torch.randn(tokens, 24), torch.randn(tokens, 16))
    tensors = [x for pair in gradient._factors for x in pair] or [gradient._matrix]
    assert Target(shape, (None, 2), tokens).collected(micro_batches, 4) == sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("proj_type", ("std", "reverse_std", "full"))
def test_numbers_of_a_sketch_are_those_of_its_products(proj_type):
    G, sent = torch.randn(40, 30), 0

    def counted(product: torch.Tensor) -> torch.Tensor:
        nonlocal sent
        sent += product.numel()
        return product

    ranks = mode_ranks(G.shape, 4, proj_type)
    bases, _ = sketched_bases(
        lambda M: counted(G @ M), lambda M: counted(G.mT @ M), G.shape, ranks, None, 0, torch.device("cpu")
    )
    sent += sum(basis.numel() for basis in bases if basis is not None)
    assert Target((40, 30), ranks, tokens=1).sent_at_refresh("sketch") == sent


# ------------------------------------------------------------------------------------------ what the plan says


def test_llama_7b_is_planned_in_seconds_and_fits_two_gpus_of_24_gib():
    start = time.perf_counter()
    options = parse_arguments([*LLAMA, "--gpu_gib", "24"])
    plan = make_plan(options)
    assert time.perf_counter() - start < 30
    assert plan.parameters == 6_738_415_616
    assert plan.resident["weights"] == 2 * plan.parameters
    assert plan.resident["rounding error of 16-bit targets"] == 2 * 32 * 11008 * 4096
    assert plan.largest[0] == "weights"
    assert 16 * GIB < plan.peak < 20 * GIB
    last = plan_memory.describe(plan, options)[-1]
    assert last.startswith("verdict: fits in 2 x 24 GiB: ") and "largest part: weights, 12.55 GiB" in last
    options.gpu_gib = 16.0
    assert plan_memory.verdict(plan, options).startswith("verdict: does not fit in 2 x 16 GiB: ")


def test_llama_7b_accumulation_keeps_whole_gradients():
    options = parse_arguments([*LLAMA, "--gradient_accumulation_steps", "32"])
    plan = make_plan(options)
    collected = plan.moments["a refresh step, backward ends"]["refresh: gradients collected so far"]
    assert collected == 4 * plan.weights
    assert plan_memory.verdict(plan, options).startswith("verdict: fits in 2 x 24 GiB (too close to rely on): ")


def test_llama_7b_against_dense():
    plan = make_plan(parse_arguments(LLAMA))
    assert plan.weights / plan.cores == 512
    assert plan.weights / plan.trained > 200
    # Refreshes count: whole gradients bring the factor to the order of the gap, sketches do not.
    assert plan.weights / plan.sent("exact", 10) < 10
    assert plan.weights / plan.sent("sketch", 10) > 100


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_what_each_stage_shards(stage):
    one, two = (make_plan(options_of("tiny-t5", "--stage", str(stage), "--gpus", n)).resident for n in "12")
    halved = {name for name in one if one[name] and two[name] == one[name] / 2}
    expected = {
        0: set(),
        1: {"fp32 masters and Adam moments"},
        2: {"fp32 masters and Adam moments", "gradients of what trains"},
        3: {"fp32 masters and Adam moments", "gradients of what trains", "weights", "trained values in the model"},
    }
    assert halved == expected[stage]


def test_offloaded_state_is_in_the_cpus_memory():
    kept, away = (make_plan(options_of("tiny-t5", "--stage", "2", *more)) for more in ((), ("--offload_optimizer",)))
    name = "fp32 masters and Adam moments"
    assert away.resident[name] == 0 and away.host[name] == kept.resident[name]


def test_checkpointing_keeps_less():
    plain, less = (make_plan(options_of("tiny-llama", *more)) for more in ((), ("--activation_checkpointing",)))
    moment = "an ordinary step, backward begins"
    assert less.moments[moment]["activations"] < plain.moments[moment]["activations"] / 2


def test_t5_large_preset_has_the_published_size():
    plan = make_plan(parse_arguments([
        "--model_name_or_path", "t5-large", "--lora_modules", LORA["tiny-t5"],
        "--optim_target_modules", WEIGHTS["tiny-t5"],
    ]))  # fmt: skip
    assert plan.parameters == 737_668_096
    assert len(plan.targets) == 48


def test_buckets_are_those_of_the_deepspeed_files():
    for path in (ROOT / "configs" / "ds_configs").glob("stage[123]*.config"):
        zero = json.loads(path.read_text())["zero_optimization"]
        assert zero["reduce_bucket_size"] == plan_memory.BUCKET, path.name
        if zero["stage"] == 3:
            assert zero["stage3_prefetch_bucket_size"] == plan_memory.PREFETCH
            assert zero["stage3_max_live_parameters"] == plan_memory.LIVE


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--lora_modules", ".*nothing.*"), "--lora_modules: '.*nothing.*' matches no module"),
        (("--optim_target_modules", ".*lm_head2"), "--optim_target_modules: '.*lm_head2' matches no module"),
        (("--optim_target_modules", "("), "is no regular expression"),
        (("--galore_rank", "999"), "--galore_rank: found 999; at most 128"),
        (("--gpus", "0"), "found 0; a whole number from 1"),
        (("--gpu_gib", "nan"), "--gpu_gib: found nan"),
        (("--stage", "4"), "argument --stage"),
        (("--stage", "0", "--offload_optimizer"), "--offload_optimizer: found with --stage 0"),
        (("--tasks_before", "-1"), "--tasks_before: found -1"),
        (("--model_name_or_path", "initial_model"), "has no config.json"),
        (("--model_name_or_path", "./missing"), "./missing does not exist"),
        (("--unknown", "1"), "--unknown"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(more, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = plan_memory.main([
        "--model_name_or_path", "initial_model/tiny-t5", "--lora_modules", LORA["tiny-t5"],
        "--optim_target_modules", WEIGHTS["tiny-t5"], *more,
    ])  # fmt: skip
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and said in captured.err


def test_a_config_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    code = plan_memory.main(["--model_name_or_path", str(tmp_path), "--lora_modules", "x",
                             "--optim_target_modules", "x"])
    assert code == 2 and "found model_type 'gpt2'" in capsys.readouterr().err
