"""ProjAdamW: AdamW whose moments live in a low-rank projection of the gradient, clear of a protected space.

    groups = [
        {"params": weights, "rank": 8, "update_proj_gap": 10, "scale": 1.0, "proj_type": "std", "lr": 1e-5},
        {"params": everything_else},
    ]
    optimizer = ProjAdamW(groups, lr=1e-3)

One step for a weight W (out, in) with gradient G, in a group with a rank and a protected space S:

1. if the step's number (from 0) is a multiple of `update_proj_gap`, new bases from the whole G, its part in S included
   (`proj_projector.next_bases`); the moments are neither reset nor rotated, as in GaLore (Zhao et al. 2024);
2. R = the projection of G; with `gp_first`, R loses its component in S;
3. Adam on R gives a direction in the projected coordinates, exactly as `torch.optim.AdamW` does; with `gp_second`, the
   first moment loses its component in S for this step, before it is divided by the root of the second;
4. W shrinks by `lr * weight_decay` and moves by -lr * scale * (the direction projected back).

S is always in W's own coordinates; where its side is projected, it is taken out of that side's basis. `gp_first` and
`gp_second` are the two ways of the released GORP code. With neither is the change of W orthogonal to S, except where
S's side is itself projected: Adam's elementwise division turns a direction orthogonal to S into one that is not. With
`orthogonal`, this project's third way, it is (except for weight decay, which acts on W itself): S is removed from G
before the bases are taken, and from the update that is projected back.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from errors import InputError
from Proj_torch.proj_projector import (
    PROJ_TYPES,
    SIDES,
    SVD_METHODS,
    ProjProjector,
    at_least_float32,
    project,
    project_back,
    remove,
    remove_projected,
)
from Proj_torch.proj_projector_tensor import ProjProjectorTensor

log = logging.getLogger("gorp")

ADAM_KEYS = ("params", "param_names", "lr", "betas", "eps", "weight_decay")
PROJECTION_KEYS = ("rank", "update_proj_gap", "scale", "proj_type", "svd")
WAYS = ("gp_first", "gp_second", "orthogonal")  # in which a protected space acts
PROTECTION_KEYS = ("scale_mats", *WAYS, "protect_side")


def adam_direction(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    R: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
    clear: Callable[[Tensor], Tensor] = lambda moment: moment,
) -> Tensor:
    """Update both moments in place and return m_hat / (sqrt(v_hat) + eps), as `torch.optim.AdamW` defines it.

    Args:
        exp_avg, exp_avg_sq, R: first moment, second moment and gradient, of one shape and dtype.
        step: number of this step, counted from 1.
        clear: what the first moment goes through before it is divided; what is stored does not.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(R, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(R, R, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    return torch.div(clear(exp_avg), denominator, out=denominator).div_(1 - beta1**step)


@dataclass(frozen=True)
class ProjectionReport:
    """What the projection of an optimizer's weights did.

    `weights` has for each projected weight its `shape`, `rank`, `steps` (taken in projected coordinates), `refreshes`
    of the bases, and `energy`: the share of the squared gradient that the last bases held when they were taken.
    `skipped` counts the updates of any parameter left out because the gradient was not finite.
    """

    weights: dict[str, dict[str, Any]]
    skipped: int

    def line(self) -> str:
        """The report in one line."""
        rest = f"{self.skipped} updates skipped for a gradient that is not finite"
        if not self.weights:
            return f"projection: no weight; {rest}"
        steps, refreshes = (sum(weight[key] for weight in self.weights.values()) for key in ("steps", "refreshes"))
        energies = sorted(weight["energy"] for weight in self.weights.values())
        return (
            f"projection: {len(self.weights)} weights, {steps} steps, {refreshes} refreshes, last bases held "
            f"{energies[0]:.0%} to {energies[-1]:.0%} of the gradient's energy; {rest}"
        )


class ProjAdamW(Optimizer):
    """AdamW with per-group gradient projection and protected spaces; groups without either are plain AdamW.

    Args:
        params: parameters, named parameters, or groups of them. Beside Adam's settings a group may hold

            * `rank`, `update_proj_gap`, `scale`, `proj_type` (all four) and `svd` ("exact", the default, or
              "lowrank"): the projection, see `ProjProjector`; tensors of more than two dimensions get
              `ProjProjectorTensor`;
            * `scale_mats`: one entry a parameter, S with orthonormal columns ((out, c) or (in, c), as `protect_side`
              says) or None where nothing is protected; `gp_first`, `gp_second`, `orthogonal`: how S acts, see the
              head of this file; `protect_side`: "output" (the default, as published) or "input".
        lr, betas, eps, weight_decay: defaults of the groups, as in `torch.optim.AdamW`.
        eps_before_correction: add eps to sqrt(v) before the bias correction, as Hugging Face's former AdamW does; it is
            then eps / sqrt(1 - beta2^t) in the usual place.

    The moments and bases are float32 whatever the parameter's dtype (float64 for float64), and saved and loaded so.
    A parameter whose gradient is not finite is left as it is for that step, its state included, and counted.

    Raises:
        InputError: a group's key or value is not one of those above, or a rank or S does not fit its parameter.
    """

    _warned = False  # of a gradient that is not finite

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eps_before_correction: bool = False,
    ):
        self.eps_before_correction = eps_before_correction
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; nothing is added when it is refused. Raises InputError as the constructor does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_keys(group)
            for index, p in enumerate(group["params"]):
                _check_fit(group, index, p)
        except InputError:
            self.param_groups.pop()
            raise
        _place_spaces(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimisation step; returns what `closure`, if there is one, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skipped = self._skip_non_finite()
        for group in self.param_groups:
            plain = []
            for index, p in enumerate(group["params"]):
                if p.grad is None or p in skipped:
                    continue
                S = _space(group, index)
                if self._is_plain(group, p, S):
                    plain.append(p)
                else:
                    self._step_one(group, p, S)
            self._step_plain(group, plain)
        return loss

    def _is_plain(self, group: dict[str, Any], p: Tensor, S: Tensor | None) -> bool:
        """Whether PyTorch's own AdamW does what is to be done."""
        own_precision = p.dtype in (torch.float32, torch.float64)
        return "rank" not in group and S is None and own_precision and not self.eps_before_correction

    def _skip_non_finite(self) -> set[Tensor]:
        """Parameters whose gradient is not finite: counted, and named once. Costs one device synchronisation."""
        with_grad = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if get_total_norm([p.grad for p in with_grad]).isfinite():
            return set()
        skipped = {p for p in with_grad if not p.grad.isfinite().all()}  # none, if only the norm's squares overflowed
        for p in skipped:
            self.state[p]["skipped"] = self.state[p].get("skipped", 0) + 1
        if skipped and not self._warned:
            names = [name for name, _, p in self._named() if p in skipped]
            log.warning("gradient not finite, update skipped (said once): %s", ", ".join(names))
            self._warned = True
        return skipped

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """PyTorch's own AdamW for parameters that are neither projected nor protected."""
        states = [_started(self.state[p], p) for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_one(self, group: dict[str, Any], p: Tensor, S: Tensor | None) -> None:
        """The step described at the head of this file, for one parameter."""
        state = self.state[p]
        step = int(state.get("step", 0))
        projector = _projector(group, p, state)
        on_gradient, on_moment, on_update = _removals(group, S, projector, p.shape)
        if projector is None:
            R = project(p.grad, None, None, *on_gradient)
        else:
            if projector.is_due(step):
                G = remove(p.grad, *on_update) if on_update and group["orthogonal"] else p.grad
                _refresh(projector, G, state)
            R = projector.project(p.grad, *on_gradient)
        _started(state, R)["step"] += 1
        bases = (None, None) if projector is None else projector.bases
        eps = group["eps"] / (math.sqrt(1 - group["betas"][1] ** (step + 1)) if self.eps_before_correction else 1)
        direction = adam_direction(
            state["exp_avg"], state["exp_avg_sq"], R, step + 1, group["betas"], eps,
            clear=lambda moment: remove_projected(moment, *bases, *on_moment) if on_moment else moment,
        )  # fmt: skip
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        if projector is None:
            p.add_(project_back(direction, None, None, *on_update), alpha=-group["lr"])
        else:
            projector.add_back_(p, direction, -group["lr"], *on_update)

    def get_first_moment(self, param: Tensor) -> Tensor:
        """Adam's first moment of a parameter in the parameter's own coordinates and shape, as a copy.

        A projected moment is projected back with the current bases, without `scale`. Zeros before the first step.

        Raises:
            InputError: the parameter is not this optimizer's.
        """
        group = next((g for g in self.param_groups if any(p is param for p in g["params"])), None)
        if group is None:
            raise InputError(f"first moment asked for a parameter {tuple(param.shape)} that is not the optimizer's")
        state = self.state.get(param, {})
        if "exp_avg" not in state:
            return torch.zeros_like(at_least_float32(param.detach()))
        projector = _projector(group, param, state)
        if projector is None:
            return state["exp_avg"].clone()
        index = next(index for index, p in enumerate(group["params"]) if p is param)
        on_update = _removals(group, _space(group, index), projector, param.shape)[2]
        return projector.project_back(state["exp_avg"], *on_update).clone()

    def projection_report(self) -> "ProjectionReport":
        """What the projection did so far, by parameter name, and how many updates were left out in all groups."""
        weights = {}
        for name, group, p in self._named():
            if "rank" in group:
                state = self.state.get(p, {})
                weights[name] = {
                    "shape": tuple(p.shape),
                    "rank": group["rank"],
                    "steps": int(state.get("step", 0)),
                    "refreshes": state.get("refreshes", 0),
                    "energy": float(state.get("energy", 0.0)),
                }
        return ProjectionReport(weights, sum(state.get("skipped", 0) for state in self.state.values()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, each tensor in the dtype it was saved in, so that a run goes on bitwise."""
        super().load_state_dict(state_dict)
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, p in zip(saved_ids, params, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor) and key != "step":  # the base class casts to the parameter's dtype
                    self.state[p][key] = value.to(p.device)
        for group in self.param_groups:
            _place_spaces(group)

    def _named(self) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names", [f"{number}.{index}" for index in range(len(group["params"]))])
            for name, p in zip(names, group["params"], strict=True):
                yield name, group, p


# ----------------------------------------------------------------------------------- state of one step


def _started(state: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """The state with moments of `like`'s shape and dtype, zero if they were not there."""
    if "exp_avg" not in state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)  # on the CPU, as torch.optim.AdamW keeps it
        state["exp_avg"] = torch.zeros_like(like)
        state["exp_avg_sq"] = torch.zeros_like(like)
    return state


def _removals(
    group: dict[str, Any], S: Tensor | None, projector: ProjProjector | None, shape: torch.Size
) -> tuple[tuple, tuple, tuple]:
    """(S, side) for the gradient, for the first moment and for the update, each empty where nothing is removed.

    With `gp_first`, S leaves a projected side's basis once it is taken, and so the way back too.
    """
    if S is None:
        return (), (), ()
    protection = (S, group["protect_side"])
    first, second, orthogonal = (group[way] for way in WAYS)
    projected = projector is not None and projector.ranks(shape)[SIDES.index(group["protect_side"])] is not None
    return (
        protection if first or orthogonal else (),
        protection if second else (),
        protection if orthogonal or (first and projected) else (),
    )


def _projector(group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> ProjProjector | None:
    """The parameter's projector with its bases from the state; None in a group without a rank."""
    if "rank" not in group:
        return None
    settings = {key: group[key] for key in PROJECTION_KEYS}
    bases = tuple(state.get(f"basis_{mode}") for mode in range(p.ndim)) if "refreshes" in state else None
    return (ProjProjector if p.ndim <= 2 else ProjProjectorTensor)(**settings, bases=bases)


def _refresh(projector: ProjProjector, G: Tensor, state: dict[str, Any]) -> None:
    """New bases from G into the projector and the state, with the share of G's energy that they hold."""
    projector.refresh(G)
    for mode, basis in enumerate(projector.bases):
        if basis is not None:
            state[f"basis_{mode}"] = basis
    state["refreshes"] = state.get("refreshes", 0) + 1
    held, whole = (torch.linalg.vector_norm(X, dtype=torch.float64) for X in (projector.project(G), G))
    state["energy"] = (held / whole.clamp_min(torch.finfo(whole.dtype).tiny)).square()


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


def _check_keys(group: dict[str, Any]) -> None:
    """Refuse unknown, missing and impossible settings; fill in the optional ones."""
    allowed = ADAM_KEYS + PROJECTION_KEYS + PROTECTION_KEYS
    for key in group:
        if key not in allowed:
            raise InputError(f"optimizer group: key {key!r} is unknown; allowed are {', '.join(allowed)}")
    if any(key in group for key in PROJECTION_KEYS):
        group.setdefault("svd", "exact")
        _require(group, PROJECTION_KEYS, "a projection")
    if any(key in group for key in PROTECTION_KEYS):
        for key, value in (*((way, False) for way in WAYS), ("protect_side", "output")):
            group.setdefault(key, value)
        _require(group, PROTECTION_KEYS, "a protected space")
        _check_spaces(group)
    for key, (holds, wanted) in VALUES.items():
        try:
            fits = key not in group or holds(group[key])
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise InputError(f"optimizer group: {key} is {group[key]!r}; allowed is {wanted}")


def _require(group: dict[str, Any], keys: tuple[str, ...], purpose: str) -> None:
    missing = [key for key in keys if key not in group]
    if missing:
        raise InputError(f"optimizer group: {', '.join(missing)} missing; {purpose} needs {', '.join(keys)}")


def _check_spaces(group: dict[str, Any]) -> None:
    spaces = group["scale_mats"]
    if len(spaces) != len(group["params"]):
        raise InputError(
            f"optimizer group: scale_mats has {len(spaces)} entries for {len(group['params'])} parameters; "
            "allowed is one a parameter, None where nothing is protected"
        )
    if any(S is not None for S in spaces) and not any(group[way] for way in WAYS):
        raise InputError(f"optimizer group: {', '.join(WAYS)} are all off, so scale_mats would do nothing")


def _check_fit(group: dict[str, Any], index: int, p: Tensor) -> None:
    """Refuse a rank or a protected space that does not fit the parameter, naming the parameter."""
    name = group["param_names"][index] if "param_names" in group else f"number {index}"
    try:
        projector = _projector(group, p, {})
        if projector is not None:
            projector.ranks(p.shape)
    except InputError as error:
        raise InputError(f"optimizer group, parameter {name}: {error}") from None
    S = _space(group, index)
    if S is None:
        return
    if p.ndim != 2:
        raise InputError(f"optimizer group, parameter {name}: shape {tuple(p.shape)}; only a matrix can be protected")
    size = p.shape[SIDES.index(group["protect_side"])]
    if S.ndim != 2 or S.shape[0] != size:
        raise InputError(
            f"scale_mats of parameter {name}: shape {tuple(S.shape)}; allowed is ({size}, c) for side "
            f"{group['protect_side']!r}"
        )
    if S.shape[1] == 0:
        return
    gram = at_least_float32(S.detach()).T @ at_least_float32(S.detach())
    distance = (gram - torch.eye(len(gram), device=gram.device)).abs().max().item()
    if not distance < 1e-3:
        raise InputError(f"scale_mats of parameter {name}: columns {distance:.1g} from orthonormal; allowed is 1e-3")


def _space(group: dict[str, Any], index: int) -> Tensor | None:
    return group["scale_mats"][index] if "scale_mats" in group else None


def _place_spaces(group: dict[str, Any]) -> None:
    """Put each protected space beside its parameter, in the dtype the mathematics is done in."""
    if "scale_mats" in group:
        group["scale_mats"] = [
            None if S is None else at_least_float32(S.detach()).to(p.device)
            for S, p in zip(group["scale_mats"], group["params"], strict=True)
        ]
