"""SGORP, Structural GORP: this project's variant, in which a task's change is orthogonal to the shared space exactly.

Removing S from a gradient does not keep an update clear of S: Adam divides elementwise, and a `loranew_A` begins with a
component in S (docs/LOG.md). Here the new LoRA sees x - S S^T x, and a full-rank weight's update loses its component in
S after Adam. S lives on the input side and comes from what the layers see on a task's examples, for which forgetting
has a theory (GPM, Saha et al. 2021; InfLoRA, Liang and Li 2024).
"""

from dataclasses import dataclass, field

from errors import InputError
from loranew import loranew_layers, set_input_space
from methods.gorp import Gorp, GorpArguments


@dataclass
class SgorpArguments(GorpArguments):
    protect: str = field(
        default="structural",
        metadata={
            "help": "structural: the change is orthogonal to the shared space exactly; or as --method gorp.",
            "choices": ["structural", "gp_first", "gp_second", "none"],
        },
    )
    protect_side: str = field(
        default="input", metadata={"help": "The protected side of a weight.", "choices": ["input", "output"]}
    )
    space_from: str = field(
        default="inputs",
        metadata={"help": "What a finished task adds to the space.", "choices": ["inputs", "moments"]},
    )
    lamda_1: float = field(default=0.0, metadata={"help": "Weight of sum |A_old A_new^T|; 0: off."})

    def __post_init__(self):
        super().__post_init__()
        if self.protect == "structural" and self.protect_side != "input":
            raise InputError("--protect structural: found --protect_side output; it needs --protect_side input")


class Sgorp(Gorp):
    """GORP with the change of a protected weight orthogonal to S."""

    Arguments = SgorpArguments
    presets = {}

    @property
    def structural(self) -> bool:
        return self.options.protect == "structural"

    def prepare(self, model, previous, *, decoder_only, sharded=False):
        model = super().prepare(model, previous, decoder_only=decoder_only, sharded=sharded)
        if self.structural:
            set_input_space(model, {name: self.space.get(f"{name}.loranew_A") for name in loranew_layers(model)})
        return model

    def way(self):
        return "orthogonal" if self.structural else super().way()

    def spaces(self, names):
        # A factor's change is clear of S by the forward pass already.
        return super().spaces(name for name in names if not self.structural or name in self.targets)

    def needs_inputs(self):
        return self.structural or super().needs_inputs()
