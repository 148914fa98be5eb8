"""ELLA (Das Biswas et al., EACL 2026, https://arxiv.org/abs/2601.02232): new changes avoid large entries of old ones.

A new LoRA for each task, the old ones frozen, and a penalty, the sum over LoRA layers of

    lambda ||dW * W_past||_F^2     dW = s B_new A_new, W_past = s B_old A_old (all earlier tasks), * elementwise

An entry that earlier tasks have changed a lot is costly to change again; one that they left alone is free. The paper
keeps W_past (out, in) for each layer. The old factors, which are kept anyway, are enough: the penalty and its gradient

    df/dB = 2 lambda s^2 (W_past^2 * B A) A^T      df/dA = 2 lambda s^2 B^T (W_past^2 * B A),   A, B of the new LoRA

are computed for `BLOCK` rows of W_past at a time, and autograd keeps only df/dA and df/dB. The default lambda is this
project's choice and needs a search: the entries of changes are small, and their products enter squared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from errors import check_number
from loranew import loranew_layers
from methods.base import LoraMethod
from methods.base_options import LoraArguments

BLOCK = 256  # rows of W_past at a time


@dataclass
class EllaArguments(LoraArguments):
    ella_lamda: float = HfArg(default=100.0, help="Weight of ||dW * W_past||_F^2; 0: off.")

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "ella_lamda", least=0)


class Ella(LoraMethod):
    """The base method with a penalty where the new change overlaps the old ones."""

    Arguments = EllaArguments
    zero_stage = 2  # no rank has a complete factor at stage 3

    def penalty(self):
        adapter = self.model.active_adapter
        layers = [layer for layer in loranew_layers(self.model).values() if adapter in layer.lora_A]
        if not self.options.ella_lamda or not layers:
            return None
        overlaps = []
        for layer in layers:
            factors = (pair[adapter].weight for pair in (layer.loranew_A, layer.loranew_B, layer.lora_A, layer.lora_B))
            overlaps.append(layer.scaling[adapter] ** 4 * Overlap.apply(*factors))
        return self.options.ella_lamda * torch.stack(overlaps).sum()


class Overlap(torch.autograd.Function):
    """||(B A) * (B_old A_old)||_F^2 of A (r, in), B (out, r), A_old (R, in), B_old (out, R); differentiable in A, B."""

    @staticmethod
    def forward(context, A: Tensor, B: Tensor, A_old: Tensor, B_old: Tensor) -> Tensor:
        # In fp16 the products of small factors would underflow, and lambda times the loss scale overflow.
        A, B, A_old, B_old = (factor.float() for factor in (A, B, A_old, B_old))
        value, A_grad, B_grad = A.new_zeros(()), torch.zeros_like(A), torch.zeros_like(B)
        for start in range(0, len(B), BLOCK):
            rows = slice(start, start + BLOCK)
            weighted = (B_old[rows] @ A_old).square_()
            change = B[rows] @ A
            weighted *= change
            value += (weighted * change).sum()
            B_grad[rows] = weighted @ A.T
            A_grad += B[rows].T @ weighted
        context.save_for_backward(A_grad, B_grad)
        return value

    @staticmethod
    def backward(context, grad: Tensor) -> tuple[Tensor | None, ...]:
        A_grad, B_grad = context.saved_tensors
        return 2 * grad * A_grad, 2 * grad * B_grad, None, None  # autograd casts them to their factors' dtypes
