"""Groups of command-line options that several methods read.

A method's `Arguments` is a dataclass that combines the groups it reads, adds fields of its own, and overrides defaults
where the method's differ. A flag of another method's group is accepted and reported as ignored, so that one script
serves every method.
"""

from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin, get_type_hints

from transformers.hf_argparser import HfArg

from arguments import UIETrainingArguments
from errors import InputError, check, check_number
from Proj_torch.proj_projector import PROJ_TYPES

NOTHING = "none"
"""The value of `--optim_target_modules` and `--proj_lora_modules` that clears what a script passes."""


@dataclass
class MethodArguments:
    """The options of every method."""

    method: str = HfArg(default="gorp", help="A file name of src/methods, without .py.")
    preset: str | None = HfArg(
        default=None,
        help="released (of gorp): compute what the scripts that GORP's authors released compute, see "
        "docs/DEVIATIONS.md. A flag that contradicts it is an error.",
    )
    # Known flags on the command line that this method does not read.
    ignored: list[str] = field(init=False, default_factory=list)

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                check(getattr(self, name) in get_args(kind), name, getattr(self, name), ", ".join(get_args(kind)))

    def changed_base(self) -> list[str]:
        """Regular expressions for the base's weights that change, and so cannot be held in 4 bits."""
        return []

    def unread(self) -> tuple[str, ...]:
        """Training arguments that the method's optimizer does not read."""
        return ()

    def settle(self, training: UIETrainingArguments, zero_stage: int | None) -> None:
        """Check the options against the training arguments, which also decide `auto`; `zero_stage` is None without
        DeepSpeed.

        Raises:
            InputError: the options contradict the training arguments.
        """
        self.ignored += training.changed(self.unread())


@dataclass
class LoraArguments(MethodArguments):
    """The LoRA that a task adds, and where it goes."""

    lora_modules: str = HfArg(
        default=None, help="Where LoRA goes: a regular expression for complete module names; auto: by the model type."
    )
    lora_dim: int = HfArg(default=8, help="Rank of the LoRA that a task adds.")
    lora_alpha: float = HfArg(default=32, help="LoRA scale times rank: s = lora_alpha / lora_dim.")
    lora_dropout: float = HfArg(default=0.1, help="Dropout before the trainable LoRA.")
    merge_old: bool = HfArg(
        default=False, help="Add earlier tasks' LoRA to the base weights in memory, so that passes do not slow down."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lora_modules is None:
            raise InputError("--lora_modules: missing; allowed: auto, or a regular expression such as "
                             "'.*SelfAttention.(q|v).*'")
        check_number(self, "lora_dim", above=0)
        check_number(self, "lora_alpha", above=0)
        check(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "0 up to, not including, 1")

    def settle(self, training, zero_stage):
        super().settle(training, zero_stage)
        for name in ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"):
            check(not (self.merge_old and getattr(training, name)), "merge_old", f"true with --{name}",
                  "only in fp32, as 16 bits would round small changes away")


@dataclass
class OptimizerArguments(MethodArguments):
    """The optimizer of the LoRA factors."""

    lora_optimizer: Literal["adamw", "muon"] = HfArg(
        default="adamw",
        help="adamw, or muon (torch.optim.Muon: momentum 0.95, orthogonalised, steps of AdamW's size; the adam_ flags "
        "are ignored).",
    )

    def unread(self):
        return ("adam_beta1", "adam_beta2", "adam_epsilon") if self.lora_optimizer == "muon" else ()

    def settle(self, training, zero_stage):
        super().settle(training, zero_stage)
        check(self.lora_optimizer == "adamw" or zero_stage is None, "lora_optimizer", self.lora_optimizer,
              "adamw under DeepSpeed, which flattens the matrices")


@dataclass
class LoraOptimizerArguments(OptimizerArguments, LoraArguments):
    """A LoRA and its optimizer, with nothing else."""


@dataclass
class TargetArguments(MethodArguments):
    """The full-rank weights that train."""

    optim_target_modules: list[str] = HfArg(
        default_factory=list,
        help="Full-rank weights that train by projection: regular expressions for complete module names; auto: by the "
        "model's type.",
    )

    def __post_init__(self):
        super().__post_init__()
        given = self.optim_target_modules
        if isinstance(given, str):
            given = [given]
        self.optim_target_modules = [] if given == [NOTHING] else given

    def changed_base(self):
        return self.optim_target_modules


@dataclass
class ProjectionArguments(TargetArguments):
    """The low-rank projection of the full-rank weights' gradients."""

    galore_rank: int = HfArg(default=8, help="Rank k of the gradient projection.")
    galore_update_proj_gap: int = HfArg(default=10, help="Optimizer steps between refreshes of bases.")
    galore_scale: float = HfArg(default=1.0, help="Factor on the update that is projected back.")
    galore_proj_type: Literal[PROJ_TYPES] = HfArg(
        default="std",
        help="Projected side: std the smaller, reverse_std the larger, left output, right input, full both.",
    )
    galore_svd: Literal["exact", "lowrank", "sketch"] = HfArg(
        default="lowrank",
        help="How a basis is computed: by SVD, by randomised SVD, or (engine: cores) from a sketch, for which no "
        "complete gradient is formed or summed over ranks.",
    )
    galore_engine: Literal["auto", "dense", "cores"] = HfArg(
        default="auto",
        help="What trains full-rank weights: dense gradients and ProjAdamW, or small cores beside frozen weights, with "
        "the same mathematics (clipping sees the cores' gradients) and less memory. auto: cores under DeepSpeed and "
        "beside 16-bit weights, else dense.",
    )
    galore_lr: float = HfArg(default=1e-5, help="Learning rate of the full-rank weights.")

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "galore_rank", above=0)
        check_number(self, "galore_update_proj_gap", above=0)
        check_number(self, "galore_scale", above=0)
        check_number(self, "galore_lr", least=0)

    @staticmethod
    def of_projection() -> set[str]:
        """Names of the options that are ignored where there is no full-rank weight."""
        return {option.name for option in fields(ProjectionArguments) if option.name.startswith("galore_")}

    def settle(self, training, zero_stage):
        super().settle(training, zero_stage)
        if not training.do_train:
            return
        if zero_stage is not None:
            check(self.galore_engine != "dense", "galore_engine", "dense", "auto or cores under DeepSpeed")
        elif self.galore_engine != "cores":
            check(self.galore_svd != "sketch", "galore_svd", "sketch without --deepspeed",
                  "exact or lowrank, or sketch with --galore_engine cores")

    def projection(self) -> dict:
        """The projection settings of a ProjAdamW group."""
        return {
            "rank": self.galore_rank,
            "update_proj_gap": self.galore_update_proj_gap,
            "scale": self.galore_scale,
            "proj_type": self.galore_proj_type,
            "svd": self.galore_svd,
            "lr": self.galore_lr,
        }


@dataclass
class SpaceArguments(MethodArguments):
    """The shared gradient space, and how it protects."""

    proj_lora_modules: str | None = HfArg(
        default=".*loranew_A.*",
        help="Protected LoRA factors: a regular expression for factor names; none: no factor.",
    )
    protect: Literal["gp_first", "gp_second", "none"] = HfArg(
        default="gp_first",
        help="Where the shared gradient space is removed: from the projected gradient before Adam (gp_first, as in the "
        "paper), from Adam's first moment before its division (gp_second), or nowhere.",
    )
    protect_side: Literal["input", "output"] = HfArg(
        default="output", help="The protected side of a weight: output in the paper."
    )
    space_energy: float = HfArg(default=0.9, help="Share of the first moments' or inputs' energy that the space holds.")
    space_from: Literal["inputs", "moments"] = HfArg(
        default="moments",
        help="What a finished task adds to the space: directions of Adam's first moment (as in the paper), or of the "
        "inputs that the layers see on its examples (as in GPM).",
    )

    @staticmethod
    def of_space() -> set[str]:
        """Names of the options that are ignored where nothing is protected."""
        return {"proj_lora_modules", "protect_side", "space_energy", "space_from"}

    def __post_init__(self):
        super().__post_init__()
        if self.proj_lora_modules == NOTHING:
            self.proj_lora_modules = None
        check(0 < self.space_energy <= 1, "space_energy", self.space_energy, "above 0, at most 1")
        if self.space_from == "inputs" and self.protect_side != "input":
            raise InputError("--space_from inputs: found --protect_side output; allowed: --protect_side input")


@dataclass
class PenaltyArguments(MethodArguments):
    """Penalties on the LoRA factors."""

    lamda_1: float = HfArg(default=0.5, help="Weight of sum |A_old A_new^T|; 0: off.")
    lamda_2: float = HfArg(default=0.0, help="Weight of the L2 norms of the new LoRA; 0: off.")

    def weights(self) -> dict[str, float]:
        """The weight of each penalty, by option."""
        return {name: value for name, value in vars(self).items() if name.startswith("lamda_")}

    def __post_init__(self):
        super().__post_init__()
        for name in self.weights():
            check_number(self, name, least=0)

    def settle(self, training, zero_stage):
        super().settle(training, zero_stage)
        for name, weight in self.weights().items() if zero_stage == 3 else []:  # no rank has complete weights
            check(not weight, name, weight, "only 0 at ZeRO stage 3")


@dataclass
class ChangePenaltyArguments(PenaltyArguments):
    """Penalties on the LoRA factors and on the full-rank weights' change."""

    lamda_3: float = HfArg(default=0.0, help="Weight of ||dW dW^T - I||, full-rank weights; 0: off.")
