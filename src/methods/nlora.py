"""N-LoRA (Yang et al., COLING 2025, https://aclanthology.org/2025.coling-main.286): sparse updates do not collide.

Where two tasks change different entries of a weight, neither disturbs the other. N-LoRA makes each task's change
dW = B_new A_new sparse by an l1 penalty, lambda sum |dW|, and keeps the changes of earlier tasks frozen.

`--nlora_form product` is that penalty, the paper's. `--nlora_form factors` is what the authors' released code computes:
lambda sum |A_new B_new|, an r x r matrix that exists only where a layer has as many outputs as inputs, with lambda 0.4
and, later in long orders, 1.2.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from errors import InputError, check_number
from loranew import loranew_layers
from methods.base import LoraMethod
from methods.base_options import LoraArguments

LAMDA = {"product": 1e-5, "factors": 0.4}  # by form


@dataclass
class NloraArguments(LoraArguments):
    nlora_lamda: float | None = HfArg(
        default=None,
        help="Weight of the penalty; by default 1e-5 with product (a choice of this project, not the paper's) and 0.4 "
        "with factors, the released value.",
    )
    nlora_form: Literal["product", "factors"] = HfArg(
        default="product",
        help="product: |B_new A_new|, (out, in), as in the paper; factors: |A_new B_new|, (r, r), as in the released "
        "code, for layers with as many outputs as inputs.",
    )

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "nlora_lamda", least=0)
        if self.nlora_lamda is None:
            self.nlora_lamda = LAMDA[self.nlora_form]


class Nlora(LoraMethod):
    """The base method with an l1 penalty on each layer's factors, taken without the LoRA scale."""

    Arguments = NloraArguments
    zero_stage = 2  # no rank has a complete factor at stage 3

    def prepare(self, model, previous, **kind):
        model = super().prepare(model, previous, **kind)
        for name, layer in loranew_layers(model).items() if self.options.nlora_form == "factors" else ():
            if layer.in_features != layer.out_features:
                raise InputError(f"--nlora_form: found factors; allowed: product for {name}, a {layer.out_features} x "
                                 f"{layer.in_features} matrix, as A B exists only for square ones")
        return model

    def penalty(self):
        if not self.options.nlora_lamda:
            return None
        adapter = self.model.active_adapter
        sizes = []
        for layer in loranew_layers(self.model).values():
            A, B = layer.loranew_A[adapter].weight, layer.loranew_B[adapter].weight
            sizes.append((B @ A if self.options.nlora_form == "product" else A @ B).abs().sum(dtype=torch.float32))
        return self.options.nlora_lamda * torch.stack(sizes).sum()
