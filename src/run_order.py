"""Run the tasks of one order, one after the other in one process, each from the previous task's adapter.

    python src/run_order.py configs/order1_configs --model_name_or_path initial_model/t5-large
        --output_dir logs_and_outputs/order_1/outputs --lora_modules ... ...

The folder of the order comes first, then the flags of `run_uie_lora.py`, which runs each task. The first task starts
from `--model_name_or_path`, `--output_dir` gets a folder `<number>-<dataset>` for each task, and `--task_epochs MNLI=2`
trains that dataset for two epochs, whatever `--num_train_epochs` says. Everything that `check.py` checks is checked
before the first task, and before each later one, that no file of the order was written since. The same command
resumes an unfinished order.

In one process, later tasks import nothing anew and read no unchanged file twice. Under DeepSpeed's launcher or torchrun
each rank runs the complete order; the first one checks, writes and prints, and decides for all where a task starts.
"""

import argparse
import contextlib
import functools
import gc
import math
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import run_uie_lora
from check import check_flags, check_order
from checkpoints import checkpoint_folders
from command_line import Parser, peek, underscored
from errors import InputError, check, entry_point
from files import check_writable, read_json
from methods import find_method
from order_config import OrderStep, order_name, read_order, step_name
from ranks import disconnect, is_first, of_first_rank
from run_record import RECORD, find_adapter
from uie_dataset_lora import data_files

Stamp = tuple[int, int] | None


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run an order; returns 0, or the exit code of the check or of the task that ended it."""
    options, flags = parse_order(sys.argv[1:] if argv is None else argv)
    steps, files = begin(options, flags)
    gc.freeze()  # keeps garbage collections from scanning what the imports have created
    start, group = options.model_name_or_path, run_group(options, flags)
    for name in ("WANDB_RUN_GROUP", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.setdefault(name, group)
    for number, step in enumerate(steps, start=1):
        of_first_rank(lambda: check_untouched(files))
        command = [*task_flags(options, number, step, start, group), *flags]
        if step.dataset in options.task_epochs:
            command += ["--num_train_epochs", options.task_epochs[step.dataset]]  # the later flag wins
        if is_first():
            print(f"[gorp] {order_name(options.order)}, task {number} of {len(steps)}: {step.task}/{step.dataset}")
            print(shlex.join(["python", "src/run_uie_lora.py", *command]), flush=True)
        if status := run_uie_lora.main(command):
            return status
        gc.collect()  # trainer, optimizer and engine refer to each other
        folder = options.output_dir / step_name(number, step.dataset)
        if options.drop_checkpoints and is_first():
            for checkpoint in checkpoint_folders(folder):
                shutil.rmtree(checkpoint)
        if options.drop_weights and number > 1 and is_first():
            drop_weights(options.output_dir / step_name(number - 1, steps[number - 2].dataset))
        if number < len(steps):
            start = of_first_rank(functools.partial(next_start, folder, start))
    return 0


def drop_weights(folder: Path) -> None:
    """Remove the weights of a task whose next task is finished too: nothing of the order reads them any more."""
    for weights in (find_adapter(folder) or folder).glob("*.safetensors"):
        weights.unlink()


def next_start(folder: Path, start: Path | str) -> Path | str:
    """Where the task after the finished one in `folder` starts: from its adapter, or without `--do_train` from `start`
    again.

    Raises:
        InputError: the adapter has been removed.
    """
    adapter = find_adapter(folder)
    if adapter is None and read_json(folder / RECORD)["configuration"]["do_train"]:
        raise InputError(f"{folder}: finished, but the adapter folder that the next task starts from is gone; restore "
                         "it, or start over with --fresh")
    return adapter or start


def parse_order(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The order's own options, and the flags for all of its tasks."""
    parser = Parser(usage="run_order.py ORDER [flags of run_uie_lora.py]", description=__doc__)
    parser.add_argument("order", type=Path, help="folder of the order, for instance configs/order1_configs")
    parser.add_argument("--model_name_or_path", required=True, help="base model of the first task")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets a folder for each task")
    parser.add_argument("--fresh", type=Path, metavar="LOG", help="move earlier results, and this log, aside")
    parser.add_argument("--drop_checkpoints", action="store_true", help="remove the checkpoints of finished tasks")
    parser.add_argument("--drop_weights", action="store_true",
                        help="remove a finished task's weights once the next task is finished, too")  # fmt: skip
    parser.add_argument("--task_epochs", nargs="+", type=_epochs, default=[], metavar="DATASET=N",
                        help="epochs of single tasks")  # fmt: skip
    options, flags = parser.parse_known_args(underscored(argv))
    options.output_dir = options.output_dir.expanduser()  # as Transformers expands each task's
    named = [dataset for dataset, _ in options.task_epochs]
    if twice := [dataset for dataset in named if named.count(dataset) > 1]:
        raise InputError(f"--task_epochs: found {twice[0]} twice; allowed: once")
    options.task_epochs = dict(options.task_epochs)
    return options, flags


def _epochs(word: str) -> tuple[str, str]:
    """The dataset and the number of epochs, still text, of a `DATASET=N`."""
    dataset, _, number = word.partition("=")
    with contextlib.suppress(ValueError):
        if dataset and 0 < float(number) < math.inf:
            return dataset, number
    raise InputError(f"--task_epochs: found {word!r}; allowed: DATASET=N, with N epochs, above 0")


def begin(options: argparse.Namespace, flags: list[str]) -> tuple[list[OrderStep], dict[Path, Stamp]]:
    """Return the order's steps and the files that they read, after the first rank has checked them and claimed the
    folder; collective."""
    steps = read_order(options.order)
    trained = [step.dataset for step in steps]
    if unknown := [dataset for dataset in options.task_epochs if dataset not in trained]:
        raise InputError(f"--task_epochs: found {unknown[0]!r}; allowed: datasets of {order_name(options.order)}: "
                         f"{', '.join(trained)}")
    named = peek(flags, resume_from_checkpoint="", task_config_dir="", max_steps=-1, method="gorp")
    check(named.resume_from_checkpoint in ("", "True", "true"), "resume_from_checkpoint", named.resume_from_checkpoint,
          "true for an order; a checkpoint of one task with src/run_uie_lora.py")
    check(not named.task_config_dir, "task_config_dir", named.task_config_dir,
          "none for an order, which has one for each task")
    together = find_method(named.method).reads == "all"
    if options.task_epochs and (named.max_steps > 0 or together):
        options.task_epochs = {}
        why = (f"{named.method} trains all tasks together" if together
               else f"each task trains for --max_steps {named.max_steps}")
        if is_first():
            print(f"[gorp] --task_epochs is ignored: {why}", flush=True)
    checked = check_flags(["--model_name_or_path", options.model_name_or_path, *flags])  # every rank: connects them

    def check_and_claim() -> None:
        print(f"[gorp] {options.order}: valid, {check_order(options.order, *checked)}", flush=True)
        claim(options, steps)

    of_first_rank(check_and_claim)
    example_options, _ = checked
    read = chain.from_iterable(data_files(step.folder, example_options).values() for step in steps)
    return steps, {path: stamp(path) for path in read}


def stamp(path: Path) -> Stamp:
    """A file's size in bytes and the time of its last change in ns; None if it is gone."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns


def check_untouched(files: Mapping[Path, Stamp]) -> None:
    """Reject files that were written since the order began: its later tasks would read others than its earlier ones."""
    for path, read in files.items():
        if stamp(path) != read:
            raise InputError(f"{path}: was written while the order ran; with its earlier content, the same command "
                             "resumes")


def claim(options: argparse.Namespace, steps: list[OrderStep]) -> None:
    """Claim the output folder for this order. Results of an unfinished order stay, to be resumed; with `--fresh` they
    are moved aside together with the log."""
    outputs, name = options.output_dir, order_name(options.order)
    check_writable(outputs.parent)
    if options.fresh is not None and outputs.exists():
        for task in outputs.glob("[!.]*/"):
            with run_uie_lora.lock(task):  # an error if a run is writing there
                pass
        aside = outputs.with_name(f"{outputs.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        outputs.rename(aside)
        if options.fresh.exists():
            shutil.move(options.fresh, aside)
        print(f"[gorp] earlier results of {name}: moved to {aside}", flush=True)
    expected = {step_name(number, step.dataset) for number, step in enumerate(steps, start=1)}
    for folder in sorted(path.name for path in outputs.glob("[!.]*/")):
        if folder not in expected:
            raise InputError(f"{outputs / folder}: not a task of {name} as it is now; --fresh starts over")


def run_group(options: argparse.Namespace, flags: list[str]) -> str:
    """The name under which trackers group the runs of an order: `order1-gorp-seed42`."""
    found = peek(flags, method="gorp", preset="", seed=42)
    return "-".join(filter(None, [order_name(options.order), found.method, found.preset, f"seed{found.seed}"]))


def task_flags(options: argparse.Namespace, number: int, step: OrderStep, start: Path | str, group: str) -> list[str]:
    """The flags in which the tasks of an order differ."""
    folder = step_name(number, step.dataset)
    return ["--model_name_or_path", str(start), "--task_config_dir", str(step.folder),
            "--output_dir", str(options.output_dir / folder), "--run_name", f"{group}-{folder}"]  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    status = main()
    if status == 0:  # after an error of one rank alone, the others may be waiting for it in a collective
        disconnect()
    sys.exit(status)
