"""InfLoRA (Liang and Li, CVPR 2024, https://arxiv.org/abs/2404.00228): LoRA in directions that old inputs do not have.

For each LoRA layer, M (in, c) is an orthonormal basis of the inputs that earlier tasks gave it, and C (in, in) the sum
of x x^T over the inputs x that this task's examples give it.

1. Before task t, C <- C - M M^T C; A_t has the first r left singular vectors of C as rows, divided by sqrt 3, and is
   frozen. B_t begins at zero and trains, so that a change s B_t A_t does not touch what lies in M.
2. After the task, C is computed again, and M grows by GPM (`extend_basis`) until it holds a share
   eps_t = eps + (1 - eps) t / T of ||C||_F^2, where t counts from 0 and T is the number of tasks in the order.

Where fewer than r directions are left outside M, the remaining rows of A_t are zero; a task for which no layer has a
direction left is an error. The paper's DualGPM keeps the complement of M where that is smaller, which saves memory;
here M is kept.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from errors import InputError, check
from loranew import loranew_layers
from methods.base import LoraMethod
from methods.base_options import LoraArguments
from Proj_torch.svd import truncated_svd
from ranks import sum_over_ranks
from subspace import GradientSpace, is_equal, orthonormal_against, see_inputs

SPACE_FILE = "input_space.safetensors"


@dataclass
class InfloraArguments(LoraArguments):
    inflora_energy: float = HfArg(
        default=0.995, help="Share of ||sum x x^T||_F^2 over the first task's inputs that is protected; grows later."
    )

    def __post_init__(self):
        super().__post_init__()
        check(0 < self.inflora_energy <= 1, "inflora_energy", self.inflora_energy, "above 0, at most 1")


class Inflora(LoraMethod):
    Arguments = InfloraArguments
    zero_stage = 2
    shown_examples, shares_examples = None, True
    counts_tasks = True
    finished = 0.0  # share of the order's tasks before this one, t / T

    def training_examples(self, own, order):
        self.finished = order.index() / len(order.steps())
        return own

    def prepare(self, model, previous: Path | None, *, decoder_only, sharded=False):
        model = super().prepare(model, previous, decoder_only=decoder_only, sharded=sharded)
        self.layers = loranew_layers(model)
        self.A = {name: layer.loranew_A[model.active_adapter].weight for name, layer in self.layers.items()}
        for A in self.A.values():
            A.requires_grad_(False)
        eps = self.options.inflora_energy
        self.space = GradientSpace("input", eps + (1 - eps) * self.finished)
        if previous is not None:
            self.space.load(previous / SPACE_FILE, self.A)
        return model

    def begin_task(self, model, batches):
        for name in self.A.keys() - (found := self.covariances(model, batches)).keys():
            self.A[name].zero_()  # no example reaches the layer
        last = (None, None, None)  # q and v, which see the same inputs, share one SVD
        for name, C in found.items():
            if not C.isfinite().all():
                raise InputError(f"--method inflora: the inputs of {name}, which choose A, are not finite")
            A, M = self.A[name], self.space.get(name)
            if not (is_equal(C, last[0]) and is_equal(M, last[1])):
                last = C, M, directions(C, M, len(A)) / math.sqrt(3)
            A.copy_(last[2])
        if not any(A.any() for A in self.A.values()):
            raise InputError("--method inflora: earlier tasks' inputs leave this task no direction in any layer, and "
                             "nothing would train; allowed: a lower --inflora_energy from the first task on")

    def training_state(self):
        return super().training_state() | {f"frozen.{name}": A.to("cpu", copy=True) for name, A in self.A.items()}

    def load_training_state(self, saved):
        super().load_training_state({name: value for name, value in saved.items() if not name.startswith("frozen.")})
        for name, A in self.A.items():
            A.copy_(saved[f"frozen.{name}"])

    def revisit(self, model, batches):
        self.space.extend(self.covariances(model, batches))

    def covariances(self, model, batches) -> dict[str, Tensor]:
        """C of each layer that an example reaches, over all ranks' examples; collective."""
        found = input_covariances(model, self.layers, batches)
        for name, A in self.A.items():
            sum_over_ranks(found.setdefault(name, A.new_zeros(A.shape[1], A.shape[1], dtype=torch.float32)))
        return {name: C for name, C in found.items() if C.any()}

    def save(self, folder: Path):
        super().save(folder)
        self.space.save(folder / SPACE_FILE)

    def describe(self):
        return f"{super().describe()}, of B alone; A is clear of {self.space.total()} directions of earlier inputs"

    def closing_summary(self):
        return [self.space.line()]


def input_covariances(model, layers, batches) -> dict[str, Tensor]:
    """C = sum x x^T (in, in) of each layer's inputs, float32 on the layer's device; arguments as in `see_inputs`."""
    total: dict[str, Tensor] = {}
    last: tuple[list[Tensor], Tensor | None] = ([], None)  # a batch's inputs, and their sum of x x^T

    def add(name: str, first: int, inputs: list[Tensor]) -> None:
        nonlocal last
        if inputs is not last[0]:
            X = torch.cat(inputs).float()
            with torch.autocast(X.device.type, enabled=False):  # under --bf16 it would multiply in 16 bits
                last = inputs, X.T @ X
        total[name] = total[name].add_(last[1]) if name in total else last[1].clone()

    see_inputs(model, layers, batches, add)
    return total


def directions(C: Tensor, M: Tensor | None, rank: int) -> Tensor:
    """The first `rank` left singular vectors of C - M M^T C as rows (rank, in); zero where M leaves none.

    If M holds all of a C of lower rank, what is left is rounding error, whose singular vectors may lie in M.
    """
    M = C.new_zeros(len(C), 0) if M is None else M.to(C)
    rows, residual = C.new_zeros(rank, len(C)), C - M @ (M.T @ C)
    if residual.any():
        U, s, _ = truncated_svd(residual, min(rank, len(C) - M.shape[1]))
        found = U[:, s > 10 * torch.finfo(C.dtype).eps * torch.linalg.matrix_norm(C)]  # above C's own rounding errors
        rows[: found.shape[1]] = orthonormal_against(M, found).T
    return rows
