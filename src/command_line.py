"""The command line of `run_uie_lora.py`: from flags, or one JSON file, to the four groups of options.

Everything that the command line and the DeepSpeed file alone decide is checked here, before data or a model is read.
"""

import argparse
import dataclasses
import json
import sys

from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from arguments import DataArguments, ModelArguments, UIETrainingArguments, check
from errors import InputError, nearest
from files import read_json
from methods import Method, find_method, method_names
from methods.base_options import MethodArguments


DESCRIPTION = """One task of an order: data, model, method, training, saving, evaluation. For a complete order:
src/run_order.py; for the published ones: scripts/.

    python src/run_uie_lora.py --model_name_or_path initial_model/t5-large --task_config_dir
        configs/order1_configs/dbpedia --output_dir outputs/1-dbpedia --lora_modules '.*SelfAttention.(q|v).*'
        --method olora --do_train --do_predict --predict_with_generate

The options of this project and of the method come first, those of Hugging Face's Seq2SeqTrainingArguments last."""


class Parser(HfArgumentParser):
    """Flags by their complete names; an error is an InputError and prints no usage."""

    def __init__(self, *groups: type, **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(groups, allow_abbrev=False, formatter_class=form, **options)

    def format_help(self) -> str:
        """Put this project's options before Hugging Face's."""
        theirs = {option.name for option in dataclasses.fields(Seq2SeqTrainingArguments)} - {"output_dir"}
        for group in self._action_groups:
            group._group_actions.sort(key=lambda action: action.dest in theirs)
        return super().format_help()

    def error(self, message: str):
        raise InputError(f"command line: {message}")


def parse_arguments(
    argv: list[str] | None = None, deepspeed_file: str | None = None
) -> tuple[ModelArguments, DataArguments, MethodArguments, UIETrainingArguments]:
    """The four groups of arguments, from flags or from one JSON file; the third is the method's.

    Args:
        deepspeed_file: in place of `--deepspeed`, to be checked without starting DeepSpeed.

    Raises:
        InputError: an unknown flag or method, or values that contradict each other.
    """
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = _flags(argv[0])
    early = Parser(add_help=False)
    early.add_argument("--method", default="gorp")
    early.add_argument("--preset")
    chosen, _ = early.parse_known_args(argv)
    method_class = find_method(chosen.method)
    fixed = method_class.fixed_by(chosen.preset)
    parser = Parser(
        ModelArguments, DataArguments, method_class.Arguments, UIETrainingArguments, _others(method_class.Arguments),
        usage="run_uie_lora.py --FLAG VALUE ...", description=DESCRIPTION,
    )
    parser.set_defaults(**fixed)
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True,
                                                              look_for_args_file=False)
    except (ValueError, TypeError, OSError, ImportError) as error:  # Hugging Face's own checks of its arguments
        raise InputError(f"command line: {error}") from None
    for word in unknown:
        flag = word.partition("=")[0]
        known = [f"--{option.name}" for group in parser.dataclass_types for option in dataclasses.fields(group)]
        what = "no such flag" if flag.startswith("-") else "found where a flag belongs"
        raise InputError(f"{flag}: {what}{nearest(flag, known)}")
    model, data, method, training, others = groups
    method.ignored = [name for name, value in vars(others).items() if value is not None]
    for name, value in fixed.items():
        found = getattr(method if hasattr(method, name) else training, name)
        if name == "deepspeed":
            found = deepspeed_file or found
        check(found == value, name, found, f"{value} with --preset {chosen.preset}")
    if deepspeed_file is not None:
        training.check_deepspeed(deepspeed_file)
    if model.load_in_4bit:
        file = deepspeed_file or training.deepspeed
        check(file is None, "load_in_4bit", f"true with --deepspeed {file}", "only without DeepSpeed")
        check(not getattr(method, "merge_old", False), "load_in_4bit", "true with --merge_old", "one of the two")
    _check_together(method_class, data, method, training, deepspeed_file or training.deepspeed)
    return model, data, method, training


def _others(arguments: type) -> type:
    """A group of all options that only other methods read; None for a flag that is not given."""
    own = {option.name for option in dataclasses.fields(arguments)}
    options = (option for name in method_names() for option in dataclasses.fields(find_method(name).Arguments))
    others = {
        option.name: (option.name, option.type, dataclasses.field(default=None, metadata=option.metadata))
        for option in options if option.init and option.name not in own
    }
    return dataclasses.make_dataclass("IgnoredArguments", others.values())


def _check_together(
    method_class: type[Method], data: DataArguments, method: MethodArguments, training: UIETrainingArguments,
    deepspeed_file: str | None,
) -> None:
    """Reject what the method cannot do with these training arguments or this ZeRO stage.

    Raises:
        InputError: naming the flags.
    """
    check(training.generation_max_length in (None, data.max_target_length), "generation_max_length",
          training.generation_max_length, f"{data.max_target_length}, as --max_target_length, or the flag left out")
    check(not (data.zero_shot and training.do_train and (training.bf16_full_eval or training.fp16_full_eval)),
          "zero_shot", "true with 16-bit evaluation", "either, as the model would then also train in 16 bits")
    stage = None
    if training.do_train and deepspeed_file is not None:
        name, most = method.method, method_class.zero_stage
        check(not data.zero_shot, "zero_shot", "true",
              f"only without --deepspeed {deepspeed_file}, which cannot predict before it trains")
        check(most is not None, f"method {name}", f"--deepspeed {deepspeed_file}",
              f"{name} runs in one process without it")
        zero = read_json(deepspeed_file).get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
        if stage > most:
            raise InputError(f"--method {name}: found ZeRO stage {stage} ({deepspeed_file}); at most stage {most}")
    method.check_with(training, stage)


def _flags(path: str) -> list[str]:
    """The flags of a JSON object of arguments, so that both are checked in the same way; null omits a flag."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: found a JSON {type(content).__name__}; an object of flag -> value is allowed")
    argv = []
    for name, value in content.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv
