"""Low-rank gradient projection of tensors with more than two dimensions: a Tucker projection.

Every mode gets the leading left singular vectors of the gradient's unfolding along it (the higher-order SVD, De
Lathauwer, De Moor and Vandewalle 2000). `ProjProjectorTensor` has `ProjProjector`'s interface; a protected space is
defined for matrices only.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from errors import InputError
from Proj_torch.proj_projector import Bases, ProjProjector
from Proj_torch.svd import at_least_float32, truncated_svd


def unfold(T: Tensor, mode: int) -> Tensor:
    """The matrix (d_mode, product of the other dimensions) whose rows are T's slices along `mode`."""
    return T.movedim(mode, 0).flatten(1)


def mode_products(T: Tensor, matrices: Iterable[Tensor | None]) -> Tensor:
    """T with each dimension of size d multiplied by its matrix (e, d), so that its size is e; None leaves it alone."""
    for mode, M in enumerate(matrices):
        if M is not None:
            T = torch.tensordot(T, M, dims=([mode], [1])).movedim(-1, mode)
    return T


def tucker_ranks(shape: Sequence[int], rank: int) -> tuple[int | None, ...]:
    """Rank of each mode: `rank`, or what the mode's unfolding allows if that is less; None where it is not projected.

    Raises InputError where `rank` is not in 1 .. the largest dimension.
    """
    if not 1 <= rank <= max(shape):
        raise InputError(f"rank {rank} does not fit shape {tuple(shape)}; allowed: 1 to {max(shape)}")
    capped = [min(rank, size, math.prod(shape) // size) for size in shape]
    return tuple(mode_rank if mode_rank < size else None for mode_rank, size in zip(capped, shape, strict=True))


class ProjProjectorTensor(ProjProjector):
    """`ProjProjector` for a weight of three or more dimensions: every mode is projected, whatever `proj_type` says."""

    def ranks(self, shape: Sequence[int]) -> tuple[int | None, ...]:
        return tucker_ranks(shape, self.rank)

    def compute(self, G: Tensor) -> Bases:
        """A basis (d, k) for each mode of G, of size d and rank k; None where the mode is not projected."""
        return tuple(
            None if rank is None else truncated_svd(unfold(G, mode), rank, self.svd)[0]
            for mode, rank in enumerate(self.ranks(G.shape))
        )

    def project(self, G: Tensor, S: None = None, side: str = "output") -> Tensor:
        """The Tucker core: every mode of G in the coordinates of its basis."""
        return mode_products(at_least_float32(G), (None if basis is None else basis.mT for basis in self.bases))

    def back_factors(self, R: Tensor, S: None = None, side: str = "output") -> tuple[Tensor, ...]:
        """The one tensor (d in each mode) that the Tucker core R (d, or k if projected, in each mode) stands for."""
        return (mode_products(R, self.bases),)
