"""Whether a GORP run fits: bytes on each rank, from a model's config alone, before any weight is read or GPU rented.

    python src/plan_memory.py --model_name_or_path llama-2-7b --gpus 2 --gpu_gib 24 --stage 2 --bf16
        --activation_checkpointing --lora_modules '.*self_attn.(q_proj|v_proj).*'
        --optim_target_modules '.*mlp.gate_proj.*'

The model is built and run forward on the meta device, which holds no values: numbers of parameters and what autograd
keeps are counted. With e bytes a value in the model:

* One GPU without `--stage` is a run without DeepSpeed: e = 4 whatever the precision of training. Under `--bf16`,
  autocast also keeps a 16-bit copy of every weight until the backward pass; with checkpointing, of one layer at a time.
* Under DeepSpeed (e = 2 with `--bf16`) ZeRO divides optimizer state between ranks (stages 1 to 3), gradients (2, 3) and
  weights (3), the last only once each GPU has held all of them. Its buffers are those of configs/ds_configs.
* A step that takes bases collects each target's gradient, as factors of e (out + in) bytes a token or in float32 where
  that is smaller; an SVD makes one such gradient and copies of it at a time.
* A task's end makes float32 copies of one weight; with `--space_from moments`, `gorp`'s default, cores give all
  moments at once.
* Assumed: 1 GiB for CUDA and NCCL; attention that keeps queries, keys, values, output and mask, but no scores; e (3 f +
  2 h) bytes a token for a layer's own backward pass, f its widest and h its hidden size; 12 bytes a value of LLaMA's
  logits and 3 e of the others', at answer tokens.

Not counted: the shared space S (4 bytes x side of the weight for each direction), lamda_3's copies, evaluation,
fragmentation of the GPU's memory.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForSeq2SeqLM, LlamaConfig, T5Config
from transformers.hf_argparser import string_to_bool
from transformers.modeling_layers import GradientCheckpointingLayer

from arguments import check
from command_line import Parser
from errors import InputError, entry_point
from loranew import LoraNewConfig, add_loranew
from model.llama import LlamaForCausalLM_with_lossmask
from module_matching import check_rank, match_linear
from Proj_torch.layer_gradient import OVERSAMPLING
from Proj_torch.proj_projector import PROJ_TYPES, mode_ranks
from Proj_torch.zero_core import REFRESHES

GIB = 1024**3
CONTEXT = GIB
MARGIN = 0.1  # of a GPU, below which a plan warns: its own error, and fragmentation
BUCKET = 200_000_000  # reduce_bucket_size of configs/ds_configs, values
PREFETCH, LIVE = 50_000_000, 1_000_000_000  # stage3_prefetch_bucket_size, stage3_max_live_parameters, values
PRESETS = {
    "llama-2-7b": lambda: LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096, tie_word_embeddings=False),
    "t5-large": lambda: T5Config(
        vocab_size=32128, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, feed_forward_proj="relu",
        decoder_start_token_id=0),
}  # fmt: skip
STATE = "fp32 masters and Adam moments"


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank, by part.

    Attributes:
        values: numbers of values: the model's, the new LoRA's, those that train in place of full-rank weights, theirs.
        resident: what is there all the time. moments: all parts at each moment that can be the fullest.
        host: all parts at moments in the CPU's memory.
    """

    values: tuple[int, int, int, int]
    resident: dict[str, int]
    moments: dict[str, dict[str, int]]
    host: dict[str, dict[str, int]]

    def peak(self) -> tuple[int, str]:
        """Bytes at the fullest moment, and its name."""
        return max((sum(parts.values()), name) for name, parts in self.moments.items())


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan for the options of `parse_arguments`.

    Raises:
        InputError: no such model, one of a kind that is not trained here, or an expression or a rank that does not fit.
    """
    stage, dense, value = options.stage or 0, options.galore_engine == "dense", _value(options)
    model = build_on_meta(options.model_name_or_path).to(torch.bfloat16 if value == 2 else torch.float32)
    values = sum(parameter.numel() for parameter in model.parameters())
    check_rank(match_linear(model, [options.lora_modules], "--lora_modules"), options.lora_dim, "--lora_dim")
    targets = match_linear(model, options.optim_target_modules, "--optim_target_modules")
    check_rank(targets, options.galore_rank, "--galore_rank")
    model.requires_grad_(False)
    config = LoraNewConfig(r=options.lora_dim, r_sum=options.tasks_before * options.lora_dim,
                           lora_dropout=options.lora_dropout, target_modules=options.lora_modules)  # fmt: skip
    model = add_loranew(model, config).get_base_model()
    lora, old = (sum(p.numel() for p in model.parameters() if p.requires_grad == trains) for trains in (True, False))
    old -= values
    shapes = [tuple(layer.weight.shape) for layer in targets.values()]
    ranks = [mode_ranks(shape, options.galore_rank, options.galore_proj_type) for shape in shapes]
    cores = sum((left or out) * (right or inp) for (out, inp), (left, right) in zip(shapes, ranks))
    bases = sum((left or 0) * out + (right or 0) * inp for (out, inp), (left, right) in zip(shapes, ranks))
    weights, largest = (of(out * inp for out, inp in shapes) for of in (sum, max))

    trained, in_model = lora + cores, lora + (0 if dense else cores)
    masters = 2 if value == 4 and not stage else 3  # without ZeRO the float32 values in the model are the masters
    state = _share(4 * masters * trained, stage >= 1, options)
    resident = {
        "weights": _share(value * values, stage == 3, options),
        "frozen LoRA of earlier tasks": _share(value * old, stage == 3, options),
        "trained values in the model": _share(value * in_model, stage == 3, options),
        STATE: 0 if options.offload_optimizer else state,
        "gradients": _share(value * (lora + weights if dense else trained), stage >= 2, options),
        "bases": 4 * bases,
        "rounding error of 16-bit targets": 2 * weights if value == 2 else 0,
        "DeepSpeed's buffers": _buffers(values, options),
        "CUDA context (assumed)": CONTEXT,
    }
    layers, inputs, tokens = count_activations(model, targets, options)
    *layers, outside = layers
    activations = outside + (sum(inputs) + max(layers) if options.activation_checkpointing else sum(layers))
    copies = 2 * values // (len(layers) if options.activation_checkpointing else 1)
    logits, working = _backward(model, options)
    svd = max(_decomposition(shape, of_shape, options) for shape, of_shape in zip(shapes, ranks))
    before, after = (
        sum(collected(shape, count * tokens[name], value) for name, shape in zip(targets, shapes)) * (not dense)
        for count in (options.gradient_accumulation_steps - 1, options.gradient_accumulation_steps)
    )
    from_moments = options.space_from == "moments"
    moments = {
        "loading": {"weights, complete": value * (values + old + in_model), "CUDA context (assumed)": CONTEXT},
        "a refresh step, backward begins": resident | {
            "activations": activations,
            "16-bit copies of weights": copies if options.bf16 and value == 4 else 0,
            "gradients collected so far": before,
            "logits and backward, one SVD": max(logits, working) + svd,
        },
        "a refresh step, backward ends": resident | {
            "activations": outside + max(layers),
            "gradients collected so far": after,
            "logits and backward, one SVD": working + svd,
        },
        "the task's end": resident | {
            "one weight and its copies": 12 * largest,
            "first moments": from_moments * (8 * largest if dense else 4 * (weights + lora)),
            "a forward pass": working * (not from_moments),
        },
    }  # fmt: skip
    host = {
        "loading": {"weights, fp32": 4 * (values + old + lora)},
        "the task's end": {
            STATE: state if options.offload_optimizer else 0,
            "full-rank weights to save, fp32": 4 * weights,
            "first moments": from_moments * 4 * (weights + lora),
        },
    }
    return Plan((values, lora, cores, weights), resident, moments, host)


def _value(options: argparse.Namespace) -> int:
    """Bytes of a value in the model."""
    return 2 if options.bf16 and options.stage is not None else 4


def _share(count: int, is_shared: bool, options: argparse.Namespace) -> int:
    return -(-count // options.gpus) if is_shared else count


def _buffers(values: int, options: argparse.Namespace) -> int:
    if options.stage in (1, 2):  # two, for communication overlaps with the backward pass; stage 1 sums in fp32
        return 2 * BUCKET * (4 if options.stage == 1 else _value(options))
    return _value(options) * (BUCKET + PREFETCH + min(LIVE, values)) if options.stage == 3 else 0


def _backward(model: nn.Module, options: argparse.Namespace) -> tuple[int, int]:
    """Bytes of the logits and their gradients, and of a layer's own backward pass."""
    rows, source, answer = options.per_device_train_batch_size, options.max_source_length, options.max_target_length
    linear = {module.out_features for module in model.modules() if isinstance(module, nn.Linear)}
    widths = 3 * max(linear - {model.get_output_embeddings().out_features}) + 2 * model.config.hidden_size
    if model.config.is_encoder_decoder:
        return rows * answer * model.config.vocab_size * 3 * _value(options), rows * source * widths * _value(options)
    return rows * answer * model.config.vocab_size * 12, rows * (source + answer) * widths * _value(options)


def collected(shape: tuple[int, int], tokens: int, value: int) -> int:
    """Bytes of a target's gradient after so many tokens, in the form that `LayerGradient` keeps."""
    out, inp = shape
    numbers = tokens * (out + inp)
    return 4 * out * inp if numbers > out * inp else numbers * value


def _decomposition(shape: tuple[int, int], ranks: tuple[int | None, int | None], options: argparse.Namespace) -> int:
    """Bytes to take bases from one gradient: it and its copies in fp32, or only thin products."""
    if not any(ranks):
        return 0
    sides, small, weight = sum(shape), min(shape), shape[0] * shape[1]
    width = min(max(rank or 0 for rank in ranks) + OVERSAMPLING, small)
    copies = 2 + (options.gpus > 1)  # the gradient, one scaled and, with several ranks, one to sum
    numbers = {"sketch": 4 * sides * width, "lowrank": copies * weight + 3 * sides * width,
               "exact": (copies + 1) * weight + sides * small}  # fmt: skip
    return 4 * numbers[options.galore_svd]


# The model on the meta device


def build_on_meta(name: str) -> nn.Module:
    """The model of a preset, a folder or a hub id, without values; its attention keeps what a GPU's does.

    Raises:
        InputError: there is none, it is neither LLaMA nor an encoder-decoder, or its sizes contradict each other.
    """
    try:
        config = PRESETS[name]() if name in PRESETS else AutoConfig.from_pretrained(name, trust_remote_code=False)
        decoder_only = config.model_type == "llama"
        if decoder_only or config.is_encoder_decoder:
            AttentionInterface.register("planned", _attention)
            config._attn_implementation = "planned"
            with torch.device("meta"):
                build = LlamaForCausalLM_with_lossmask if decoder_only else AutoModelForSeq2SeqLM.from_config
                return build(config)
    except Exception as error:  # whatever the hub's client, a config's own checks or a model's layers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--model_name_or_path: no model can be built for {name} ({reason}); a folder with "
                         f"config.json, a hub id such as google-t5/t5-large, or one of {', '.join(PRESETS)}") from None
    raise InputError(f"--model_name_or_path: found model_type {config.model_type!r}; llama and encoder-decoders")


class _Kernel(torch.autograd.Function):
    """Stands for a fused kernel of a GPU: its output, and what it keeps for the backward pass."""

    @staticmethod
    def forward(ctx, output: Tensor, kept: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return output


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, position_bias=None, **_):
    """Attention as `sdpa` computes it on a padded batch: keys and values at full width, a mask of the values' dtype."""
    rows, heads, length, _ = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    mask = query.new_empty(rows, 1 if position_bias is None else heads, length, key.shape[2])
    output = query.new_empty(rows, length, heads, value.shape[3])
    return _Kernel.apply(output, (query, key, value, mask, output), query, key, value), None


def _dropout(x: Tensor) -> Tensor:
    return _Kernel.apply(torch.empty_like(x), [torch.empty_like(x, dtype=torch.bool)], x)


def count_activations(
    model: nn.Module, targets: Mapping[str, nn.Linear], options: argparse.Namespace
) -> tuple[list[int], list[int], dict[str, int]]:
    """Run a micro-batch through `model` on the meta device, and count what autograd keeps until the backward pass.

    Every target keeps its input, as in a step that takes bases.

    Returns:
        Bytes that each layer keeps, last those outside of layers; of each layer's input; tokens that each target sees.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    rows, source, answer = options.per_device_train_batch_size, options.max_source_length, options.max_target_length
    kept, inputs, held = [0] * (len(layers) + 1), [], {}
    tokens = dict.fromkeys(targets, rows * answer)  # what the head sees, which does not run here
    running = len(layers)

    def enter(number: int, *inputs_of_layer: Tensor) -> None:
        nonlocal running
        running = number
        inputs.extend(x.untyped_storage().nbytes() for x in inputs_of_layer)

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in held:
            held[storage._cdata] = x  # so that no other gets its address
            kept[running] += storage.nbytes()
        return x

    def see(name: str, x: Tensor) -> None:
        tokens[name] = x.shape[:-1].numel()
        keep(x)

    for parameter in model.parameters():
        held[parameter.untyped_storage()._cdata] = parameter
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda _, args, number=number: enter(number, args[0]))
        layer.register_forward_hook(lambda *_: enter(len(layers)))
    for name, target in targets.items():
        target.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p:
            module.forward = _dropout
    batch = {"use_cache": False}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        if model.config.is_encoder_decoder:
            prompts = _embedded(model, rows, source)
            batch["encoder_hidden_states"] = model.get_encoder().train()(inputs_embeds=prompts).last_hidden_state
        length = answer if model.config.is_encoder_decoder else source + answer
        model.get_decoder().train()(inputs_embeds=_embedded(model, rows, length), **batch)
    return kept, inputs, tokens


def _embedded(model: nn.Module, rows: int, length: int) -> Tensor:
    weight = model.get_input_embeddings().weight
    return weight.new_empty(rows, length, weight.shape[1])


# Printing it


def describe(plan: Plan, options: argparse.Namespace) -> list[str]:
    """The lines that the program prints; the last one is the verdict."""
    values, lora, cores, weights = plan.values
    engine = "without DeepSpeed" if options.stage is None else f"ZeRO stage {options.stage}"
    lines = [
        f"{options.model_name_or_path}: {values:,} values, {lora + cores:,} train: {lora:,} of the new LoRA, {cores:,} "
        f"in place of full-rank weights of {weights:,}",
        f"bytes on each of {options.gpus} ranks, {engine}, {options.galore_engine}, "
        f"{'bf16' if options.bf16 else 'fp32'}, {options.per_device_train_batch_size} x "
        f"{options.gradient_accumulation_steps} rows, refresh by {options.galore_svd}",
        *(_row(name, count) for name, count in plan.resident.items()),
    ]
    for place, moments in (("in all", plan.moments), ("in the CPU's memory", plan.host)):
        for moment, parts in moments.items():
            lines += [f"{moment}:", *(_row(name, n) for name, n in parts.items() if n and plan.resident.get(name) != n)]
            lines.append(_row(place, sum(parts.values())))
    return [*lines, verdict(plan, options)]


def _row(name: str, count: int) -> str:
    return f"  {name:<36}{count:>18,}  {count / GIB:8.3f} GiB"


def verdict(plan: Plan, options: argparse.Namespace) -> str:
    """One line: whether the peak fits in each GPU, at which moment it is, its largest part, and the host's memory."""
    (peak, moment), room = plan.peak(), options.gpu_gib * GIB
    close = " (too close to rely on)" if (1 - MARGIN) * room < peak <= room else ""
    name, count = max(plan.moments[moment].items(), key=lambda part: part[1])
    host = options.gpus * max(sum(parts.values()) for parts in plan.host.values())
    return (
        f"verdict: {'fits' if peak <= room else 'does not fit'} in {options.gpus} x {options.gpu_gib:g} GiB{close}: "
        f"{peak / GIB:.2f} GiB on each at {moment}; largest part: {name}, {count / GIB:.2f} GiB; the CPU's memory: "
        f"{host / GIB:.1f} GiB in all"
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; those of the entry have its names and defaults.

    Raises:
        InputError: an unknown option, a missing one, or a value out of range.
    """
    parser = Parser(prog="plan_memory", description="Whether a GORP run fits, from the model's config alone.")
    flag = parser.add_argument
    flag("--model_name_or_path", required=True, help=f"folder with config.json, hub id, or {', '.join(PRESETS)}")
    flag("--gpus", type=int, default=1, help="ranks, one GPU each")
    flag("--gpu_gib", type=float, default=24.0, help="memory of a GPU, GiB")
    flag("--stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage; default: 2, on one GPU no DeepSpeed")
    for name in ("bf16", "offload_optimizer", "activation_checkpointing"):
        flag(f"--{name}", type=string_to_bool, nargs="?", const=True, default=False)
    flag("--lora_modules", required=True, help="regular expression for complete module names")
    flag("--optim_target_modules", required=True, nargs="+", help="regular expressions for complete module names")
    flag("--lora_dropout", type=float, default=0.1)
    flag("--galore_proj_type", default="std", choices=PROJ_TYPES)
    flag("--galore_svd", default="exact", choices=REFRESHES)
    flag("--galore_engine", default="auto", choices=("auto", "dense", "cores"))
    flag("--space_from", default="moments", choices=("inputs", "moments"))
    flag("--tasks_before", type=int, default=0, help="earlier tasks, whose LoRA is frozen")
    sizes = {"lora_dim": 8, "galore_rank": 8, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
             "max_source_length": 512, "max_target_length": 50}  # fmt: skip
    for name, default in sizes.items():
        flag(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    if options.stage is None and options.gpus > 1:
        options.stage = 2
    if options.galore_engine == "auto":
        options.galore_engine = "dense" if options.stage is None else "cores"
    for name in ("gpus", *sizes):
        check(getattr(options, name) >= 1, name, getattr(options, name), "a whole number from 1")
    cores = options.galore_engine == "cores"
    check(options.gpu_gib > 0, "gpu_gib", options.gpu_gib, "a number above 0")
    check(options.tasks_before >= 0, "tasks_before", options.tasks_before, "0 or more")
    check(0 <= options.lora_dropout < 1, "lora_dropout", options.lora_dropout, "0 up to, not including, 1")
    check(options.stage or not options.offload_optimizer, "offload_optimizer", "without --stage 1, 2 or 3", "with one")
    check(cores or options.stage is None, "galore_engine", "dense", "auto or cores under DeepSpeed")
    check(cores or options.galore_svd != "sketch", "galore_svd", "sketch with dense gradients", "exact or lowrank")
    return options


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan; 0, or 2 after one line about bad input. A plan that does not fit is an answer, not a fault."""
    options = parse_arguments(argv)
    print("\n".join(describe(make_plan(options), options)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # libraries' notes on their own future
    sys.exit(main())
