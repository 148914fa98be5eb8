"""O-LoRA (Wang et al., Findings of EMNLP 2023): a new LoRA is drawn towards directions orthogonal to the old ones."""

from dataclasses import dataclass, field

import torch

from arguments import MethodArguments
from methods.base import PROJECTION, SPACE, LoraMethod


@dataclass
class OloraArguments(MethodArguments):
    lamda_1: float = field(default=0.5, metadata={"help": "Weight of sum |A_old A_new^T|; 0: off."})


class Olora(LoraMethod):
    """The base method with the penalties `lamda_1` (overlap with the old factors) and `lamda_2` (size)."""

    Arguments = OloraArguments
    unread = ("optim_target_modules", *SPACE, *PROJECTION, "lamda_3")

    def penalty(self):
        terms = self.lora_penalties()
        return torch.stack(terms).sum() if terms else None
