"""A paired interval for the difference of two methods' average performance.

The difference between two runs of one order and seed depends on which test examples there happen to be and on what the
seed draws. Each dataset's examples are resampled (a bootstrap, with the same draw for every run, as two methods answer
the same examples). The few seeds are not, since resampling n of them gives only (n - 1) / n of their variance and
ignores how uncertain it is: a Student's t error is added to their mean. Runs of one seed in different orders share its
random draws, such as the initial LoRA factor A, so each seed counts once, by its mean over orders. A difference is not
significant if its interval contains 0, or if there is a single seed, as the interval does not then cover what another
seed would draw.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from errors import InputError

RunKey = tuple[str, str]
"""Order and seed."""

T_DRAWS = 20  # of Student's t, for each resample


@dataclass(frozen=True)
class Interval:
    """A difference of average performance in points, and its bounds."""

    mean: float
    low: float
    high: float
    runs: int  # orders and seeds that both methods have
    seeds: int  # of the order with the fewest

    @property
    def contains_zero(self) -> bool:
        return self.low <= 0 <= self.high

    @property
    def is_significant(self) -> bool:
        return self.seeds > 1 and not self.contains_zero

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def paired_interval(
    ours: Mapping[RunKey, Mapping[str, np.ndarray]],
    theirs: Mapping[RunKey, Mapping[str, np.ndarray]] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Ours minus theirs over the runs that both have: the mean over orders, their seeds, datasets and examples.

    Args:
        ours, theirs: by order and seed, then by dataset, whether each test example (n,) was answered correctly at the
            end. Without `theirs` the difference is ours itself, as if no answer of theirs were correct.
    """
    least = -1 if theirs else 0
    if theirs is None:
        theirs = {run: {name: np.zeros_like(hits) for name, hits in right.items()} for run, right in ours.items()}
    runs = [run for run in ours if run in theirs]
    if not runs:
        raise InputError("the two methods have no run of the same order and seed")
    gaps = {run: _gaps(ours[run], theirs[run], run) for run in runs}
    random = np.random.default_rng(seed)
    drawn_from = sorted({(dataset, len(gap)) for by_dataset in gaps.values() for dataset, gap in by_dataset.items()})
    seeds = Counter(order for order, _ in runs)
    weights = {run: 1 / seeds[run[0]] / len(seeds) for run in runs}
    means = {run: np.mean([gap.mean() for gap in gaps[run].values()]) for run in runs}

    def pooled(dataset: str, n: int) -> np.ndarray:  # (n,), what each example adds to the mean over all runs
        having = [run for run, gap in gaps.items() if len(gap.get(dataset, ())) == n]
        return sum(weights[run] / len(gaps[run]) * gaps[run][dataset] for run in having)

    drawn = sum(random.multinomial(n, [1 / n] * n, resamples) / n @ pooled(dataset, n) for dataset, n in drawn_from)
    fewest = min(seeds.values())
    if fewest > 1:
        errors = _seed_error(means, weights, fewest) * random.standard_t(fewest - 1, (T_DRAWS, resamples))
        drawn = np.clip([drawn + errors, drawn - errors], least, 1)  # both, so that the sign of a gap does not matter
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    mean = sum(weights[run] * means[run] for run in runs)
    return Interval(*(100 * float(value) for value in (mean, low, high)), runs=len(runs), seeds=fewest)


def _seed_error(means: Mapping[RunKey, float], weights: Mapping[RunKey, float], fewest: int) -> float:
    """The standard error, over seeds, of the weighted mean of the runs.

    A seed's deviations from the means of its orders are added up before they are squared. With the same n seeds in
    every order this is the error of a mean of n.
    """
    by_order, by_seed = defaultdict(list), defaultdict(float)
    for (order, _), mean in means.items():
        by_order[order].append(mean)
    for (order, seed), mean in means.items():
        by_seed[seed] += weights[order, seed] * (mean - np.mean(by_order[order]))
    return np.sqrt(fewest / (fewest - 1) * sum(deviation**2 for deviation in by_seed.values()))


def _gaps(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], run: RunKey) -> dict[str, np.ndarray]:
    if {name: len(hits) for name, hits in ours.items()} != {name: len(hits) for name, hits in theirs.items()}:
        raise InputError(f"order {run[0]}, seed {run[1]}: the two methods were not tested on the same examples")
    return {name: np.asarray(ours[name], float) - np.asarray(theirs[name], float) for name in ours}
