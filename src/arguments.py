"""Three groups of options: model, data, and Hugging Face's training arguments with this project's additions.

The fourth group is the method's own (`methods/base_options.py`); `command_line.py` parses all four. Option names are
the published ones.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import Seq2SeqTrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations

from errors import InputError
from files import check_writable, read_json

NOTHING = "none"
"""The value of `--optim_target_modules` and `--proj_lora_modules` that overrides a script's with nothing."""


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str = HfArg(help="Base model (folder or hub id), or the adapter folder of the previous task.")
    config_name: str | None = HfArg(default=None, help="Another config (seq2seq base models only).")
    tokenizer_name: str | None = HfArg(default=None, help="Another tokenizer (seq2seq base models only).")
    cache_dir: str | None = HfArg(default=None, help="Where models from the hub are kept.")
    use_fast_tokenizer: bool = HfArg(default=True, help="Use the fast tokenizer where there is one.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of a hub model.")
    use_auth_token: bool = HfArg(default=False, help="Use the hub login of this machine.")
    family: str | None = HfArg(
        default=None,
        help="What the model must be; the scripts say what they are for.",
        metadata={"choices": ["encoder-decoder", "decoder-only"]},
    )
    resize_position_embeddings: bool | None = HfArg(
        default=None, help="Grow learned positions to max_source_length, where the model can."
    )


@dataclass
class DataArguments:
    """Which examples are read, and how they become prompts."""

    data_dir: str = HfArg(default="CL_Benchmark", help="Benchmark folder: <TASK>/<DATASET>/*.json.")
    task_config_dir: str = HfArg(default=None, help="Folder of the step's {train,dev,test}_tasks.json.")
    instruction_file: str = HfArg(
        default="configs/instruction_config.json", help="JSON file with the instructions of each task."
    )
    instruction_strategy: str = HfArg(
        default="single", help="single: the first instruction; multiple: a random one for each example."
    )
    overwrite_cache: bool = HfArg(default=False, help="Build the cached examples anew.")
    input_record_file: str | None = HfArg(default=None, help="Append every batch to this file as text.")
    max_source_length: int = HfArg(default=512, help="Most tokens of a prompt; the text is cut to fit.")
    max_target_length: int = HfArg(default=50, help="Most tokens of an answer; a longer one is an error.")
    repetition_penalty: float = HfArg(default=1.0, help="Generation: 1.0 is no penalty.")
    num_beams: int = HfArg(default=1, help="Generation: beams; 1 is greedy.")
    max_num_instances_per_task: int | None = HfArg(
        default=10000, help="Training examples of a dataset with sampling strategy 'random'."
    )
    max_num_instances_per_eval_task: int | None = HfArg(
        default=200, help="Validation examples of a dataset with sampling strategy 'random'."
    )
    over_sampling: bool = HfArg(default=False, help="Repeat training examples up to the limit.")
    max_train_samples: int | None = HfArg(default=None, help="Train on this many examples at most.")
    max_eval_samples: int | None = HfArg(default=None, help="Validate on this many examples at most.")
    max_predict_samples: int | None = HfArg(default=None, help="Test on this many examples of each dataset at most.")
    predict_tasks: str = HfArg(
        default="all",
        help="Test after each task on all tasks so far (all), or, except after the order's last, on itself (ends).",
        metadata={"choices": ["all", "ends"]},
    )
    zero_shot: bool = HfArg(
        default=False, help="Before training, test on the order's tasks that are not trained yet (forward transfer)."
    )
    unseen_config_dir: str | None = HfArg(
        default=None, help="A step's folder of any order: also test on its test datasets that this order never trains."
    )
    num_examples: int = HfArg(default=0, help="Solved examples shown in each prompt (few-shot).")
    add_task_name: bool = HfArg(default=False, help="Begin the prompt with the task's name.")
    add_dataset_name: bool = HfArg(default=False, help="Begin the prompt with the dataset's name.")
    multilingual: bool = HfArg(
        default=False, help="ROUGE over GPT-2's pieces instead of English words (data/gpt2tokenizer)."
    )


@dataclass
class UIETrainingArguments(Seq2SeqTrainingArguments):
    """Hugging Face's arguments, this project's additions, and earlier checks of contradictions."""

    overwrite_output_dir: bool = HfArg(
        default=False, help="Start over where output_dir already holds results, and replace them."
    )
    denser_evaluation: bool = HfArg(default=False, help="Also log and evaluate at steps 1, 50, 100 and 200.")
    max_non_finite_steps: int = HfArg(
        default=3, help="End the run at this many steps in a row whose loss or gradient is not finite."
    )
    eval_batch_tokens: int | None = HfArg(
        default=None,
        help="Most prompt tokens of an evaluation batch, padding included; by default those of "
        "per_device_eval_batch_size prompts of max_source_length tokens.",
    )
    predict_loss: bool = HfArg(
        default=False, help="Also compute the loss of the test examples' answers: one more forward pass."
    )
    # The flag is an option of the methods that read it (`methods/base_options.py`), not of Hugging Face's optimizers.
    optim_target_modules: list[str] | None = field(init=False, default=None)

    def __post_init__(self):
        if self.bf16 and self.fp16:
            raise InputError("--bf16 --fp16: both found; at most one of them")
        self._check_numbers()
        if self.deepspeed is not None:
            self.check_deepspeed(self.deepspeed)
        self.remove_unused_columns = False  # the collator reads all columns
        check(self.max_non_finite_steps > 0, "max_non_finite_steps", self.max_non_finite_steps, "a number above 0")
        check(not self.save_only_model, "save_only_model", "true", "false; no run could resume from such a checkpoint")
        check(not self.push_to_hub, "push_to_hub", "true", "false; src/export.py writes a model to upload")
        if self.output_dir is None:
            raise InputError("--output_dir: missing; a folder for the results")
        check_writable(self.output_dir)
        super().__post_init__()
        known = get_available_reporting_integrations()
        for name in self.report_to:
            check(name in known, "report_to", name, ", ".join(["none", *known]))

    def check_deepspeed(self, path: str) -> None:
        """Reject a DeepSpeed file that does not fit these arguments, see `check_deepspeed_file`."""
        numbers = {
            "train_micro_batch_size_per_gpu": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clipping": self.max_grad_norm,
        }
        check_deepspeed_file(path, bf16=bool(self.bf16), fp16=bool(self.fp16), numbers=numbers)

    def _check_numbers(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_number(self, name, above=0)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "seed"):
            check_number(self, name, least=0)
        for name in ("adam_beta1", "adam_beta2"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 up to, not including, 1")
        if self.max_steps <= 0:
            check_number(self, "num_train_epochs", above=0)
        for name in ("generation_max_length", "eval_batch_tokens"):
            if getattr(self, name) is not None:
                check_number(self, name, above=0)


def check_deepspeed_file(path: str, *, bf16: bool, fp16: bool, numbers: Mapping[str, float] = {}) -> None:
    """Reject a DeepSpeed file that contradicts the command line or replaces the method's optimizer.

    Args:
        numbers: the command line's values of keys that the file may repeat.

    Raises:
        InputError: not a JSON object, a precision or number other than the command line's, an unknown ZeRO stage, or
            an optimizer or scheduler section (DeepSpeed would then build its own optimizer, without the projection).
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: found a JSON {type(config).__name__}; a DeepSpeed config is an object")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise InputError(
                f"{path}: found a section '{section}'; the method brings its own, remove it (a DeepSpeed optimizer "
                "would train without the projection)"
            )
    for name, wanted in (("bf16", bf16), ("fp16", fp16)):
        enabled = config.get(name, {}).get("enabled", False) if isinstance(config.get(name, {}), dict) else None
        if enabled == "auto" or enabled is wanted:
            continue
        flag = f"--{name}" if wanted else f"no --{name}"
        raise InputError(f"{path}, key {name}.enabled: found {json.dumps(enabled)} against {flag} on the command line; "
                         "both the same, or \"auto\" in the file")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if type(stage) is not int or not 0 <= stage <= 3:
        raise InputError(f"{path}, key zero_optimization.stage: found {json.dumps(stage)}; 0, 1, 2 or 3")
    if fp16 and stage == 0:
        # deepspeedai/DeepSpeed 8393: gradients are divided by a loss scale that no loss was multiplied by.
        raise InputError(f"{path}, key zero_optimization.stage: found 0 with --fp16, where DeepSpeed 0.19 trains with "
                         "wrong gradients; 1 to 3, or --bf16")
    for key, number in numbers.items():
        if config.get(key, "auto") not in ("auto", number):
            raise InputError(f"{path}, key {key}: found {json.dumps(config[key])} against {number} on the command "
                             "line; both the same, or \"auto\" in the file")


def check_data_arguments(data: DataArguments) -> None:
    """Check the ranges and required folders of the data group.

    Raises:
        InputError: naming the flag, what was found and what is allowed.
    """
    for flag in ("data_dir", "task_config_dir"):
        value = getattr(data, flag)
        if not value:
            raise InputError(f"--{flag}: missing; a folder")
        if not Path(value).is_dir():
            raise InputError(f"--{flag}: {value} is not a folder")
    for flag in ("max_source_length", "max_target_length", "num_beams", "repetition_penalty"):
        check_number(data, flag, above=0)
    for flag in ("max_num_instances_per_task", "max_num_instances_per_eval_task"):
        check(getattr(data, flag) != 0, flag, 0, "a number above 0, or -1 for all")
    for flag in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
        value = getattr(data, flag)
        check(value is None or value > 0, flag, value, "a number above 0, or the flag left out")


def check(holds: bool, flag: str, found, allowed: str) -> None:
    """Reject the value of a flag unless `holds`, saying what is allowed."""
    if not holds:
        raise InputError(f"--{flag}: found {found}; {allowed}")


def check_number(group, flag: str, *, above: float | None = None, least: float = -math.inf) -> None:
    """Reject the value of a flag unless it is finite and above `above`, or at least `least`."""
    found = getattr(group, flag)
    holds = math.isfinite(found) and (found > above if above is not None else found >= least)
    check(holds, flag, found, f"a number above {above}" if above is not None else f"{least} or more")
