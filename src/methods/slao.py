"""SLAO (Qiao and Mahdavi, ICLR 2026, https://arxiv.org/abs/2512.23017): one LoRA is merged after each task.

Two pairs of factors: the fine-tuned A_i, B_i of the last task, from which training continues, and the merged A_m, B_m,
which are evaluated.

1. Task i > 1 starts from B = B_{i-1} and A = Q^T, where A_{i-1}^T = Q R with R's diagonal positive: A's rows are
   orthonormal and span the same space as those of A_{i-1}.
2. After task i: A_m <- A_i, B_m <- B_m + (B_i - B_m) / sqrt(i); after task 1 both are that task's.

The adapter folder holds the merged LoRA, and beside it the fine-tuned one.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from errors import InputError
from files import read_tensors
from methods.base_options import LoraArguments
from methods.seqlora import Seqlora

LAST_FILE = "last_factors.safetensors"


class Slao(Seqlora):
    Arguments = LoraArguments

    def prepare(self, model, previous: Path | None, **kind):
        model = super().prepare(model, previous, **kind)
        self.tasks, self.last = 0, {}
        if previous is not None:
            self.last, about = read_tensors(previous / LAST_FILE)
            self.check_like_factors(self.last, previous / LAST_FILE)
            if not about.get("tasks", "").isdigit():
                raise InputError(f"{previous / LAST_FILE}: its metadata does not count the tasks that are merged")
            self.tasks = int(about["tasks"])
        return model

    @torch.no_grad()
    def begin_task(self, model, batches):
        self.merged_B = {}
        for name, factor in self.factors() if self.last else ():
            start = self.last[name].to(factor)
            if ".loranew_A." in name:
                factor.copy_(orthonormal_rows(start))
            else:
                self.merged_B[name] = factor.clone()
                factor.copy_(start)

    @torch.no_grad()
    def end_task(self):
        super().end_task()
        self.tasks += 1
        self.last = {name: factor.to("cpu", copy=True) for name, factor in self.factors()}
        for name, factor in self.factors():
            if name in self.merged_B:
                factor.copy_(self.merged_B[name].to(factor).lerp(factor, 1 / math.sqrt(self.tasks)))

    def save(self, folder: Path):
        super().save(folder)
        save_file(self.last, folder / LAST_FILE, metadata={"tasks": str(self.tasks)})

    def describe(self):
        return f"{super().describe()}; {self.tasks} earlier tasks merged so far"


def orthonormal_rows(A: Tensor) -> Tensor:
    """Q^T (r, in) of A^T = Q R, with the signs that make R's diagonal positive."""
    Q, R = torch.linalg.qr(A.float().T)
    return (Q * torch.where(R.diagonal() < 0, -1, 1)).T.to(A.dtype)
