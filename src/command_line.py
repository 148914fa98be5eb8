"""The command line of one task of an order: turns flags, or one JSON file of them, into the four groups of options.

    python src/run_uie_lora.py --model_name_or_path initial_model/t5-large --task_config_dir
        configs/order1_configs/dbpedia --output_dir outputs/1-dbpedia --lora_modules '.*SelfAttention.(q|v).*'
        --method olora --do_train --do_predict --predict_with_generate

For a complete order use src/run_order.py, for the published ones scripts/. The options of this project and of the
methods come first, then those of Hugging Face's Seq2SeqTrainingArguments and what this project adds to them. Whatever
depends on the flags and the DeepSpeed file alone is checked before data or a model is read.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import get_type_hints

from transformers import HfArgumentParser

from arguments import DataArguments, ModelArguments, UIETrainingArguments
from errors import InputError, check, first_line, nearest
from files import read_object
from methods import Method, find_method, method_names
from methods.base_options import MethodArguments


class Parser(HfArgumentParser):
    """A parser that takes flags by their complete names only; an error raises InputError and prints no usage."""

    def __init__(self, *groups: type, **options):
        super().__init__(groups, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise InputError(f"command line: {message}")


def peek(argv: Sequence[str], **defaults: str | int) -> argparse.Namespace:
    """The values of a few flags on a command line; its other words are ignored."""
    parser = Parser(add_help=False)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    return parser.parse_known_args(underscored(argv))[0]


def underscored(argv: Sequence[str]) -> list[str]:
    """The words with `--galore-rank` as `--galore_rank`: Hugging Face's parser takes both spellings."""
    return [re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]


def parse_arguments(
    argv: list[str] | None = None, deepspeed_file: str | None = None
) -> tuple[ModelArguments, DataArguments, MethodArguments, UIETrainingArguments]:
    """The four groups of arguments, from flags or from one JSON file; the third is the method's.

    `deepspeed_file`, in place of `--deepspeed`, is checked without starting DeepSpeed.
    """
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = _flags(argv[0])
    chosen = peek(argv, method="gorp", preset="")
    method_class = find_method(chosen.method)
    fixed = method_class.fixed_by(chosen.preset or None)
    groups = [ModelArguments, DataArguments, method_class.Arguments, _others(method_class), UIETrainingArguments]
    parser = Parser(*groups, usage="run_uie_lora.py --FLAG VALUE ...", description=__doc__)
    parser.set_defaults(**fixed)
    try:
        model, data, method, others, training, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, OSError, ImportError) as error:  # Hugging Face's own checks of its arguments
        raise InputError(f"command line: {error}") from None
    except RuntimeError as error:  # of PyTorch or Accelerate, from one line to a stack of C++ calls
        where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise InputError("the device of this process cannot be set up, or the processes cannot connect "
                         f"(MASTER_ADDR:MASTER_PORT {where}): {first_line(error)}") from None
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = [f"--{option.name}" for group in groups for option in dataclasses.fields(group)]
        what = "no such flag" if flag.startswith("-") else "found where a flag belongs"
        raise InputError(f"{flag}: {what}{nearest(flag, known)}")
    method.ignored = [name for name, value in vars(others).items() if value is not None]
    deepspeed_file = deepspeed_file or training.deepspeed
    given = vars(training) | vars(method) | {"deepspeed": deepspeed_file}
    for name, value in fixed.items():
        check(given[name] == value, name, given[name], f"{value} with --preset {chosen.preset}")
    _check_together(model, data, method, training, deepspeed_file, method_class.zero_stage)
    return model, data, method, training


def _check_together(
    model: ModelArguments, data: DataArguments, method: MethodArguments, training: UIETrainingArguments,
    deepspeed_file: str | None, most: int | None,
) -> None:
    """Reject flags that exclude each other, and a ZeRO stage above `most`, the highest that the method supports."""
    stage = None if deepspeed_file is None else training.check_deepspeed(deepspeed_file)
    under = f"--deepspeed {deepspeed_file}"
    if model.load_in_4bit:
        check(stage is None, "load_in_4bit", f"true with {under}", "only without DeepSpeed")
        check(not getattr(method, "merge_old", False), "load_in_4bit", "true with --merge_old", "one of the two")
        check(method.method != "galore", "load_in_4bit", "true with --method galore", "a method with a LoRA")
    check(training.generation_max_length in (None, data.max_target_length), "generation_max_length",
          training.generation_max_length, f"{data.max_target_length}, as --max_target_length, or the flag left out")
    if not training.do_train:
        stage = None  # nothing trains, so DeepSpeed's engine is not used
    elif data.zero_shot:
        check(not (training.bf16_full_eval or training.fp16_full_eval), "zero_shot", "true with 16-bit evaluation",
              "one of the two, as the model would also train in 16 bits")
        check(stage is None, "zero_shot", "true", f"only without {under}, which cannot predict before it trains")
    if stage is not None:
        for name in ("bf16", "fp16"):  # "auto" in DeepSpeed's file counts either flag
            check(getattr(training, name) or not getattr(training, f"{name}_full_eval"), f"{name}_full_eval",
                  f"true with {under}", f"only with --{name}, as training would use 16 bits too")
        check(most is not None, f"method {method.method}", under, "one process without DeepSpeed")
        if stage > most:
            raise InputError(f"--method {method.method}: found ZeRO stage {stage} ({deepspeed_file}); allowed: at "
                             f"most stage {most}")
    method.settle(training, stage)


def _others(method: type[Method]) -> type:
    """A group of all options that only other methods read; None for a flag that is not given."""
    own = {option.name for option in dataclasses.fields(method.Arguments)}
    groups = [find_method(name).Arguments for name in method_names()]
    others = {
        option.name: (option.name, types[option.name], dataclasses.field(default=None, metadata=option.metadata))
        for types, group in zip(map(get_type_hints, groups), groups)  # resolved, should a file postpone its annotations
        for option in dataclasses.fields(group) if option.init and option.name not in own
    }
    return dataclasses.make_dataclass("IgnoredArguments", others.values())


def _flags(path: str) -> list[str]:
    """The flags that a JSON object of arguments stands for, so that both are checked alike; null omits a flag."""
    argv = []
    for name, value in read_object(path, "an object of flag -> value").items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv
