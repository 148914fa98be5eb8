"""SGORP, Structural GORP: this project's variant, in which a task's change is exactly orthogonal to the shared space.

Removing S from a gradient does not keep an update clear of S: Adam divides elementwise, and a `loranew_A` starts with a
component in S (docs/LOG.md). Here the new LoRA sees x - S S^T x, and a full-rank weight's update loses its component in
S after Adam. Only weight decay, which shrinks the full-rank weight itself, can still change it in S. S lives on the
input side and comes from what the layers see on a task's examples. For such an S there is a theory of forgetting (GPM,
Saha et al. 2021; InfLoRA, Liang and Li 2024).

With `--protect step` the new LoRA sees x itself, and A loses its component in S instead, A <- A - A S S^T, before
training and after each optimizer step. The change is then orthogonal to S too, but A's gradient and Adam's moments
still contain the component in S.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from errors import InputError, check
from loranew import loranew_layers, set_input_space
from methods.gorp import Gorp, GorpArguments
from Proj_torch.proj_projector import remove


@dataclass
class SgorpArguments(GorpArguments):
    protect: Literal["structural", "step", "gp_first", "gp_second", "none"] = HfArg(
        default="structural",
        help="structural: the change is exactly orthogonal to the shared space, by the forward pass; step: the same, "
        "by removing the space from loranew_A after each step; the others: as in --method gorp.",
    )
    protect_side: Literal["input", "output"] = HfArg(default="input", help="The protected side of a weight.")
    space_from: Literal["inputs", "moments"] = HfArg(default="inputs", help="What a finished task adds to the space.")
    lamda_1: float = HfArg(default=0.0, help="Weight of sum |A_old A_new^T|; 0: off.")

    def __post_init__(self):
        super().__post_init__()
        if self.protect in ("structural", "step") and self.protect_side != "input":
            raise InputError(f"--protect {self.protect}: found --protect_side output; allowed: --protect_side input")

    def settle(self, training, zero_stage):
        super().settle(training, zero_stage)
        check(self.protect != "step" or zero_stage is None, "protect", "step",
              "structural under DeepSpeed, which partitions the factors' float32 values")


class Sgorp(Gorp):
    """GORP with the change of a protected weight orthogonal to S."""

    Arguments = SgorpArguments
    presets = {}

    @property
    def exact(self) -> bool:
        """Whether a change is orthogonal to S, whatever Adam makes of a gradient."""
        return self.options.protect in ("structural", "step")

    def prepare(self, model, previous, *, decoder_only, sharded=False):
        model = super().prepare(model, previous, decoder_only=decoder_only, sharded=sharded)
        if self.options.protect == "structural":
            factors = {name: f"{name}.loranew_A.weight" for name in loranew_layers(model)}
            set_input_space(model, {name: self.space.get(factor) if factor in self.protected else None
                                    for name, factor in factors.items()})  # fmt: skip
        return model

    def create_optimizer(self, **adam):
        optimizer = super().create_optimizer(**adam)
        if self.options.protect == "step":
            self.cleared = [(A, S.to(A)) for name, A in self.protected.items()
                            if (S := self.space.get(name)) is not None]  # fmt: skip
            self.clear()
            optimizer.register_step_post_hook(lambda *_: self.clear())
        return optimizer

    @torch.no_grad()
    def clear(self) -> None:
        """A <- A - A S S^T, for each protected A (r, in) and its S (in, c)."""
        for A, S in self.cleared:
            A.copy_(remove(A, S, "input"))

    def way(self):
        return "orthogonal" if self.exact else super().way()

    def spaces(self, names):
        # A factor's change is clear of S by the forward pass, or after each step.
        return super().spaces(name for name in names if not self.exact or name in self.targets)

    def protects_A_alone(self):
        return self.exact or super().protects_A_alone()
