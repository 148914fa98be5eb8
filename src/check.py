"""Check orders before anything is trained, in seconds and without reading a model's weights.

    python src/check.py configs/order1_configs configs/mine_configs --data_dir CL_Benchmark
    python src/check.py configs/order1_configs --model_name_or_path initial_model/t5-large --lora_modules ... ...

Folders of orders come first (by default every order in configs/), then flags of `run_uie_lora.py`; the scripts in
`scripts/` pass those of the run. The run's own functions check orders, examples, labels, instructions, flags and a
DeepSpeed file; with `--model_name_or_path` also the files of the model or the adapter, module names and ranks, and
whether every prompt and answer fits. Prints a line for each order: `error: ...` if it is invalid, with exit code 2.
"""

import importlib
import itertools
import os
import sys
import tempfile
import warnings
from pathlib import Path

from accelerate.utils import is_deepspeed_available
from transformers.utils import logging as hf_logging

from arguments import check_data_arguments
from command_line import Parser, parse_arguments, peek
from compute_metrics import gpt2_folder
from errors import InputError, entry_point
from methods import find_method
from order_config import read_order
from ranks import of_first_rank
from task_setup import build_collator, example_options, load_model
from uie_collator import DataCollatorForUIE
from uie_dataset_lora import ExampleOptions, read_examples


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Check flags and orders; returns 0, or 2 after an error line for each invalid order, or for the flags."""
    argv = sys.argv[1:] if argv is None else argv
    orders = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    checked = check_flags(argv[len(orders) :])
    if not orders:
        orders = sorted(path for path in Path("configs").glob("[!.]*_configs") if path.name != "ds_configs")
    if not orders:
        raise InputError("configs: found no folder NAME_configs; name the folder of an order")
    status = 0
    for order in orders:
        try:
            print(f"[gorp] {order}: valid, {check_order(order, *checked)}")
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    return status


def check_flags(flags: list[str]) -> tuple[ExampleOptions, DataCollatorForUIE | None]:
    """Check the flags, and the model or adapter if one is named; returns the example options and model's collator."""
    # --deepspeed is parsed separately: the file is checked, but DeepSpeed is not started.
    parser = Parser(usage="check.py [ORDER ...] [flags of run_uie_lora.py]", description=__doc__)
    parser.add_argument("--deepspeed", help="a DeepSpeed file to check")
    launch, flags = parser.parse_known_args(flags)
    if launch.deepspeed is not None and is_deepspeed_available():
        importlib.import_module("deepspeed.comm")  # imported after the ranks connect, it would keep them connected
    with_model = peek(flags, model_name_or_path="").model_name_or_path
    stand_in = [] if with_model else ["--model_name_or_path", "none", "--lora_modules", ".*"]
    with tempfile.TemporaryDirectory() as scratch:
        given = ["--output_dir", scratch, "--task_config_dir", scratch, "--do_train", "--do_predict", *stand_in, *flags]
        model_args, data_args, method_args, training_args = parse_arguments(given, launch.deepspeed)
        check_data_arguments(data_args)
    if data_args.multilingual:
        of_first_rank(gpt2_folder)
    collator = None
    if with_model:
        loaded = load_model(model_args, data_args, weights=False)
        find_method(method_args.method)(method_args).prepare(
            loaded.model, loaded.previous, decoder_only=loaded.decoder_only, sharded=launch.deepspeed is not None
        )
        collator = build_collator(loaded, data_args, training_args)
    return example_options(data_args, training_args), collator


def check_order(order: str | os.PathLike, options: ExampleOptions, collator: DataCollatorForUIE | None) -> str:
    """Check the order in the folder `order`; returns its numbers of tasks and examples as text."""
    steps = read_order(order)
    examples = list(read_examples([step.folder for step in steps], options))
    if collator is not None:
        collator.check(examples)
    return f"{len(steps)} tasks, {len(examples):,} examples"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # libraries' deprecations
    hf_logging.set_verbosity_error()
    sys.exit(main())
