"""O-LoRA (Wang et al., Findings of EMNLP 2023): a new LoRA is drawn towards directions orthogonal to the old ones."""

import torch

from methods.base import LoraMethod


class Olora(LoraMethod):
    """The base method with the penalties `lamda_1` (overlap with the old factors) and `lamda_2` (size)."""

    def penalty(self):
        terms = self.lora_penalties()
        return torch.stack(terms).sum() if terms else None
