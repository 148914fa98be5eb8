"""What the code that GORP's authors released computes, written from shared/PROTOCOL.md 10.2 to 10.4 alone, in float64.

Nothing here comes from `src/`. `Rules` can take back each point in which the released code is unusual; a test shows
with it that the comparison notices that point. The weights (out, in) of a model go by their names, W; `old` and `new`
are LoRA factors by the same names, (A (r, in), B (out, r)); a micro-batch is a dict of tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """The released code's choices; another value of one is what other code would do."""

    eps_before_correction: bool = True  # sqrt(v) + eps, then bias correction
    basis_of_whole_gradient: bool = True  # S is removed after the projection, not before it
    mean_of_means: bool = True  # each micro-batch counts alike, however many answer tokens it has
    keeps_change: bool = False  # whether the next task starts from the full-rank weights of this one
    clip: float | None = None  # norm above which the gradient is scaled down


@dataclass
class Adam:
    """One matrix's AdamW without weight decay, on a projection of its gradient where there is a `rank`.

    S (out, c) has orthonormal columns. The released code cannot remove it where the left side is projected; `gp_first`
    then means here that it is removed from the basis, once the whole gradient has given that (`gorp`, not released).
    """

    lr: float
    eps: float
    rank: int | None = None
    gap: int = 1
    scale: float = 1.0
    S: Tensor | None = None
    gp_first: bool = False
    gp_second: bool = False
    rules: Rules = field(default_factory=Rules)
    step: int = 0
    m: Tensor | None = None
    v: Tensor | None = None
    V: Tensor | None = None

    def without_space(self, M: Tensor) -> Tensor:
        return M - self.S @ self.S.mT @ M

    def change(self, G: Tensor) -> Tensor:
        """What this step adds to the weight, (out, in) as the gradient G."""
        right = G.shape[0] >= G.shape[1]
        in_basis = self.S is not None and self.rank is not None and not right
        assert not (in_basis and self.gp_second)
        R = G
        if self.gp_first and not self.rules.basis_of_whole_gradient:
            R = self.without_space(R)
        if self.rank is not None:
            if self.step % self.gap == 0:
                U, _, Vh = torch.linalg.svd(R, full_matrices=False)
                self.V = Vh[: self.rank].mT if right else U[:, : self.rank]
                if in_basis:
                    self.V = self.without_space(self.V)
            R = R @ self.V if right else self.V.mT @ R
        if self.gp_first and not in_basis:
            R = self.without_space(R)
        if self.step == 0:
            self.m, self.v = torch.zeros_like(R), torch.zeros_like(R)
        self.step += 1
        self.m, self.v = 0.9 * self.m + 0.1 * R, 0.999 * self.v + 0.001 * R**2
        m = self.without_space(self.m) if self.gp_second else self.m
        first, second = 1 - 0.9**self.step, 1 - 0.999**self.step
        if self.rules.eps_before_correction:
            update = (second**0.5 / first) * m / (self.v.sqrt() + self.eps)
        else:
            update = (m / first) / ((self.v / second).sqrt() + self.eps)
        if self.rank is not None:
            update = self.scale * (update @ self.V.mT if right else self.V @ update)
        return -self.lr * update


def train_task(loss: Callable, base: dict, old: dict, new: dict, full_rank: Sequence[str], steps: Sequence, *,
               lora_scale: float, lr: float, galore_lr: float, rules: Rules, projection: dict, eps: float = 1e-6,
               spaces: dict | None = None):
    """(new, base) after one task; `loss(weights, micro_batch)` is a mean over the answer tokens of a micro-batch.

    Args:
        full_rank: names of the weights that train beside the new factors.
        steps: a list of micro-batches for each optimizer step.
        projection: `rank`, `gap` and `scale` of the full-rank weights.
        spaces: S of the weights, and of the factors A by (name, 0), that `gp_first` protects; released: none.
    """
    def optimizer(key, lr, **kind):
        S = (spaces or {}).get(key)
        return Adam(lr, eps, rules=rules, S=S, gp_first=S is not None, **kind)

    values = {(name, i): factor for name, pair in new.items() for i, factor in enumerate(pair)}
    optimizers = {key: optimizer(key, lr) for key in values}
    values |= {name: base[name] for name in full_rank}
    optimizers |= {name: optimizer(name, galore_lr, **projection) for name in full_rank}
    for micro_batches in steps:
        values = {key: value.detach().clone().requires_grad_() for key, value in values.items()}
        weights = base | {name: values[name] for name in full_rank}
        for name in new:
            A, B = joined(old.get(name), (values[name, 0], values[name, 1]))
            weights[name] = weights[name] + lora_scale * B @ A
        tokens = [(batch["labels"] != -100).sum() for batch in micro_batches]
        shares = [1 / len(tokens) if rules.mean_of_means else count / sum(tokens) for count in tokens]
        total = sum(share * loss(weights, batch) for share, batch in zip(shares, micro_batches))
        gradients = dict(zip(values, torch.autograd.grad(total, list(values.values()))))
        if rules.clip is not None:
            norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
            gradients = {key: G * (rules.clip / (norm + 1e-6)).clamp(max=1) for key, G in gradients.items()}
        values = {key: value.detach() + optimizers[key].change(gradients[key]) for key, value in values.items()}
    return {name: (values[name, 0], values[name, 1]) for name in new}, base | {name: values[name] for name in full_rank}


def train_tasks(loss: Callable, base: dict, tasks: Sequence[tuple[dict, Sequence]], full_rank: Sequence[str],
                rules: Rules = Rules(), spaces: Sequence[dict] = (), **settings):
    """[(old, weights) as each task ends]; a task is its initial new factors and its steps (see `train_task`).

    `spaces` holds what each task has to protect, nothing where it is empty.
    """
    old, weights, ends = {}, base, []
    for (initial, steps), protected in zip(tasks, spaces or [{}] * len(tasks), strict=True):
        new, trained = train_task(loss, weights, old, initial, full_rank, steps, rules=rules, spaces=protected,
                                  **settings)
        old = {name: joined(old.get(name), pair) for name, pair in new.items()}
        weights = trained if rules.keeps_change else base
        ends.append((old, trained))
    return ends


def joined(old: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A (r_sum + r, in) and B (out, r_sum + r) of both pairs together."""
    return new if old is None else (torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]], dim=1))


def space(S: Tensor | None, M: Tensor, energy: float = 0.9) -> Tensor:
    """The shared gradient space (out, c) after a task whose first moment is M (out, in): section 10.3, exact count."""
    S = M.new_zeros(len(M), 0) if S is None else S
    U, s, _ = torch.linalg.svd(M - S @ S.mT @ M)
    held, wanted, count = (S.mT @ M).square().sum(), energy * M.square().sum(), 0
    while held < wanted and S.shape[1] + count < len(M):
        held, count = held + s[count] ** 2, count + 1
    return torch.cat([S, U[:, :count]], dim=1)
