"""What every method shares: a LoRA that remembers, and carrying what earlier tasks left behind.

A method is a subclass in a file of its own that overrides the few hooks in which it differs. As it stands, this
class adds a new LoRA for each task and puts no constraint on it.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, TaskType
from torch import nn

import full_rank
from arguments import MethodArguments
from loranew import (
    LoraNewConfig,
    add_loranew,
    fold_loranew,
    folded_factors,
    load_loranew,
    loranew_layers,
    save_folded,
)
from Proj_torch.sharded_state import optimizer_state_of, read_parameters, steps_taken, write_parameters


class Method:
    """One task's training by one method.

    Life of an instance: `prepare` once, then `create_optimizer`; `penalty` in every training step; `end_task` after
    the last one; `save` to leave the adapter folder from which the next task's `prepare` starts.
    """

    def __init__(self, options: MethodArguments):
        self.options = options
        self.model: PeftModel | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        # Weights of the base that differ from the base model on disk, by module name: earlier tasks' and this one's.
        self.changed: dict[str, nn.Linear] = {}
        # Of a model that DeepSpeed has cut up: what `end_task` has gathered to be saved.
        self.partitioned = False
        self.left_behind: dict[str, torch.Tensor] | None = None
        self.whole: dict[str, torch.Tensor] = {}

    # Setting up

    def prepare(
        self, model: nn.Module, previous: Path | None, *, decoder_only: bool, sharded: bool = False
    ) -> PeftModel:
        """Attach the LoRA to `model`, load what the task before left in `previous`, freeze everything else.

        `sharded` says that DeepSpeed will train the model, so that the optimizer sees flat pieces of the parameters.

        Raises:
            InputError: a regular expression that matches nothing or not linear layers, a rank above a matrix, or an
                adapter folder that does not fit the model.
        """
        layers = full_rank.match_linear(model, [self.options.lora_modules], "lora_modules")
        full_rank.check_rank(layers, self.options.lora_dim, "lora_dim")
        model.requires_grad_(False)
        if previous is None:
            self.model = add_loranew(model, self.lora_config(decoder_only))
        else:
            self.changed = full_rank.load_weights(model, previous)
            self.model = load_loranew(model, previous)
        return self.model

    def lora_config(self, decoder_only: bool) -> LoraNewConfig:
        """The first task's LoRA; later tasks read theirs from the adapter folder."""
        return LoraNewConfig(
            r=self.options.lora_dim,
            lora_alpha=self.options.lora_alpha,
            lora_dropout=self.options.lora_dropout,
            target_modules=self.options.lora_modules,
            task_type=TaskType.CAUSAL_LM if decoder_only else TaskType.SEQ_2_SEQ_LM,
        )

    # Training

    def create_optimizer(self, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        """Optimizer of everything that trains."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        return self.optimizer

    def begin_training(self, engine) -> None:
        """Called once before the first step, with the DeepSpeed engine that trains the model, or None."""
        self.partitioned = engine is not None and engine.zero_optimization_stage() == 3
        self.optimizer_state = None if engine is None else optimizer_state_of(self.optimizer, engine)

    def begin_micro_batch(self, is_last: bool) -> None:
        """Called before each forward pass in training; `is_last` where an optimizer step follows."""

    def penalty(self) -> torch.Tensor | None:
        """A scalar to add to the loss once an optimizer step, or None where there is nothing to add."""
        return None

    # Checkpoints of a run under DeepSpeed

    def training_state(self) -> dict[str, torch.Tensor]:
        """What such a run needs to go on, on the same or another number of ranks: CPU tensors by name; collective."""
        step = torch.tensor(steps_taken(self.optimizer))
        return {"step": step} | read_parameters(self.optimizer_state, dict(self.factors()))

    def load_training_state(self, saved: dict[str, torch.Tensor]) -> None:
        """Go on where `training_state` was taken; collective, once DeepSpeed has moments (`start_moments`).

        Raises:
            InputError: a tensor is missing or does not fit.
        """
        write_parameters(self.optimizer_state, dict(self.factors()), saved, int(saved["step"]))

    # Finishing

    def end_task(self) -> None:
        """Turn what was trained into memory: the new LoRA joins the old one. Collective.

        At ZeRO-3 the model stays as DeepSpeed has it, and only what is saved is gathered.
        """
        if self.partitioned:
            import deepspeed  # slow, so only where it runs

            self.left_behind = folded_factors(self.model, deepspeed.zero.GatheredParameters)
            for name, layer in self.changed.items():
                with deepspeed.zero.GatheredParameters([layer.weight]):
                    self.whole[name] = layer.weight.detach().to("cpu", copy=True)
        else:
            fold_loranew(self.model)

    def save(self, folder: Path) -> None:
        """Write what the next task needs to `folder`: the LoRA factors and every changed full-rank weight."""
        if self.left_behind is None:
            self.model.save_pretrained(folder, save_embedding_layers=False)  # the base's are never changed
        else:
            save_folded(self.model, self.left_behind, folder)
        if self.changed:
            full_rank.save_weights(self.changed_weights(), folder)

    def changed_weights(self) -> dict[str, torch.Tensor]:
        """Values (out, in) of the full-rank weights that differ from the base model on disk, by module name."""
        return {name: layer.weight for name, layer in self.changed.items()} | self.whole

    # Saying what the run does

    def summary(self) -> list[str]:
        """Lines for the start of a run: how many values train, and where."""
        new = sum(parameter.numel() for _, parameter in self.factors())
        total = sum(parameter.numel() for parameter in self.model.parameters())
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return [
            f"method {type(self).__name__.lower()}: {trained:,} of {total:,} values train; "
            f"{new:,} in the new LoRA of {len(loranew_layers(self.model))} layers"
        ]

    def closing_summary(self) -> list[str]:
        """Lines for the end of training: what the method did."""
        return []

    # Access for subclasses

    def lora_penalties(self) -> list[torch.Tensor]:
        """The weighted terms of `lamda_1` and `lamda_2`; none of a term whose weight is 0.

        O-LoRA's overlap sum |A_old A_new^T| of each layer that has old factors (Wang et al., 2023), and
        the Frobenius norm of each new factor.
        """
        terms = []
        if self.options.lamda_1:
            adapter = self.model.active_adapter
            for layer in loranew_layers(self.model).values():
                if adapter in layer.lora_A:
                    overlap = layer.lora_A[adapter].weight @ layer.loranew_A[adapter].weight.T
                    terms.append(self.options.lamda_1 * overlap.abs().sum())
        if self.options.lamda_2:
            terms += [self.options.lamda_2 * factor.norm() for _, factor in self.factors()]
        return terms

    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The new LoRA's factors, named as users know them: `...SelfAttention.q.loranew_A.weight`."""
        for name, parameter in self.model.named_parameters():
            if ".loranew_" in name:
                yield name.removeprefix("base_model.model.").replace(".default.", "."), parameter
