"""Entry: the tasks of one order, one after the other in this process, each from the adapter that the one before left.

    python src/run_order.py configs/order1_configs --model_name_or_path initial_model/t5-large
        --output_dir logs_and_outputs/order_1/outputs --lora_modules ... ...

The folder of the order comes first, then the flags of `run_uie_lora.py`, which runs each task as it would alone. Here
`--model_name_or_path` is what the first task starts from, `--output_dir` gets a folder `<number>-<dataset>` for each
task. Before the first task, everything is checked that `check.py` checks. An order that was begun goes on.

What the tasks share is what one process a task would do again and again: imports, reading files that have not changed.
Under DeepSpeed's launcher each rank runs the whole order; the first one checks, writes and speaks.
"""

import argparse
import gc
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list

import run_uie_lora
from check import check_flags, check_order
from checkpoints import checkpoint_folders
from command_line import Parser
from errors import InputError
from files import check_writable
from order_config import OrderStep, read_order
from run_record import find_adapter

OWN_FLAGS = ("--model_name_or_path", "--output_dir")  # of the order as a whole; each task gets its own


def main(argv: Sequence[str] | None = None) -> int:
    """Run an order; 0, or the exit code of the check or of the task that ended it."""
    try:
        options, flags = parse_order(sys.argv[1:] if argv is None else argv)
        steps = begin(options, flags)
    except InputError as error:
        if is_first():
            print(f"error: {error}", file=sys.stderr)
        return 2
    if steps is None:  # the first rank says why
        return 2
    gc.freeze()  # what imports made stays: no collection needs to look at it again
    start = options.model_name_or_path
    for number, step in enumerate(steps, start=1):
        command = [*task_flags(options, number, step, start), *flags]
        if is_first():
            print(f"[gorp] {order_name(options.order)}, task {number} of {len(steps)}: {step.task}/{step.dataset}")
            print(shlex.join(["python", "src/run_uie_lora.py", *command]), flush=True)
        if status := run_uie_lora.main(command):
            return status
        gc.collect()  # trainer, optimizer and engine hold one another
        folder = options.output_dir / task_folder(number, step)
        if options.drop_checkpoints and is_first():
            for checkpoint in checkpoint_folders(folder):
                shutil.rmtree(checkpoint)
        start = find_adapter(folder)
    return 0


def parse_order(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The order's own options, and the flags that all of its tasks get.

    Raises:
        InputError: one of the order's own is missing.
    """
    parser = Parser(prog="run_order.py", usage="run_order.py ORDER [flags of run_uie_lora.py]")
    parser.add_argument("order", type=Path, help="folder of the order, for instance configs/order1_configs")
    parser.add_argument("--model_name_or_path", required=True, help="what the first task starts from")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets a folder for each task")
    parser.add_argument("--fresh", type=Path, metavar="LOG", help="move earlier results, and this log, aside")
    parser.add_argument("--drop_checkpoints", action="store_true", help="remove those of each task that is finished")
    return parser.parse_known_args(argv)


def begin(options: argparse.Namespace, flags: list[str]) -> list[OrderStep] | None:
    """Check the order and claim its folder, both by the first rank alone; the others wait for its word.

    Returns:
        The order's steps; None on ranks that the first one leaves behind.

    Raises:
        InputError: what `check.py` refuses; results of another order in the folder, or a folder that is not writable.
    """
    steps, fault = read_order(options.order), None
    words = ["--model_name_or_path", options.model_name_or_path, *flags]
    checked = check_flags(words)  # by every rank: it is also where they meet
    if is_first():
        try:
            print(f"[gorp] {options.order}: fine, {check_order(options.order, *checked)}", flush=True)
            claim(options, steps)
        except InputError as error:
            fault = error
    [refused] = broadcast_object_list([fault is not None])
    if fault is not None:
        raise fault
    return None if refused else steps


def claim(options: argparse.Namespace, steps: list[OrderStep]) -> None:
    """Make the output folder this order's. Results of an order that was begun stay, for it goes on; with `--fresh`
    they are moved aside together with the log, never mixed with new ones and never lost.

    Raises:
        InputError: the folder cannot be written, or has a folder that is no task of this order.
    """
    outputs, name = options.output_dir, order_name(options.order)
    check_writable(outputs.parent)
    if not outputs.exists():
        return
    if options.fresh is not None:
        aside = outputs.with_name(f"{outputs.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        outputs.rename(aside)
        if options.fresh.exists():
            shutil.move(options.fresh, aside)
        print(f"[gorp] earlier results of {name}: moved to {aside}", flush=True)
        return
    expected = {task_folder(number, step) for number, step in enumerate(steps, start=1)}
    for folder in sorted(path.name for path in outputs.glob("[!.]*/")):
        if folder not in expected:
            raise InputError(f"{outputs / folder}: no task of {name} as it is now; --fresh starts over")


def task_flags(options: argparse.Namespace, number: int, step: OrderStep, start: Path | str) -> list[str]:
    """What tells the command line of one task from that of the next."""
    return [
        "--model_name_or_path", str(start),
        "--task_config_dir", str(step.folder),
        "--output_dir", str(options.output_dir / task_folder(number, step)),
        "--run_name", f"{order_name(options.order)}_round{number}",
    ]  # fmt: skip


def task_folder(number: int, step: OrderStep) -> str:
    return f"{number}-{step.dataset}"


def order_name(order: Path) -> str:
    return order.resolve().name.removesuffix("_configs")


def is_first() -> bool:
    """Whether this is the first rank, or the only process."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
