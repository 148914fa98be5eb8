"""Three groups of options: model, data, and Hugging Face's training arguments with this project's additions.

The fourth group is the method's own (`methods/base_options.py`); `command_line.py` parses all four. Option names are
the published ones.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainingArguments, get_scheduler
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from errors import InputError, check, check_number, nearest
from files import check_writable, read_object
from order_config import LIMITS


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str = HfArg(help="Base model (folder or hub id), or the adapter folder of the previous task.")
    config_name: str | None = HfArg(default=None, help="Another config: folder or hub id.")
    tokenizer_name: str | None = HfArg(default=None, help="Another tokenizer: folder or hub id.")
    cache_dir: str | None = HfArg(default=None, help="Where models from the hub are kept.")
    use_fast_tokenizer: bool = HfArg(default=True, help="Ignored: Transformers 5 has one kind of tokenizer.")
    model_revision: str | None = HfArg(default=None, help="Branch, tag or commit of a hub model (main).")
    use_auth_token: bool = HfArg(default=False, help="Use the hub login of this machine.")
    family: Literal["encoder-decoder", "decoder-only"] | None = HfArg(default=None, help="What the model must be.")
    load_in_4bit: bool = HfArg(default=False, help="Hold frozen linear layers in 4 bits (NF4, by bitsandbytes).")
    resize_position_embeddings: bool | None = HfArg(default=None, help="Grow learned positions to max_source_length.")


@dataclass
class DataArguments:
    """Which examples are read, and how they become prompts."""

    data_dir: str = HfArg(default="CL_Benchmark", help="Benchmark folder: <TASK>/<DATASET>/*.json.")
    task_config_dir: str = HfArg(default=None, help="Folder of the task's {train,dev,test}_tasks.json.")
    instruction_file: str = HfArg(default="configs/instruction_config.json", help="Instructions of each task, JSON.")
    instruction_strategy: str = HfArg(default="single", help="single: the first instruction; multiple: a random one.")
    overwrite_cache: bool = HfArg(default=False, help="Published, and ignored: examples are not cached.")
    input_record_file: str | None = HfArg(default=None, help="Append every batch to this file as text.")
    max_source_length: int = HfArg(default=512, help="Maximum number of tokens in a prompt; the text is cut to fit.")
    max_target_length: int = HfArg(default=50, help="Maximum number of tokens in an answer; a longer one is an error.")
    repetition_penalty: float = HfArg(default=1.0, help="Generation: 1.0 is no penalty.")
    num_beams: int = HfArg(default=1, help="Generation: beams; 1 is greedy.")
    max_num_instances_per_task: int | None = HfArg(
        default=LIMITS["train"], help="Training examples, if sampled; -1: all."
    )
    max_num_instances_per_eval_task: int | None = HfArg(default=LIMITS["dev"], help="Validation examples, if sampled.")
    over_sampling: bool = HfArg(default=False, help="Repeat training examples up to max_num_instances_per_task.")
    max_train_samples: int | None = HfArg(default=None, help="Train on this many examples at most.")
    max_eval_samples: int | None = HfArg(default=None, help="Validate on this many examples at most.")
    max_predict_samples: int | None = HfArg(default=None, help="Test on this many examples of each dataset at most.")
    predict_tasks: Literal["all", "ends"] = HfArg(
        default="all", help="all: after each task, test all so far; ends: only the new one, all after the last task."
    )
    zero_shot: bool = HfArg(default=False, help="Before training, test on this and later tasks (forward transfer).")
    unseen_config_dir: str | None = HfArg(default=None, help="A task's folder: also test its unseen datasets.")
    num_examples: int = HfArg(default=0, help="Solved examples shown in each prompt (few-shot).")
    add_task_name: bool = HfArg(default=False, help="Begin the prompt with the task's name.")
    add_dataset_name: bool = HfArg(default=False, help="Begin the prompt with the dataset's name.")
    multilingual: bool = HfArg(default=False, help="ROUGE over GPT-2's tokens instead of English words.")


# Hugging Face's training arguments of which only the default is allowed, by reason, ...
REJECTED = {
    "the method brings its own optimizer": "optim optim_args",
    "the engines' hooks do not run in compiled or replaced modules":
        "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config",
    "its hook misses the embeddings of encoder and decoder": "neftune_noise_alpha",
    "another batch size would be another experiment": "auto_find_batch_size accelerator_config",
    "several processes run under DeepSpeed or DistributedDataParallel": "parallelism_config fsdp fsdp_config",
    "each answer token of an optimizer step has the same weight": "average_tokens_across_devices",
    "the collator decides what a batch holds": "label_names remove_unused_columns",
    "evaluation generates; see --num_beams, --repetition_penalty and --max_target_length":
        "predict_with_generate generation_num_beams generation_config",
    "predictions are always scored; --predict_loss adds their loss": "prediction_loss_only",
    "no run could resume from such checkpoints":
        "save_only_model save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint",
    "src/export.py writes the model to upload": "push_to_hub",
    "a command line is logged; `hf auth login` or the variable HF_TOKEN keeps it secret": "hub_token",
    "--max_non_finite_steps watches losses and gradients": "debug logging_nan_inf_filter",
}
# ... and those that are ignored here, which the run reports; those in TRACKIO count with --report_to trackio.
IGNORED = (
    "use_cache eval_accumulation_steps eval_do_concat_batches eval_use_gather_object include_for_metrics "
    "batch_eval_metrics sortish_sampler length_column_name hub_private_repo hub_model_id hub_strategy hub_always_push "
    "hub_revision"
).split()
TRACKIO = "project trackio_space_id trackio_bucket_id trackio_static_space_id".split()

ON_EVALUATION = ("reduce_lr_on_plateau", "greedy")  # schedules that each evaluation moves

ABOVE_0 = (
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_non_finite_steps "
    "generation_max_length eval_batch_tokens eval_steps logging_steps save_steps ddp_timeout"
).split()
AT_LEAST_0 = (
    "learning_rate weight_decay max_grad_norm adam_epsilon warmup_steps eval_delay seed data_seed "
    "dataloader_num_workers"
).split()
DATA_ABOVE_0 = (
    "max_source_length max_target_length num_beams repetition_penalty max_train_samples max_eval_samples "
    "max_predict_samples"
).split()


@dataclass
class UIETrainingArguments(Seq2SeqTrainingArguments):
    """Hugging Face's arguments, this project's additions, and early checks for contradictions."""

    overwrite_output_dir: bool = HfArg(default=False, help="Start over, and replace the results in output_dir.")
    denser_evaluation: bool = HfArg(default=False, help="Also log (and evaluate, if at all) at steps 1, 50, 100, 200.")
    max_non_finite_steps: int = HfArg(default=3, help="End the run at this many non-finite steps in a row.")
    eval_batch_tokens: int | None = HfArg(default=None, help="Maximum prompt tokens of an evaluation batch, padded.")
    predict_loss: bool = HfArg(default=False, help="Also compute the loss of the test examples' answers.")
    remove_unused_columns: bool = HfArg(default=False, help="Always false.")
    predict_with_generate: bool = HfArg(default=True, help="Always true.")
    # The flag is an option of the methods that read it (`methods/base_options.py`), not of Hugging Face's optimizers.
    optim_target_modules: list[str] | None = field(init=False, default=None)

    def __post_init__(self):
        check(self.ddp_backend is None or "RANK" in os.environ, "ddp_backend", self.ddp_backend, "none in one process")
        self._check_library_options()
        self._check_numbers()
        if self.deepspeed is not None:
            self.check_deepspeed(self.deepspeed)
        self._check_environment()
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # every rank computes the same rounding errors of 16-bit weights
        if self.output_dir is None:
            raise InputError("--output_dir: missing; allowed: a folder for the results")
        check_writable(self.output_dir)
        super().__post_init__()
        known = get_available_reporting_integrations()
        for name in self.report_to:
            hint = f" (pip install {name} adds it)" if name in INTEGRATION_TO_CALLBACK else ""
            check(name in known, "report_to", name, ", ".join(["none", *known]) + ", as installed here" + hint)
        again = self.resume_from_checkpoint in ("True", "true")
        check(not (self.overwrite_output_dir and again), "resume_from_checkpoint", "true with --overwrite_output_dir",
              "one of the two, as the folder's checkpoint is of the run that is replaced")
        if not (self.do_train or self.do_eval or self.do_predict):
            raise InputError("--do_train, --do_eval, --do_predict: found none of them; allowed: one or more")
        check(not self.fp16 or self.device.type != "cpu", "fp16", "true", "false on a CPU, where --bf16 works")
        self._check_settings()

    def ignored(self) -> list[str]:
        """The flags of `IGNORED`, and those that count only beside another flag, that are not at their defaults."""
        counts = {
            "save_steps": self.save_strategy == "steps",
            "save_total_limit": self.save_strategy != "no",
            "logging_steps": self.logging_strategy == "steps",
            "eval_steps": self.eval_strategy == "steps",
            "eval_delay": self.eval_strategy != "no",
            "gradient_checkpointing_kwargs": self.gradient_checkpointing,
        }
        idle = [name for name, counted in counts.items() if not counted]
        return self.changed(IGNORED + TRACKIO * ("trackio" not in self.report_to) + idle)

    def changed(self, names: Iterable[str]) -> list[str]:
        """Which of these options are not at their defaults; one that Transformers lacks is never among them."""
        defaults = {name: getattr(type(self), name, []) for name in names}  # a list default is no class attribute
        return [name for name in names if getattr(self, name, []) not in (None, defaults[name])]

    def _check_environment(self) -> None:
        """Reject what `accelerate launch` sets and no flag says."""
        found = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
        if found.lower() not in ("", "no"):
            raise InputError(f"ACCELERATE_DYNAMO_BACKEND: found {found} in the environment; allowed: no, as the "
                             "engines' hooks do not run in compiled modules")
        for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
            found = os.environ.get(name, "false")
            if self.deepspeed is None and found.lower() in ("true", "1", "yes"):
                raise InputError(f"{name}: found {found} in the environment; allowed: false; DeepSpeed trains with "
                                 "--deepspeed FILE")
        found = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if found.lower() not in ("", "no") and not (self.bf16 or self.fp16):
            raise InputError(f"ACCELERATE_MIXED_PRECISION: found {found} in the environment; allowed: no, or --bf16 or "
                             "--fp16 besides")

    def _check_library_options(self) -> None:
        """Reject what `REJECTED` lists, samplers that need tokenised examples, and settings that are not objects."""
        for reason, names in REJECTED.items():
            for name in self.changed(names.split()):
                found = "a secret" if name == "hub_token" else getattr(self, name)
                raise InputError(f"--{name}: found {found}; allowed: only the default, as {reason}")
        sampling = self.train_sampling_strategy
        check(sampling in ("random", "sequential"), "train_sampling_strategy", sampling, "random or sequential")
        for name in ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if isinstance(given := getattr(self, name, None), str):
                with _tried(f"--{name}: found {given}, which is not a JSON object"):
                    dict(json.loads(given))

    def _check_numbers(self) -> None:
        for name in ABOVE_0:
            check_number(self, name, above=0)
        for name in AT_LEAST_0:
            check_number(self, name, least=0)
        for name in ("seed", "data_seed"):
            check((getattr(self, name) or 0) < 2**32, name, getattr(self, name), "less than 2^32")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 up to, not including, 1")
        check(self.max_steps != 0, "max_steps", 0, "a number above 0, or -1 for --num_train_epochs")
        if self.max_steps < 0:
            check_number(self, "num_train_epochs", above=0)

    def _check_settings(self) -> None:
        """Try on stand-ins what training will need: the schedule, the loader, the recomputation of activations."""
        chosen = self.metric_for_best_model is not None and self.eval_strategy != "no"
        check(self.save_strategy != "best" or chosen, "save_strategy", "best",
              "best with --metric_for_best_model and --eval_strategy steps or epoch")
        kind, settings = self.lr_scheduler_type, self.lr_scheduler_kwargs
        check(kind not in ("constant", *ON_EVALUATION) or not self.warmup_steps, "warmup_steps", self.warmup_steps,
              f"0 with --lr_scheduler_type {kind.value}, which has none; constant_with_warmup has them")
        check(not (kind.startswith("constant") and settings), "lr_scheduler_kwargs", settings,
              f"none with --lr_scheduler_type {kind.value}")
        check(kind != "greedy" or "min_lr" in (settings or {}), "lr_scheduler_kwargs", settings,
              "min_lr and more with --lr_scheduler_type greedy, whose own minimum, 1e-3, suits no full-rank weight")
        if kind in ON_EVALUATION:  # by default a rising accuracy would count as getting worse
            settings = {"mode": "max" if self.greater_is_better else "min"} | (settings or {})
            self.lr_scheduler_kwargs = settings
        steps, weight = max(self.max_steps, 1), torch.zeros(1, requires_grad=True)
        with _tried(f"--lr_scheduler_type {kind.value}, --lr_scheduler_kwargs, --learning_rate {self.learning_rate}"):
            optimizer = torch.optim.SGD([weight], lr=self.learning_rate)
            get_scheduler(kind, optimizer, self.get_warmup_steps(steps), steps, settings)
        loading = ("num_workers", "prefetch_factor", "persistent_workers", "multiprocessing_context", "in_order")
        with _tried(f"--dataloader_num_workers {self.dataloader_num_workers}"):
            DataLoader([0], **{name: getattr(self, f"dataloader_{name}") for name in loading})
        with _tried("--gradient_checkpointing_kwargs, --activation_checkpointing_kwargs"):  # the old name and the new
            given = {"use_reentrant": True} | (self.gradient_checkpointing_kwargs or {})
            own = ("every_n_layers", "offload")  # Transformers' own; the others are PyTorch's
            checkpoint(torch.clone, weight, **{name: value for name, value in given.items() if name not in own})

    @cached_property
    def _setup_devices(self) -> torch.device:
        """The parent's device, one GPU for this process: `DataParallel` over all would multiply a step's examples."""
        device = super()._setup_devices
        self._n_gpu = min(self._n_gpu, 1)
        return device

    def idle_gpus(self) -> int:
        """How many GPUs a single process leaves unused."""
        return max(0, torch.cuda.device_count() - 1) if self.world_size == 1 and not self.use_cpu else 0

    def check_deepspeed(self, path: str) -> int:
        """The ZeRO stage of a DeepSpeed file; InputError unless the file fits these arguments."""
        config = read_object(path, "a DeepSpeed config, an object")
        for section in ("optimizer", "scheduler"):
            if section in config:
                raise InputError(f"{path}: found a section '{section}'; the method brings its own, remove it (a "
                                 "DeepSpeed optimizer would train without the projection)")
        for name in ("bf16", "fp16"):
            wanted, section = bool(getattr(self, name)), config.get(name, {})
            enabled = section.get("enabled", False) if isinstance(section, dict) else None
            if enabled != "auto" and enabled is not wanted:
                flag = f"--{name}" if wanted else f"no --{name}"
                raise InputError(f"{path}, key {name}.enabled: found {json.dumps(enabled)} against {flag} on the "
                                 "command line; allowed: both the same, or \"auto\" in the file")
        for key in config.keys() - DEEPSPEED_KEYS:
            if hint := nearest(key, DEEPSPEED_KEYS, cutoff=0.8):  # DeepSpeed ignores an unknown key
                raise InputError(f"{path}: unknown key {key!r}{hint}")
        zero = config.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
        if type(stage) is not int or not 0 <= stage <= 3:
            raise InputError(f"{path}, key zero_optimization.stage: found {json.dumps(stage)}; allowed: 0, 1, 2, 3")
        offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
        forced = config.get("zero_force_ds_cpu_optimizer", True)
        if isinstance(offload, dict) and offload.get("device", "none") != "none" and forced is not False:
            # accelerate would replace the optimizer by DeepSpeed's own: the full-rank weights would not train.
            raise InputError(f"{path}, key zero_force_ds_cpu_optimizer: found {json.dumps(forced)} with "
                             "offload_optimizer; allowed: false, so that the method's optimizer trains")
        if self.fp16 and stage == 0:
            # deepspeedai/DeepSpeed 8393: gradients are divided by a loss scale that no loss was multiplied by.
            raise InputError(f"{path}, key zero_optimization.stage: found 0 with --fp16, where DeepSpeed 0.19 trains "
                             "with wrong gradients; allowed: 1 to 3, or --bf16")
        if (found := config.get("train_batch_size", "auto")) != "auto":
            raise InputError(f"{path}, key train_batch_size: found {json.dumps(found)}; allowed: \"auto\", as the "
                             "flags and the number of processes decide it")
        if "gradient_clipping" not in config and self.max_grad_norm != 1:  # DeepSpeed would clip at 1
            raise InputError(f"{path}: found no key gradient_clipping, beside --max_grad_norm {self.max_grad_norm}; "
                             "allowed: \"auto\"")
        for key, option in REPEATED_KEYS.items():
            number = getattr(self, option)
            if config.get(key, "auto") not in ("auto", number):
                raise InputError(f"{path}, key {key}: found {json.dumps(config[key])} against {number} on the command "
                                 "line; allowed: both the same, or \"auto\" in the file")
        return stage


# Keys of a DeepSpeed file that may repeat an option, and all known keys.
REPEATED_KEYS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
DEEPSPEED_KEYS = {"bf16", "fp16", "train_batch_size", "zero_optimization", *REPEATED_KEYS}


@contextlib.contextmanager
def _tried(flags: str) -> Iterator[None]:
    """Report what a library raises as the fault of these flags."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InputError(f"{flags}: {error}") from None


def check_data_arguments(data: DataArguments) -> None:
    """Check the required folders and the numbers of the data group."""
    for flag in ("data_dir", "task_config_dir"):
        folder = getattr(data, flag)
        check(bool(folder) and Path(folder).is_dir(), flag, folder, "an existing folder")
    for flag in DATA_ABOVE_0:
        check_number(data, flag, above=0)
    for flag in ("max_num_instances_per_task", "max_num_instances_per_eval_task"):
        check(getattr(data, flag) != 0, flag, 0, "a number above 0, or -1 for all")
    limit = data.max_num_instances_per_task
    check(not data.over_sampling or (limit or -1) > 0, "max_num_instances_per_task", f"{limit} with --over_sampling",
          "the number of examples to reach")
