"""GORP (Wang et al., ACL 2025): LoRA and full-rank weights, both kept clear of what earlier tasks need.

Full-rank weights train through a rank-k gradient projection; the protected LoRA factors and the full-rank weights
keep out of the shared gradient space, which each finished task extends by its first moments.
"""

import re
from pathlib import Path

import torch
from torch import nn

import full_rank
from errors import InputError
from loranew import loranew_layers, set_input_space
from methods.base import Method
from Proj_torch import ProjAdamW
from subspace import GradientSpace

SPACE_FILE = "gradient_space.safetensors"


class Gorp(Method):
    """The published method; what its options switch is in `MethodArguments`."""

    def prepare(self, model, previous: Path | None, *, decoder_only: bool):
        self.targets = full_rank.match_linear(model, self.options.optim_target_modules, "optim_target_modules")
        full_rank.check_rank(self.targets, self.options.galore_rank, "galore_rank")
        model = super().prepare(model, previous, decoder_only=decoder_only)
        for layer in self.targets.values():
            layer.weight.requires_grad_(True)
        self.changed |= self.targets
        self.protected = self._protected_factors()
        if not self.targets and not self.protected:
            raise InputError(
                "--method gorp: neither --optim_target_modules nor --proj_lora_modules is given, so nothing would be "
                "projected or protected; give one, or use --method inclora"
            )
        self.space = self._load_space(previous)
        if self.options.protect == "structural":
            self._protect_structurally()
        return model

    def create_optimizer(self, *, lr, betas, eps, weight_decay):
        free = {name: factor for name, factor in self.factors() if name not in self.protected}
        groups = [
            {"params": list(free.values()), "param_names": list(free)},
            self._protected_group(self.protected),
            self._protected_group({name: layer.weight for name, layer in self.targets.items()})
            | {
                "rank": self.options.galore_rank,
                "update_proj_gap": self.options.galore_update_proj_gap,
                "scale": self.options.galore_scale,
                "proj_type": self.options.galore_proj_type,
                "svd": self.options.galore_svd,
                "lr": self.options.galore_lr,
            },
        ]
        groups = [group for group in groups if group["params"]]
        if self.options.lamda_3:
            self.start = {name: layer.weight.detach().clone() for name, layer in self.targets.items()}
        self.optimizer = ProjAdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        return self.optimizer

    def penalty(self):
        options = self.options
        terms = []
        if options.lamda_1:
            terms += [options.lamda_1 * term for term in self._overlaps_with_old()]
        if options.lamda_2:
            terms += [options.lamda_2 * factor.norm() for _, factor in self.factors()]
        if options.lamda_3:
            terms += [options.lamda_3 * term for term in self._distances_from_orthogonal_change()]
        return torch.stack(terms).sum() if terms else None

    def end_task(self) -> None:
        moments = {_space_name(name): self.optimizer.get_first_moment(factor) for name, factor in self.protected.items()}
        moments |= {name: self.optimizer.get_first_moment(layer.weight) for name, layer in self.targets.items()}
        self.space.update_from_moments(moments)
        super().end_task()

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.space.save(folder / SPACE_FILE)

    def summary(self) -> list[str]:
        options = self.options
        weights = sum(layer.weight.numel() for layer in self.targets.values())
        return super().summary() + [
            f"full-rank: {weights:,} values of {len(self.targets)} weights train, projected ({options.galore_proj_type}) "
            f"to rank {options.galore_rank} every {options.galore_update_proj_gap} steps, lr {options.galore_lr}",
            f"shared space: {options.protect} on the {options.protect_side} side of {len(self.protected)} LoRA factors "
            f"and {len(self.targets)} weights; {self._count_directions()} directions of earlier tasks",
        ]

    def closing_summary(self) -> list[str]:
        return [self.optimizer.projection_report().line(), *self.space.describe()]

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
                f"--proj_lora_modules: '{pattern}' matches no factor; factors are called {', '.join(list(names)[:2])} ..."
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
        return space

    def _protected_group(self, parameters: dict[str, nn.Parameter]) -> dict:
        """Optimizer group whose gradients or updates keep out of the space that earlier tasks left."""
        group = {"params": list(parameters.values()), "param_names": list(parameters)}
        protect = self.options.protect
        bases = [self.space.get(_space_name(name)) for name in parameters]
        if protect == "none" or not any(basis is not None for basis in bases):
            return group
        return group | {
            "scale_mats": bases,
            "protect_side": self.options.protect_side,
            # Structural: a full-rank weight's change leaves the space when gradient and update both do; a LoRA
            # factor's through its forward pass, where a second removal changes nothing.
            "gp_first": protect in ("gp_first", "structural"),
            "gp_second": protect in ("gp_second", "structural"),
        }

    def _protect_structurally(self) -> None:
        """Let the new LoRA see x - S S^T x, so that its change is orthogonal to S exactly."""
        set_input_space(
            self.model, {name: self.space.get(f"{name}.loranew_A") for name in loranew_layers(self.model)}
        )

    def _overlaps_with_old(self):
        """sum |A_old A_new^T| of each layer that has old factors: O-LoRA's term (Wang et al., 2023)."""
        adapter = self.model.active_adapter
        for layer in loranew_layers(self.model).values():
            if adapter in layer.lora_A:
                yield (layer.lora_A[adapter].weight @ layer.loranew_A[adapter].weight.T).abs().sum()

    def _distances_from_orthogonal_change(self):
        """||dW dW^T - I||_F of each full-rank weight, dW its change since this task began."""
        for name, layer in self.targets.items():
            change = layer.weight - self.start[name]
            yield torch.linalg.norm(change @ change.T - torch.eye(change.shape[0], device=change.device))

    def _count_directions(self) -> int:
        return sum(self.space.get(name).shape[1] for name in self.space)


def _space_name(parameter_name: str) -> str:
    return parameter_name.removesuffix(".weight")
