"""The command line of `run_uie_lora.py`: the model, the data, the method, and Hugging Face's training arguments.

Option names are the published ones. Every check that needs only the command line and the DeepSpeed file happens
here, before any data or model is read.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from transformers import HfArgumentParser, Seq2SeqTrainingArguments
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


# What `--preset` sets where a flag does not: the published settings that depend neither on the model nor on the order
# (those that do are in scripts/settings.sh).
PRESETS = {
    "default": {},
    "published": {
        "lora_dim": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "galore_update_proj_gap": 10,
        "galore_proj_type": "std",
        "galore_svd": "exact",
        "protect": "gp_first",
        "protect_side": "output",
        "space_from": "moments",
        "space_energy": 0.9,
        "lamda_1": 0.5,
    },
}


@dataclass
class MethodArguments:
    """The continual-learning method and its settings (see the README's table for published values).

    A method that has options of its own declares them in a subclass, in its own file.
    """

    uses_lora: ClassVar[bool] = True

    method: str = field(default="gorp", metadata={"help": "A file name of src/methods, without .py."})
    preset: str = field(
        default="default",
        metadata={"help": "published: the published settings, where no flag says otherwise.", "choices": [*PRESETS]},
    )
    lora_dim: int = field(default=8, metadata={"help": "Rank of the LoRA that a task adds."})
    lora_alpha: float = field(default=32, metadata={"help": "LoRA scale times rank: s = lora_alpha / lora_dim."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout before the LoRA that trains."})
    merge_old: bool = field(
        default=False,
        metadata={"help": "Add earlier tasks' LoRA to the base weights in memory: no pass grows with their number."},
    )
    lora_modules: str = field(
        default=None, metadata={"help": "Where LoRA goes: a regular expression for whole module names."}
    )
    # `--optim_target_modules` belongs to Hugging Face's arguments; `parse_arguments` hands it over.
    optim_target_modules: list[str] = field(init=False, default_factory=list)
    proj_lora_modules: str | None = field(
        default=None, metadata={"help": "LoRA factors that are protected: a regular expression for factor names."}
    )
    galore_rank: int = field(default=8, metadata={"help": "Rank k of the gradient projection."})
    galore_update_proj_gap: int = field(default=10, metadata={"help": "Optimizer steps between two bases."})
    galore_scale: float = field(default=1.0, metadata={"help": "Factor on the update that is projected back."})
    galore_proj_type: str = field(
        default="std", metadata={"help": "Projected side.", "choices": ["std", "reverse_std", "left", "right", "full"]}
    )
    galore_svd: str = field(
        default="exact",
        metadata={
            "help": "How a basis is computed: by SVD, by randomised SVD, or (engine: cores) from a sketch, for which "
            "there is no whole gradient, nor is one summed over ranks.",
            "choices": ["exact", "lowrank", "sketch"],
        },
    )
    galore_engine: str = field(
        default="auto",
        metadata={
            "help": "What trains full-rank weights: dense gradients and ProjAdamW, or small cores beside frozen "
            "weights, the same mathematics with less memory. auto: cores under DeepSpeed, else dense.",
            "choices": ["auto", "dense", "cores"],
        },
    )
    galore_lr: float = field(default=1e-5, metadata={"help": "Learning rate of the full-rank weights."})
    protect: str = field(
        default="structural",
        metadata={
            "help": "How the shared gradient space acts: structurally (the change is orthogonal to it exactly), on the "
            "gradient before Adam (as published), on the update after it, or not at all.",
            "choices": ["structural", "gp_first", "gp_second", "none"],
        },
    )
    protect_side: str = field(
        default="input",
        metadata={"help": "Which side of a weight it protects: output as published.", "choices": ["input", "output"]},
    )
    space_energy: float = field(
        default=0.9, metadata={"help": "Energy of the first moment, or of the inputs, that the space holds."}
    )
    space_from: str = field(
        default="inputs",
        metadata={
            "help": "What a finished task adds to the space: directions of the inputs that the layers see on its rows "
            "(as GPM), or of Adam's first moment (as published).",
            "choices": ["inputs", "moments"],
        },
    )
    lamda_1: float = field(default=0.0, metadata={"help": "Weight of sum |A_old A_new^T|; 0: off."})
    lamda_2: float = field(default=0.0, metadata={"help": "Weight of the L2 norms of the new LoRA; 0: off."})
    lamda_3: float = field(default=0.0, metadata={"help": "Weight of ||dW dW^T - I||, full-rank weights; 0: off."})

    def __post_init__(self):
        if self.proj_lora_modules == NOTHING:
            self.proj_lora_modules = None
        if self.uses_lora and self.lora_modules is None:
            raise InputError("--lora_modules: missing; a regular expression such as '.*SelfAttention.(q|v).*'")
        check(self.uses_lora or not self.merge_old, "merge_old", f"true with --method {self.method}", "a method with a "
              "LoRA")
        positive = ("lora_dim", "lora_alpha", "galore_rank", "galore_update_proj_gap")
        not_negative = ("galore_scale", "galore_lr", "lamda_1", "lamda_2", "lamda_3")
        for name in positive:
            _check_number(self, name, above=0)
        for name in not_negative:
            _check_number(self, name, least=0)
        check(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "0 up to, not including, 1")
        check(0 < self.space_energy <= 1, "space_energy", self.space_energy, "above 0, at most 1")
        if self.protect == "structural" and self.protect_side != "input":
            raise InputError("--protect structural: found --protect_side output; it needs --protect_side input")
        if self.space_from == "inputs" and self.protect_side != "input":
            raise InputError("--space_from inputs: found --protect_side output; it needs --protect_side input")


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
    optim_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Full-rank weights that train by projection: regular expressions for whole module names."},
    )

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
            _check_number(self, name, above=0)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "seed"):
            _check_number(self, name, least=0)
        for name in ("adam_beta1", "adam_beta2"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 up to, not including, 1")
        if self.max_steps <= 0:
            _check_number(self, "num_train_epochs", above=0)
        for name in ("generation_max_length", "eval_batch_tokens"):
            if getattr(self, name) is not None:
                _check_number(self, name, above=0)


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


class Parser(HfArgumentParser):
    """Flags by their whole names; what is wrong with one is an InputError, not a page of usage."""

    def __init__(self, *groups: type, **options):
        super().__init__(groups, allow_abbrev=False, **options)

    def error(self, message: str):
        raise InputError(f"command line: {message}")


def parse_arguments(
    argv: list[str] | None = None, deepspeed_file: str | None = None
) -> tuple[ModelArguments, DataArguments, MethodArguments, UIETrainingArguments]:
    """The four groups of arguments, from flags or from one JSON file; the third is what the method declares.

    Args:
        deepspeed_file: what `--deepspeed` would say, to check it against the rest without starting DeepSpeed.

    Raises:
        InputError: an unknown flag or method, or values that contradict each other.
    """
    from methods import find_method  # the methods take their options from this module

    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = _flags(argv[0])
    chosen = _early_choices(argv)
    method_class = find_method(chosen["method"])
    parser = Parser(ModelArguments, DataArguments, method_class.Arguments, UIETrainingArguments)
    parser.set_defaults(**PRESETS[chosen["preset"]])
    try:
        groups = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    except (ValueError, TypeError, OSError, ImportError) as error:  # Hugging Face's own checks of its arguments
        raise InputError(f"command line: {error}") from None
    model, data, method, training = groups
    if training.optim_target_modules == [NOTHING]:
        training.optim_target_modules = None
    method.optim_target_modules = training.optim_target_modules or []
    if deepspeed_file is not None:
        training.check_deepspeed(deepspeed_file)
    for name in ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"):
        check(not (method.merge_old and getattr(training, name)), "merge_old", f"true with --{name}",
              "fp32 alone, for 16 bits would round most of a small change away")
    deepspeed_file = deepspeed_file or training.deepspeed
    if training.do_train and deepspeed_file is None:
        check_alone(method, training.weight_decay)
    elif training.do_train:
        check(not data.zero_shot, "zero_shot", "true", f"only without --deepspeed {deepspeed_file}, which has nothing "
              "to predict with before it trains")
        check_sharded(method_class, method, deepspeed_file, training.weight_decay)
    return model, data, method, training


def _early_choices(argv: list[str]) -> dict[str, str]:
    """The flags that decide which other flags there are and what they are by default."""
    parser = Parser(add_help=False)
    parser.add_argument("--method", default="gorp")
    parser.add_argument("--preset", default="default")
    chosen = vars(parser.parse_known_args(argv)[0])
    check(chosen["preset"] in PRESETS, "preset", chosen["preset"], f"one of {', '.join(PRESETS)}")
    return chosen


def _flags(path: str) -> list[str]:
    """The flags that a JSON object of arguments stands for, so that both are checked alike; null leaves a flag out."""
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


def check_alone(method: MethodArguments, weight_decay: float) -> None:
    """What an engine cannot do without DeepSpeed.

    Raises:
        InputError: a sketch from dense gradients; decay of factors whose component in a space is kept.
    """
    if method.galore_engine != "cores":
        check(method.galore_svd != "sketch", "galore_svd", "sketch without --deepspeed",
              "exact or lowrank, or sketch with --galore_engine cores")
    else:
        check_decay(method, weight_decay, "--galore_engine cores")


def check_sharded(method_class, method: MethodArguments, deepspeed_file: str, weight_decay: float) -> None:
    """What the method cannot do when DeepSpeed cuts up its parameters.

    Raises:
        InputError: a stage of ZeRO that leaves the method less than it needs; a penalty at stage 3, where no rank has
            whole weights to compute it from; or decay of factors whose component in a space is kept, which it would
            move.
    """
    name, most = method.method, method_class.zero_stage
    if most is None:
        raise InputError(f"--method {name}: found --deepspeed {deepspeed_file}; {name} runs in one process without it")
    zero = read_json(deepspeed_file).get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if stage > most:
        raise InputError(f"--method {name}: found ZeRO stage {stage} ({deepspeed_file}); at most stage {most}")
    if stage == 3:
        for flag in {"lamda_1", "lamda_2", "lamda_3"}.difference(method_class.unread):
            check(not getattr(method, flag), flag, getattr(method, flag), f"only 0 at stage 3 ({deepspeed_file})")
    check(method.galore_engine != "dense", "galore_engine", "dense", "auto or cores under DeepSpeed")
    check_decay(method, weight_decay, "DeepSpeed")


def check_decay(method: MethodArguments, weight_decay: float, where: str) -> None:
    """Refuse decay that would move what a guarded factor keeps (`GuardedLinear`)."""
    decays = method.protect == "gp_second" and weight_decay
    check(not decays, "weight_decay", weight_decay, f"only 0 with --protect gp_second under {where}")


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
        _check_number(data, flag, above=0)
    _check_number(data, "repetition_penalty", above=0)
    for flag in ("max_num_instances_per_task", "max_num_instances_per_eval_task"):
        check(getattr(data, flag) != 0, flag, 0, "a number above 0, or -1 for all")
    for flag in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
        value = getattr(data, flag)
        check(value is None or value > 0, flag, value, "a number above 0, or the flag left out")


def check(holds: bool, flag: str, found, allowed: str) -> None:
    """Refuse the value of a flag, saying what is allowed."""
    if not holds:
        raise InputError(f"--{flag}: found {found}; {allowed}")


def _check_number(group, flag: str, *, above: float | None = None, least: float = -math.inf) -> None:
    """A finite number above, or at least, a limit."""
    found = getattr(group, flag)
    holds = math.isfinite(found) and (found > above if above is not None else found >= least)
    check(holds, flag, found, f"a number above {above}" if above is not None else f"{least} or more")
