"""Leading singular vectors of a matrix, or of a linear map that is known only by its products with thin matrices.

Everything is computed in float32 at least, whatever the dtype of the matrix (bfloat16 has no SVD).
"""

import functools
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger("gorp")

SVD_METHODS = ("exact", "lowrank")
SKETCH_SEED = 0  # the sketch is the same on every rank and in every run
# More columns than the 5 to 10 of Halko, Martinsson and Tropp 2011 (section 4.2), and one pass fewer over the matrix.
# This is faster and more accurate: with 24, a basis holds 99 % of the best one's energy, with 8 it holds 98 %
# (docs/LOG.md).
OVERSAMPLING = 24
SAFE_PEAKS = (2.0**-30, 2.0**30)  # entries whose squares and sums of squares stay far from a float32's limits

Product = Callable[[Tensor], Tensor]


def at_least_float32(X: Tensor) -> Tensor:
    """X itself if it is float32 or float64, else a float32 copy."""
    return X.to(torch.promote_types(X.dtype, torch.float32))


def largest(X: Tensor) -> Tensor:
    """The largest magnitude in X, or NaN if X has one; on a CPU far faster than the maximum norm."""
    low, high = X.aminmax()
    return torch.maximum(-low, high)


def energy_share(part: Tensor, whole: Tensor) -> Tensor:
    """||part||_F^2 / ||whole||_F^2 in float64; 0 where `whole` is zero."""
    held, total = (torch.linalg.vector_norm(X, dtype=torch.float64) for X in (part, whole))
    return (held / total.clamp_min(torch.finfo(torch.float64).tiny)).square()


def truncated_svd(M: Tensor, rank: int, svd: str = "exact") -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets U (m, k), s (k,) in descending order and V (n, k) of M (m, n), in float32 at least.

    k is `rank`, at most min(m, n); `svd` is "exact", or "lowrank" for a randomised range finder with a fixed seed. A
    tiny or huge M is first scaled by a power of two (which rounds nothing) to entries below 2, so that nothing under-
    or overflows.

    Raises:
        torch.linalg.LinAlgError: M is zero or not finite, or the SVD did not converge.
    """
    M = at_least_float32(M)
    peak = largest(M).item()  # the one value that the host waits for
    if not 0 < peak < math.inf:
        raise torch.linalg.LinAlgError(f"a {tuple(M.shape)} matrix is zero or not finite")
    unit = 1.0 if SAFE_PEAKS[0] < peak < SAFE_PEAKS[1] else 2.0 ** max(math.frexp(peak)[1] - 1, -126)
    U, s, V = (_exact_svd if svd == "exact" else _sketched_svd)(M if unit == 1.0 else M / unit, rank)
    return U, s * unit, V


@functools.cache
def warn_once(text: str) -> None:
    logger.warning("%s (logged once)", text)


def _exact_svd(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank].contiguous(), s[:rank], Vh[:rank].mT.contiguous()


def _sketched_svd(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`randomised_svd` from a Gaussian sketch.

    `torch.svd_lowrank` is the same algorithm but draws from the global generator: it would change the run's other
    random numbers, and differ between ranks whose generators differ.
    """
    width = min(rank + OVERSAMPLING, *M.shape)
    generator = torch.Generator().manual_seed(SKETCH_SEED)
    sketch = torch.randn(M.shape[1], width, generator=generator, dtype=M.dtype).to(M.device)
    # (Q^T M)^T reads M along its rows, and is several times faster on a CPU than M^T Q.
    U, s, V, _ = randomised_svd(lambda X: M @ X, lambda Q: (Q.mT @ M).mT, sketch)
    return U[:, :rank].contiguous(), s[:rank], V[:, :rank].contiguous()  # as a checkpoint stores bases


def randomised_svd(
    times: Product, transposed_times: Product, start: Tensor, probe: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Approximate singular triplets of M (m, n), which is never formed, by subspace iteration with one power iteration.

    Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1.

    Args:
        times, transposed_times: M X for X (n, w), M^T X for X (m, w).
        start: (n, w), the block that the iteration starts from.
        probe: (n, p), further columns to multiply by M on the way.

    Returns:
        U (m, w), s (w,), V (n, w), and the part of M probe (m, p) outside the span of U; None without a probe.

    Raises:
        torch.linalg.LinAlgError: M is not finite (on a GPU the result may be NaN instead).
    """
    block = _orthonormal(transposed_times(_orthonormal(times(start))))
    Y = times(block if probe is None else torch.cat((block, probe), dim=1))
    Q, probed = _orthonormal(Y[:, : block.shape[1]]), Y[:, block.shape[1] :]
    V, triangle = torch.linalg.qr(transposed_times(Q))  # far faster than an SVD of the tall matrix
    W, s, Uh = torch.linalg.svd(triangle)
    return Q @ Uh.mT, s, V @ W, None if probe is None else probed - Q @ (Q.mT @ probed)


def _orthonormal(M: Tensor) -> Tensor:
    """Orthonormal columns that span M's; M is scaled by a power of two first, so that nothing under- or overflows."""
    peak = largest(M).clamp_min(torch.finfo(M.dtype).tiny)
    return torch.linalg.qr(torch.ldexp(M, -torch.frexp(peak).exponent)).Q
