"""Estimate whether a GORP run fits in memory: bytes on each rank from a model's config alone, with no weight read.

    python src/plan_memory.py --model_name_or_path llama-2-7b --gpus 2 --gpu_gib 24 --stage 2 --bf16
        --activation_checkpointing --lora_modules '.*self_attn.(q_proj|v_proj).*'
        --optim_target_modules '.*mlp.gate_proj.*'

The model is built on the meta device, where parameters have shapes and no values; the method attaches to it as in a
run, and a forward pass of one micro-batch shows what autograd keeps. One GPU without `--stage` runs without DeepSpeed.
ZeRO divides optimizer state between ranks (stages 1 to 3), gradients (2, 3) and weights (3), the last only after each
GPU has held all of them. 1 GiB for CUDA and NCCL is assumed. Not counted: the shared space S (4 bytes x side of the
weight x directions), the copies for --lamda_3, evaluation, and fragmentation.
"""

import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, T5Config
from transformers.hf_argparser import HfArg
from transformers.modeling_layers import GradientCheckpointingLayer

from command_line import Parser
from errors import InputError, check, check_number, entry_point, first_line
from methods.base_modules import choose_modules
from methods.gorp import Gorp, GorpArguments
from model.loading import model_class
from Proj_torch.proj_projector import mode_ranks
from Proj_torch.svd import OVERSAMPLING

GIB = 1024**3
CONTEXT = GIB
MARGIN = 0.1  # a plan warns when a smaller share of a GPU stays free
BUCKET = 200_000_000  # reduce_bucket_size of configs/ds_configs, in numbers
PREFETCH, LIVE = 50_000_000, 1_000_000_000  # stage3_prefetch_bucket_size, stage3_max_live_parameters
PRESETS = {
    "llama-2-7b": LlamaConfig(),
    "t5-large": T5Config(d_model=1024, d_ff=4096, num_layers=24, num_heads=16, decoder_start_token_id=0),
}
STEP = "a micro-batch"
BASES = "new bases"
END = "the task's end"
STATE = "fp32 masters and Adam moments"


class FusedAttention(torch.autograd.Function):
    """What a GPU's fused attention keeps for the backward pass: the mask, but no scores."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


class GpuKernels(TorchFunctionMode):
    """Lets autograd keep what it keeps on a GPU, where attention is one operation, and so is dropout.

    On the meta device, as on a CPU, both are made of several operations that keep more.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        here = {F.scaled_dot_product_attention: self.attention, F.dropout: self.dropout}.get(function, function)
        return here(*args, **(kwargs or {}))

    @staticmethod
    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.native_dropout(input, p, training)[0] if training and p else input  # keeps a byte for each value

    @classmethod
    def attention(cls, query, key, value, attn_mask=None, dropout_p=0.0, *_, **__) -> torch.Tensor:
        if attn_mask is None or attn_mask.stride(-1) == 1 or key.shape[1] != query.shape[1]:
            return FusedAttention.apply(query, key, value, attn_mask)
        # T5's position bias in Transformers 5.17: the fused kernels need a mask whose last dimension is contiguous.
        half = 0.5  # any factor: scaled copies are kept
        weights = torch.softmax((query * half) @ (key * half).mT + attn_mask, -1)
        return cls.dropout(weights, dropout_p) @ value


@dataclass(kw_only=True)
class PlanArguments(GorpArguments):
    """The options of `gorp`, and those of the launcher, DeepSpeed and the data that memory depends on."""

    model_name_or_path: str = HfArg(help=f"Folder with config.json, hub id, or {', '.join(PRESETS)}.")
    optim_target_modules: list[str] = HfArg(help="Regular expressions for complete module names.")
    lamda_1: float = 0.0  # takes no memory, and stage 3 rejects it
    gpus: int = HfArg(default=1, help="Ranks, one GPU each.")
    gpu_gib: float = HfArg(default=24.0, help="Memory of a GPU, GiB.")
    stage: int | None = HfArg(default=None, help="ZeRO stage; by default 2, and no DeepSpeed on one GPU.",
                              metadata={"choices": [0, 1, 2, 3]})  # fmt: skip
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
        for name in ("gpus", "max_source_length", "max_target_length", "per_device_train_batch_size",
                     "gradient_accumulation_steps"):
            check_number(self, name, least=1)
        check_number(self, "gpu_gib", above=0)
        check_number(self, "tasks_before", least=0)
        if self.stage is None and self.gpus > 1:
            self.stage = 2
        check(self.stage or not self.offload_optimizer, "offload_optimizer", "without --stage 1, 2 or 3", "with one")
        off = dict.fromkeys(("fp16", "bf16_full_eval", "fp16_full_eval", "gradient_checkpointing"), False)
        self.settle(SimpleNamespace(do_train=True, bf16=self.bf16, changed=lambda names: [], **off), self.stage)
        self.cores = self.galore_engine == "cores" or self.galore_engine == "auto" and self.stage is not None
        self.weight_bytes = 2 if self.bf16 and self.cores else 4  # of a frozen weight
        self.trainable_bytes = 4 if self.stage is None else self.weight_bytes  # of a trainable parameter in the model

    def share(self, count: int, first_stage: int) -> int:
        """A rank's part of what ZeRO divides from `first_stage` on."""
        return -(-count // self.gpus) if (self.stage or 0) >= first_stage else count


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank."""

    parameters: tuple[int, int, int, int]  # counts: the model, the new LoRA, the cores, the weights that cores train
    resident: dict[str, int]  # by part, held all the time
    moments: dict[str, dict[str, int]]  # all parts at each moment that can be the peak
    host: dict[str, int]  # in the CPU's memory, at each moment that can be its peak

    def peak(self) -> tuple[int, str]:
        """The most bytes at one moment, and its name."""
        return max((sum(parts.values()), name) for name, parts in self.moments.items())


def make_plan(options: PlanArguments) -> MemoryPlan:
    """Plan a run; an expression or a rank that does not fit the model is an InputError."""
    weight_bytes, trainable_bytes = options.weight_bytes, options.trainable_bytes
    stage, cores = options.stage, options.cores
    model = build_on_meta(options.model_name_or_path).to(torch.bfloat16 if weight_bytes == 2 else torch.float32)
    base = sum(parameter.numel() for parameter in model.parameters())
    choose_modules(options, model)
    method = Gorp(options)
    method.prepare(model, None, decoder_only=not model.config.is_encoder_decoder, sharded=stage is not None)
    lora = sum(factor.numel() for _, factor in method.factors())
    shapes = {name: tuple(layer.weight.shape) for name, layer in method.targets.items()}
    ranks = {name: mode_ranks(shape, options.galore_rank, options.galore_proj_type) for name, shape in shapes.items()}
    core = sum((ranks[name][0] or out) * (ranks[name][1] or inp) for name, (out, inp) in shapes.items())
    bases = sum((ranks[name][0] or 0) * out + (ranks[name][1] or 0) * inp for name, (out, inp) in shapes.items())
    sizes = [out * inp for out, inp in shapes.values()]
    weights, largest = sum(sizes), max(sizes, default=0)
    old_lora, trainable = options.tasks_before * lora, lora + core * cores
    masters = 2 if stage is None or (stage, weight_bytes) == (0, 4) else 3  # float32 parameters are the masters
    state = options.share(4 * masters * (lora + core), 1)
    buffers = {  # stages 1 and 2 hold two, as communication overlaps with the backward pass; stage 1 sums in float32
        1: 2 * BUCKET * 4,
        2: 2 * BUCKET * weight_bytes,
        3: weight_bytes * (BUCKET + PREFETCH + min(LIVE, base)),
    }
    resident = {
        "weights": options.share(weight_bytes * base, 3),
        "frozen LoRA of earlier tasks": options.share(trainable_bytes * old_lora, 3),
        "trainable parameters in the model": options.share(trainable_bytes * trainable, 3),
        STATE: 0 if options.offload_optimizer else state,
        "gradients": options.share(trainable_bytes * (lora + (core if cores else weights)), 2),
        "bases": 4 * bases,
        "rounding error of 16-bit targets": 2 * weights if weight_bytes == 2 else 0,
        "DeepSpeed's buffers": buffers.get(stage, 0),
        "CUDA context (assumed)": CONTEXT,
    }
    step, tokens = forward_pass(method, options)
    sketch = 4 * max(map(sum, shapes.values()), default=0) * (options.galore_rank + OVERSAMPLING)
    seen = {name: options.gradient_accumulation_steps * count for name, count in tokens.items()}
    collect = cores * sum(collected(shape, seen[name], weight_bytes) for name, shape in shapes.items())
    svd = 4 * (sketch if options.galore_svd == "sketch" else (3 + (options.gpus > 1)) * largest)
    from_moments = options.space_from == "moments"
    moments = {
        "loading": {
            "weights, complete": weight_bytes * base + trainable_bytes * (old_lora + trainable),
            "CUDA context (assumed)": CONTEXT,
        },
        STEP: resident | step | {"gradients collected": collect},
        BASES: resident | {"gradients collected": collect, "one SVD": svd},
        END: resident | {
            "one weight and its copies": 12 * largest,
            "first moments, as factors": 4 * (bases + core + lora) if from_moments else 0,
            "a forward pass": 0 if from_moments else step["logits or a layer's backward pass"],
        },
    }
    host = {"loading": weight_bytes * base + 4 * (old_lora + lora),
            END: 4 * (weights if stage == 3 else largest) + (state if options.offload_optimizer else 0)}  # fmt: skip
    return MemoryPlan((base, lora, core, weights), resident, moments, host)


def forward_pass(method: Gorp, options: PlanArguments) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that the forward and backward pass of a micro-batch needs, and the tokens that each target sees.

    What autograd keeps is counted: with checkpointing each layer's input, and everything in one layer. Estimates are
    3 f + 2 h numbers per token in a layer's backward pass (f: widest linear layer, h: hidden size), and the logits.
    """
    model, config = method.model.get_base_model().train(), method.model.config
    widened = 1
    if model.dtype == torch.float32 and getattr(config, "_experts_implementation", None) == "grouped_mm":
        model, widened = model.to(torch.bfloat16), 2  # the only dtype of PyTorch's kernel for experts on this device
    text = config.get_text_config(decoder=True)
    size, source, answer = options.per_device_train_batch_size, options.max_source_length, options.max_target_length
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept, layers, tokens = {}, [0], dict.fromkeys(method.targets, size * answer)  # so many in an output layer

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # by an identity that none can reuse
        return tensor

    def checkpoint(call: Callable, x: torch.Tensor, *args) -> object:
        keep(x)
        before = dict(kept)
        result = call(x, *args)
        layers.append(sum(storage.nbytes() for key, storage in kept.items() if key not in before))
        kept.clear()
        kept.update(before)
        return result

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and options.activation_checkpointing:
            module.gradient_checkpointing, module._gradient_checkpointing_func = True, checkpoint
    for name in method.targets:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: tokens.update({name: args[0].shape[:-1].numel()}))
        if options.cores:
            layer.prepare_refresh()
    length = source if config.is_encoder_decoder else source + answer
    ids = torch.ones(size, length, dtype=torch.long, device="meta")
    mask = torch.zeros(size, 1, length, length, dtype=model.dtype, device="meta")  # as padding makes it
    try:
        with GpuKernels(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            stack = model.get_encoder() if config.is_encoder_decoder else model.get_decoder()
            encoded = stack(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            if config.is_encoder_decoder:
                model.get_decoder()(input_ids=ids[:, :1].expand(-1, answer), encoder_hidden_states=encoded,
                                    attention_mask=mask.new_zeros(size, 1, answer, answer),
                                    encoder_attention_mask=mask[:, :, :1].expand(-1, -1, answer, -1), use_cache=False)
    except (RuntimeError, TypeError, ValueError) as error:  # OPT's and BLOOM's take no mask of four dimensions
        raise InputError(f"--model_name_or_path: a step of model_type {config.model_type!r} cannot be planned "
                         f"({first_line(error)})") from None
    f = max(layer.out_features for layer in model.modules()
            if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings())  # fmt: skip
    logits = size * answer * text.vocab_size * (3 * options.weight_bytes if config.is_encoder_decoder else 12)
    copies = 2 * sum(parameter.numel() for parameter in model.parameters())  # autocast's, of 16 bits
    return {
        "activations": widened * (sum(storage.nbytes() for storage in kept.values()) + max(layers)),
        "16-bit copies of weights": 0 if not options.bf16 or options.weight_bytes == 2
        else copies // text.num_hidden_layers if options.activation_checkpointing else copies,
        "logits or a layer's backward pass":
            max(logits, size * length * options.weight_bytes * (3 * f + 2 * text.hidden_size)),
    }, tokens


def collected(shape: tuple[int, int], tokens: int, weight_bytes: int) -> int:
    """Bytes of a target's gradient (out, in) after so many tokens, in the form that `LayerGradient` keeps."""
    numbers, matrix = tokens * sum(shape), math.prod(shape)
    return 4 * matrix if numbers > matrix else numbers * weight_bytes


def build_on_meta(name: str) -> nn.Module:
    """The model of a preset, a folder or a hub id, without values; an InputError says why none can be built."""
    try:
        config = PRESETS[name] if name in PRESETS else AutoConfig.from_pretrained(name, trust_remote_code=False)
        raw = {} if name in PRESETS else PreTrainedConfig.get_config_dict(name)[0]
        with torch.device("meta"):
            model = model_class(config, name)(config)
            if raw.get("tie_word_embeddings") is False:  # which some config classes, such as T5's, ignore
                head = model.get_output_embeddings()
                head.weight = nn.Parameter(torch.empty_like(head.weight))
        return model
    except InputError:
        raise
    except Exception as error:  # whatever the hub's client, a config's own checks or a model's layers raise
        raise InputError(f"--model_name_or_path: no model can be built for {name} ({first_line(error)}); a folder with "
                         f"config.json, a hub id such as google-t5/t5-large, or one of {', '.join(PRESETS)}") from None


def describe(plan: MemoryPlan, options: PlanArguments) -> list[str]:
    """The lines that the program prints; the last one is the verdict."""
    base, lora, core, weights = plan.parameters
    engine = "without DeepSpeed" if options.stage is None else f"ZeRO stage {options.stage}"
    rows = [*plan.resident.items()]
    for moment, parts in plan.moments.items():
        rows += [(f"{moment}:", None), *((name, n) for name, n in parts.items() if n and plan.resident.get(name) != n)]
        rows.append(("in total", sum(parts.values())))
    rows += [(f"the CPU's memory, {moment}", count) for moment, count in plan.host.items()]
    return [
        f"{options.model_name_or_path}: {base:,} parameters; {lora + core:,} are trainable, {lora:,} of the new LoRA "
        f"and {core:,} in place of full-rank weights of {weights:,}",
        f"bytes on each of {options.gpus} ranks, {engine}, {'cores' if options.cores else 'dense'}, "
        f"{'bf16' if options.bf16 else 'fp32'}, bases by {options.galore_svd} SVD",
        *(name if n is None else f"  {name:<36}{n:>18,}  {n / GIB:8.3f} GiB" for name, n in rows),
        verdict(plan, options),
    ]


def verdict(plan: MemoryPlan, options: PlanArguments) -> str:
    """One line: whether the peak fits in each GPU, at which moment it is, its largest part, and the host's memory."""
    (peak, moment), room = plan.peak(), options.gpu_gib * GIB
    close = " (too close to rely on)" if (1 - MARGIN) * room < peak <= room else ""
    name, count = max(plan.moments[moment].items(), key=lambda part: part[1])
    return (
        f"verdict: {'fits' if peak <= room else 'does not fit'} in {options.gpus} x {options.gpu_gib:g} GiB{close}: "
        f"{peak / GIB:.2f} GiB on each at {moment}; largest part: {name}, {count / GIB:.2f} GiB; the CPU's memory: "
        f"{options.gpus * max(plan.host.values()) / GIB:.1f} GiB in total"
    )


def parse_arguments(argv: Sequence[str] | None = None) -> PlanArguments:
    """The options of the command line."""
    return PlanArguments(**vars(Parser(PlanArguments, prog="plan_memory.py", description=__doc__).parse_args(argv)))


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan; a plan that does not fit is an answer, not an error."""
    options = parse_arguments(argv)
    print("\n".join(describe(make_plan(options), options)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # libraries' notes on their own future
    sys.exit(main())
