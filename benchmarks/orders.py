"""An order's tasks in one process against one process per task, a run's start-up time, and what grows with the tasks.

    python benchmarks/orders.py --steps 200         # the tiny T5's order 4, 15 tasks
    python benchmarks/orders.py --order order1 --steps 20

`src/run_order.py` runs an order in one process. The same tasks then run in one process each, by the command lines that
it printed. They must save the same predictions and tensors, bit for bit; otherwise this benchmark ends with an error.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
from files import digest  # noqa: E402

STARTED, TWICE = 12, 2  # targets: seconds to the first step, times faster in one process
PREDICTIONS, TENSORS = "predict_eval_predictions.jsonl", "t5_adapter/*.safetensors"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "VIRTUAL_ENV": sys.prefix,
                            "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
Row = tuple[str, str, str, str]  # what, against, figure, target


def order_command(args: argparse.Namespace, output: Path) -> list[str]:
    """The command that the script would run, as DRY_RUN=1 prints it."""
    environment = ENVIRONMENT | {"DRY_RUN": "1", "OUTPUT": str(output), "EXTRA": f"--max_steps {args.steps}"}
    done = subprocess.run(["bash", "scripts/order.sh", "--tiny", args.order], cwd=ROOT, env=environment, text=True,
                          capture_output=True, check=True)  # fmt: skip
    return shlex.split(done.stdout)


def run(command: list[str]) -> tuple[str, float]:
    """Output and seconds of a command."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"error: {shlex.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout, time.perf_counter() - start


def seconds_to_first_step(args: argparse.Namespace, output: Path) -> float:
    """From the script's command to the end of the first optimizer step."""
    environment = ENVIRONMENT | {"OUTPUT": str(output), "EXTRA": "--max_steps 2 --logging_steps 1"}
    log = output / f"{args.order.replace('order', 'order_')}.log"
    start = time.perf_counter()
    script = subprocess.Popen(["bash", "scripts/order.sh", "--tiny", args.order], cwd=ROOT, env=environment,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    while not (log.exists() and "{'loss'" in log.read_text(encoding="utf-8", errors="replace")):
        if script.poll() is not None:
            sys.exit(f"error: the script ended with {script.returncode} before its first step; {log}")
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    os.killpg(script.pid, 9)
    script.wait()
    return seconds


def contents(outputs: Path) -> dict[str, str | dict[str, Tensor]]:
    """File -> its digest, or for safetensors its tensors, as the order of their header varies."""
    files = {str(path.relative_to(outputs)): digest(path) for path in outputs.glob(f"*/{PREDICTIONS}")}
    if not files:
        sys.exit(f"error: {outputs}: found no predictions")
    return files | {str(path.relative_to(outputs)): load_file(path) for path in outputs.glob(f"*/{TENSORS}")}


def same(one: dict, other: dict) -> bool:
    """Whether two of `contents` are equal bit for bit."""
    return one.keys() == other.keys() and all(
        one[key].equal(other[key]) if isinstance(one[key], Tensor)
        else same(one[key], other[key]) if isinstance(one[key], dict)
        else one[key] == other[key]
        for key in one
    )


def chain(args: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Time both ways, and check that they saved the same."""
    shown, together = run(order_command(args, scratch))
    outputs = next(scratch.glob("*/outputs"))
    left = contents(outputs)
    tasks = [line for line in shown.splitlines() if line.startswith("python src/run_uie_lora.py ")]
    outputs.rename(outputs.with_name("together"))
    apart = sum(run([sys.executable, *shlex.split(task)[1:]])[1] for task in tasks)
    if not same(left, contents(outputs)):
        sys.exit("error: one process per task did not save the same as one process for all")
    ratio = apart / together
    figure = f"{ratio:.2f} x faster ({together:.0f} s against {apart:.0f} s)"
    yield (f"{args.order}, {len(tasks)} tasks of {args.steps} steps, in one process", "one process a task", figure,
           verdict(f"{TWICE} x, same bits", ratio >= TWICE))  # fmt: skip


def growth(outputs: Path) -> Iterator[Row]:
    """How the shared space and the stack of old LoRAs in the adapter folder grow with the tasks."""
    folders = sorted(outputs.glob("*/t5_adapter"), key=lambda folder: int(folder.parent.name.split("-")[0]))
    for what, file in (("shared space", "gradient_space"), ("stack of LoRAs", "adapter_model")):
        sizes = [sum(tensor.nbytes for tensor in load_file(folder / f"{file}.safetensors").values())
                 for folder in folders]  # fmt: skip
        slope = (sizes[-1] - sizes[0]) / max(1, len(sizes) - 1)
        most = max(later - earlier for earlier, later in zip(sizes, sizes[1:], strict=False)) if sizes[1:] else 0
        figure = f"{sizes[-1] / 1024:,.0f} against {sizes[0] / 1024:,.0f} KiB; {slope / 1024:,.1f} KiB a task"
        yield f"{what} after {len(sizes)} tasks", "after 1", f"{figure}, {most / 1024:,.1f} at most", "linear at most"


def verdict(target: str, met: bool) -> str:
    return f"{target}: {'met' if met else 'not met'}"


def results(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of the table, as they are measured."""
    with tempfile.TemporaryDirectory() as scratch:
        seconds = min(seconds_to_first_step(args, Path(scratch) / str(number)) for number in range(args.starts))
        yield ("from command to first step, tiny T5", "-", f"{seconds:.1f} s",
               verdict(f"{STARTED} s", seconds <= STARTED))  # fmt: skip
        yield from chain(args, Path(scratch) / "order")
        yield from growth(next((Path(scratch) / "order").glob("*/together")))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", default="order4", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="of each task (%(default)s)")
    parser.add_argument("--starts", type=int, default=2, help="starts, of which the fastest counts (%(default)s)")
    return parser


def main() -> None:
    print("| what | against | figure | target |", "|---|---|---|---|", sep="\n")
    for row in results(arguments().parse_args()):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
