"""GORP (Wang et al., ACL 2025): LoRA and full-rank weights, both kept clear of what earlier tasks need.

Full-rank weights train through a rank-k gradient projection; the protected LoRA factors and the full-rank weights
keep out of the shared gradient space, which each finished task extends by what its layers saw (or, as published, by
its first moments, `--space_from moments`).

Two engines do the same mathematics: `ProjAdamW` where the optimizer sees whole weights, and `CoreEngine` with a plain
AdamW where DeepSpeed cuts them up, or where `--galore_engine cores` asks for it.
"""

import logging
import re
from pathlib import Path

import torch
from torch import nn

from errors import InputError
from loranew import loranew_layers, set_input_space
from methods.base import PROJECTION, LoraMethod
from module_matching import check_rank, match_linear
from Proj_torch import ProjAdamW
from Proj_torch.zero_core import CoreEngine
from subspace import GradientSpace, layer_inputs

detail = logging.getLogger("gorp.detail")
SPACE_FILE = "gradient_space.safetensors"


class Gorp(LoraMethod):
    """The published method; what its options switch is in `MethodArguments`."""

    unread = ()

    def prepare(self, model, previous: Path | None, *, decoder_only: bool, sharded: bool = False):
        options = self.options
        self.targets = match_linear(model, options.optim_target_modules, "--optim_target_modules")
        check_rank(self.targets, options.galore_rank, "--galore_rank")
        if not self.targets:
            self.unread = (*PROJECTION, "lamda_3")
        self.changed |= self.targets
        model = super().prepare(model, previous, decoder_only=decoder_only)
        self.protected = self._protected_factors()
        if not self.targets and not self.protected:
            raise InputError(
                "--method gorp: neither --optim_target_modules nor --proj_lora_modules is given, so nothing would be "
                "projected or protected; give one, or use --method inclora"
            )
        self.space = self._load_space(previous)
        if options.protect == "structural":
            # The new LoRA sees x - S S^T x, so that its change is orthogonal to S exactly.
            set_input_space(model, {name: self.space.get(f"{name}.loranew_A") for name in loranew_layers(model)})
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
                self._protected_group(self._full_rank_weights())
                | {
                    "rank": self.options.galore_rank,
                    "update_proj_gap": self.options.galore_update_proj_gap,
                    "scale": self.options.galore_scale,
                    "proj_type": self.options.galore_proj_type,
                    "svd": self.options.galore_svd,
                    "lr": self.options.galore_lr,
                },
            ]
            self.optimizer = ProjAdamW([group for group in groups if group["params"]], **settings)
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
        if self.options.space_from == "inputs":
            base = self.model.get_base_model()
            layers = {_space_name(name): name for name in self.targets}
            layers |= {_space_name(name): _space_name(name).rpartition(".")[0] for name in self.protected}
            self.seen = layer_inputs(model, {name: base.get_submodule(at) for name, at in layers.items()}, batches)

    def end_task(self) -> None:
        self.projection_line = self._describe_projection()
        if self.options.space_from == "moments":
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
        return [
            *super().summary(),
            f"full-rank: {weights:,} values of {len(self.targets)} weights train, projected "
            f"({options.galore_proj_type}) to rank {options.galore_rank} every {options.galore_update_proj_gap} steps, "
            f"lr {options.galore_lr}; engine: {engine}",
            f"shared space: {options.protect} on the {options.protect_side} side, from {options.space_from}, of "
            f"{len(self.protected)} LoRA factors and {len(self.targets)} weights; {self._count_directions()} "
            "directions of earlier tasks",
        ]

    def closing_summary(self) -> list[str]:
        bases = self.space.bases.values()
        full = sum(S.shape[1] == S.shape[0] for S in bases)
        return [
            self.projection_line,
            f"shared space: {self._count_directions()} directions in {len(bases)} bases, {full} of them full",
        ]

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
        # Only A sees what the layer sees; B's input is of the LoRA's own making.
        others = [name for name in matched if not name.endswith(".loranew_A.weight")]
        if others and (self.options.space_from == "inputs" or self.options.protect == "structural"):
            raise InputError(
                f"--proj_lora_modules: '{pattern}' matches {others[0]}; with --space_from inputs or --protect "
                "structural only loranew_A factors can be protected"
            )
        return matched

    def _load_space(self, previous: Path | None) -> GradientSpace:
        if previous is None or not (previous / SPACE_FILE).exists():
            return GradientSpace(side=self.options.protect_side, energy=self.options.space_energy)
        space = GradientSpace.load(previous / SPACE_FILE)
        if space.side != self.options.protect_side:
            raise InputError(
                f"--protect_side: found {self.options.protect_side}; {previous / SPACE_FILE} was built for {space.side}"
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

    def _removals(self) -> dict[str, bool]:
        """Where S is removed: from the gradient, from the update. Structurally means from both for a weight."""
        protect = self.options.protect
        return {
            "gp_first": protect in ("gp_first", "structural"),
            "gp_second": protect in ("gp_second", "structural"),
        }

    def _spaces(self, names) -> dict[str, torch.Tensor | None]:
        """S of each named parameter; None for all where nothing is to be protected."""
        return {name: None if self.options.protect == "none" else self.space.get(_space_name(name)) for name in names}

    def _protected_group(self, parameters: dict[str, nn.Parameter]) -> dict:
        """ProjAdamW's group of parameters that keep out of the space that earlier tasks left."""
        group = {"params": list(parameters.values()), "param_names": list(parameters)}
        bases = list(self._spaces(parameters).values())
        if all(basis is None for basis in bases):
            return group
        return group | {"scale_mats": bases, "protect_side": self.options.protect_side, **self._removals()}

    def _core_engine(self) -> CoreEngine:
        options = self.options
        both = sorted(self.targets.keys() & loranew_layers(self.model).keys())
        if both:  # a core takes the whole layer's place
            raise InputError(
                f"--optim_target_modules: matches {both[0]}, which has a LoRA too; under DeepSpeed, or with "
                "--galore_engine cores, one of the two"
            )
        # Structurally, a factor is protected by its forward pass already.
        spaces = {} if options.protect == "structural" else self._spaces(self.protected)
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
            **self._removals(),
        )

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
