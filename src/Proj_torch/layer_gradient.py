"""The gradient of a linear layer's weight without forming it: factors that add up, and bases from a random sketch.

The backward pass of y = W x has the input X (tokens, in) and the gradient of the output GY (tokens, out); the gradient
of W is G = GY^T X. Products of G with thin matrices need no G: G M = GY^T (X M). A sketch is a few such products, and
ranks sum sketches instead of gradients: (out + in) (k + p) numbers per pass instead of out * in.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from Proj_torch.proj_projector import Bases
from Proj_torch.svd import OVERSAMPLING, Product, randomised_svd

PROBES = 8  # fresh Gaussian columns that estimate the energy outside the subspace


class LayerGradient:
    """The sum of GY^T X (out, in) over some backward passes, in its smaller form: the factors, or a float32 matrix."""

    def __init__(self, shape: Sequence[int]):
        self.shape = tuple(shape)
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._matrix: Tensor | None = None

    def add(self, GY: Tensor, X: Tensor) -> None:
        """Add GY^T X for GY (..., out) and X (..., in)."""
        self._factors.append((GY.reshape(-1, self.shape[0]), X.reshape(-1, self.shape[1])))
        numbers = sum(GY.numel() + X.numel() for GY, X in self._factors)
        if self._matrix is not None or numbers > self.shape[0] * self.shape[1]:
            self._matrix, self._factors = self.matrix(), []

    def add_matrix(self, G: Tensor) -> None:
        """Add a gradient G (out, in), such as that of a penalty on the weight."""
        self._matrix = G.float() if self._matrix is None and not self._factors else self.matrix() + G.float()
        self._factors = []

    def clear(self) -> None:
        """Drop the sum and what it holds: factors, or the matrix (out, in)."""
        self._factors, self._matrix = [], None

    def matrix(self) -> Tensor:
        """G (out, in), the tensor itself where the sum already has that form."""
        G = self._matrix
        for GY, X in self._factors:
            G = GY.float().mT @ X.float() if G is None else G.addmm_(GY.float().mT, X.float())
        return G

    def times(self, M: Tensor) -> Tensor:
        """G M (out, l) for M (in, l)."""
        if self._matrix is not None:
            return self._matrix @ M
        return sum(GY.float().mT @ (X.float() @ M) for GY, X in self._factors)

    def transposed_times(self, M: Tensor) -> Tensor:
        """G^T M (in, l) for M (out, l)."""
        if self._matrix is not None:
            return self._matrix.mT @ M
        return sum(X.float().mT @ (GY.float() @ M) for GY, X in self._factors)

    def projected(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """left^T G right; None stands for the identity."""
        if left is None:
            return self.matrix() if right is None else self.times(right)
        R = self.transposed_times(left).mT
        return R if right is None else R @ right


def sketched_bases(
    times: Product,
    transposed_times: Product,
    shape: Sequence[int],
    ranks: Sequence[int | None],
    previous: Bases | None,
    seed: int,
    device: torch.device,
) -> tuple[Bases, Tensor]:
    """Bases of G (out, in) for `mode_ranks`' ranks, from products with G alone, and the energy share they hold.

    By `randomised_svd`, whose starting block holds the previous basis and `OVERSAMPLING` Gaussian columns. The share is
    an estimate: the energy outside the subspace is taken from E ||G Omega||_F^2 = columns * ||G||_F^2 for Gaussian
    Omega. The products G M and G^T M, `ranks` (not both None) and the seed of Omega are the same in every process.

    Raises:
        torch.linalg.LinAlgError: G is not finite or zero.
    """
    if ranks[1] is None:  # the left singular vectors of G are the right ones of its transpose
        shape, ranks, previous = (None if pair is None else tuple(pair)[::-1] for pair in (shape, ranks, previous))
        bases, share = sketched_bases(transposed_times, times, shape, ranks, previous, seed, device)
        return bases[::-1], share
    rank, start = ranks[1], None if previous is None else previous[1]
    width = min(rank + OVERSAMPLING, *shape)
    known = 0 if start is None else start.shape[1]
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(shape[1], width - min(known, width - 1), generator=generator).to(device)
    block = omega if start is None else torch.cat((omega, start), dim=1)[:, :width]
    probe = torch.randn(shape[1], PROBES, generator=generator).to(device)
    U, s, V, outside = randomised_svd(times, transposed_times, block, probe)
    left = None if ranks[0] is None else U[:, : ranks[0]].contiguous()
    squares = s.double().square()
    share = squares[:rank].sum() / (squares.sum() + outside.double().square().sum() / PROBES)
    if not share.isfinite():  # 0 / 0 where G is zero; the one value that the host waits for
        raise torch.linalg.LinAlgError(f"a {tuple(shape)} gradient is zero or not finite")
    return (left, V[:, :rank].contiguous()), share
