"""Time and memory of a training step of one projected layer, at the published models' shapes.

    python benchmarks/layer_step.py --shapes 1024x1024x200 11008x4096x512

Times the forward pass, backward pass and optimizer step of one linear layer whose input needs a gradient, averaged over
a gap of ten steps, which has one refresh:

* `published`: the weight's dense gradient, galore-torch's AdamW with an exact SVD once per gap;
* `ours, exact` and `ours, sketch`: a frozen weight with a trainable core (`zero_core.py`), refreshed by an exact SVD of
  the layer's gradient or by a sketch that does not form this matrix;
* `LoRA`: a frozen weight and two factors of the same rank, AdamW.

Memory is the peak of the weight and all that the step needs. Each contender runs in a process of its own.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from Proj_torch.plan import Plan  # noqa: E402
from Proj_torch.zero_core import CoreEngine  # noqa: E402
from training_step import AT_LEAST, AT_MOST, GAP, Row, peak_bytes, reset_peak, resident_bytes, row  # noqa: E402

RANK = 8
# T5-large's EncDecAttention.q and .v (4 examples of 50 and of 512 tokens), LLaMA-2-7B's mlp.gate_proj (one example).
PUBLISHED = [(1024, 1024, 200), (1024, 1024, 2048), (11008, 4096, 512)]
RATIOS = (  # what, against, sense of the targets, target for time, target for memory
    ("published", "ours, sketch", AT_LEAST, 3.0, 1.5),
    ("published", "ours, exact", AT_LEAST, None, None),
    ("ours, sketch", "LoRA", AT_MOST, None, None),
)


class LoRA(nn.Module):
    """y = W x + B A x with a frozen W (out, in)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Linear(linear.in_features, RANK, bias=False)
        self.B = nn.Linear(RANK, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.B(self.A(x))


Step = Callable[[Tensor, Tensor], None]  # takes the layer's input and the gradient of its output


def plain_step(layer: nn.Module, optimizer: torch.optim.Optimizer, before: Callable[[], None] = lambda: None) -> Step:
    def step(x: Tensor, grad_y: Tensor) -> None:
        before()
        layer(x).backward(grad_y)
        optimizer.step()
        optimizer.zero_grad()

    return step


def published(linear: nn.Linear) -> Step:
    from galore_torch import GaLoreAdamW

    projection = {"rank": RANK, "update_proj_gap": GAP, "scale": 1.0, "proj_type": "std"}
    groups = [{"params": [linear.weight], **projection}]
    return plain_step(linear, GaLoreAdamW(groups, lr=1e-5, no_deprecation_warning=True))


def ours(linear: nn.Linear, refresh: str) -> Step:
    model = nn.Sequential(linear)
    projection = {"rank": RANK, "update_proj_gap": GAP, "scale": 1.0, "proj_type": "std", "svd": refresh, "lr": 1e-5}
    cores = CoreEngine(model, Plan({"0": linear}, projection))
    optimizer = torch.optim.AdamW(cores.core_groups())
    cores.begin_training(optimizer)
    return plain_step(model, optimizer, cores.begin_micro_batch)


def lora(linear: nn.Linear) -> Step:
    model = LoRA(linear)
    return plain_step(model, torch.optim.AdamW([model.A.weight, model.B.weight], lr=1e-3))


CONTENDERS: dict[str, Callable[[nn.Linear], Step]] = {
    "published": published,
    "ours, exact": lambda linear: ours(linear, "exact"),
    "ours, sketch": lambda linear: ours(linear, "sketch"),
    "LoRA": lora,
}


def measure(contender: str, shape: tuple[int, int], tokens: int) -> dict[str, float]:
    """Seconds of a step, amortised over a gap, and peak memory in bytes; to be run in a new process."""
    import galore_torch  # noqa: F401  # in every process, so that each has the same libraries in memory

    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=False)
    # The inputs of a trained layer lie close to a few directions, so the gradient's spectrum decays.
    x = (torch.randn(tokens, 64) @ torch.randn(64, shape[1]) / 8).requires_grad_()
    grad_y = torch.randn(tokens, shape[0]) / tokens
    linear(x).backward(grad_y)
    x.grad = linear.weight.grad = None
    before = resident_bytes()
    step = CONTENDERS[contender](linear)
    for _ in range(GAP):  # creates the state; from here on, gaps are complete
        step(x, grad_y)
    reset_peak()
    start = time.perf_counter()
    for _ in range(GAP):
        step(x, grad_y)
    seconds = (time.perf_counter() - start) / GAP
    return {"seconds": seconds, "peak": peak_bytes() - before + linear.weight.nbytes}


def results(shapes: Sequence[tuple[int, int, int]]) -> Iterator[Row]:
    """The rows of the table."""
    for *shape, tokens in shapes:
        found = {}
        for contender in CONTENDERS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[contender] = pool.apply(measure, (contender, shape, tokens))
            milliseconds, peak = 1000 * found[contender]["seconds"], found[contender]["peak"] / 2**20
            print(f"{contender}: {milliseconds:,.1f} ms a step, {peak:,.0f} MiB", file=sys.stderr)
        for what, against, sense, *targets in RATIOS:
            for kind, key, target in zip(("time", "memory"), ("seconds", "peak"), targets, strict=True):
                name = f"layer {shape[0]}x{shape[1]}, {tokens} tokens, {kind}: {what}"
                yield row(name, against, found[what][key] / found[against][key], sense, target)


def shape_of(text: str) -> tuple[int, int, int]:
    out, inp, tokens = map(int, text.split("x"))
    return out, inp, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="OUTxINxTOKENS", default=PUBLISHED)
    args = parser.parse_args()
    print("| what | against | figure | target |", "|---|---|---|---|", sep="\n")
    for line in results(args.shapes):
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
