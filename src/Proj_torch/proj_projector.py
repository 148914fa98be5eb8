"""Low-rank gradient projection of a weight matrix (GaLore, Zhao et al. 2024, arXiv:2403.03507).

The mathematics is pure functions on tensors; `ProjProjector` keeps the settings and the current bases and calls them.

Conventions, for a weight W and its gradient G, both (out, in):

* `left` (out, k) and `right` (in, l) have orthonormal columns; None means that the side is not projected. The
  projected gradient is R = left^T G right; projected back, it is left R right^T.
* A side whose rank equals its dimension is not projected. A full basis would only rotate the coordinates, which loses
  nothing but changes elementwise Adam; without it, full-rank projection is plain AdamW.
* A protected space is S (out, c) for side "output" or (in, c) for side "input", with orthonormal columns, always in
  the weight's own coordinates: `remove` takes G to G - S S^T G or to G - G S S^T.
* Everything is computed in float32 at least, whatever the dtype of the gradient (bfloat16 has no SVD).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import InputError
from Proj_torch.svd import at_least_float32, truncated_svd, warn_once

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
SIDES = ("output", "input")

Basis = Tensor | None  # orthonormal columns; None where a side is not projected, or nothing is protected
Bases = tuple[Basis, ...]  # one for each mode of the weight


# ---------------------------------------------------------------------------------------------- bases


def mode_ranks(shape: Sequence[int], rank: int, proj_type: str) -> tuple[int | None, int | None]:
    """Ranks of the left and the right basis of an (out, in) weight; None where that side is not projected.

    `std` projects the side of the smaller dimension (right when out >= in), `reverse_std` the other one, `left`,
    `right` and `full` (both) what they say. Raises InputError where the shape is no matrix's, or `rank` is not in 1 ..
    min(out, in).
    """
    if len(shape) != 2:
        raise InputError(f"shape {tuple(shape)} is not a matrix's; a gradient projection needs its rows and columns")
    if not 1 <= rank <= min(shape):
        raise InputError(f"rank {rank} does not fit shape {tuple(shape)}; allowed: 1 to {min(shape)}")
    rows, columns = shape
    right_is_smaller = rows >= columns
    left, right = {
        "std": (not right_is_smaller, right_is_smaller),
        "reverse_std": (right_is_smaller, not right_is_smaller),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }[proj_type]
    return (rank if left and rank < rows else None), (rank if right and rank < columns else None)


def matrix_bases(G: Tensor, ranks: Sequence[int | None], svd: str = "exact") -> Bases:
    """The left and right basis of G for `mode_ranks`' ranks, from one SVD. Raises as `truncated_svd` does."""
    if not any(ranks):
        return None, None
    left, _, right = truncated_svd(G, ranks[0] or ranks[1], svd)
    return (left if ranks[0] else None), (right if ranks[1] else None)


def kept_bases(like: Tensor, ranks: Sequence[int | None], previous: Bases | None) -> Bases:
    """The previous bases; before the first refresh the first unit vectors, for the shape and device of `like`."""
    if previous is not None:
        return previous
    dtype = torch.promote_types(like.dtype, torch.float32)
    return tuple(
        None if rank is None else torch.eye(size, rank, dtype=dtype, device=like.device)
        for size, rank in zip(like.shape, ranks, strict=True)
    )


# ----------------------------------------------------------------------------------------- projection


def remove(X: Tensor, S: Basis, side: str) -> Tensor:
    """X (out, in) without its component in S, if there is an S; in float32 at least.

    That is X - S S^T X for side "output" and S (out, c), X - X S S^T for side "input" and S (in, c). An S that holds
    every direction leaves exactly zero, because Adam would turn rounding noise, however small, into full steps.
    """
    X = at_least_float32(X)
    if S is None:
        return X
    if S.shape[0] == S.shape[1]:
        return torch.zeros_like(X)
    return _less(X, S, side)


def _less(X: Tensor, T: Tensor, side: str) -> Tensor:
    """X - T T^T X ("output") or X - X T T^T ("input"), whatever T's columns are."""
    with torch.autocast(X.device.type, enabled=False):  # which would multiply in 16 bits
        return torch.addmm(X, T, T.mT @ X, alpha=-1) if side == "output" else torch.addmm(X, X @ T, T.mT, alpha=-1)


def check_space(S: Tensor, size: int, where: str) -> None:
    """Reject with InputError what is not (size, c) with orthonormal columns; `where` begins the message."""
    if S.ndim != 2 or S.shape[0] != size:
        raise InputError(f"{where}: shape {tuple(S.shape)}; allowed: ({size}, c)")
    gram = at_least_float32(S.detach()).T @ at_least_float32(S.detach())
    distance = (gram - torch.eye(len(gram), device=gram.device)).abs().max().item() if len(gram) else 0.0
    if not distance < 1e-3:
        raise InputError(f"{where}: columns {distance:.1g} from orthonormal; allowed: at most 1e-3")


def remove_projected(R: Tensor, left: Basis, right: Basis, S: Tensor, side: str) -> Tensor:
    """A projected R (out or k, in or l) without its component in S, still projected: L^T (I - S S^T) L R."""
    basis = left if side == "output" else right
    return remove(R, S, side) if basis is None else _less(R, basis.mT @ S, side)


def times_thin(X: Tensor, thin: Basis) -> Tensor:
    """X (..., n) @ thin (n, k), if there is one, with each thin column contiguous: twice as fast on a CPU."""
    return X if thin is None else torch.nn.functional.linear(X, thin.mT.contiguous())


def project(G: Tensor, left: Basis = None, right: Basis = None, S: Basis = None, side: str = "output") -> Tensor:
    """R = left^T G right, of shape (out or k, in or l); with S, that of `remove(G, S, side)`."""
    left, right, S = remove_from_bases(left, right, S, side)
    R = at_least_float32(G)
    if left is not None:
        R = left.mT @ R
    return remove(times_thin(R, right), S, side)


def product(factors: Sequence[Tensor]) -> Tensor:
    """The matrix that one or two factors stand for."""
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


def back_factors(R: Tensor, left: Basis, right: Basis, S: Basis = None, side: str = "output") -> tuple[Tensor, ...]:
    """One or two factors of left R right^T (out, in), or with S of its `remove`; a weight can add them in place."""
    left, right, S = remove_from_bases(left, right, S, side)
    R = remove(R, S, side)
    if left is not None and right is not None:
        return left @ R, right.mT
    if left is not None:
        return left, R
    return (R,) if right is None else (R, right.mT)


def remove_from_bases(left: Basis, right: Basis, S: Basis, side: str) -> tuple[Basis, Basis, Basis]:
    """Remove S from the basis of its side if that side is projected; otherwise return S, for the projected gradient.

    I - S S^T is symmetric and acts on one side only. So its order with the projection of the other side does not
    matter, and on its own side it can act on the basis (out x k numbers) instead of on the gradient (out x in).
    """
    if S is not None and side == "output" and left is not None:
        return remove(left, S, "output"), right, None
    if S is not None and side == "input" and right is not None:
        return left, remove(right, S, "output"), None
    return left, right, S


@dataclass
class ProjProjector:
    """Settings of one weight's projection and its current bases; its methods are the functions above with these bases.

    Attributes:
        rank: k, at most min(out, in); None projects nothing.
        scale: factor on the update that `add_back_` adds to the weight (GaLore's alpha).
        proj_type: one of `PROJ_TYPES`; svd: "exact" or "lowrank".
        bases: (left, right) to start from; None before the first refresh.
    """

    rank: int | None
    scale: float = 1.0
    proj_type: str = "std"
    svd: str = "exact"
    bases: Bases | None = None

    def ranks(self, shape: Sequence[int]) -> tuple[int | None, ...]:
        """Rank of each mode's basis, None where it is not projected. Raises InputError as `mode_ranks` does."""
        return mode_ranks(shape, self.rank, self.proj_type) if self.rank is not None else (None,) * len(shape)

    def compute(self, G: Tensor) -> Bases:
        """The left (out, k) and right (in, l) basis of G (out, in), None where a side is not projected."""
        return matrix_bases(G, self.ranks(G.shape), self.svd)

    def refresh(self, G: Tensor) -> bool:
        """Take the bases from G (out, in); where it is zero or not finite, or no SVD converges, use `kept_bases`.

        Returns whether the bases are G's own. Never fails, so that no gradient can end a run.
        """
        try:
            self.bases = self.compute(G)
            return True
        except torch.linalg.LinAlgError as error:
            warn_once(f"{error}; the previous basis stays")
            self.bases = kept_bases(G, self.ranks(G.shape), self.bases)
            return False

    def project(self, G: Tensor, S: Basis = None, side: str = "output") -> Tensor:
        """G (out, in) to R (out or k, in or l), with S removed on its side."""
        return project(G, *self.bases, S, side)

    def project_back(self, R: Tensor, S: Basis = None, side: str = "output") -> Tensor:
        """R (out or k, in or l) to left R right^T (out, in), with S removed on its side."""
        return product(self.back_factors(R, S, side))

    def back_factors(self, R: Tensor, S: Basis = None, side: str = "output") -> tuple[Tensor, ...]:
        """R (out or k, in or l) to `project_back`'s matrix: itself (out, in), or two factors (out, n) and (n, in)."""
        return back_factors(R, *self.bases, S, side)

    def add_back_(self, W: Tensor, R: Tensor, S: Basis = None, side: str = "output") -> None:
        """W += scale * project_back(R, S, side), forming no matrix of W's size where the dtypes allow it."""
        factors = self.back_factors(R, S, side)
        if len(factors) == 2 and W.dtype == factors[0].dtype:
            W.addmm_(*factors, alpha=self.scale)
        else:
            W.add_(product(factors), alpha=self.scale)
