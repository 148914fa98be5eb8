"""Optimizer step time, amortised over one update gap with its one refresh, on weights of T5-large's shapes.

    python benchmarks/optimizer_step.py --layers 6 --rank 8 --gap 10 --repeats 3

T5-large has 48 target matrices of 1024 x 1024 (`.*EncDecAttention.(q|v)` of 24 layers). Every contender treats weights
one by one, so time is linear in their number and fewer layers give the same ratios. Gradients are random, with a
1/i spectrum; forward and backward passes are not part of the time.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
from benchmarks.flags import Parser, positive  # noqa: E402
from errors import InputError, entry_point  # noqa: E402
from Proj_torch import ProjAdamW  # noqa: E402

SIZE, MATRICES_PER_LAYER = 1024, 2
SPECTRUM = 64  # singular values of a gradient that are not noise
TARGET = 10  # times faster than galore-torch
THEIRS = "galore-torch GaLoreAdamW"


def gradient(seed: int) -> Tensor:
    """(SIZE, SIZE) with singular values near 1/i, and noise so that it has full rank."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.randn(SIZE, SPECTRUM, generator=generator) / SIZE**0.5 for _ in range(2))
    noise = torch.randn(SIZE, SIZE, generator=generator) * 1e-3 / SIZE**0.5
    return torch.addmm(noise, U / torch.arange(1, SPECTRUM + 1), V.mT)


def contenders(gradients: Sequence[Tensor], rank: int, gap: int) -> dict[str, Optimizer]:
    """Name -> optimizer with its own weights; the gradients are shared, as no optimizer changes them."""
    try:
        from galore_torch import GaLoreAdamW
    except ImportError:
        raise InputError("galore-torch: not installed; pip install -r requirements-test.txt") from None

    def group(**settings) -> list[dict]:
        weights = [torch.nn.Parameter(torch.zeros_like(G)) for G in gradients]
        for W, G in zip(weights, gradients, strict=True):
            W.grad = G
        return [{"params": weights, **settings}]

    projection = {"rank": rank, "update_proj_gap": gap, "scale": 1.0, "proj_type": "std"}
    return {
        THEIRS: GaLoreAdamW(group(**projection), no_deprecation_warning=True),
        "ProjAdamW, exact": ProjAdamW(group(**projection, svd="exact")),
        "ProjAdamW, lowrank": ProjAdamW(group(**projection, svd="lowrank")),
        "torch.optim.AdamW (not projected)": torch.optim.AdamW(group(), weight_decay=0.0),
    }


def seconds_of_gap(optimizer: Optimizer, gap: int) -> list[float]:
    """Time of each of the next `gap` steps; the first of them refreshes, if all calls run complete gaps."""
    seconds = []
    for _ in range(gap):
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(optimizers: dict[str, Optimizer], gap: int, repeats: int) -> dict[str, tuple[float, float, float]]:
    """Name -> median milliseconds of a step: amortised, with refresh, without (median of each gap first).

    The contenders take turns, so that other load affects all equally. The first round, which also creates the
    state, is not counted.
    """
    rounds: dict[str, list[list[float]]] = {name: [] for name in optimizers}
    for _ in range(1 + repeats):
        for name, optimizer in optimizers.items():
            rounds[name].append(seconds_of_gap(optimizer, gap))

    def median(values) -> float:
        return 1000 * statistics.median(values)

    return {
        name: (
            median(sum(steps) / gap for steps in gaps[1:]),
            median(steps[0] for steps in gaps[1:]),
            median(statistics.median(steps[1:] or steps) for steps in gaps[1:]),
        )
        for name, gaps in rounds.items()
    }


def print_results(results: dict[str, tuple[float, float, float]]) -> None:
    theirs = results[THEIRS][0]
    print("| optimizer | ms a step, amortised | refresh step | other steps | x faster than galore-torch |")
    print("|---|---|---|---|---|")
    for name, (amortised, refresh, other) in results.items():
        print(f"| {name} | {amortised:.1f} | {refresh:.1f} | {other:.1f} | {theirs / amortised:.1f} |")
    ours = {name: theirs / times[0] for name, times in results.items() if name.startswith("ProjAdamW")}
    verdicts = [f"{'met' if x >= TARGET else 'not met'} by {name} ({x:.1f} x)" for name, x in ours.items()]
    print(f"\ntarget, {TARGET} x faster than galore-torch: {'; '.join(verdicts)}")


# ------------------------------------------------------------------------------------------ command line


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=positive, default=6, help="of T5-large's 24, two matrices each (%(default)s)")
    parser.add_argument("--rank", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--gap", type=positive, default=10, help="steps between two refreshes (%(default)s)")
    parser.add_argument("--repeats", type=positive, default=3, help="timed gaps per optimizer (%(default)s)")
    args = parser.parse_args(argv)
    if args.rank >= SIZE:
        raise InputError(f"--rank: found {args.rank}; allowed: 1 to {SIZE - 1}")
    return args


def benchmark(args: argparse.Namespace) -> None:
    matrices = MATRICES_PER_LAYER * args.layers
    optimizers = contenders([gradient(seed) for seed in range(matrices)], args.rank, args.gap)
    print(f"{matrices} matrices of {SIZE}x{SIZE}, rank {args.rank}, a refresh every {args.gap} steps, float32")
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n")
    print_results(measure(optimizers, args.gap, args.repeats))


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    benchmark(arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
