"""One order in one process and on two ranks under every ZeRO stage and precision: do the accuracies agree?

    python benchmarks/stages.py --family t5 --order order1 --steps 300 --out FOLDER

Runs the scripts with `--tiny` once for each way, on the CPU, and prints one table. A way that has results in the
folder is not run again; results of other settings there are an error. There are two targets: every accuracy after the
last task within 2 points of one process, and the averages of 16-bit training within 1 point of float32. A control, one
process with two threads, shows how far rounding alone moves the results; none of the ways can be expected to come
closer than that.

DeepSpeed rejects fp16 on a CPU without fast kernels for it, although PyTorch can compute it there. For that way, a
`sitecustomize.py` in a temporary folder therefore declares that the CPU supports it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"t5": "scripts/order.sh", "llama": "scripts_llama/order.sh"}
STAGES_APART, PRECISIONS_APART = 2.0, 1.0  # points
ANY_CPU = """
import os
if "LOCAL_RANK" in os.environ:  # not in the scripts' own calls of Python, whose output DeepSpeed would add to
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    set_accelerator(type("AnyCPU", (CPU_Accelerator,), {"is_fp16_supported": lambda self: True})())
"""


@dataclass(frozen=True)
class Way:
    """How an order is trained; without DeepSpeed if `stage` is None."""

    stage: int | None = None
    precision: str = "fp32"
    threads: int = 1

    def __str__(self) -> str:
        alone = "one process" if self.threads == 1 else f"one process, {self.threads} threads"
        return alone if self.stage is None else f"stage {self.stage}, {self.precision}"


WAYS = [Way(), Way(threads=2), *(Way(stage) for stage in range(4)), Way(2, "bf16"), Way(2, "fp16")]


def run(way: Way, args: argparse.Namespace, shim: Path) -> dict:
    """The order's results, as its report wrote them; the order runs first if there are none."""
    folder = args.out / str(way).replace(", ", "-").replace(" ", "-")
    label = re.sub(r"^order(\d+)$", r"order_\1", args.order)  # as the scripts call it
    results = folder / label / "order_results.json"
    if not results.exists():
        precision = "" if way.precision == "fp32" else f"--{way.precision} True"
        rates = f"--learning_rate {args.lr} --galore_lr {args.galore_lr}"
        environment = os.environ | {"OUTPUT": str(folder), "OMP_NUM_THREADS": str(way.threads),
                                    "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        environment["EXTRA"] = f"--max_steps {args.steps} {rates} {args.extra} {precision}"
        if way.stage is not None:
            environment |= {"NPROC": "2", "DS_CONFIG": f"configs/ds_configs/stage{way.stage}.config"}
        if way.precision == "fp16":
            environment["PYTHONPATH"] = str(shim)
        print(f"{way}: {folder}", file=sys.stderr, flush=True)
        command = ["bash", SCRIPTS[args.family], "--tiny", args.order]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {way}: {' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(results.read_text(encoding="utf-8"))


def reject_others(args: argparse.Namespace) -> None:
    """End the program if the folder has results of other settings; otherwise note those of this call there."""
    settings = {name: value for name, value in vars(args).items() if name not in ("ways", "out")}
    made_of = args.out / "made_of.json"
    if made_of.exists() and (found := json.loads(made_of.read_text(encoding="utf-8"))) != settings:
        sys.exit(f"error: --out: {args.out} has results of {found}; allowed: the same settings, or another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    made_of.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def table(results: dict[Way, dict]) -> str:
    """Markdown: the accuracies at the end and right after learning, and the largest distance from one process."""
    alone = results[Way()]
    lines = [f"| | {' | '.join(alone['tasks'])} | average | learned | furthest from one process |",
             "|---|" + "---|" * (len(alone["tasks"]) + 3)]
    for way, found in results.items():
        last = found["accuracy"][-1]
        learned = [row[number] for number, row in enumerate(found["accuracy"])]
        apart = max(abs(a - b) for a, b in zip(last, alone["accuracy"][-1], strict=True))
        cells = [*(f"{score:.0f}" for score in last), f"{found['average_performance']:.2f}",
                 ", ".join(f"{score:.0f}" for score in learned), f"{apart:.1f}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(results: dict[Way, dict]) -> list[str]:
    alone, lines = results[Way()], []
    for way, found in results.items():
        if way != Way() and way.precision == "fp32":
            pairs = zip(found["accuracy"][-1], alone["accuracy"][-1], strict=True)
            apart, target = max(abs(a - b) for a, b in pairs), STAGES_APART
        elif way.precision != "fp32":
            reference = results[Way(way.stage)]["average_performance"]
            apart, target = abs(found["average_performance"] - reference), PRECISIONS_APART
        else:
            continue
        lines.append(f"{way}: {apart:.2f} points apart, target {target:.0f}: {'met' if apart <= target else 'not met'}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=SCRIPTS, default="t5")
    parser.add_argument("--order", default="order1", help="its name in configs/ (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of each task (%(default)s)")
    parser.add_argument("--lr", default="1e-3", help="of the LoRA (%(default)s)")
    parser.add_argument("--galore_lr", default="1e-5", help="of the full-rank weights (%(default)s)")
    parser.add_argument("--extra", default="", help="more flags of src/run_uie_lora.py")
    parser.add_argument("--ways", nargs="+", choices=[str(way) for way in WAYS], metavar="WAY",
                        help=f"some of: {'; '.join(map(str, WAYS))} (all); the ways they are compared with run too")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()
    reject_others(args)
    # A 16-bit way is compared with float32 under the same stage.
    chosen = [way for way in WAYS if args.ways is None or str(way) in args.ways]
    ways = dict.fromkeys([Way(), *(Way(way.stage) for way in chosen), *chosen])
    with tempfile.TemporaryDirectory() as shim:
        (Path(shim) / "sitecustomize.py").write_text(ANY_CPU)
        results = {way: run(way, args, Path(shim)) for way in ways}
    print(table(results), "", *verdicts(results), sep="\n")


if __name__ == "__main__":
    main()
