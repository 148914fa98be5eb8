"""What methods share: the hooks of `Method`, and the two kinds of weights that a method can train.

A method is a subclass in a file of its own that overrides the few hooks in which it differs. `LoraMethod` adds a new
LoRA for each task and puts no constraint on it; `FullRankMethod` trains weights of the base model and no LoRA.
A method's options are a dataclass, its `Arguments`, made of the groups in `base_options.py` and of fields of its own.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, TaskType
from torch import nn

import checkpoints
import full_rank
from errors import InputError
from files import read_json, write_json
from loranew import (
    LoraNewConfig,
    add_loranew,
    fold_loranew,
    folded_factors,
    load_loranew,
    loranew_layers,
    save_folded,
)
from loranew.adapter import CONFIG_FILE, PEFT_TYPE, WEIGHTS_FILE, read_factors
from methods.base_modules import choose_modules
from methods.base_options import LoraArguments, MethodArguments, OptimizerArguments, TargetArguments
from module_matching import check_float32, check_rank, check_unshared, match_linear
from Proj_torch.optimizer_state import optimizer_state_of, read_parameters, steps_taken, write_parameters
from task_examples import OrderExamples

logger = logging.getLogger("gorp")


class Method:
    """One task's training by one method.

    Calls on an instance: `training_examples`, `prepare`, `begin_task`, `create_optimizer` and `begin_training`, once
    each; `begin_micro_batch` and `penalty` in every micro-batch; `revisit` and `end_task` after the last step; `save`
    to write the adapter folder from which the next task's `prepare` starts. `examples/loop.py` shows them. After
    `prepare` and after `end_task` the model is ready for evaluation. In between it may hold other weights, because some
    methods evaluate merged weights and train others.

    Attributes:
        Arguments: the method's group of command-line options; all of them, and no others, are read.
        zero_stage: the highest ZeRO stage under which the method trains; None where it does not run under DeepSpeed.
        reads: which other tasks' examples `training_examples` may read: "no", "earlier" or "all".
        step_factor: optimizer steps of the task as a multiple of `--max_steps`; `training_examples` may set it.
        shares_examples: whether, of several ranks, each gets only its share of these examples and the method adds up
            what it computes (`ranks.sum_over_ranks`); otherwise each gets all of them.
        shown_examples: how many of the task's examples `begin_task` and `revisit` may see, drawn at random; None for
            all.
        averages_micro_batches: whether a step's loss is the mean of its micro-batches' means, in place of the mean over
            all answer tokens of the step.
        presets: what each `--preset` fixes, of the method's options and of Hugging Face's.
        counts_tasks: whether the result depends on the task's place in the order and on the order's length.
        float32_base: whether the base model is read in float32 even under `--bf16`, as its own weights change.
        trains: whether training follows; otherwise the folder to load is this task's own. Set before `prepare`.
    """

    Arguments: type[MethodArguments] = MethodArguments
    zero_stage: int | None = None
    reads = "no"
    step_factor = 1
    shares_examples = False
    shown_examples: int | None = 64
    counts_tasks = False
    averages_micro_batches = False
    float32_base = False
    trains = True
    presets: Mapping[str, Mapping[str, object]] = {}

    def __init__(self, options: MethodArguments):
        self.options = options
        self.model: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        # Weights of the base that differ from the base model on disk, by module name: earlier tasks' and this one's.
        self.changed: dict[str, nn.Linear] = {}
        # Options of this method that are ignored in this run.
        self.idle: set[str] = set()

    @classmethod
    def fixed_by(cls, name: str | None) -> dict[str, object]:
        """The options that `--preset name` fixes; a flag that contradicts one is an error.

        Raises:
            InputError: the method has no such preset.
        """
        if name is not None and name not in cls.presets:
            allowed = ", ".join(cls.presets) or "none with this method; --method gorp has released"
            raise InputError(f"--preset: found {name}; allowed: {allowed}")
        return {"preset": name, **cls.presets[name]} if name else {}

    # Setting up

    def training_examples(self, own: Dataset, order: OrderExamples) -> Dataset:
        """The examples to train on: the task's `own`. If empty, nothing trains and the previous folder is copied."""
        return own

    def prepare(
        self, model: nn.Module, previous: Path | None, *, decoder_only: bool, sharded: bool = False
    ) -> nn.Module:
        """Add the trainable parameters to `model`, load the previous task's folder, freeze everything else.

        `sharded` says that DeepSpeed will train the model, so that the optimizer sees flat pieces of the parameters.

        Raises:
            InputError: a regular expression that matches nothing or a layer that is not linear, a rank above that of a
                matrix, a weight in 16 bits whose small changes would be lost, or an adapter folder that does not fit
                the model.
        """
        raise NotImplementedError

    # Training

    def begin_task(self, model: nn.Module, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        """Called before training starts or resumes, with the complete model and batches of the task's examples, made
        on demand; under DeepSpeed before DeepSpeed has the model, and on every rank."""

    def create_optimizer(self, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        """The optimizer of all trainable parameters."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        return self.optimizer

    def begin_training(self, deepspeed=None) -> None:
        """Called once before the first step, with the DeepSpeed engine that trains the model, if one does."""

    def begin_micro_batch(self, is_last: bool) -> None:
        """Called before each forward pass in training; `is_last` where an optimizer step follows."""

    def penalty(self) -> torch.Tensor | None:
        """A scalar to add to the loss, or None where there is nothing to add.

        Called in every micro-batch. The trainer adds a share of it each time, so it counts once per optimizer step.
        """
        return None

    # Checkpoints within a task

    def training_state(self) -> dict[str, torch.Tensor]:
        """What a run needs to resume, as CPU tensors by name: the trainable parameters and the optimizer's state;
        collective."""
        return checkpoints.training_state(self._trainable(), self.optimizer)

    def load_training_state(self, saved: dict[str, torch.Tensor]) -> None:
        """Resume where `training_state` was taken; collective, and under DeepSpeed only once it has moments
        (`start_moments`).

        Raises:
            InputError: a tensor is missing or does not fit.
        """
        checkpoints.load_training_state(self._trainable(), self.optimizer, saved)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    # Finishing

    def revisit(self, model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Called after the last step with the model as it trained and some batches of the task's examples, with
        `attention_mask` and `labels`; under DeepSpeed with the same ones on every rank."""

    def end_task(self) -> None:
        """Turn what was trained into what is saved. Collective."""

    def save(self, folder: Path) -> None:
        """Write what the next task needs to `folder`: here every changed full-rank weight, as PEFT saves none."""
        (folder / full_rank.FILE_NAME).unlink(missing_ok=True)  # an earlier run's, if the folder is reused
        if self.changed:
            full_rank.save_weights(self.changed_weights(), folder)
        config = read_json(folder / CONFIG_FILE)
        if config["peft_type"] == "LORA" and (self.changed or config.get("save_loranew")):
            write_json(folder / CONFIG_FILE, config | {"peft_type": PEFT_TYPE}, indent=2)

    def changed_weights(self) -> Mapping[str, torch.Tensor]:
        """Values (out, in) of the full-rank weights that differ from the base model on disk, by module name."""
        return full_rank.ExactWeights(self.changed)

    # Describing the run

    def summary(self) -> list[str]:
        """Lines for the start of a run: first what trains, is projected and is protected, then what is ignored."""
        total, trained = self.sizes()
        lines = [f"{self.full_name} trains {trained:,} of {total:,} parameters: {self.describe()}"]
        if ignored := self.ignored():
            lines.append(f"ignored by method {self.full_name}: {', '.join(f'--{name}' for name in ignored)}")
        return lines

    def sizes(self) -> tuple[int, int]:
        """How many parameters the model has, and how many of them train."""
        parameters = list(self.model.parameters())
        return (sum(parameter.numel() for parameter in parameters),
                sum(parameter.numel() for parameter in parameters if parameter.requires_grad))  # fmt: skip

    def ignored(self) -> list[str]:
        """Options on the command line that are ignored: other methods', and this one's idle ones that are not at their
        defaults."""
        options = {option.name: option for option in dataclasses.fields(self.options)}
        fixed = self.fixed_by(self.options.preset)  # in effect, as the preset says
        idle = [name for name in sorted((self.idle & options.keys()) - fixed.keys())
                if getattr(self.options, name) not in ([], None, options[name].default)]
        return [*self.options.ignored, *idle]

    @property
    def full_name(self) -> str:
        """The method's name in reports; a preset is a method of its own."""
        return self.options.method + (f" --preset {self.options.preset}" if self.options.preset else "")

    def effective_options(self) -> dict[str, object]:
        """The options that are not ignored in this run, by name."""
        options = dataclasses.asdict(self.options)
        return {name: value for name, value in options.items()
                if name not in {"method", "preset", "ignored"} | self.idle}

    def describe(self) -> str:
        """Where the trainable parameters are, for `summary`."""
        raise NotImplementedError

    def closing_summary(self) -> list[str]:
        """Lines for the end of training: what the method did."""
        return []


class LoraMethod(Method):
    """A new LoRA for each task, which joins the frozen LoRA of all earlier tasks when its task ends."""

    Arguments: type[LoraArguments] = LoraArguments
    zero_stage = 3

    def __init__(self, options: LoraArguments):
        super().__init__(options)
        self.previous: Path | None = None
        # Whether DeepSpeed or cores train, whose state is not that of the model's own parameters.
        self.own_state = False
        # Under DeepSpeed; at stage 3, where the model is partitioned, `end_task` gathers what is saved.
        self.under_deepspeed = self.partitioned = False
        self.factors_to_save: dict[str, torch.Tensor] | None = None
        self.weights_to_save: dict[str, torch.Tensor] = {}

    def prepare(
        self, model: nn.Module, previous: Path | None, *, decoder_only: bool, sharded: bool = False
    ) -> PeftModel:
        choose_modules(self.options, model)
        layers = match_linear(model, [self.options.lora_modules], "--lora_modules")
        check_rank(layers, self.options.lora_dim, "--lora_dim")
        model.requires_grad_(False)
        self.previous = previous
        if previous is None:
            self.model = add_loranew(model, self.lora_config(decoder_only))
        else:
            if self.keeps_changes():
                self.changed |= full_rank.load_weights(model, previous)
            self.model = load_loranew(model, previous)
            self._reject_other_kind(previous, self.lora_config(decoder_only).save_loranew)
            self._say_what_stays(previous, layers.keys())
        if self.options.merge_old and "merge_old" not in self.idle:
            self._merge_old()
        return self.model

    def keeps_changes(self) -> bool:
        """Whether the full-rank changes in the previous task's folder are loaded."""
        return True

    def _reject_other_kind(self, previous: Path, one_for_all: bool) -> None:
        if self.model.peft_config[self.model.active_adapter].save_loranew != one_for_all:
            kinds = {True: "trains one LoRA through all tasks", False: "adds a LoRA for each task"}
            raise InputError(f"--method {self.options.method}: {kinds[one_for_all]}, but {previous} was saved by a "
                             f"method that {kinds[not one_for_all]}")

    def _say_what_stays(self, previous: Path, named_layers: Collection[str]) -> None:
        """Warn of flags that are ignored because all tasks have the LoRA of the first."""
        config = self.model.peft_config[self.model.active_adapter]
        kept = {"lora_dim": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        for flag, value in kept.items():
            if (given := getattr(self.options, flag)) != value:
                logger.warning("--%s %s is ignored: %s was saved with %s, which stays", flag, given, previous, value)
        if named_layers != loranew_layers(self.model).keys():
            logger.warning(
                "--lora_modules, which matches %d layers, is ignored: %s was saved with a LoRA in %d, which stay",
                len(named_layers), previous, len(loranew_layers(self.model)),
            )  # fmt: skip

    def _merge_old(self) -> None:
        """Add the LoRA of earlier tasks to the base weights, before DeepSpeed can partition them.

        Raises:
            InputError: a weight that the LoRA layer shares, that is also a full-rank weight, or that is in 16 bits.
        """
        layers = loranew_layers(self.model)
        weights = {name: layer.get_base_layer() for name, layer in layers.items()}
        check_unshared(self.model, weights, "--merge_old")
        check_float32(weights, "--merge_old")
        both = sorted(layers.keys() & self.changed.keys())
        if both:  # saved with the old LoRA in it, such a weight would get it twice in the next task
            raise InputError(f"--merge_old: found {both[0]} with a LoRA and as a full-rank weight; allowed: one of the "
                             "two")
        for layer in layers.values():
            layer.merge_old(self.model.active_adapter)

    def lora_config(self, decoder_only: bool) -> LoraNewConfig:
        """The first task's LoRA; later tasks read theirs from the adapter folder."""
        return LoraNewConfig(
            r=self.options.lora_dim,
            lora_alpha=self.options.lora_alpha,
            lora_dropout=self.options.lora_dropout,
            target_modules=self.options.lora_modules,
            task_type=TaskType.CAUSAL_LM if decoder_only else TaskType.SEQ_2_SEQ_LM,
        )

    def create_optimizer(self, *, lr, betas, eps, weight_decay):
        """AdamW, or Muon where the method offers it; every trainable parameter is a matrix."""
        if not isinstance(self.options, OptimizerArguments) or self.options.lora_optimizer == "adamw":
            return super().create_optimizer(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        factors = [factor for _, factor in self.factors()]
        # Its steps get the size of AdamW's, so that the same learning rates suit both.
        self.optimizer = torch.optim.Muon(factors, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        return self.optimizer

    def begin_training(self, deepspeed=None) -> None:
        self.under_deepspeed = deepspeed is not None
        self.own_state |= self.under_deepspeed
        self.partitioned = deepspeed is not None and deepspeed.zero_optimization_stage() == 3
        self.optimizer_state = optimizer_state_of(self.optimizer, deepspeed)

    def training_state(self) -> dict[str, torch.Tensor]:
        """The same for any number of ranks."""
        if not self.own_state:
            return super().training_state()
        step = torch.tensor(steps_taken(self.optimizer))
        return {"step": step} | read_parameters(self.optimizer_state, self._trained_factors())

    def load_training_state(self, saved: dict[str, torch.Tensor]) -> None:
        if self.own_state:
            write_parameters(self.optimizer_state, self._trained_factors(), saved, int(saved["step"]))
        else:
            super().load_training_state(saved)

    def end_task(self) -> None:
        """Turn what was trained into memory: the new LoRA joins the old one.

        At ZeRO-3 the model stays as DeepSpeed has it.
        """
        if self.partitioned:
            self.factors_to_save = folded_factors(self.model, self._exact_values())
            for name, layer in self.changed.items():
                with self.optimizer_state.gathered([layer.weight]):
                    self.weights_to_save[name] = full_rank.exact_weight(layer).detach().to("cpu", copy=True)
            return
        if self.under_deepspeed:
            exact = self._exact_values()
            for name, factor in self.model.named_parameters():
                if ".lora_" in name or ".loranew_" in name:
                    factor.data = exact(factor)
        fold_loranew(self.model)

    def _exact_values(self) -> Callable[[nn.Parameter], torch.Tensor]:
        """A function that returns a factor in float32 where DeepSpeed has it in 16 bits: the optimizer's value, or for
        a frozen factor that in the previous task's file."""
        stored = {} if self.previous is None else read_factors(self.previous)
        names = {parameter: name.replace(".default.", ".") for name, parameter in self.model.named_parameters()}

        def exact(factor: nn.Parameter) -> torch.Tensor:
            if factor.requires_grad:
                return self.optimizer_state.read_master(factor)
            return stored.get(names[factor], factor.detach()).to(factor.device, torch.float32)

        return exact

    def save(self, folder: Path) -> None:
        """Write the LoRA factors and every changed full-rank weight to `folder`."""
        if self.factors_to_save is None:
            self.model.save_pretrained(folder, save_embedding_layers=False)  # the base's are never changed
        else:
            save_folded(self.model, self.factors_to_save, folder)
        super().save(folder)

    def changed_weights(self):
        return self.weights_to_save if self.partitioned else super().changed_weights()

    def describe(self) -> str:
        new = sum(factor.numel() for factor in self._trained_factors().values())
        return f"{new:,} in the LoRA of {len(loranew_layers(self.model))} layers"

    # Access for subclasses

    def lora_penalties(self) -> list[torch.Tensor]:
        """The weighted terms of `lamda_1` and `lamda_2`, without those of weight 0.

        They are O-LoRA's overlap sum |A_old A_new^T| of each layer that has old factors (Wang et al., 2023), and the
        Frobenius norms of A_new and of B_new. A_new is taken as it acts on the layer's input, so without the component
        that a structural projection removes.
        """
        terms = []
        lamda_1, lamda_2, adapter = self.options.lamda_1, self.options.lamda_2, self.model.active_adapter
        for layer in loranew_layers(self.model).values() if lamda_1 or lamda_2 else []:
            A_new = layer.loranew_A[adapter].effective()
            if lamda_1 and adapter in layer.lora_A:
                overlap = layer.lora_A[adapter].weight.to(A_new.dtype) @ A_new.T
                terms.append(lamda_1 * overlap.abs().sum(dtype=torch.float32))
            if lamda_2:
                terms += [lamda_2 * A_new.norm(), lamda_2 * layer.loranew_B[adapter].weight.norm()]
        return terms

    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The new LoRA's factors, named as users know them: `...SelfAttention.q.loranew_A.weight`."""
        for name, parameter in self.model.named_parameters():
            if ".loranew_" in name:
                yield name.removeprefix("base_model.model.").replace(".default.", "."), parameter

    def _trained_factors(self) -> dict[str, nn.Parameter]:
        """The trainable factors; a method may have frozen others in `prepare`."""
        return {name: factor for name, factor in self.factors() if factor.requires_grad}

    def check_like_factors(self, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
        """Reject a file beside the adapter unless it holds a matrix, or several in one tensor, for each factor.

        Raises:
            InputError: a name or a shape is not a factor's.
        """
        found = {name: tuple(tensor.shape[-2:]) for name, tensor in tensors.items()}
        if found != {name: tuple(factor.shape) for name, factor in self.factors()}:
            raise InputError(f"{path}: its tensors do not fit the LoRA beside it")


class FullRankMethod(Method):
    """Trains the weights of the base model that `--optim_target_modules` names; there is no LoRA."""

    Arguments: type[TargetArguments] = TargetArguments
    float32_base = True

    def prepare(
        self, model: nn.Module, previous: Path | None, *, decoder_only: bool, sharded: bool = False
    ) -> nn.Module:
        name = self.options.method
        if not self.options.optim_target_modules:
            raise InputError(f"--method {name}: --optim_target_modules is missing; it names the weights that train")
        choose_modules(self.options, model)
        self.targets = match_linear(model, self.options.optim_target_modules, "--optim_target_modules")
        check_float32(self.targets, f"--method {name}")
        if previous is not None:
            if (previous / WEIGHTS_FILE).exists():
                raise InputError(f"--method {name}: {previous} holds a LoRA; only a folder that {name} saved is loaded")
            left_by = read_json(previous / CONFIG_FILE).get("method")
            if left_by != name:
                raise InputError(f"--method {name}: {previous} was saved by {left_by}; one saved by {name} is needed")
            self.changed = full_rank.load_weights(model, previous)
        self.changed |= self.targets
        model.requires_grad_(False)
        self.base_name = model.name_or_path
        self.model = model
        return model

    def save(self, folder: Path) -> None:
        """Write the changed weights, and a file that names the base model, which marks the folder for the next task."""
        about = {"base_model_name_or_path": self.base_name, "peft_type": None, "method": self.options.method}
        write_json(folder / CONFIG_FILE, about)
        super().save(folder)

    def describe(self) -> str:
        weights = sum(layer.weight.numel() for layer in self.targets.values())
        return f"{len(self.targets)} weights of the base with {weights:,} parameters"
