"""O-LoRA (Wang et al., Findings of EMNLP 2023): a new LoRA is drawn towards directions orthogonal to the old ones."""

from dataclasses import dataclass

import torch

from methods.base import LoraMethod
from methods.base_options import LoraArguments, PenaltyArguments


@dataclass
class OloraArguments(PenaltyArguments, LoraArguments):
    pass


class Olora(LoraMethod):
    """The base method with the penalties `lamda_1` (overlap with the old factors) and `lamda_2` (size)."""

    Arguments = OloraArguments

    def penalty(self):
        terms = self.lora_penalties()
        return torch.stack(terms).sum() if terms else None
