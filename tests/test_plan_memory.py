"""The memory plan against counts made by hand from shapes, and against what really exists in small runs."""

import contextlib
import json
import time
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BartConfig, MixtralConfig, OPTConfig

import plan_memory
from helpers import ROOT, renew_loranew
from loranew import fold_loranew
from methods.gorp import Gorp
from model.loading import load_model_and_tokenizer
from plan_memory import BASES, CONTEXT, END, GIB, STATE, STEP, collected, make_plan, parse_arguments, verdict
from Proj_torch.layer_gradient import LayerGradient

LORA = {"tiny-t5": ".*SelfAttention.(q|v).*", "tiny-llama": ".*self_attn.(q_proj|v_proj).*"}
WEIGHTS = {"tiny-t5": ".*EncDecAttention.(q|v).*", "tiny-llama": ".*mlp.gate_proj.*"}
LLAMA = (
    "--model_name_or_path", "llama-2-7b", "--lora_modules", LORA["tiny-llama"],
    "--optim_target_modules", WEIGHTS["tiny-llama"], "--bf16", "--activation_checkpointing",
)  # fmt: skip
ROWS, SOURCE, ANSWER = 3, 40, 12
INPUTS = ("--protect_side", "input", "--space_from", "inputs")

# LLaMA-2-7B by its published shapes: 32 layers of four h x h, three h x f and two norms; embeddings and head; a norm.
H, WIDE, LAYERS, VOCABULARY = 4096, 11008, 32, 32000
PARAMETERS = LAYERS * (4 * H * H + 3 * H * WIDE + 2 * H) + 2 * VOCABULARY * H + H
GATES = LAYERS * H * WIDE
NEW_LORA = LAYERS * 2 * 8 * (H + H)  # rank 8 on q_proj and v_proj
CORES = LAYERS * 8 * WIDE  # `std` projects the shorter side, in: L = W's rows, R^T of rank 8


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plan_of(*words: str):
    options = parse_arguments(words)
    return make_plan(options), options


def tiny(name: str, *more: str):
    return plan_of(
        "--model_name_or_path", str(ROOT / "initial_model" / name), "--lora_modules", LORA[name],
        "--optim_target_modules", WEIGHTS[name], "--lora_dropout", "0",
        "--per_device_train_batch_size", str(ROWS), "--max_source_length", str(SOURCE),
        "--max_target_length", str(ANSWER), *more,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ by hand, LLaMA-2-7B


def test_two_ranks_of_zero_2_hold_what_the_shapes_say():
    start = time.process_time()
    plan, options = plan_of(*LLAMA, "--gpus", "2", "--gpu_gib", "24", *INPUTS)
    assert options.stage == 2 and time.process_time() - start < 60
    assert plan.parameters == (PARAMETERS, NEW_LORA, CORES, GATES)
    assert plan.parameters == (6_738_415_616, 4_194_304, 2_818_048, 1_442_840_576)
    trained = NEW_LORA + CORES
    assert plan.resident == {
        "weights": 2 * PARAMETERS,
        "frozen LoRA of earlier tasks": 0,
        "trainable parameters in the model": 2 * trained,
        STATE: 12 * trained // 2,
        "gradients": 2 * trained // 2,
        "bases": 4 * LAYERS * 8 * H,
        "rounding error of 16-bit targets": 2 * GATES,
        "DeepSpeed's buffers": 2 * 2 * 200_000_000,
        "CUDA context (assumed)": CONTEXT,
    }
    # Twelve bytes a value: the weight in float32, what a fold adds to it, and their sum.
    assert plan.moments[END]["one weight and its copies"] == 12 * H * WIDE
    # Each rank reads the model on the CPU.
    assert plan.host == {"loading": 2 * PARAMETERS + 4 * NEW_LORA, END: 4 * H * WIDE}  # saved one at a time
    said = verdict(plan, options)
    assert said.startswith("verdict: fits in 2 x 24 GiB: 18.") and "largest part: weights, 12.55 GiB" in said
    assert said.endswith("the CPU's memory: 25.1 GiB in total")
    options.gpu_gib = 16.0
    assert verdict(plan, options).startswith("verdict: does not fit in 2 x 16 GiB: ")
    options.gpu_gib = plan.peak()[0] / GIB / 0.95
    assert "(too close to rely on)" in verdict(plan, options)


def test_stage_3_holds_the_complete_model_while_it_loads():
    plan, options = plan_of(*LLAMA, "--gpus", "8", "--stage", "3", *INPUTS)
    assert plan.resident["weights"] == 2 * PARAMETERS / 8
    assert plan.moments["loading"]["weights, complete"] == 2 * (PARAMETERS + NEW_LORA + CORES)
    assert plan.peak() == (2 * (PARAMETERS + NEW_LORA + CORES) + CONTEXT, "loading")


def test_a_space_from_moments_takes_thin_factors():
    plan, _ = plan_of(*LLAMA, "--gpus", "2")
    assert plan.moments[END]["first moments, as factors"] == 4 * (LAYERS * 8 * (H + WIDE) + NEW_LORA) < GIB / 20


def test_llama_7b_in_16_bits_fits_one_gpu_of_24_gib_without_deepspeed():
    plan, options = plan_of(*LLAMA, "--gpus", "1")
    assert options.stage is None and options.cores
    assert plan.resident == {
        "weights": 2 * PARAMETERS,
        "frozen LoRA of earlier tasks": 0,
        "trainable parameters in the model": 4 * (NEW_LORA + CORES),  # float32, beside 16-bit weights
        STATE: 8 * (NEW_LORA + CORES),  # moments alone
        "gradients": 4 * (NEW_LORA + CORES),
        "bases": 4 * LAYERS * 8 * H,
        "rounding error of 16-bit targets": 2 * GATES,
        "DeepSpeed's buffers": 0,
        "CUDA context (assumed)": CONTEXT,
    }
    assert plan.moments[STEP]["16-bit copies of weights"] == 0
    assert verdict(plan, options).startswith("verdict: fits in 1 x 24 GiB: 17.")
    accumulated, options = plan_of(*LLAMA, "--gradient_accumulation_steps", "64")  # as the scripts run it
    assert accumulated.moments[STEP]["gradients collected"] == 4 * GATES
    assert "too close" in verdict(accumulated, options)
    sketched, options = plan_of(*LLAMA, "--gpu_gib", "16")
    assert verdict(sketched, options).startswith("verdict: does not fit in 1 x 16 GiB")


def test_dense_gradients_on_one_gpu_hold_float32_weights():
    plan, options = plan_of(*LLAMA, "--galore_engine", "dense")
    assert plan.resident["weights"] == 4 * PARAMETERS
    assert plan.resident["gradients"] == 4 * (NEW_LORA + GATES)
    assert plan.moments[STEP]["16-bit copies of weights"] == pytest.approx(2 * PARAMETERS / LAYERS, rel=0.01)
    assert "does not fit in 1 x 24 GiB" in verdict(plan, options)
    whole, _ = plan_of(*LLAMA[:-1], "--galore_engine", "dense")  # without checkpointing every layer's copies stay
    assert whole.moments[STEP]["16-bit copies of weights"] == pytest.approx(2 * PARAMETERS, rel=0.01)


def test_accumulation_collects_complete_gradients():
    plan, options = plan_of(*LLAMA, "--gpus", "2", "--gradient_accumulation_steps", "32", *INPUTS)
    assert plan.moments[STEP]["gradients collected"] == 4 * GATES
    assert verdict(plan, options).startswith("verdict: fits in 2 x 24 GiB (too close to rely on): ")


def test_checkpointing_keeps_each_layers_input_and_one_layer():
    plain, less = (plan_of(*words, "--gpus", "2")[0].moments[STEP]["activations"] for words in (LLAMA[:-1], LLAMA))
    inputs = LAYERS * (512 + 50) * H * 2
    assert inputs + plain / LAYERS == pytest.approx(less, rel=0.1)


# ------------------------------------------------------------------------------------------ by hand, small


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_what_each_stage_shards(stage):
    one, two = (tiny("tiny-t5", "--stage", str(stage), "--gpus", n)[0].resident for n in "12")
    halved = {name for name in one if one[name] and two[name] == one[name] / 2}
    expected = {
        0: set(),
        1: {STATE},
        2: {STATE, "gradients"},
        3: {STATE, "gradients", "weights", "trainable parameters in the model"},
    }
    assert halved == expected[stage]


def test_offloaded_state_is_in_the_cpus_memory():
    kept, away = (tiny("tiny-t5", "--stage", "2", *more)[0] for more in ((), ("--offload_optimizer",)))
    assert away.resident[STATE] == 0 and away.host[END] - kept.host[END] == kept.resident[STATE] > 0


def test_t5_large_preset_has_the_published_size():
    plan, _ = plan_of("--model_name_or_path", "t5-large", "--lora_modules", LORA["tiny-t5"],
                      "--optim_target_modules", WEIGHTS["tiny-t5"])  # fmt: skip
    assert plan.parameters[0] == 737_668_096
    assert plan.parameters[3] == 48 * 1024 * 1024


def test_buffers_are_those_of_the_deepspeed_files():
    for path in (ROOT / "configs" / "ds_configs").glob("stage[123]*.config"):
        zero = json.loads(path.read_text())["zero_optimization"]
        assert zero["reduce_bucket_size"] == plan_memory.BUCKET, path.name
        if zero["stage"] == 3:
            assert zero["stage3_prefetch_bucket_size"] == plan_memory.PREFETCH
            assert zero["stage3_max_live_parameters"] == plan_memory.LIVE


# ------------------------------------------------------------------------------------------ against real models


def prepared(name: str, sharded: bool = True) -> Gorp:
    """The method on the real model, as the entry sets it up, by default for DeepSpeed, but trained in one process."""
    loaded = load_model_and_tokenizer(str(ROOT / "initial_model" / name))
    settings = Gorp.Arguments(lora_modules=LORA[name], lora_dropout=0.0, lamda_1=0.0)
    settings.optim_target_modules = [WEIGHTS[name]]
    method = Gorp(settings)
    method.prepare(loaded.model, None, decoder_only=loaded.decoder_only, sharded=sharded).train()
    method.create_optimizer(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    method.begin_training(None)
    return method


def step(method: Gorp) -> int:
    """One optimizer step on a padded batch; the bytes that autograd kept for it, weights left out."""
    generator = torch.Generator().manual_seed(0)
    source, answer = (torch.randint(3, 1000, (ROWS, n), generator=generator) for n in (SOURCE, ANSWER))
    if not method.model.config.is_encoder_decoder:
        source, answer = torch.cat((source, answer), 1), torch.cat((torch.full_like(source, -100), answer), 1)
    mask = torch.ones_like(source)
    mask[0, :5] = 0
    weights = {parameter.untyped_storage().data_ptr() for parameter in method.model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
        return tensor

    method.begin_micro_batch(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = method.model(input_ids=source, attention_mask=mask, labels=answer).loss
    count = sum(size for size, _ in kept.values())
    kept.clear()
    loss.backward()
    method.optimizer.step()
    return count


@pytest.mark.parametrize("name", LORA)
def test_counts_and_optimizer_state_are_those_of_the_real_run(name):
    (plan, _), method = tiny(name, "--stage", "0"), prepared(name)
    trained = [p for p in method.model.parameters() if p.requires_grad]
    values, lora, cores, weights = plan.parameters
    assert lora + cores == sum(p.numel() for p in trained)
    assert values == sum(p.numel() for p in method.model.parameters()) - lora - cores
    step(method)
    state = sum(v[key].nbytes for v in method.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert plan.resident[STATE] == state
    assert plan.resident["trainable parameters in the model"] == sum(p.nbytes for p in trained)
    layers = method.engine.layers.values()
    assert cores == sum(layer.core.numel() for layer in layers)
    assert weights == sum(layer.weight.numel() for layer in layers)
    assert plan.resident["bases"] == sum(basis.nbytes for layer in layers for basis in layer.bases if basis is not None)


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Plans count what autograd keeps on a CPU."""
    monkeypatch.setattr(plan_memory, "GpuKernels", contextlib.nullcontext)


def kept_by(run: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward pass of an operation, with what the operation was given."""
    kept = {}
    with plan_memory.GpuKernels(), torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.update({x.untyped_storage()._cdata: x.untyped_storage()}), lambda x: x):  # fmt: skip
        run()
    return sum(storage.nbytes() for storage in kept.values())


def test_a_gpu_keeps_of_dropout_a_byte_for_each_value():
    x = torch.empty(10, 20, device="meta", requires_grad=True)
    assert kept_by(lambda: F.dropout(x, 0.1)) == kept_by(lambda: torch.nn.Dropout(0.1)(x)) == x.numel()
    assert kept_by(lambda: F.dropout(x, 0.1, training=False)) == kept_by(lambda: F.dropout(x, 0.0)) == 0


def test_a_gpu_keeps_scores_only_if_the_masks_values_do_not_lie_side_by_side():
    heads, length, size = 3, 50, 4
    query, key, value = torch.empty(3, 1, heads, length, size, device="meta", requires_grad=True).unbind()
    values, mask = 4 * heads * length * size, torch.empty(1, heads, length, length, device="meta")
    scores = heads * length * length
    attend = F.scaled_dot_product_attention
    assert kept_by(lambda: attend(query, key, value)) == 3 * values + values + 4 * heads * length
    assert kept_by(lambda: attend(query, key, value, attn_mask=mask)) == 4 * values + 4 * heads * length + 4 * scores
    mask = torch.empty(1, length, length, heads, device="meta").permute(0, 3, 1, 2)
    spread = kept_by(lambda: attend(query, key, value, attn_mask=mask, dropout_p=0.1))
    assert spread >= 4 * scores + scores + 4 * scores  # softmax, dropout's mask, what is left
    assert kept_by(lambda: attend(query, key, value, mask, 0.0)) <= spread - 5 * scores


@pytest.mark.parametrize("name", LORA)
def test_activations_are_those_that_autograd_keeps(name, on_a_cpu):
    """Fewer in these small models, as the CPU's fused attention keeps copies that the meta device does not."""
    plan, _ = tiny(name, "--stage", "0")
    method = prepared(name)
    kept = step(method) - 4 * ROWS * ANSWER * method.model.config.vocab_size  # log-softmax
    assert 0.85 * kept <= plan.moments[STEP]["activations"] <= 1.05 * kept


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operations meet, for as long as they are there."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.held:
            self.held[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, sum(self.held.values()))
            weakref.finalize(storage, self.held.pop, storage._cdata, None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.note(tensor)
        return result

    def peak_of(self, run: Callable[[], object]) -> int:
        self.peak = 0
        run()
        return self.peak


@pytest.mark.parametrize("name", LORA)
def test_the_planned_peaks_are_near_the_real_ones(name, on_a_cpu):
    (plan, _), method = tiny(name), prepared(name, sharded=False)
    planned = {moment: sum(parts.values()) - CONTEXT for moment, parts in plan.moments.items()}
    with Live() as live:
        for parameter in method.model.parameters():
            live.note(parameter.data)
        for _ in range(2):  # the first step makes the optimizer's state
            trained = live.peak_of(lambda: step(method))
        ended = live.peak_of(method.end_task)
    for found, expected in ((trained, max(planned[STEP], planned[BASES])), (ended, planned[END])):
        assert 0.95 * found <= expected <= 1.2 * found, planned


def test_frozen_lora_is_that_of_folded_tasks():
    method = prepared("tiny-llama")
    for _ in range(2):
        fold_loranew(method.model)
        renew_loranew(method.model)
    old = sum(p.numel() for name, p in method.model.named_parameters() if ".lora_A." in name or ".lora_B." in name)
    plan, _ = tiny("tiny-llama", "--tasks_before", "2")
    assert plan.resident["frozen LoRA of earlier tasks"] == 4 * old > 0


@pytest.mark.parametrize("micro_batches", (1, 2, 8))
def test_collected_gradient_is_as_large_as_the_real_one(micro_batches):
    gradient = LayerGradient((24, 16))
    for _ in range(micro_batches):
        gradient.add(torch.randn(4, 24), torch.randn(4, 16))
    tensors = [x for pair in gradient._factors for x in pair] or [gradient._matrix]
    assert collected((24, 16), 4 * micro_batches, 4) == sum(x.nbytes for x in tensors)


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--lora_modules", ".*nothing.*"), "--lora_modules: '.*nothing.*' matches no module"),
        (("--optim_target_modules", ".*lm_head2"), "--optim_target_modules: '.*lm_head2' matches no module"),
        (("--optim_target_modules", "("), "is not a regular expression"),
        (("--galore_rank", "999"), "--galore_rank: found 999; allowed: at most 128"),
        (("--gpus", "0"), "--gpus: found 0; allowed: 1 or more"),
        (("--gpu_gib", "nan"), "--gpu_gib: found nan"),
        (("--stage", "4"), "argument --stage"),
        (("--stage", "0", "--offload_optimizer"), "--offload_optimizer: found without --stage 1, 2 or 3"),
        (("--stage", "2", "--galore_engine", "dense"), "--galore_engine: found dense"),
        (("--galore_svd", "sketch"), "--galore_svd: found sketch without --deepspeed"),
        (("--tasks_before", "-1"), "--tasks_before: found -1"),
        (("--model_name_or_path", "initial_model"), "no model can be built for initial_model"),
        (("--model_name_or_path", "./missing"), "no model can be built for ./missing"),
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


@pytest.mark.parametrize("targets", ("none", "lm_head"))
def test_no_full_rank_weights_and_the_output_layer_have_plans(targets):
    plan, options = plan_of(*LLAMA, "--optim_target_modules", targets, "--proj_lora_modules", ".*loranew_A.*")
    assert plan.parameters[3] == (VOCABULARY * H if targets == "lm_head" else 0)
    assert (plan.moments[STEP]["gradients collected"] > 0) == (targets == "lm_head")


def test_experts_in_float32_take_twice_what_they_take_in_16_bits(tmp_path):
    MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=2, num_local_experts=4).save_pretrained(tmp_path)  # fmt: skip
    words = ("--model_name_or_path", str(tmp_path), "--lora_modules", "auto", "--optim_target_modules", "none",
             "--proj_lora_modules", ".*loranew_A.*")  # fmt: skip
    full, half = (plan_of(*words, *more)[0].moments[STEP]["activations"] for more in ((), ("--bf16",)))
    assert 1.8 * half < full <= 2.1 * half


def test_bart_has_a_plan_and_what_takes_other_masks_is_one_line(tmp_path, capsys):
    BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
               decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48).save_pretrained(tmp_path / "bart")
    plan, _ = plan_of("--model_name_or_path", str(tmp_path / "bart"), "--lora_modules", "auto",
                      "--optim_target_modules", "auto", "--proj_lora_modules", "auto")
    assert plan.moments[STEP]["activations"] > 0
    OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2,
              word_embed_proj_dim=32).save_pretrained(tmp_path / "opt")  # fmt: skip
    code = plan_memory.main(["--model_name_or_path", str(tmp_path / "opt"), "--lora_modules", ".*q_proj",
                             "--optim_target_modules", ".*fc1"])
    assert code == 2 and "a step of model_type 'opt' cannot be planned (" in capsys.readouterr().err


def test_a_config_of_another_kind_is_rejected(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    code = plan_memory.main(["--model_name_or_path", str(tmp_path), "--lora_modules", "x",
                             "--optim_target_modules", "x"])
    assert code == 2 and "found model_type 'vit'" in capsys.readouterr().err
