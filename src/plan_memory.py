"""Whether a GORP run fits in memory: bytes on each rank from a model's config alone, before any weight is read.

    python src/plan_memory.py --model_name_or_path llama-2-7b --gpus 2 --gpu_gib 24 --stage 2 --bf16
        --activation_checkpointing --lora_modules '.*self_attn.(q_proj|v_proj).*'
        --optim_target_modules '.*mlp.gate_proj.*'

The model is built on the meta device, where parameters have shapes and no values.

* One GPU without `--stage` runs without DeepSpeed, with float32 parameters. Under `--bf16` autocast also keeps 16-bit
  copies of all weights until the backward pass; with checkpointing, of one layer at a time.
* Under DeepSpeed, ZeRO divides optimizer state between ranks (stages 1 to 3), gradients (2, 3) and weights (3), the
  last only after each GPU has held all of them. The buffers are those of configs/ds_configs.
* A step that computes bases collects each target's gradient, as factors of (out + in) numbers a token, or as a float32
  matrix where that is smaller.
* Activations come from a formula (`step_parts`), 0 to 3 % above what autograd keeps for LLaMA-2-7B and T5-large.
* Assumed: 1 GiB for CUDA and NCCL.

Not counted: the shared space S (4 bytes x side of the weight x directions), the copies of --lamda_3, evaluation, and
fragmentation.
"""

import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, LlamaConfig, T5Config
from transformers.hf_argparser import HfArg
from transformers.modeling_layers import GradientCheckpointingLayer

from arguments import check, check_number
from command_line import Parser
from errors import InputError, entry_point
from methods.base_options import LoraArguments, ProjectionArguments, SpaceArguments
from model.llama import LlamaForCausalLM_with_lossmask
from module_matching import check_rank, match_linear
from Proj_torch.proj_projector import mode_ranks
from Proj_torch.svd import OVERSAMPLING

GIB = 1024**3
CONTEXT = GIB
MARGIN = 0.1  # a plan warns when less of a GPU stays free
BUCKET = 200_000_000  # reduce_bucket_size of configs/ds_configs, numbers
PREFETCH, LIVE = 50_000_000, 1_000_000_000  # stage3_prefetch_bucket_size, stage3_max_live_parameters
PRESETS = {"llama-2-7b": LlamaConfig(), "t5-large": T5Config(d_model=1024, d_ff=4096, num_layers=24, num_heads=16)}
STEP = "a step that computes bases"
STATE = "fp32 masters and Adam moments"


@dataclass(kw_only=True)
class PlanArguments(SpaceArguments, ProjectionArguments, LoraArguments):
    """The options of `gorp` that memory depends on, and those of the launcher, DeepSpeed and the data."""

    model_name_or_path: str = HfArg(help=f"Folder with config.json, hub id, or {', '.join(PRESETS)}.")
    optim_target_modules: list[str] = HfArg(help="Regular expressions for complete module names.")
    gpus: int = HfArg(default=1, help="Ranks, one GPU each.")
    gpu_gib: float = HfArg(default=24.0, help="Memory of a GPU, GiB.")
    stage: int | None = HfArg(
        default=None, help="ZeRO stage; by default 2, and no DeepSpeed on one GPU.", metadata={"choices": [0, 1, 2, 3]}
    )
    tasks_before: int = HfArg(default=0, help="Earlier tasks, whose LoRA is frozen.")
    bf16: bool = False
    activation_checkpointing: bool = False
    offload_optimizer: bool = False
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_source_length: int = 512
    max_target_length: int = 50

    def __post_init__(self):
        super().__post_init__()
        for name in ("gpus", "per_device_train_batch_size", "gradient_accumulation_steps", "max_source_length",
                     "max_target_length"):
            check_number(self, name, least=1)
        check_number(self, "gpu_gib", above=0)
        check_number(self, "tasks_before", least=0)
        if self.stage is None and self.gpus > 1:
            self.stage = 2
        self.cores = self.galore_engine == "cores" or self.galore_engine == "auto" and self.stage is not None
        self.number = 2 if self.bf16 and self.stage is not None else 4  # bytes of a number in the model
        check(self.stage or not self.offload_optimizer, "offload_optimizer", "without --stage 1, 2 or 3", "with one")
        check(self.cores or self.stage is None, "galore_engine", "dense", "auto or cores under DeepSpeed")
        check(self.cores or self.galore_svd != "sketch", "galore_svd", "sketch with dense gradients",
              "exact or lowrank")

    def share(self, count: int, first_stage: int) -> int:
        """A rank's part of what ZeRO divides from `first_stage` on."""
        return -(-count // self.gpus) if (self.stage or 0) >= first_stage else count


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank, by part.

    Attributes:
        parameters: numbers of parameters: the model's, the new LoRA's, the cores', and of the weights that cores train.
        resident: bytes held all the time. moments: all parts at each moment that can be the peak.
        host: all parts in the CPU's memory, at each moment that can be its peak.
    """

    parameters: tuple[int, int, int, int]
    resident: dict[str, int]
    moments: dict[str, dict[str, int]]
    host: dict[str, dict[str, int]]

    def peak(self) -> tuple[int, str]:
        """The most bytes at one moment, and its name."""
        return max((sum(parts.values()), name) for name, parts in self.moments.items())


def make_plan(options: PlanArguments) -> Plan:
    """Plan a run.

    Raises:
        InputError: no such model, one of a kind that is not trained here, or an expression or a rank that does not fit.
    """
    number, cores, stage = options.number, options.cores, options.stage
    model = build_on_meta(options.model_name_or_path).to(torch.bfloat16 if number == 2 else torch.float32)
    base = sum(parameter.numel() for parameter in model.parameters())
    adapted = match_linear(model, [options.lora_modules], "--lora_modules")
    check_rank(adapted, options.lora_dim, "--lora_dim")
    targets = match_linear(model, options.optim_target_modules, "--optim_target_modules")
    check_rank(targets, options.galore_rank, "--galore_rank")
    lora = options.lora_dim * sum(layer.in_features + layer.out_features for layer in adapted.values())
    old = options.tasks_before * lora
    shapes = {name: tuple(layer.weight.shape) for name, layer in targets.items()}
    ranks = [mode_ranks(shape, options.galore_rank, options.galore_proj_type) for shape in shapes.values()]
    core = sum((left or out) * (right or inp) for (out, inp), (left, right) in zip(shapes.values(), ranks))
    bases = sum((left or 0) * out + (right or 0) * inp for (out, inp), (left, right) in zip(shapes.values(), ranks))
    weights, largest = (of(out * inp for out, inp in shapes.values()) for of in (sum, max))

    in_model = lora + core * cores
    masters = 2 if number == 4 and not stage else 3  # without ZeRO the model's float32 parameters are the masters
    state = options.share(4 * masters * (lora + core), 1)
    buffers = {  # stages 1 and 2 hold two, as communication overlaps with the backward pass; stage 1 sums in float32
        1: 2 * BUCKET * 4,
        2: 2 * BUCKET * number,
        3: number * (BUCKET + PREFETCH + min(LIVE, base)),
    }
    resident = {
        "weights": options.share(number * base, 3),
        "frozen LoRA of earlier tasks": options.share(number * old, 3),
        "trainable parameters in the model": options.share(number * in_model, 3),
        STATE: 0 if options.offload_optimizer else state,
        "gradients": options.share(number * (lora + (core if cores else weights)), 2),
        "bases": 4 * bases,
        "rounding error of 16-bit targets": 2 * weights if number == 2 else 0,
        "DeepSpeed's buffers": buffers.get(stage, 0),
        "CUDA context (assumed)": CONTEXT,
    }
    step = step_parts(model, options)
    step["one SVD"] = max(_decomposition(shape, of_shape, options) for shape, of_shape in zip(shapes.values(), ranks))
    before, after = (
        cores * sum(collected(shape, count * tokens_of(name, model, options), number) for name, shape in shapes.items())
        for count in (options.gradient_accumulation_steps - 1, options.gradient_accumulation_steps)
    )
    step["gradients collected"] = max(before, after - step["activations"])  # the last backward pass frees activations
    from_moments = options.space_from == "moments"
    moments = {
        "loading": {"weights, complete": number * (base + old + in_model), "CUDA context (assumed)": CONTEXT},
        STEP: resident | step,
        "the task's end": resident | {
            "one weight and its copies": 12 * largest,
            "first moments": (4 * (weights + lora) if cores else 8 * largest) if from_moments else 0,
            "a forward pass": 0 if from_moments else step["logits or a layer's backward pass"],
        },
    }
    host = {
        "loading": {"weights, fp32": 4 * (base + old + lora)},
        "the task's end": {
            STATE: state if options.offload_optimizer else 0,
            "full-rank weights to save, fp32": 4 * weights,
            "first moments": 4 * (weights + lora) if from_moments else 0,
        },
    }
    return Plan((base, lora, core, weights), resident, moments, host)


def tokens_of(name: str, model: nn.Module, options: PlanArguments) -> int:
    """Tokens of a micro-batch that a module sees: the prompt's, the answer's, or both where there is one stack."""
    source, answer = options.max_source_length, options.max_target_length
    if not model.config.is_encoder_decoder:
        length = source + answer
    else:  # keys and values of cross-attention are the encoder's
        length = source if re.search(r"(^|\.)encoder\.|(EncDecAttention|encoder_attn)\.[kv]", name) else answer
    return options.per_device_train_batch_size * length


def step_parts(model: nn.Module, options: PlanArguments) -> dict[str, int]:
    """Bytes that the forward and backward pass of a micro-batch needs, estimated from above.

    For each token a layer keeps a multiple of h numbers for each attention (fused: a mask but no scores), f for each of
    its linear layers of that width, and in 16 bits float32 copies for its norms. Its backward pass needs 3 f + 2 h.
    """
    number, rows, h = options.number, options.per_device_train_batch_size, model.config.hidden_size
    source, answer = options.max_source_length, options.max_target_length
    two_stacks, vocabulary = model.config.is_encoder_decoder, model.config.vocab_size
    masks = model.config.num_attention_heads if two_stacks else 1  # T5's hold a bias for each head
    multiple, norms = (6, 16) if two_stacks else (10, 8)  # times h: numbers, and bytes in 16 bits
    f = max(layer.out_features for layer in model.modules()
            if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings())  # fmt: skip
    kept, inputs = [], 0
    for name, layer in model.named_modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        tokens = tokens_of(name, model, options)
        crosses = two_stacks and "decoder." in name
        keys = [source, answer] if crosses else [tokens // rows]
        linear = [part for part in layer.modules() if isinstance(part, nn.Linear)]
        wide = sum(f in (part.in_features, part.out_features) for part in linear)
        numbers = tokens * (multiple * h * len(keys) + f * wide + masks * sum(keys)) + 2 * rows * source * h * crosses
        kept.append(number * numbers + (norms * tokens * h * len(keys) if number == 2 else 0))
        inputs += number * tokens * h
    checkpointing, length = options.activation_checkpointing, source if two_stacks else source + answer
    copies = 2 * sum(parameter.numel() for parameter in model.parameters()) // (len(kept) if checkpointing else 1)
    return {
        "activations": 4 * rows * (source + answer) * h + (inputs + max(kept) if checkpointing else sum(kept)),
        "16-bit copies of weights": copies if options.bf16 and number == 4 else 0,
        "logits or a layer's backward pass": rows * max(answer * vocabulary * (3 * number if two_stacks else 12),
                                                        length * number * (3 * f + 2 * h)),
    }  # fmt: skip


def collected(shape: tuple[int, int], tokens: int, number: int) -> int:
    """Bytes of a target's gradient (out, in) after so many tokens, in the form that `LayerGradient` keeps."""
    out, inp = shape
    numbers = tokens * (out + inp)
    return 4 * out * inp if numbers > out * inp else numbers * number


def _decomposition(shape: tuple[int, int], ranks: tuple[int | None, int | None], options: PlanArguments) -> int:
    """Bytes to compute one target's bases, in float32: its gradient and copies of it, or thin products alone."""
    sides, small, weight = sum(shape), min(shape), shape[0] * shape[1]
    width = min(max(rank or 0 for rank in ranks) + OVERSAMPLING, small)
    copies = 2 + (options.gpus > 1)  # the gradient, one scaled and, with several ranks, one to sum
    numbers = {"sketch": 4 * sides * width, "lowrank": copies * weight + 3 * sides * width,
               "exact": (copies + 1) * weight + sides * small}  # fmt: skip
    return 4 * numbers[options.galore_svd]


def build_on_meta(name: str) -> nn.Module:
    """The model of a preset, a folder or a hub id, without values.

    Raises:
        InputError: there is none, it is neither LLaMA nor an encoder-decoder, or its sizes contradict each other.
    """
    try:
        config = PRESETS[name] if name in PRESETS else AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            if config.model_type == "llama":
                return LlamaForCausalLM_with_lossmask(config)
            if config.is_encoder_decoder:
                return AutoModelForSeq2SeqLM.from_config(config)
    except Exception as error:  # whatever the hub's client, a config's own checks or a model's layers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--model_name_or_path: no model can be built for {name} ({reason}); a folder with "
                         f"config.json, a hub id such as google-t5/t5-large, or one of {', '.join(PRESETS)}") from None
    raise InputError(f"--model_name_or_path: found model_type {config.model_type!r}; llama and encoder-decoders")


def describe(plan: Plan, options: PlanArguments) -> list[str]:
    """The lines that the program prints; the last one is the verdict."""
    base, lora, core, weights = plan.parameters
    engine = "without DeepSpeed" if options.stage is None else f"ZeRO stage {options.stage}"
    lines = [
        f"{options.model_name_or_path}: {base:,} parameters; {lora + core:,} are trainable, {lora:,} of the new LoRA "
        f"and {core:,} in place of full-rank weights of {weights:,}",
        f"bytes on each of {options.gpus} ranks, {engine}, {'cores' if options.cores else 'dense'}, "
        f"{'bf16' if options.bf16 else 'fp32'}, {options.per_device_train_batch_size} x "
        f"{options.gradient_accumulation_steps} examples, bases by {options.galore_svd} SVD",
        *(_row(name, count) for name, count in plan.resident.items()),
    ]
    for place, moments in (("in total", plan.moments), ("in the CPU's memory", plan.host)):
        for moment, parts in moments.items():
            lines += [f"{moment}:", *(_row(name, n) for name, n in parts.items() if n and plan.resident.get(name) != n)]
            lines.append(_row(place, sum(parts.values())))
    return [*lines, verdict(plan, options)]


def _row(name: str, count: int) -> str:
    return f"  {name:<36}{count:>18,}  {count / GIB:8.3f} GiB"


def verdict(plan: Plan, options: PlanArguments) -> str:
    """One line: whether the peak fits in each GPU, at which moment it is, its largest part, and the host's memory."""
    (peak, moment), room = plan.peak(), options.gpu_gib * GIB
    close = " (too close to rely on)" if (1 - MARGIN) * room < peak <= room else ""
    name, count = max(plan.moments[moment].items(), key=lambda part: part[1])
    host = options.gpus * max(sum(parts.values()) for parts in plan.host.values())
    return (
        f"verdict: {'fits' if peak <= room else 'does not fit'} in {options.gpus} x {options.gpu_gib:g} GiB{close}: "
        f"{peak / GIB:.2f} GiB on each at {moment}; largest part: {name}, {count / GIB:.2f} GiB; the CPU's memory: "
        f"{host / GIB:.1f} GiB in total"
    )


def parse_arguments(argv: Sequence[str] | None = None) -> PlanArguments:
    """The options of the command line.

    Raises:
        InputError: an unknown option, a missing one, or a value out of range.
    """
    return PlanArguments(**vars(Parser(PlanArguments, prog="plan_memory.py", description=__doc__).parse_args(argv)))


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan; a plan that does not fit is an answer, not an error."""
    options = parse_arguments(argv)
    print("\n".join(describe(make_plan(options), options)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # libraries' notes on their own future
    sys.exit(main())
