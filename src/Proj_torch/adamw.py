"""ProjAdamW: AdamW whose moments live in a low-rank projection of the gradient, clear of a protected space.

    groups = [
        {"params": weights, "rank": 8, "update_proj_gap": 10, "scale": 1.0, "proj_type": "std", "lr": 1e-5},
        {"params": everything_else},
    ]
    optimizer = ProjAdamW(groups, lr=1e-3)

One step for a weight W (out, in) with gradient G, in a group with a rank and a protected space S:

1. if the step's number (from 0) is a multiple of `update_proj_gap`, new bases from all of G, its part in S included
   (`ProjProjector.refresh`); the moments are neither reset nor rotated, as in GaLore (Zhao et al. 2024). A refresh that
   finds no basis keeps the previous one and is due again at the next step;
2. R = the projection of G; with `gp_first`, R loses its component in S;
3. a core of R's shape, zero before the step, takes one step of PyTorch's own AdamW on R; with `gp_second`, the first
   moment loses its component in S for this step, before it is divided by the root of the second;
4. W shrinks by `lr * weight_decay` and moves by scale * (the core projected back).

This is the reference; `zero_core.py` does the same with cores that persist from step to step, and must equal it.

A parameter whose gradient is None is left as it is, its state included.

S is always in W's own coordinates. `gp_first` and `gp_second` come from the released GORP code. `gp_first` makes the
change of W orthogonal to S only if S's side is projected, because it then removes S from that side's basis. Otherwise,
and always with `gp_second`, Adam's elementwise division brings a component in S back. `orthogonal`, this project's own
way, makes the change orthogonal everywhere (except for weight decay, which acts on W itself): it removes S from G
before the bases are taken, and from the update that is projected back.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from errors import InputError
from Proj_torch.proj_projector import (
    PROJ_TYPES,
    SIDES,
    ProjProjector,
    check_space,
    product,
    remove,
    remove_projected,
)
from Proj_torch.proj_projector_tensor import ProjProjectorTensor
from Proj_torch.svd import SVD_METHODS, at_least_float32, energy_share

ADAM_KEYS = ("params", "param_names", "lr", "betas", "eps", "weight_decay", "eps_before_correction")
PROJECTION_KEYS = ("rank", "update_proj_gap", "scale", "proj_type", "svd")
WAYS = ("gp_first", "gp_second", "orthogonal")  # how a protected space acts
PROTECTION_KEYS = ("scale_mats", *WAYS, "protect_side")
DEFAULTS = {"svd": "exact", **dict.fromkeys(WAYS, False), "protect_side": "output"}


class ProjAdamW(Optimizer):
    """AdamW with per-group gradient projection and protected spaces; groups without either are plain AdamW.

    Args:
        params: parameters, named parameters, or groups of them. Besides Adam's settings a group may hold

            * `rank`, `update_proj_gap`, `scale`, `proj_type` (all four) and `svd` ("exact", the default, or
              "lowrank"): the projection, see `ProjProjector`; tensors of more than two dimensions get
              `ProjProjectorTensor`;
            * `scale_mats`: one entry per parameter, S with orthonormal columns ((out, c) or (in, c), as `protect_side`
              says) or None where nothing is protected; `gp_first`, `gp_second`, `orthogonal`: how S acts, see the
              head of this file; `protect_side`: "output" (the default, as published) or "input".
        lr, betas, eps, weight_decay: defaults of the groups, as in `torch.optim.AdamW`.
        eps_before_correction: add eps to sqrt(v) before the bias correction, as Hugging Face's former AdamW does; it is
            then eps / sqrt(1 - beta2^t) in the usual place.

    The moments and bases are float32 whatever the parameter's dtype (float64 for float64), also when saved and loaded.

    Raises:
        InputError: a group's key or value is not one of those above, or a rank or S does not fit its parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eps_before_correction: bool = False,
    ):
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, adam | {"eps_before_correction": eps_before_correction})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; raises InputError as the constructor does, and then the optimizer is as before."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise
        _place_spaces(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimisation step; returns what `closure`, if there is one, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step([Weight(group, index, p, self.state[p]) for index, p in enumerate(group["params"])
                        if p.grad is not None], group)  # fmt: skip
        return loss

    def _step(self, weights: list["Weight"], group: dict[str, Any]) -> None:
        """Take the step described at the head of this file; for a plain weight, the core is W itself."""
        projected = [weight.projected_gradient() for weight in weights]
        if group["weight_decay"] and weights:
            torch._foreach_mul_([weight.p for weight in weights], 1 - group["lr"] * group["weight_decay"])
        cores = [weight.p if weight.is_plain else torch.zeros_like(R) for weight, R in zip(weights, projected)]
        self._adam(group, cores, projected, [weight.state for weight in weights])
        for weight, core in zip(weights, cores, strict=True):
            if weight.from_moment is not None:
                core = weight.direction_of_cleared_moment(_eps(group, weight.state)).mul_(-group["lr"])
            if not weight.is_plain:
                weight.projector.add_back_(weight.p, core, weight.from_update, weight.side)

    def _adam(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[dict]) -> None:
        """One step of PyTorch's own AdamW, on all parameters of a group at once."""
        for state, gradient in zip(states, grads, strict=True):
            if "exp_avg" not in state:
                state["step"] = torch.tensor(0.0)  # on the CPU, as torch.optim.AdamW keeps it
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        by_eps = defaultdict(list)  # it may differ between parameters that have taken different numbers of steps
        for index, state in enumerate(states):
            by_eps[_eps(group, state, ahead=1)].append(index)
        for eps, chosen in by_eps.items():
            adamw(
                [params[i] for i in chosen],
                [grads[i] for i in chosen],
                [states[i]["exp_avg"] for i in chosen],
                [states[i]["exp_avg_sq"] for i in chosen],
                [],
                [states[i]["step"] for i in chosen],
                foreach=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=0.0,
                eps=eps,
                maximize=False,
            )

    def get_first_moment(self, param: Tensor) -> Tensor:
        """Adam's first moment of a parameter in the parameter's own coordinates and shape, as a copy.

        A projected moment is projected back with the current bases, without `scale`. Zeros before the first step.
        """
        return product(self.first_moment_factors(param)).clone()

    def first_moment_factors(self, param: Tensor) -> tuple[Tensor, ...]:
        """The first moment as one matrix, or as the two thin ones (out, k) and (k, in) whose product it is."""
        found = [Weight(group, index, p, self.state.get(p, {})) for group in self.param_groups
                 for index, p in enumerate(group["params"]) if p is param]  # fmt: skip
        if not found:
            raise InputError(f"no first moment: the parameter {tuple(param.shape)} is not one of this optimizer's")
        weight, moment = found[0], found[0].state.get("exp_avg")
        if moment is None:
            return (torch.zeros_like(at_least_float32(param.detach())),)
        return weight.projector.back_factors(moment, weight.from_update, weight.side)

    def projection_report(self) -> dict[str, dict[str, float]]:
        """What the projection of each weight has done so far, by parameter name.

        `steps` taken in projected coordinates, `refreshes` that found bases, and `energy`: the share of the squared
        gradient that the last bases held when they were taken.
        """
        weights = {}
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names", [f"{number}.{index}" for index in range(len(group["params"]))])
            for name, p in zip(names, group["params"], strict=True) if "rank" in group else ():
                state = self.state.get(p, {})
                weights[name] = {
                    "steps": int(state.get("step", 0)),
                    "refreshes": state.get("refreshes", 0),
                    "energy": float(state.get("energy", 0.0)),
                }
        return weights

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, each tensor in the dtype it was saved in, so that a run resumes bitwise."""
        super().load_state_dict(state_dict)
        params = (p for group in self.param_groups for p in group["params"])
        for number, p in enumerate(params):  # `state_dict` calls p by this number
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and key != "step":  # the base class casts to the parameter's dtype
                    self.state[p][key] = value.to(p.device)
        for group in self.param_groups:
            _place_spaces(group)


def _eps(group: dict[str, Any], state: dict[str, Any], ahead: int = 0) -> float:
    """eps of the last step that `state` has taken, or with `ahead` 1 of the next one."""
    if not group["eps_before_correction"]:
        return group["eps"]
    return group["eps"] / math.sqrt(1 - group["betas"][1] ** (int(state["step"]) + ahead))


# ------------------------------------------------------------------------------------ one weight in one step


class Weight:
    """A parameter of a group with its state, and what the head of this file does to it before and after Adam.

    Args:
        group: the optimizer's group; index: of the parameter in it.
        p: (out, in), or any shape where nothing is projected or protected.
        state: the optimizer's for p.

    Attributes:
        from_bases, from_gradient, from_moment, from_update: S where it is removed from the gradient that the bases are
            taken from, from the projected gradient, from the first moment, and from the update; else None.
    """

    def __init__(self, group: dict[str, Any], index: int, p: Tensor, state: dict[str, Any]):
        self.group, self.p, self.state = group, p, state
        self.projector = _projector(group, p, state)
        S, self.side = _space(group, index), group.get("protect_side", "output")
        first, second, orthogonal = (S is not None and group[way] for way in WAYS)
        # gp_first removes S from the basis of a projected side, and so from the update too.
        in_basis = first and self.projector.ranks(p.shape)[SIDES.index(self.side)] is not None
        self.from_bases = S if orthogonal else None
        self.from_gradient = S if first or orthogonal else None
        self.from_moment = S if second else None
        self.from_update = S if orthogonal or in_basis else None
        # Whether PyTorch's own AdamW on p does all that is asked.
        self.is_plain = "rank" not in group and S is None and p.dtype in (torch.float32, torch.float64)

    def projected_gradient(self) -> Tensor:
        """R (out or k, in or l), with new bases where they are due."""
        G = self.p.grad
        if "rank" in self.group and (
            self.state.get("fell_back") or int(self.state.get("step", 0)) % self.group["update_proj_gap"] == 0
        ):
            self._refresh(remove(G, self.from_bases, self.side))
        return self.projector.project(G, self.from_gradient, self.side)

    def _refresh(self, G: Tensor) -> None:
        """Give the projector and the state new bases from G, with the share of G's energy that they hold."""
        found = self.projector.refresh(G)
        for mode, basis in enumerate(self.projector.bases):
            if basis is not None:
                self.state[f"basis_{mode}"] = basis
        self.state["refreshes"] = self.state.get("refreshes", 0) + int(found)
        self.state["fell_back"] = int(not found)
        if found:
            self.state["energy"] = energy_share(self.projector.project(G), G)

    def direction_of_cleared_moment(self, eps: float) -> Tensor:
        """m_hat / (sqrt(v_hat) + eps) of the step just taken, with S removed from the first moment."""
        betas = self.group["betas"]
        moment = remove_projected(self.state["exp_avg"], *self.projector.bases, self.from_moment, self.side)
        step = int(self.state["step"])
        root = (self.state["exp_avg_sq"] / (1 - betas[1] ** step)).sqrt_()
        return moment.div_(1 - betas[0] ** step).div_(root.add_(eps))


def _projector(group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> ProjProjector:
    """The parameter's projector with its bases from the state; in a group without a rank it projects nothing."""
    if "rank" not in group:
        return ProjProjector(rank=None, bases=(None, None))
    settings = {key: group[key] for key in ("rank", "scale", "proj_type", "svd")}
    bases = tuple(state.get(f"basis_{mode}") for mode in range(p.ndim)) if "refreshes" in state else None
    return (ProjProjector if p.ndim <= 2 else ProjProjectorTensor)(**settings, bases=bases)


# ------------------------------------------------------------------------------------- checks of groups


VALUES = {  # key: (what must hold, in words)
    "lr": (lambda value: value >= 0, "a number from 0"),
    "betas": (lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value), "two numbers in [0, 1)"),
    "eps": (lambda value: value >= 0, "a number from 0"),
    "weight_decay": (lambda value: value >= 0, "a number from 0"),
    "rank": (lambda value: isinstance(value, int) and value >= 1, "a whole number from 1"),
    "update_proj_gap": (lambda value: isinstance(value, int) and value >= 1, "a whole number from 1"),
    "scale": (lambda value: value > 0, "a number above 0"),
    "proj_type": (lambda value: value in PROJ_TYPES, ", ".join(PROJ_TYPES)),
    "svd": (lambda value: value in SVD_METHODS, ", ".join(SVD_METHODS)),
    "protect_side": (lambda value: value in SIDES, ", ".join(SIDES)),
}


def _check(group: dict[str, Any]) -> None:
    """Reject unknown, missing, impossible and unsuitable settings with InputError; fill in the optional ones."""
    allowed = ADAM_KEYS + PROJECTION_KEYS + PROTECTION_KEYS
    for key in group:
        if key not in allowed:
            raise InputError(f"optimizer group: key {key!r} is unknown; allowed: {', '.join(allowed)}")
    for keys, purpose in ((PROJECTION_KEYS, "a projection"), (PROTECTION_KEYS, "a protected space")):
        if any(key in group for key in keys):
            group |= {key: DEFAULTS[key] for key in keys if key in DEFAULTS and key not in group}
            if missing := [key for key in keys if key not in group]:
                raise InputError(f"optimizer group: {', '.join(missing)} missing; {purpose} needs {', '.join(keys)}")
    for key, (holds, wanted) in VALUES.items():
        try:
            fits = key not in group or holds(group[key])
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise InputError(f"optimizer group: {key} is {group[key]!r}; allowed: {wanted}")
    spaces = group.get("scale_mats", ())
    if spaces and not any(group[way] for way in WAYS) and any(S is not None for S in spaces):
        raise InputError(f"optimizer group: {', '.join(WAYS)} are all off, so scale_mats would do nothing")
    if group.get("gp_second") and group.get("proj_type") == "full":
        # A new two-sided core's gradient is diagonal; off the diagonal what S takes away is divided by almost 0.
        raise InputError("optimizer group: gp_second with proj_type 'full'; allowed: gp_first, orthogonal")
    if "scale_mats" in group and len(spaces) != len(group["params"]):
        raise InputError(f"optimizer group: scale_mats has {len(spaces)} entries for {len(group['params'])} "
                         "parameters; allowed: one per parameter, None where nothing is protected")
    names = group.get("param_names", [f"number {index}" for index in range(len(group["params"]))])
    for index, (name, p) in enumerate(zip(names, group["params"], strict=True)):
        where, S = f"optimizer group, parameter {name}", _space(group, index)
        try:
            _projector(group, p, {}).ranks(p.shape)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if S is not None and p.ndim != 2:
            raise InputError(f"{where}: shape {tuple(p.shape)}; only a matrix can be protected")
        if S is not None:
            check_space(S, p.shape[SIDES.index(group["protect_side"])], f"scale_mats of parameter {name}")


def _space(group: dict[str, Any], index: int) -> Tensor | None:
    return group["scale_mats"][index] if "scale_mats" in group else None


def _place_spaces(group: dict[str, Any]) -> None:
    """Move each protected space to its parameter's device, in the dtype of the computations."""
    if "scale_mats" in group:
        group["scale_mats"] = [
            None if S is None else at_least_float32(S.detach()).to(p.device)
            for S, p in zip(group["scale_mats"], group["params"], strict=True)
        ]
