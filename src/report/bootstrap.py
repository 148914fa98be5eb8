"""A paired bootstrap interval for the difference of two methods' average performance.

What varies between two runs of the same order and seed is which test rows there happened to be and what the seed drew.
So both are resampled: the rows of each dataset (the same ones for every run, for two methods answer the same rows), and
the seeds of each order. A difference whose interval holds 0 is no result. Nor is one of a single seed, whose interval
tells nothing of what another seed would have drawn.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from errors import InputError

RunKey = tuple[str, str]
"""Order and seed."""


@dataclass(frozen=True)
class Interval:
    """A difference of average performance in points, and its bounds.

    Attributes:
        runs: how many both methods have, by order and seed; seeds: of the order that has fewest.
    """

    mean: float
    low: float
    high: float
    runs: int
    seeds: int

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high

    @property
    def is_result(self) -> bool:
        """Whether the difference is more than chance would give, that of rows and that of seeds."""
        return self.seeds > 1 and not self.holds_zero

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def paired_interval(
    ours: Mapping[RunKey, Mapping[str, np.ndarray]],
    theirs: Mapping[RunKey, Mapping[str, np.ndarray]],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Ours minus theirs, over the runs that both have: mean over orders, their seeds, their datasets, their rows.

    Args:
        ours, theirs: by order and seed, then by dataset, which test rows (n,) were answered rightly at the end.

    Raises:
        InputError: no run is common to both, or the two were tested on other rows.
    """
    runs = [run for run in ours if run in theirs]
    if not runs:
        raise InputError("the two methods have no run of the same order and seed")
    gaps = {run: _gaps(ours[run], theirs[run], run) for run in runs}
    random = np.random.default_rng(seed)
    sizes = {dataset: len(gap) for by_dataset in gaps.values() for dataset, gap in by_dataset.items()}
    shares = {dataset: random.multinomial(n, [1 / n] * n, resamples) / n for dataset, n in sorted(sizes.items())}
    seeds = Counter(order for order, _ in runs)
    means, drawn = [], []
    for order in seeds:
        of_order = [gaps[run] for run in runs if run[0] == order]
        means.append(np.mean([_mean_over_datasets(by_dataset) for by_dataset in of_order]))
        resampled = np.stack([_mean_over_datasets(by_dataset, shares) for by_dataset in of_order])  # seeds, resamples
        n = seeds[order]
        drawn.append((resampled * random.multinomial(n, [1 / n] * n, resamples).T / n).sum(axis=0))
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(np.mean(drawn, axis=0), [tail, 100 - tail])
    bounds = (100 * float(value) for value in (np.mean(means), low, high))
    return Interval(*bounds, runs=len(runs), seeds=min(seeds.values()))


def _gaps(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], run: RunKey) -> dict[str, np.ndarray]:
    if {name: len(rows) for name, rows in ours.items()} != {name: len(rows) for name, rows in theirs.items()}:
        raise InputError(f"order {run[0]}, seed {run[1]}: the two methods were not tested on the same rows")
    return {name: np.asarray(ours[name], float) - np.asarray(theirs[name], float) for name in ours}


def _mean_over_datasets(gaps: Mapping[str, np.ndarray], shares: Mapping[str, np.ndarray] | None = None):
    """Mean over datasets of the mean over rows; with `shares` (resamples, n) one for each resample."""
    return np.mean([gap.mean() if shares is None else shares[name] @ gap for name, gap in gaps.items()], axis=0)
