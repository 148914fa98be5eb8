"""Low-rank gradient projection of tensors with more than two dimensions: a Tucker projection.

Every mode gets the leading left singular vectors of the gradient's unfolding along it (the higher-order SVD, De
Lathauwer, De Moor and Vandewalle 2000). `ProjProjectorTensor` has `ProjProjector`'s interface; a protected space is
defined for matrices only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from errors import InputError
from Proj_torch.proj_projector import Bases, ProjProjector, basis_left
from Proj_torch.svd import at_least_float32


def unfold(T: Tensor, mode: int) -> Tensor:
    """The matrix (d_mode, product of the other dimensions) whose rows are T's slices along `mode`."""
    return T.movedim(mode, 0).flatten(1)


def mode_product(T: Tensor, M: Tensor, mode: int) -> Tensor:
    """T with its dimension `mode` (d) taken through M (e, d), so of size e there."""
    return torch.tensordot(T, M, dims=([mode], [1])).movedim(-1, mode)


def tucker_ranks(shape: Sequence[int], rank: int) -> tuple[int | None, ...]:
    """Rank of each mode: `rank`, or what the mode's unfolding allows if that is less; None where it is not projected.

    Raises:
        InputError: fewer than three dimensions, or `rank` is not in 1 .. the largest dimension.
    """
    if len(shape) < 3:
        raise InputError(f"shape {tuple(shape)} has no Tucker projection; it needs at least three dimensions")
    if not 1 <= rank <= max(shape):
        raise InputError(f"rank {rank} does not fit shape {tuple(shape)}; allowed are 1 to {max(shape)}")
    others = [torch.Size(shape).numel() // size for size in shape]
    capped = [min(rank, size, other) for size, other in zip(shape, others, strict=True)]
    return tuple(mode_rank if mode_rank < size else None for mode_rank, size in zip(capped, shape, strict=True))


def tucker_bases(G: Tensor, ranks: Sequence[int | None], svd: str = "exact") -> Bases:
    """Orthonormal columns (d_mode, rank) for each mode of G, None where its rank is None. Raises as `truncated_svd`."""
    return tuple(None if rank is None else basis_left(unfold(G, mode), rank, svd) for mode, rank in enumerate(ranks))


def project_tensor(G: Tensor, bases: Bases) -> Tensor:
    """G with every mode taken into the coordinates of its basis: the Tucker core."""
    core = at_least_float32(G)
    for mode, basis in enumerate(bases):
        if basis is not None:
            core = mode_product(core, basis.mT, mode)
    return core


def project_back_tensor(core: Tensor, bases: Bases) -> Tensor:
    """The tensor in full coordinates that has this core."""
    for mode, basis in enumerate(bases):
        if basis is not None:
            core = mode_product(core, basis, mode)
    return core


class ProjProjectorTensor(ProjProjector):
    """`ProjProjector` for a weight of three or more dimensions: every mode is projected, whatever `proj_type` says."""

    compute = staticmethod(tucker_bases)

    def ranks(self, shape: Sequence[int]) -> tuple[int | None, ...]:
        return tucker_ranks(shape, self.rank)

    def project(self, G: Tensor) -> Tensor:
        return project_tensor(G, self.bases)

    def back_factors(self, R: Tensor, S: None = None, side: str = "output") -> tuple[Tensor, ...]:
        return (project_back_tensor(R, self.bases),)
