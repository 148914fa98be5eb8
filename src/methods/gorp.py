"""GORP (Wang et al., ACL 2025, https://doi.org/10.18653/v1/2025.acl-long.721): the paper's method.

Each task trains a new LoRA, and some full-rank weights through a rank-k projection of their gradients. A finished task
extends the shared gradient space S of each protected weight by the directions of Adam's first moment; while later tasks
train, the gradients of protected LoRA factors and of full-rank weights lose their component in S before Adam.

The paper, the code that its authors released and this project differ: docs/DEVIATIONS.md. `--preset released` computes
what the released scripts compute (`RELEASED`); `sgorp.py` is this project's variant.

Two engines do the same mathematics: `ProjAdamW` where the optimizer sees whole weights, and `CoreEngine` with a plain
AdamW where DeepSpeed cuts them up, or where `--galore_engine cores` asks for it.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from errors import InputError
from loranew import loranew_layers, set_shared_dropout
from methods.base import LoraMethod
from methods.base_options import ChangePenaltyArguments, LoraArguments, ProjectionArguments, SpaceArguments
from module_matching import check_rank, match_linear
from Proj_torch import ProjAdamW
from Proj_torch.zero_core import CoreEngine
from subspace import GradientSpace, layer_inputs

detail = logging.getLogger("gorp.detail")
SPACE_FILE = "gradient_space.safetensors"


# What a clean run of the released scripts computes, whatever it passes; the method's options and Hugging Face's.
RELEASED = {
    "protect": "none", "lamda_1": 0.0, "lamda_2": 0.0, "lamda_3": 0.0,
    "galore_svd": "exact", "galore_engine": "dense", "merge_old": False,
    "adam_epsilon": 1e-6, "max_grad_norm": 0.0, "weight_decay": 0.0, "label_smoothing_factor": 0.0,
    "bf16": False, "fp16": False, "gradient_checkpointing": False, "activation_checkpointing": False, "deepspeed": None,
}  # fmt: skip


@dataclass
class GorpArguments(ChangePenaltyArguments, SpaceArguments, ProjectionArguments, LoraArguments):
    def check_with(self, training, zero_stage):
        super().check_with(training, zero_stage)
        if self.protect == "gp_second" and (zero_stage is not None or self.galore_engine == "cores"):
            engine = "--galore_engine cores" if zero_stage is None else "DeepSpeed"
            raise InputError(f"--protect: found gp_second with {engine}; it needs ProjAdamW, one process without cores")


class Gorp(LoraMethod):
    """The paper's method; with `--preset released`, what the released scripts compute."""

    Arguments = GorpArguments
    presets = {"released": RELEASED}

    def __init__(self, options):
        super().__init__(options)
        self.released = self.averages_micro_batches = options.preset == "released"
        if self.released:
            self.idle = RELEASED.keys() & vars(options).keys()

    def keeps_changes(self):
        # The released code saves the LoRA alone: the next task starts from the base's full-rank weights again.
        return not (self.released and self.trains)

    def prepare(self, model, previous: Path | None, *, decoder_only: bool, sharded: bool = False):
        options = self.options
        self.targets = match_linear(model, options.optim_target_modules, "--optim_target_modules")
        check_rank(self.targets, options.galore_rank, "--galore_rank")
        if not self.targets:
            self.idle |= {*self.options.of_projection(), "lamda_3"}
        self.changed |= self.targets
        model = super().prepare(model, previous, decoder_only=decoder_only)
        self.protected = self._protected_factors()
        if not self.targets and not self.protected:
            raise InputError(
                "--method gorp: neither --optim_target_modules nor --proj_lora_modules is given, so nothing would be "
                "projected or protected; give one, or use --method inclora"
            )
        self.space = self._load_space(previous)
        if options.protect == "none":
            self.idle |= {"protect_side", "space_energy", "space_from", "proj_lora_modules"}
        set_shared_dropout(model, self.released)
        if options.lamda_3:  # before a checkpoint is loaded: the change counts from the task's start
            self.start = {name: layer.weight.detach().clone() for name, layer in self.targets.items()}
        self.sharded = sharded
        self.cores = self._core_engine() if sharded or options.galore_engine == "cores" else None
        self.own_state = self.cores is not None
        if self.cores is None:
            for layer in self.targets.values():
                layer.weight.requires_grad_(True)
        return model

    # Training

    def create_optimizer(self, *, lr, betas, eps, weight_decay):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if self.options.lamda_3:
            device = next(self.model.parameters()).device
            self.start = {name: weight.to(device) for name, weight in self.start.items()}
        factors = dict(self.factors())
        if self.cores is not None:
            cores = self.cores.core_groups(self.options.galore_lr, weight_decay)
            self.optimizer = torch.optim.AdamW([{"params": list(factors.values())}, *cores], **settings)
        else:
            free = {name: factor for name, factor in factors.items() if name not in self.protected}
            groups = [
                {"params": list(free.values()), "param_names": list(free)},
                self._protected_group(self.protected),
                self._protected_group(self._full_rank_weights()) | self.options.projection(),
            ]
            groups = [group for group in groups if group["params"]]
            self.optimizer = ProjAdamW(groups, **settings, eps_before_correction=self.released)
        return self.optimizer

    def begin_training(self, engine) -> None:
        super().begin_training(engine)
        if self.cores is not None:
            self.cores.attach(self.optimizer, engine)

    def begin_micro_batch(self, is_last: bool) -> None:
        if self.cores is not None:
            self.cores.begin_micro_batch(is_last)

    def training_state(self):
        cores = {} if self.cores is None else self.cores.state_dict()
        return super().training_state() | {f"cores.{name}": value for name, value in cores.items()}

    def load_training_state(self, saved):
        super().load_training_state(saved)
        if self.cores is not None:
            prefix = "cores."
            self.cores.load_state_dict({n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)})

    def penalty(self):
        terms = self.lora_penalties()
        if self.options.lamda_3:
            terms += [self.options.lamda_3 * term for term in self._distances_from_orthogonal_change()]
        return torch.stack(terms).sum() if terms else None

    # Finishing

    def revisit(self, model, batches) -> None:
        if self.options.space_from == "inputs" and self.options.protect != "none":
            base = self.model.get_base_model()
            layers = {_space_name(name): name for name in self.targets}
            layers |= {_space_name(name): _space_name(name).rpartition(".")[0] for name in self.protected}
            self.seen = layer_inputs(model, {name: base.get_submodule(at) for name, at in layers.items()}, batches)

    def end_task(self) -> None:
        self.projection_line = self._describe_projection()
        if self.options.protect == "none":
            self.seen = {}
        elif self.options.space_from == "moments":
            self.seen = {_space_name(name): moment.cpu() for name, moment in self._first_moments()}
        self.space.extend(self.seen)
        for line in self.space.describe():
            detail.info(line)
        if self.cores is not None:
            self.trained = self.cores.trained_weights()
            if self.partitioned:
                self.cores.finish()
            else:
                self.cores.detach(self.model.get_base_model())
        super().end_task()

    def changed_weights(self):
        # The sharded engine knows its weights in float32, without the rounding of a 16-bit model.
        return super().changed_weights() | (self.trained if self.cores is not None else {})

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.space.save(folder / SPACE_FILE)

    # Saying what the run does

    def summary(self) -> list[str]:
        options = self.options
        weights = sum(layer.weight.numel() for layer in self.targets.values())
        cores = "trainable cores under DeepSpeed, AdamW" if self.sharded else "trainable cores, AdamW"
        engine = "ProjAdamW" if self.cores is None else cores
        if options.protect == "none":
            space = "shared space: none, nothing is protected"
        else:
            space = (
                f"shared space: {options.protect} on the {options.protect_side} side, from {options.space_from}, of "
                f"{len(self.protected)} LoRA factors and {len(self.targets)} weights; {self._count_directions()} "
                "directions of earlier tasks"
            )
        released = (
            "preset released: what the released scripts compute, nothing protected, no penalty, full-rank changes for "
            "this task alone; but not their ranks that train apart (one model takes every step), nor their reading of "
            "data and their evaluation (docs/DEVIATIONS.md)"
        )
        return [
            *super().summary(),
            *([released] if self.released else []),
            f"full-rank: {weights:,} values of {len(self.targets)} weights train, projected "
            f"({options.galore_proj_type}) to rank {options.galore_rank} every {options.galore_update_proj_gap} steps, "
            f"lr {options.galore_lr}; engine: {engine}",
            space,
        ]

    def closing_summary(self) -> list[str]:
        bases = self.space.bases.values()
        full = sum(S.shape[1] == S.shape[0] for S in bases)
        space = f"shared space: {self._count_directions()} directions in {len(bases)} bases, {full} of them full"
        return [self.projection_line, *([space] if bases else [])]

    # The parts

    def _protected_factors(self) -> dict[str, nn.Parameter]:
        """The factors that `--proj_lora_modules` names, by name."""
        pattern = self.options.proj_lora_modules
        if not pattern:
            return {}
        names = dict(self.factors())
        try:
            matched = {name: factor for name, factor in names.items() if re.fullmatch(pattern, name)}
        except re.error as error:
            raise InputError(f"--proj_lora_modules: '{pattern}' is no regular expression ({error})") from None
        if not matched:
            raise InputError(
                f"--proj_lora_modules: '{pattern}' matches no factor; factors are called {next(iter(names))} ..."
            )
        others = [name for name in matched if not name.endswith(".loranew_A.weight")]
        if others and self._needs_inputs():
            raise InputError(
                f"--proj_lora_modules: '{pattern}' matches {others[0]}; with --space_from inputs or --protect "
                "structural only loranew_A factors can be protected"
            )
        return matched

    def _needs_inputs(self) -> bool:
        """Whether a protected factor must be one that sees the layer's input: A, not B."""
        return self.options.space_from == "inputs"

    def _load_space(self, previous: Path | None) -> GradientSpace:
        if previous is None or not (previous / SPACE_FILE).exists():
            return GradientSpace(side=self.options.protect_side, energy=self.options.space_energy)
        space = GradientSpace.load(previous / SPACE_FILE)
        if space.side != self.options.protect_side:
            hint = " (METHOD=sgorp, which was the default gorp once)" if space.side == "input" else ""
            raise InputError(
                f"--protect_side: found {self.options.protect_side}; {previous / SPACE_FILE} was built for the "
                f"{space.side} side{hint}"
            )
        space.energy = self.options.space_energy
        side = 0 if space.side == "output" else 1
        for name, weight in (dict(self.factors()) | self._full_rank_weights()).items():
            basis = space.get(_space_name(name))
            if basis is not None and len(basis) != weight.shape[side]:
                raise InputError(
                    f"{previous / SPACE_FILE}: {_space_name(name)} has a basis of {len(basis)} rows; "
                    f"{weight.shape[side]} are needed, the {space.side} side of a {weight.shape[0]} x "
                    f"{weight.shape[1]} matrix"
                )
        return space

    def _full_rank_weights(self) -> dict[str, nn.Parameter]:
        return {name: layer.weight for name, layer in self.targets.items()}

    def _spaces(self, names) -> dict[str, torch.Tensor | None]:
        """S of each named parameter; None for all where nothing is to be protected."""
        return {name: None if self.options.protect == "none" else self.space.get(_space_name(name)) for name in names}

    def _protected_group(self, parameters: dict[str, nn.Parameter]) -> dict:
        """ProjAdamW's group of parameters that keep out of the space that earlier tasks left."""
        group = {"params": list(parameters.values()), "param_names": list(parameters)}
        bases = list(self._spaces(parameters).values())
        if all(basis is None for basis in bases):
            return group
        return group | {"scale_mats": bases, "protect_side": self.options.protect_side, self.way(): True}

    def way(self) -> str:
        """How S acts, in ProjAdamW's terms."""
        return self.options.protect

    def _core_engine(self) -> CoreEngine:
        options = self.options
        both = sorted(self.targets.keys() & loranew_layers(self.model).keys())
        if both:  # a core takes the whole layer's place
            raise InputError(
                f"--optim_target_modules: matches {both[0]}, which has a LoRA too; under DeepSpeed, or with "
                "--galore_engine cores, one of the two"
            )
        spaces = self._spaces(self.gradient_protected())
        return CoreEngine(
            self.model.get_base_model(),
            self.targets,
            rank=options.galore_rank,
            update_proj_gap=options.galore_update_proj_gap,
            scale=options.galore_scale,
            proj_type=options.galore_proj_type,
            refresh=options.galore_svd,
            spaces=self._spaces(self.targets),
            protect_side=options.protect_side,
            factor_spaces={name: (factor, spaces.get(name)) for name, factor in self.protected.items()},
            orthogonal=self.way() == "orthogonal",
        )

    def gradient_protected(self) -> dict[str, nn.Parameter]:
        """The protected factors whose gradient loses its component in S."""
        return self.protected

    def _first_moments(self):
        """Adam's first moment (out, in) of each protected factor and full-rank weight, with its name."""
        if self.cores is not None:
            yield from self.cores.first_moments().items()
            return
        for name, factor in self.protected.items():
            yield name, self.optimizer.get_first_moment(factor)
        for name, layer in self.targets.items():
            yield name, self.optimizer.get_first_moment(layer.weight)

    def _describe_projection(self) -> str:
        if self.cores is None:
            return self.optimizer.projection_report().line()
        report = self.cores.report()
        targets = report["targets"].values()
        energies = [target["energy"] for target in targets] or [0.0]
        return (
            f"projection: {len(targets)} weights, {sum(target['projections'] for target in targets)} steps, "
            f"{sum(target['refreshes'] for target in targets)} refreshes, bases held {min(energies):.0%} to "
            f"{max(energies):.0%} of the gradient's energy; {report['core_numbers']:,} numbers trained for "
            f"{report['weights']:,} weights"
        )

    def _distances_from_orthogonal_change(self):
        """||dW dW^T - I||_F of each full-rank weight, dW its change since this task began."""
        for name, layer in self.targets.items():
            weight = layer.weight if self.cores is None else self.cores.layers[name].effective_weight()
            change = weight - self.start[name].to(weight.device)
            yield torch.linalg.norm(change @ change.T - torch.eye(change.shape[0], device=change.device))

    def _count_directions(self) -> int:
        return sum(S.shape[1] for S in self.space.bases.values())


def _space_name(parameter_name: str) -> str:
    return parameter_name.removesuffix(".weight")
