"""Whether a GORP run fits: bytes on each rank, from a model's config alone, before any weight is read or GPU rented.

    python src/plan_memory.py --model_name_or_path llama-2-7b --gpus 2 --gpu_gib 24 --stage 2 --bf16
        --activation_checkpointing --lora_modules '.*self_attn.(q_proj|v_proj).*'
        --optim_target_modules '.*mlp.gate_proj.*'

The run that is planned trains through `Proj_torch.zero_core` under DeepSpeed. Counts of parameters are exact, since the
model is built (on the meta device, which holds no values); what lives only within a step is an estimate. With e bytes
a value (2 with --bf16, else 4), N ranks, T trained values (new LoRA factors and cores):

* resident: weights e each, whole at stages 0 to 2, 1/N at stage 3; the frozen LoRA of earlier tasks likewise; the
  model's own copy of what trains, e T; fp32 master and two Adam moments, 12 T, of which ZeRO (1 to 3) leaves 1/N, or
  nothing with --offload_optimizer (stage 0 in fp32 has no second master: 8 T); gradients e T, 1/N from stage 2 on;
  bases in fp32 and the rounding error of a 16-bit target weight (2 bytes a value), whole on every rank at every stage;
  ZeRO's reduction buckets, as the files in configs/ds_configs size them; CONTEXT for CUDA and NCCL, an assumption.
* activations that autograd keeps, per layer and token, in bytes:

      LLaMA     8 h + e (3 f + 4 a + L) + trained
      T5, BART  (4 + e mod 4) h s + e (u f + 2 a + s_x 2 a + w m L) + dropped + trained, k and v (e 2 a) by their tokens

  h hidden, f feed-forward, a attention width, m heads, L keys, s sublayers (2, decoder 3), s_x cross-attention (0 or
  1), u = 1 (3 if gated), w = attentions whose position bias is kept (1, decoder 2). 8 h and 4 h: a norm's fp32 input.
  LLaMA's keys and values count at full width and its mask L in each layer, as in a padded batch. Dropped: a byte a
  value and dropout. Trained: a LoRA adds e (in + r) + in, its own dropped input and the mask, or e r and one e in for
  the LoRAs of a module together without dropout; a core e k, e in if its input side is not projected or the basis is
  due. Attention never keeps its scores (sdpa). With checkpointing a layer keeps e h, and one whole layer exists at a
  time.
* logits: 12 bytes a value for log-softmax and two gradients (T5 3 e), only at answer tokens: LLaMA's class scores no
  other, T5's decoder has no other. A layer's backward itself takes e (3 f + 2 h).
* refresh step: each target's factors GY and X, e (out + in) a token, or its fp32 gradient where accumulation makes
  that smaller, kept until the optimizer steps. `exact` and `lowrank` also make one target's fp32 gradient at a time,
  and copies: with several ranks one to sum, one scaled, and for the exact SVD its own and the singular vectors.

Not counted: the shared space S (4 bytes x side of the weight for each direction), lamda_3's copies of the target
weights, evaluation, and fragmentation of the GPU's memory.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, LlamaConfig, PretrainedConfig, T5Config

from errors import InputError
from module_matching import check_rank, match_linear
from model.llama import LlamaForCausalLM_with_lossmask
from Proj_torch.layer_gradient import OVERSAMPLING, PROBES
from Proj_torch.proj_projector import PROJ_TYPES, mode_ranks
from Proj_torch.zero_core import REFRESHES

GIB = 1024**3
CONTEXT = GIB  # CUDA context, cuBLAS and NCCL workspaces; not derived from anything
MARGIN = 0.1  # of a GPU, below which a plan says so: its own error, and fragmentation
BUCKET = 200_000_000  # reduce_bucket_size of configs/ds_configs, values
PREFETCH, LIVE = 50_000_000, 1_000_000_000  # stage3_prefetch_bucket_size, stage3_max_live_parameters, values
CROSS_KEYS = re.compile(r".*(EncDecAttention\.[kv]|encoder_attn\.[kv]_proj)")  # these read the encoder's output

PRESETS = {
    "llama-2-7b": lambda: LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096, tie_word_embeddings=False),
    "t5-large": lambda: T5Config(
        vocab_size=32128, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, feed_forward_proj="relu",
        decoder_start_token_id=0),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Target:
    """A full-rank weight that trains by projection.

    Attributes:
        shape: (out, in). ranks: of the left and the right basis, None where that side is not projected.
        tokens: rows of a micro-batch times the tokens of each that pass through it.
        own_input: whether its input is a tensor of its own; the encoder's output is one for all decoder layers.
    """

    shape: tuple[int, int]
    ranks: tuple[int | None, int | None]
    tokens: int
    own_input: bool = True

    @property
    def weight(self) -> int:
        """Values of the weight."""
        return self.shape[0] * self.shape[1]

    @property
    def core(self) -> int:
        """Values of the core, which train."""
        return (self.ranks[0] or self.shape[0]) * (self.ranks[1] or self.shape[1])

    @property
    def bases(self) -> int:
        """Values of the bases."""
        return sum((rank or 0) * size for rank, size in zip(self.ranks, self.shape, strict=True))

    def collected(self, micro_batches: int, value: int) -> int:
        """Bytes of the gradient after so many micro-batches, in the form that `LayerGradient` keeps it in."""
        out, inp = self.shape
        numbers = micro_batches * self.tokens * (out + inp)
        if numbers > self.weight:
            return 4 * self.weight
        return micro_batches * self.tokens * (out + (inp if self.own_input else 0)) * value

    def sent_at_refresh(self, refresh: str) -> int:
        """Numbers that a rank puts into collectives for new bases: gradient or sketch, and the bases themselves."""
        if not self.bases:
            return 0
        if refresh != "sketch":
            return self.weight + self.bases
        out, inp = self.shape if self.ranks[1] is not None else self.shape[::-1]
        width = min((self.ranks[1] or self.ranks[0]) + OVERSAMPLING, out, inp)
        return out * (2 * width + PROBES) + inp * 2 * width + self.bases  # the products in `sketched_bases`


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank, by part; `peak` is the fullest moment of an optimizer step.

    Attributes:
        resident: what is there all the time.
        moments: what else there is at each moment that can be the fullest.
        host: bytes in the CPU's memory for each rank.
        parameters, lora, lora_old: values of the base model, of the new LoRA, of the frozen LoRA.
    """

    targets: dict[str, Target]
    parameters: int
    lora: int
    lora_old: int
    resident: dict[str, int]
    moments: dict[str, dict[str, int]] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Values of all target weights."""
        return sum(target.weight for target in self.targets.values())

    @property
    def cores(self) -> int:
        """Values of all cores."""
        return sum(target.core for target in self.targets.values())

    @property
    def trained(self) -> int:
        """Values that train."""
        return self.lora + self.cores

    @property
    def fullest(self) -> str:
        """Name of the moment with the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.resident.values()) + sum(self.moments[self.fullest].values())

    @property
    def largest(self) -> tuple[str, int]:
        """Name and bytes of the largest part at the fullest moment."""
        return max((self.resident | self.moments[self.fullest]).items(), key=lambda part: part[1])

    def sent(self, refresh: str, gap: int) -> float:
        """Gradient numbers that a rank sends in a step, the refreshes of the targets spread over `gap` steps."""
        return self.trained + sum(target.sent_at_refresh(refresh) for target in self.targets.values()) / gap


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan for the options of `parse_arguments`.

    Raises:
        InputError: no such model, one of a kind that is not trained here, or an expression or a rank that does not fit.
    """
    model = build_on_meta(read_config(options.model_name_or_path))
    lora_layers = match_linear(model, [options.lora_modules], "--lora_modules")
    check_rank(lora_layers, options.lora_dim, "--lora_dim")
    matched = match_linear(model, options.optim_target_modules, "--optim_target_modules")
    check_rank(matched, options.galore_rank, "--galore_rank")
    shapes = Shapes.of(model.config)
    targets = {name: _target(name, tuple(layer.weight.shape), shapes, options) for name, layer in matched.items()}
    lora = sum(options.lora_dim * sum(layer.weight.shape) for layer in lora_layers.values())
    plan = Plan(
        targets, sum(p.numel() for p in model.parameters()), lora, lora * options.tasks_before, resident={}
    )
    plan.resident.update(_resident(plan, options))
    plan.moments.update(_moments(plan, shapes, lora_layers, options))
    plan.host.update(_host(plan, options))
    return plan


def _target(name: str, shape: tuple[int, int], shapes: "Shapes", options: argparse.Namespace) -> Target:
    tokens = options.per_device_train_batch_size * shapes.tokens(name, options)
    ranks = mode_ranks(shape, options.galore_rank, options.galore_proj_type)
    return Target(shape, ranks, tokens, own_input=CROSS_KEYS.fullmatch(name) is None)


# ---------------------------------------------------------------------------------------------- the model


def read_config(name: str) -> PretrainedConfig:
    """The config of a preset, a folder or a hub model.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if name in PRESETS:
        return PRESETS[name]()
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"--model_name_or_path: {name} has no config.json")
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~")) or len(folder.parts) != 2):
        raise InputError(
            f"--model_name_or_path: {name} does not exist; a folder with config.json, a hub id such as "
            f"google-t5/t5-large, or one of {', '.join(PRESETS)}"
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever the hub's client or a config's own checks raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--model_name_or_path: {name}: the config cannot be loaded: {reason}") from error


def build_on_meta(config: PretrainedConfig) -> nn.Module:
    """The model that the entry would train, without values.

    Raises:
        InputError: neither LLaMA nor an encoder-decoder, or sizes that contradict each other.
    """
    decoder_only = config.model_type == "llama"
    if not decoder_only and not config.is_encoder_decoder:
        raise InputError(f"--model_name_or_path: found model_type {config.model_type!r}; llama and encoder-decoders")
    try:
        with torch.device("meta"):
            if decoder_only:
                return LlamaForCausalLM_with_lossmask(config)
            return AutoModelForSeq2SeqLM.from_config(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--model_name_or_path: no model can be built from its config: {reason}") from error


@dataclass(frozen=True)
class Shapes:
    """The sizes that activations depend on, in values."""

    decoder_only: bool
    hidden: int
    attention: int  # heads x width of a head
    heads: int
    feed_forward: int
    feed_forward_kept: int  # u: tensors of that width that autograd keeps
    dropout: bool
    position_bias: bool  # T5: a bias for each pair of positions is kept by every attention
    encoder_layers: int
    decoder_layers: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shapes":
        """Read from a config, whatever its model calls them.

        Raises:
            InputError: a size has none of the names known here.
        """
        decoder_only = config.model_type == "llama"
        heads, hidden = _size(config, "num_attention_heads", "num_heads"), _size(config, "hidden_size", "d_model")
        width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads
        gated = decoder_only or getattr(config, "is_gated_act", False)
        decoder = ("num_hidden_layers",) if decoder_only else ("num_decoder_layers", "decoder_layers")
        return cls(
            decoder_only=decoder_only,
            hidden=hidden,
            attention=heads * width,
            heads=heads,
            feed_forward=_size(config, "intermediate_size", "d_ff", "encoder_ffn_dim"),
            feed_forward_kept=3 if gated else 1,
            dropout=not decoder_only and bool(getattr(config, "dropout_rate", getattr(config, "dropout", 0))),
            position_bias=hasattr(config, "relative_attention_num_buckets"),
            encoder_layers=0 if decoder_only else _size(config, "num_layers", "encoder_layers"),
            decoder_layers=_size(config, *decoder),
            vocabulary=config.vocab_size,
        )

    def tokens(self, module: str, options: argparse.Namespace) -> int:
        """Tokens of a row that pass through a module: prompt and answer, or one of the two."""
        if self.decoder_only:
            return options.max_source_length + options.max_target_length
        of_encoder = "encoder" in module.split(".") or CROSS_KEYS.fullmatch(module)
        return options.max_source_length if of_encoder else options.max_target_length


def _size(config: PretrainedConfig, *names: str) -> int:
    for name in names:
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise InputError(f"--model_name_or_path: the {config.model_type} config has none of {', '.join(names)}")


# ---------------------------------------------------------------------------------------------- resident


def _resident(plan: Plan, options: argparse.Namespace) -> dict[str, int]:
    ranks, stage, value = options.gpus, options.stage, _value(options)
    of_model = ranks if stage == 3 else 1  # how many ranks share the model's weights
    bases = sum(target.bases for target in plan.targets.values())
    return {
        "weights": _share(value * plan.parameters, of_model),
        "frozen LoRA of earlier tasks": _share(value * plan.lora_old, of_model),
        "trained values in the model": _share(value * plan.trained, of_model),
        "fp32 masters and Adam moments": 0 if options.offload_optimizer else _optimizer_state(plan.trained, options),
        "gradients of what trains": _share(value * plan.trained, ranks if stage >= 2 else 1),
        "bases": 4 * bases,
        "rounding error of 16-bit targets": 2 * plan.weights if options.bf16 else 0,
        "DeepSpeed's buffers": _buffers(plan, options),
        "CUDA context (assumed)": CONTEXT,
    }


def _value(options: argparse.Namespace) -> int:
    """Bytes of a value in the model."""
    return 2 if options.bf16 else 4


def _share(count: int, ranks: int) -> int:
    return -(-count // ranks)


def _optimizer_state(trained: int, options: argparse.Namespace) -> int:
    """Bytes of masters and moments; in fp32 without ZeRO the values in the model are the masters."""
    numbers = 2 if options.stage == 0 and not options.bf16 else 3
    return _share(4 * numbers * trained, options.gpus if options.stage else 1)


def _buffers(plan: Plan, options: argparse.Namespace) -> int:
    value = _value(options)
    if options.stage in (1, 2):
        # Two, for communication overlaps with the backward pass; stage 1 keeps its sums in fp32.
        return 2 * BUCKET * (4 if options.stage == 1 else value)
    if options.stage == 3:
        return value * (BUCKET + PREFETCH + min(LIVE, plan.parameters))
    return 0


def _host(plan: Plan, options: argparse.Namespace) -> dict[str, int]:
    host = {"weights while loading, fp32": 4 * plan.parameters}
    if options.offload_optimizer:
        host["fp32 masters and Adam moments"] = _optimizer_state(plan.trained, options)
    return host


# ---------------------------------------------------------------------------------------------- within a step


def _moments(
    plan: Plan, shapes: Shapes, lora_layers: dict[str, nn.Linear], options: argparse.Namespace
) -> dict[str, dict[str, int]]:
    """The transient parts at the moments that can be the fullest."""
    loss, targets = logits_bytes(shapes, options), plan.targets.values()
    working = _backward_bytes(shapes, options)
    gradient = max(_decomposition_bytes(target, options) for target in targets)
    before, after = (
        sum(target.collected(count, _value(options)) for target in targets)
        for count in (options.gradient_accumulation_steps - 1, options.gradient_accumulation_steps)
    )
    ordinary, refresh = (layer_bytes(shapes, lora_layers, plan, options, due) for due in (False, True))
    return {
        "an ordinary step, backward begins": {
            "activations": activation_bytes(ordinary, shapes, options),
            "logits and backward": max(loss, working),
        },
        "a refresh step, cores are folded": {
            # W, a term of it and their sum, in fp32.
            "refresh: one weight and its copies": 12 * max(target.weight for target in targets),
        },
        "a refresh step, backward begins": {
            "activations": activation_bytes(refresh, shapes, options),
            "refresh: gradients collected so far": before,
            "refresh: one gradient and its SVD": gradient,
            "logits and backward": max(loss, working),
        },
        "a refresh step, backward ends": {
            "activations": max(refresh),
            "refresh: gradients collected so far": after,
            "refresh: one gradient and its SVD": gradient,
            "logits and backward": working,
        },
    }


def logits_bytes(shapes: Shapes, options: argparse.Namespace) -> int:
    """Bytes of log-softmax and its two gradients at the answer tokens of a micro-batch."""
    rows = options.per_device_train_batch_size * options.max_target_length
    return rows * shapes.vocabulary * (12 if shapes.decoder_only else 3 * _value(options))


def _backward_bytes(shapes: Shapes, options: argparse.Namespace) -> int:
    tokens = options.max_source_length + (options.max_target_length if shapes.decoder_only else 0)
    widths = 3 * shapes.feed_forward + 2 * shapes.hidden
    return options.per_device_train_batch_size * tokens * widths * _value(options)


def _decomposition_bytes(target: Target, options: argparse.Namespace) -> int:
    """Bytes to take bases from one gradient: it and its copies in fp32, or only thin products."""
    out, inp = target.shape
    small = min(out, inp)
    width = min(max(rank or 0 for rank in target.ranks) + OVERSAMPLING, small)
    if not target.bases:
        return 0
    if options.galore_svd == "sketch":
        return 4 * 4 * (out + inp) * width
    copies = 2 + (options.gpus > 1)
    if options.galore_svd == "lowrank":
        return 4 * (copies * target.weight + 3 * (out + inp) * width)
    return 4 * ((copies + 1) * target.weight + (out + inp) * small)


def layer_bytes(
    shapes: Shapes, lora_layers: dict[str, nn.Linear], plan: Plan, options: argparse.Namespace, refresh: bool
) -> list[int]:
    """Bytes that autograd keeps of one micro-batch in each layer, encoder first, by the head of this file.

    Args:
        refresh: whether bases are due, so that every target keeps its whole input.
    """
    rows, value = options.per_device_train_batch_size, _value(options)
    layers = [_frozen_bytes(shapes, options, decoder=False)] * shapes.encoder_layers
    layers += [_frozen_bytes(shapes, options, decoder=True)] * shapes.decoder_layers
    trained = sum(_lora_bytes(name, layer, shapes, options) for name, layer in lora_layers.items())
    if not options.lora_dropout:  # then the LoRAs of an attention read one tensor
        readers = {name.rpartition(".")[0]: (name, layer.in_features) for name, layer in lora_layers.items()}
        trained += sum(rows * shapes.tokens(name, options) * width * value for name, width in readers.values())
    trained += sum(_core_bytes(target, options, refresh) for target in plan.targets.values())
    return [layer + trained // len(layers) for layer in layers]


def activation_bytes(layers: list[int], shapes: Shapes, options: argparse.Namespace) -> int:
    """Bytes kept when the backward pass begins: of all layers, or their inputs and one layer that is recomputed."""
    if not options.activation_checkpointing:
        return sum(layers)
    source, target = options.max_source_length, options.max_target_length
    tokens = source * shapes.encoder_layers + (target + source * shapes.decoder_only) * shapes.decoder_layers
    return options.per_device_train_batch_size * tokens * shapes.hidden * _value(options) + max(layers)


def _frozen_bytes(shapes: Shapes, options: argparse.Namespace, decoder: bool) -> int:
    """Bytes that one layer of the frozen model keeps of a micro-batch."""
    value, h, a = _value(options), shapes.hidden, shapes.attention
    source, target = options.max_source_length, options.max_target_length
    kept = shapes.feed_forward_kept * shapes.feed_forward
    if shapes.decoder_only:
        tokens = source + target
        return options.per_device_train_batch_size * tokens * (8 * h + value * (kept + 4 * a + tokens))
    tokens, sublayers = (target, 3) if decoder else (source, 2)
    norms = (4 + value % 4) * h * sublayers  # in 16 bits its own input is kept beside the fp32 one
    dropped = (sublayers * h + shapes.feed_forward) if shapes.dropout else 0
    per_token = norms + dropped + value * (kept + 4 * a)
    keys = tokens
    cross = 0
    if decoder:
        per_token += value * 2 * a
        cross = source * value * 2 * a
        keys += source
    if shapes.position_bias:
        per_token += value * shapes.heads * keys
    return options.per_device_train_batch_size * (tokens * per_token + cross)


def _lora_bytes(name: str, layer: nn.Linear, shapes: Shapes, options: argparse.Namespace) -> int:
    value, tokens = _value(options), options.per_device_train_batch_size * shapes.tokens(name, options)
    own = layer.in_features * (value + 1) if options.lora_dropout else 0
    return tokens * (own + options.lora_dim * value)


def _core_bytes(target: Target, options: argparse.Namespace, refresh: bool) -> int:
    whole = refresh or target.ranks[1] is None
    return target.tokens * _value(options) * (target.shape[1] if whole else target.ranks[1])


# ---------------------------------------------------------------------------------------------- saying it


def describe(plan: Plan, options: argparse.Namespace) -> list[str]:
    """The lines that the program prints; the last one is the verdict."""
    return [*_parts(plan, options), "", *_against_dense(plan, options), "", verdict(plan, options)]


def _parts(plan: Plan, options: argparse.Namespace) -> list[str]:
    lines = [
        f"{options.model_name_or_path}: {plan.parameters:,} values, {plan.trained:,} train: {plan.lora:,} of the new "
        f"LoRA, {plan.cores:,} in the cores of {len(plan.targets)} weights of {plan.weights:,}",
        "",
        f"bytes on each of {options.gpus} ranks, ZeRO stage {options.stage}, {'bf16' if options.bf16 else 'fp32'}, "
        f"{options.per_device_train_batch_size} x {options.gradient_accumulation_steps} rows, refresh by "
        f"{options.galore_svd}",
    ]
    lines += [_row(name, count) for name, count in plan.resident.items()]
    for moment, parts in plan.moments.items():
        total = sum(plan.resident.values()) + sum(parts.values())
        lines += [f"  {moment}:", *(_row(f"  {name}", count) for name, count in parts.items())]
        lines.append(_row("  all parts", total))
    return lines + ["in the CPU's memory, for each rank", *(_row(name, count) for name, count in plan.host.items())]


def _row(name: str, count: int) -> str:
    return f"  {name:<40}{count:>18,}  {count / GIB:8.3f} GiB"


def _against_dense(plan: Plan, options: argparse.Namespace) -> list[str]:
    """The same weights by dense AdamW: state, gradient and traffic, with the factor between them."""
    dense_state = _share(12 * plan.weights, options.gpus if options.stage else 1)
    dense_gradient = _share(_value(options) * plan.weights, options.gpus if options.stage >= 2 else 1)
    amortised = plan.sent(options.galore_svd, options.galore_update_proj_gap)
    without_lora = amortised - plan.lora
    return [
        f"dense AdamW on the same {len(plan.targets)} weights, on each rank",
        _row("fp32 masters and Adam moments", dense_state),
        _row("gradients", dense_gradient),
        "times less here than dense                  cores alone    cores and LoRA",
        _ratios("trained state (masters and moments)", plan.weights, plan.cores, plan.trained),
        _ratios("gradient numbers sent, ordinary step", plan.weights, plan.cores, plan.trained),
        _ratios(
            f"the same, refreshes spread over {options.galore_update_proj_gap} steps", plan.weights, without_lora,
            amortised),
    ]  # fmt: skip


def _ratios(name: str, dense: int, cores: float, trained: float) -> str:
    return f"  {name:<40}{dense / cores:>13.1f}{dense / trained:>18.1f}"


def verdict(plan: Plan, options: argparse.Namespace) -> str:
    """One line: whether the peak fits in each GPU, at which moment it is, and its largest part."""
    room = options.gpu_gib * GIB
    fits = "fits" if plan.peak <= room else "does not fit"
    close = " (too close to rely on)" if fits == "fits" and plan.peak > (1 - MARGIN) * room else ""
    name, count = plan.largest
    return (
        f"verdict: {fits} in {options.gpus} x {options.gpu_gib:g} GiB{close}: {plan.peak / GIB:.2f} GiB on each at "
        f"{plan.fullest}; largest part: {name}, {count / GIB:.2f} GiB"
    )


# ---------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"command line: {message}")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; those of the entry have its names and defaults.

    Raises:
        InputError: an unknown option, a missing one, or a value out of range.
    """
    parser = _Parser(prog="plan_memory", description="Whether a GORP run fits, from the model's config alone.")
    text, number = parser.add_argument, _positive
    text("--model_name_or_path", required=True, help=f"folder with config.json, hub id, or {', '.join(PRESETS)}")
    text("--gpus", type=number, default=1, help="ranks, one GPU each")
    text("--gpu_gib", type=float, default=24.0, help="memory of a GPU, GiB")
    text("--stage", type=int, default=2, choices=(0, 1, 2, 3), help="DeepSpeed's ZeRO stage")
    for flag in ("bf16", "offload_optimizer", "activation_checkpointing"):
        text(f"--{flag}", type=_boolean, nargs="?", const=True, default=False)
    text("--lora_modules", required=True, help="regular expression for whole module names")
    text("--optim_target_modules", required=True, nargs="+", help="regular expressions for whole module names")
    text("--lora_dim", type=number, default=8)
    text("--lora_dropout", type=float, default=0.1)
    text("--galore_rank", type=number, default=8)
    text("--galore_proj_type", default="std", choices=PROJ_TYPES)
    text("--galore_svd", default="exact", choices=REFRESHES)
    text("--galore_update_proj_gap", type=number, default=10, help="optimizer steps between two bases")
    text("--tasks_before", type=int, default=0, help="earlier tasks, whose LoRA is frozen")
    text("--per_device_train_batch_size", type=number, default=1)
    text("--gradient_accumulation_steps", type=number, default=1)
    text("--max_source_length", type=number, default=512)
    text("--max_target_length", type=number, default=50)
    options = parser.parse_args(argv)
    if not options.gpu_gib > 0:
        raise InputError(f"--gpu_gib: found {options.gpu_gib:g}; a number above 0")
    if options.tasks_before < 0:
        raise InputError(f"--tasks_before: found {options.tasks_before}; 0 or more")
    if not 0 <= options.lora_dropout < 1:
        raise InputError(f"--lora_dropout: found {options.lora_dropout:g}; 0 up to, not including, 1")
    if options.offload_optimizer and options.stage == 0:
        raise InputError("--offload_optimizer: found with --stage 0; stages 1 to 3 can")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}; a whole number from 1")
    return int(text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"found {text}; True or False")
    return text.lower() == "true"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; 0, or 2 after one line about bad input. A plan that does not fit is an answer, not a fault."""
    try:
        options = parse_arguments(argv)
        print("\n".join(describe(make_plan(options), options)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
