"""N-LoRA (Yang et al., COLING 2025, https://aclanthology.org/2025.coling-main.286): sparse updates do not collide.

Where two tasks change different entries of a weight, neither disturbs the other. N-LoRA makes each task's change
dW = B_new A_new sparse by an l1 penalty, lambda sum |dW|, and keeps the changes of earlier tasks frozen.
"""

from dataclasses import dataclass, field

import torch

from arguments import check
from loranew import loranew_layers
from methods.base import LoraMethod
from methods.base_options import LoraArguments


@dataclass
class NloraArguments(LoraArguments):
    nlora_lamda: float = field(
        default=1e-5,
        metadata={"help": "Weight of sum |B_new A_new| over all layers (a choice of this project, not the paper's)."},
    )

    def __post_init__(self):
        super().__post_init__()
        check(self.nlora_lamda >= 0, "nlora_lamda", self.nlora_lamda, "0 or more")


class Nlora(LoraMethod):
    """The base method with the l1 penalty on each layer's change (out, in), taken without the LoRA scale."""

    Arguments = NloraArguments
    zero_stage = 2  # a rank has no whole factor at stage 3

    def penalty(self):
        if not self.options.nlora_lamda:
            return None
        adapter = self.model.active_adapter
        sizes = [
            (layer.loranew_B[adapter].weight @ layer.loranew_A[adapter].weight).abs().sum()
            for layer in loranew_layers(self.model).values()
        ]
        return self.options.nlora_lamda * torch.stack(sizes).sum()
