"""Three groups of options: the model, the data, and Hugging Face's training arguments with this project's additions.

The fourth group is the method's own (`methods/base_options.py`); `command_line.py` parses all four. Option names are the
published ones.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import Seq2SeqTrainingArguments
from transformers.integrations import get_available_reporting_integrations

from errors import InputError
from files import check_writable, read_json

NOTHING = "none"
"""What `--optim_target_modules` and `--proj_lora_modules` say to name nothing, where a script names something."""


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str = field(
        metadata={"help": "Base model (folder or hub id), or the adapter folder that the previous task left."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Another config (seq2seq base models only)."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Another tokenizer (seq2seq base models only)."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where models from the hub are kept."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use the fast tokenizer where there is one."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    use_auth_token: bool = field(default=False, metadata={"help": "Use the hub login of this machine."})
    resize_position_embeddings: bool | None = field(
        default=None, metadata={"help": "Grow learned positions to max_source_length, where the model can."}
    )


@dataclass
class DataArguments:
    """Which rows are read, and how they become prompts."""

    data_dir: str = field(default="CL_Benchmark", metadata={"help": "Benchmark folder: <TASK>/<DATASET>/*.json."})
    task_config_dir: str = field(default=None, metadata={"help": "Folder of the step's {train,dev,test}_tasks.json."})
    instruction_file: str = field(
        default="configs/instruction_config.json", metadata={"help": "JSON file with the instructions of each task."}
    )
    instruction_strategy: str = field(
        default="single", metadata={"help": "single: the first instruction; multiple: a random one for each row."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Build the cached examples anew."})
    input_record_file: str | None = field(default=None, metadata={"help": "Append every batch to this file as text."})
    max_source_length: int = field(default=512, metadata={"help": "Most tokens of a prompt; the text is cut to fit."})
    max_target_length: int = field(default=50, metadata={"help": "Most tokens of an answer; never cut, refused."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Generation: 1.0 is no penalty."})
    num_beams: int = field(default=1, metadata={"help": "Generation: beams; 1 is greedy."})
    max_num_instances_per_task: int | None = field(
        default=10000, metadata={"help": "Training rows of a dataset with sampling strategy 'random'."}
    )
    max_num_instances_per_eval_task: int | None = field(
        default=200, metadata={"help": "Validation rows of a dataset with sampling strategy 'random'."}
    )
    over_sampling: bool = field(default=False, metadata={"help": "Repeat training rows up to the limit."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many rows at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate on this many rows at most."})
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "Test on this many rows of each dataset at most."}
    )
    predict_tasks: str = field(
        default="all",
        metadata={
            "help": "Test after each task on all tasks so far (all), or, but for the order's last, on itself (ends).",
            "choices": ["all", "ends"],
        },
    )
    zero_shot: bool = field(
        default=False,
        metadata={"help": "Before training, test on the order's tasks that are not trained yet (forward transfer)."},
    )
    unseen_config_dir: str | None = field(
        default=None,
        metadata={"help": "A step's folder of any order: test also on its test datasets that this order never trains."},
    )
    num_examples: int = field(default=0, metadata={"help": "Solved examples shown in each prompt (few-shot)."})
    add_task_name: bool = field(default=False, metadata={"help": "Begin the prompt with the task's name."})
    add_dataset_name: bool = field(default=False, metadata={"help": "Begin the prompt with the dataset's name."})
    multilingual: bool = field(
        default=False, metadata={"help": "ROUGE over GPT-2's pieces instead of English words (data/gpt2tokenizer)."}
    )


@dataclass
class UIETrainingArguments(Seq2SeqTrainingArguments):
    """Hugging Face's arguments; the flags of this project, and earlier checks of what they contradict."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start over where output_dir already holds results, and replace them."}
    )
    denser_evaluation: bool = field(
        default=False, metadata={"help": "Also log and evaluate at steps 1, 50, 100 and 200."}
    )
    max_non_finite_steps: int = field(
        default=3, metadata={"help": "End the run at this many steps in a row whose loss or gradient is not finite."}
    )
    eval_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Most prompt tokens of an evaluation batch, padding included; by default those of "
            "per_device_eval_batch_size prompts of max_source_length tokens."
        },
    )
    predict_loss: bool = field(
        default=False, metadata={"help": "Also the loss of the test rows' answers: one more forward pass."}
    )
    # The flag is an option of the methods that read it (`methods/base_options.py`), not of Hugging Face's optimizers.
    optim_target_modules: list[str] | None = field(init=False, default=None)

    def __post_init__(self):
        if self.bf16 and self.fp16:
            raise InputError("--bf16 --fp16: both found; at most one of them")
        self._check_numbers()
        if self.deepspeed is not None:
            self.check_deepspeed(self.deepspeed)
        self.remove_unused_columns = False  # the collator reads the whole row
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
        """Refuse a DeepSpeed file that does not fit these arguments, see `check_deepspeed_file`."""
        repeated = {
            "train_micro_batch_size_per_gpu": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clipping": self.max_grad_norm,
        }
        check_deepspeed_file(path, bf16=bool(self.bf16), fp16=bool(self.fp16), numbers=repeated)

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
    """Refuse a DeepSpeed file that contradicts the command line or would take the optimizer away from the method.

    Args:
        numbers: what the command line says of keys that the file may repeat.

    Raises:
        InputError: no JSON object, a precision or number that the command line does not ask for, no stage of ZeRO, or
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
    """Ranges and required folders of the data group.

    Raises:
        InputError: naming the flag, what was found and what is allowed.
    """
    for flag in ("data_dir", "task_config_dir"):
        value = getattr(data, flag)
        if not value:
            raise InputError(f"--{flag}: missing; a folder")
        if not Path(value).is_dir():
            raise InputError(f"--{flag}: {value} is no folder")
    for flag in ("max_source_length", "max_target_length", "num_beams"):
        check_number(data, flag, above=0)
    check_number(data, "repetition_penalty", above=0)
    for flag in ("max_num_instances_per_task", "max_num_instances_per_eval_task"):
        check(getattr(data, flag) != 0, flag, 0, "a number above 0, or -1 for all")
    for flag in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
        value = getattr(data, flag)
        check(value is None or value > 0, flag, value, "a number above 0, or the flag left out")


def check(holds: bool, flag: str, found, allowed: str) -> None:
    """Refuse the value of a flag, saying what is allowed."""
    if not holds:
        raise InputError(f"--{flag}: found {found}; {allowed}")


def check_number(group, flag: str, *, above: float | None = None, least: float = -math.inf) -> None:
    """A finite number above, or at least, a limit."""
    found = getattr(group, flag)
    holds = math.isfinite(found) and (found > above if above is not None else found >= least)
    check(holds, flag, found, f"a number above {above}" if above is not None else f"{least} or more")
