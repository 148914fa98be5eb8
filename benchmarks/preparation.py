"""Measure the memory of data preparation for a dataset on the hub, and for one that is four times as long.

    python benchmarks/preparation.py [--examples 50000]

The hub is not accessed: made-up dbpedia examples of 60 words stream through `prepare_from_hub` as the hub's would. Each
length runs in a process of its own, whose peak is measured.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "data")]

TIMES = 4


def made_up_rows(count: int):
    """dbpedia examples as the hub has them, no two alike."""
    for number in range(count):
        words = " ".join(f"word{(number * 7 + place * 13) % 5003}" for place in range(60))
        yield {"title": f"Title {number}", "content": words, "label": number % 14}


def prepare(rows: int) -> None:
    """Prepare dbpedia from `rows` examples per split; print examples a second and peak memory in MiB."""
    from prepare_benchmark import prepare_from_hub

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        prepare_from_hub(folder, ["TC/dbpedia"], load=lambda *_, **__: made_up_rows(rows))
    seconds = time.perf_counter() - start
    print(2 * rows / seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(rows: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--examples", str(rows), "--only"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    speed, peak = map(float, done.stdout.split())
    return speed, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=50_000, help="in each of the shorter splits (%(default)s)")
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        prepare(args.examples)
        return
    (_, short), (speed, long) = measure(args.examples), measure(TIMES * args.examples)
    print("| what | against | figure | target |", "|---|---|---|---|", sep="\n")
    print(f"| preparing dbpedia from {TIMES * args.examples:,} examples a split: peak memory | from "
          f"{args.examples:,} examples | {long / short:.2f} x ({short:.0f} and {long:.0f} MiB, {speed:,.0f} examples a "
          "second) | bounded |")


if __name__ == "__main__":
    main()
