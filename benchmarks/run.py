"""Every figure of docs/PERFORMANCE.md, in one table: training step, projected layer, evaluation, data, orders.

    python benchmarks/run.py --data CL_Benchmark [--short]

Each part is a program in this folder, which can also run alone and whose head says what it does. This one measures the
machine itself and then runs them one after the other. On a machine that is not otherwise idle, the figures mean little.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2, TINY = "initial_model/smollm2-135m", "initial_model/tiny-llama"


def parts(data: str, short: bool) -> list[list[str]]:
    """Command lines; with `short` the smallest that still measure something."""
    few = ["--datasets", "3", "--examples", "2", "--teach", "10"] if short else []
    return [
        ["training_step.py", "--data", data, *(["--examples", "1"] if short else ["--rounds", "2"])],
        ["training_step.py", "--data", data, "--length", "384", "--examples", "1" if short else "2", "--contenders",
         "gorp", "gorp, full logits"],
        ["training_step.py", "--data", data, "--model", TINY, "--length", "128", "--examples", "1", "--contenders",
         "gorp", "gorp, bf16"],
        ["layer_step.py", *(["--shapes", "256x256x64"] if short else [])],
        ["evaluation.py", "--data", data, *few],
        ["evaluation.py", "--data", data, "--model", SMOLLM2, "--batch_size", "8", *(few or ["--examples", "4"])],
        ["preparation.py", *(["--examples", "1000"] if short else [])],
        ["orders.py", *(["--order", "order1", "--steps", "10", "--starts", "1"] if short else [])],
    ]  # fmt: skip


def matmul_rate(size: int = 1024, repeats: int = 10) -> float:
    """The machine's own limit: float32 matrix products in 10^9 operations a second, on all threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="CL_Benchmark", help="benchmark folder (%(default)s)")
    parser.add_argument("--short", action="store_true", help="small versions of every part")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} before, "
          f"torch.matmul {matmul_rate():,.0f} GFLOP/s\n")
    print("| what | against | figure | target |", "|---|---|---|---|", sep="\n", flush=True)
    failed = 0
    for part in parts(str(Path(args.data).resolve()), args.short):
        command = [sys.executable, f"benchmarks/{part[0]}", *part[1:]]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as program:
            for line in program.stdout:
                if line.startswith("| ") and not line.startswith("| what |"):
                    print(line, end="", flush=True)
        if program.returncode:
            failed = 1
            print(f"| {' '.join(part)} | | ended with {program.returncode} | |", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
