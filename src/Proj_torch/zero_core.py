"""Projected AdamW through small trainable cores, so that DeepSpeed ZeRO can shard it; exact, step by step.

ProjAdamW needs the gradient of a whole weight, and ZeRO hands an optimizer flat slices. But between two refreshes the
bases L and R are constant, and projecting the gradient, running Adam there and projecting back is the same as
training a small core C, zero at the refresh, in

    y = (d W + L C R^T) x,        dC = L^T (dL/dW) R,

with elementwise AdamW on C, whose result does not depend on how C is partitioned. What lives where:

* **Frozen, whole on every rank** (at stage 3 partitioned by DeepSpeed): the weight W. No gradient and no optimizer
  state of its size exist between refreshes.
* **Trained, sharded by ZeRO**: the cores, and their moments. They are ordinary parameters of an ordinary AdamW.
* **The bases**, float32, whole on every rank. At a refresh step each rank's backward leaves its share of the
  gradient at the layer, as the factors GY and X. Once the last micro-batch's is there, the shares are summed over the
  ranks (`exact`, `lowrank`: the matrix, to rank 0, which computes the bases and sends them; `sketch`: only thin
  products), and the core's gradient L^T G R is formed with the new bases, before ZeRO reduces it like any other.
  Micro-batches before the last give the core a zero gradient, so the basis sees the whole batch and nothing is lost.
* **The fold**: before the first micro-batch of a refresh step, W <- d W + L C R^T on every rank, C <- 0, d <- 1. The
  moments stay, as in published GaLore. A 16-bit W keeps its rounding error beside it, so small updates are not lost.
* **Weight decay** W <- (1 - lr wd) W is a number d per engine, applied in the forward pass and in the fold; on C it
  is AdamW's own. GaLore's scale and the learning rate are one number, because the fold is linear: the core trains
  with lr * scale, and with wd / scale, so that lr wd is the same. eps acts on the gradient's own scale, as in
  ProjAdamW.

A protected space S acts as in ProjAdamW. As `gp_first` it leaves the core's gradient; as `orthogonal` it leaves the
gradient that the bases are taken from too, and L C R^T in the forward pass and in the fold. `gp_second` would have to
change Adam's moment within its step, which ZeRO makes of slices: only ProjAdamW has it.

Clipping: the core's gradient enters the norm that DeepSpeed or `clip_grad_norm_` clips, not the full gradient.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from errors import InputError
from module_matching import check_unshared
from Proj_torch.adamw import ProjectionReport
from Proj_torch.core_linear import CoreLinear
from Proj_torch.layer_gradient import sketched_bases
from Proj_torch.proj_projector import (
    SIDES,
    Bases,
    check_space,
    mode_ranks,
    next_bases,
    project,
    project_back,
    remove,
)
from Proj_torch.optimizer_state import MOMENTS, LocalState, ZeroState, optimizer_state_of
from Proj_torch.svd import energy_share

log = logging.getLogger("gorp")

REFRESHES = ("exact", "lowrank", "sketch")
CORE_GROUP = "projected_cores"  # key that marks the cores' optimizer group


# --------------------------------------------------------------------------------------------- engine


class CoreEngine:
    """Trains linear layers of a model through low-rank gradient projection, in one process or many.

        cores = CoreEngine(model, targets, rank=8, update_proj_gap=10)
        optimizer = torch.optim.AdamW([*other_groups, *cores.core_groups(lr, weight_decay)])
        # ... deepspeed.initialize(model, optimizer), or DistributedDataParallel, or neither
        cores.attach(optimizer, engine)
        for every micro-batch:
            cores.begin_micro_batch(is_last)
            # forward, backward; after the last one the optimizer's step
        cores.fold()

    Its other methods are those of every engine (`engine.py`).

    Args:
        model: holds the targets; they are replaced in it by `CoreLinear` layers.
        targets: module name -> layer. Their weights are frozen. May be empty where there are factors to protect.
        rank, update_proj_gap, scale, proj_type: as in ProjAdamW; `lr` of the targets, for `create_optimizer`.
        refresh: "exact", "lowrank" (randomised SVD of the summed gradient) or "sketch" (no gradient is summed).
        spaces: module name -> S (out, c) or (in, c), or None.
        protect_side: "output" or "input".
        orthogonal: how S acts on a target, as ProjAdamW's `orthogonal`, otherwise as its `gp_first`.
        factor_spaces: parameter name -> (parameter, S or None), of weights that the optimizer trains directly (LoRA
            factors): a hook removes S from their gradient before it is reduced, as ProjAdamW's `gp_first` does.

    Raises:
        InputError: a target is not a linear layer or shares its weight, or a setting or a space does not fit.
    """

    name = "trainable cores, AdamW"
    own_state = True

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, nn.Linear],
        *,
        rank: int,
        update_proj_gap: int,
        scale: float = 1.0,
        proj_type: str = "std",
        lr: float | None = None,
        refresh: str = "exact",
        spaces: dict[str, Tensor | None] | None = None,
        protect_side: str = "output",
        orthogonal: bool = False,
        factor_spaces: dict[str, tuple[nn.Parameter, Tensor | None]] | None = None,
    ):
        spaces, factor_spaces = spaces or {}, factor_spaces or {}
        _check_settings(update_proj_gap, scale, refresh, protect_side)
        if not targets and not factor_spaces:
            raise InputError("targets: no module matches, so nothing would be projected")
        _check_targets(model, targets)
        self.model, self.lr = model, lr
        self.gap, self.scale, self.refresh = update_proj_gap, scale, refresh
        self.layers: dict[str, CoreLinear] = {}
        for name, linear in targets.items():
            try:
                ranks = mode_ranks((linear.out_features, linear.in_features), rank, proj_type)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            space = spaces.get(name)
            if space is not None:
                check_space(space, linear.weight.shape[SIDES.index(protect_side)], f"space of {name}")
            layer = CoreLinear(linear, ranks, space, protect_side, orthogonal)
            _replace(model, name, layer)
            self.layers[name] = layer
        self.factors = {name: param for name, (param, _) in factor_spaces.items()}
        for param, space in factor_spaces.values():
            if space is not None:
                S = space.detach().float()
                param.register_hook(lambda grad, S=S: remove(grad, S.to(grad.device), protect_side).to(grad.dtype))
        for index, layer in enumerate(self.layers.values()):
            layer.core.register_hook(lambda grad, layer=layer, index=index: self._on_core_gradient(layer, index, grad))
        self.step = 0  # optimizer steps taken
        self.trained_weights: dict[str, Tensor] = {}  # see `finish`
        self.optimizer_state: LocalState | ZeroState | None = None
        self._between_steps, self._is_last, self._open = True, True, False

    # ----------------------------------------------------------------------------------- set-up

    def create_optimizer(self, factors: Mapping[str, nn.Parameter], **adam: Any) -> torch.optim.AdamW:
        """The AdamW of the cores and of LoRA factors; `adam` is lr, betas, eps, weight_decay."""
        cores = self.core_groups(self.lr, adam["weight_decay"])
        return torch.optim.AdamW([{"params": list(factors.values())}, *cores], **adam)

    def begin_training(self, optimizer: Optimizer, deepspeed: Any) -> None:
        self.attach(optimizer, deepspeed)
        self.name = "trainable cores under DeepSpeed, AdamW" if deepspeed is not None else self.name

    def core_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The cores' group for `torch.optim.AdamW`; `lr` and `weight_decay` are those of the weights."""
        cores = [layer.core for layer in self.layers.values()]
        group = {"params": cores, "lr": lr * self.scale, "weight_decay": weight_decay / self.scale, CORE_GROUP: True}
        return [group] if cores else []

    def attach(self, optimizer: Optimizer, engine: Any = None) -> None:
        """Follow the optimizer that holds `core_groups`; once, before the first micro-batch.

        Args:
            optimizer: the AdamW itself, not a wrapper. Not `fused` where a torch GradScaler skips steps, because
                there a skipped step looks like a step.
            engine: what `deepspeed.initialize` returned, if DeepSpeed trains the model.
        """
        if self.layers and not any(group.get(CORE_GROUP) for group in optimizer.param_groups):
            raise InputError("optimizer: it has no group from core_groups, so the projected weights would not train")
        self.optimizer_state = optimizer_state_of(optimizer, engine)
        optimizer.register_step_post_hook(self._on_step)
        for layer in self.layers.values():
            layer.space = None if layer.space is None else layer.space.to(layer.core.device)

    # ---------------------------------------------------------------------------------- training

    def begin_micro_batch(self, is_last: bool = True) -> None:
        """Call before each micro-batch's forward pass; collective.

        Args:
            is_last: whether the optimizer steps after this micro-batch.
        """
        if self.optimizer_state is None:
            raise InputError("CoreEngine: attach(optimizer) comes before the first micro-batch")
        if self._between_steps:
            self._settle()
            self._open = True
            if self.step % self.gap == 0:
                self._fold()
                for layer in self.layers.values():
                    layer.prepare_refresh()
        self._between_steps = self._is_last = is_last

    def fold(self) -> None:
        """Fold the cores, so that the weights hold what was trained; collective. Training may continue after it."""
        self._settle()
        self._fold()

    @torch.no_grad()
    def finish(self, in_pieces: bool = False) -> None:
        """`fold`, and plain linear layers in the model again, unless DeepSpeed's stage 3 has its weights in pieces.

        Then `trained_weights` has each target's weight (out, in), float32 on the CPU, without the rounding of a 16-bit
        weight in the model. Collective.
        """
        self._settle()
        for name, layer in self.layers.items():
            core = self.optimizer_state.read_master(layer.core)
            with self.optimizer_state.gathered([layer.weight]):
                self.trained_weights[name] = layer.trained_weight(core).cpu()
        self._fold()
        for name, layer in self.layers.items() if not in_pieces else ():
            linear = nn.Linear(*layer.shape[::-1], bias=layer.bias is not None, device="meta")
            linear.weight, linear.bias = layer.weight, layer.bias
            linear.weight.requires_grad_(layer.trainable_before)
            _replace(self.model, name, linear.train(layer.training))

    def _fold(self) -> None:
        for layer in self.layers.values():
            if layer.bases is not None:
                core = self.optimizer_state.read_master(layer.core)
                with self.optimizer_state.gathered([layer.weight]):
                    layer.fold(core)
                self.optimizer_state.write_master(layer.core, torch.zeros_like(core))

    def _settle(self) -> None:
        """If the last step was skipped (fp16 overflow), go back to the bases before it."""
        if self._open:
            for layer in self.layers.values():
                layer.close_refresh(taken=False)
            self._open = False

    def _on_step(self, optimizer: Optimizer, *_: Any) -> None:
        """After the optimizer's step, which ZeRO makes once a group or slice, and not at all when it overflows."""
        groups = [group for group in optimizer.param_groups if group.get(CORE_GROUP) and group["params"]]
        cores = [layer.core for layer in self.layers.values()]
        left_out = self.optimizer_state.steps_on_parameters and all(core.grad is None for core in cores)
        if left_out or not (self._open and groups):
            return
        self._open = False
        self.step += 1
        for layer in self.layers.values():
            layer.decay *= 1 - groups[0]["lr"] * groups[0]["weight_decay"]
            layer.steps += 1
            layer.close_refresh(taken=True)

    # ----------------------------------------------------------------------------------- refresh

    def _on_core_gradient(self, layer: CoreLinear, index: int, grad: Tensor) -> Tensor:
        """The core's gradient, once every use of the layer in this backward pass has been summed."""
        if layer.gradient is None or not self._is_last:
            return grad
        with torch.no_grad():
            if not any(layer.ranks):  # full rank: plain AdamW
                layer.bases, layer.share = (None, None), 1.0
            elif self.refresh == "sketch":
                layer.bases, layer.share = _sketch(layer, seed=index + len(self.layers) * self.step)
            else:
                layer.bases, layer.share = _decompose(layer, self.refresh)
            left, right, space = layer.factors(from_update=False, dtype=torch.float32)
            core_gradient = layer.gradient.projected(left, right)
            layer.gradient.clear()  # before backward reaches the next layer, so that one at a time is in memory
            return (core_gradient if space is None else remove(core_gradient, space, layer.side)).to(grad.dtype)

    # ------------------------------------------------------------------------------- after the last step

    def first_moments(self) -> dict[str, Tensor]:
        """Adam's first moments in full coordinates, float32: of each target's weight (out, in) under its module name,
        projected back with the current bases and without `scale`, and of each factor; collective."""
        self._settle()
        moments = {name: self.optimizer_state.read_moment(param, "exp_avg") for name, param in self.factors.items()}
        for name, layer in self.layers.items():
            moment = self.optimizer_state.read_moment(layer.core, "exp_avg")
            bases = layer.bases
            back = layer.removed(from_update=True)
            moments[name] = moment.new_zeros(layer.shape) if bases is None else project_back(moment, *bases, *back)
        return moments

    def effective_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each target's trained weight (out, in), float32, differentiable: for penalties. Not at ZeRO stage 3."""
        for name, layer in self.layers.items():
            yield name, layer.effective_weight()

    def report(self) -> ProjectionReport:
        """What the projection did so far, by module name."""
        return ProjectionReport({name: layer.report() for name, layer in self.layers.items()})

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """All that a run needs to go on, as one flat dictionary of CPU tensors; collective, and the same on every
        rank and for any number of ranks. Only between two optimizer steps."""
        self._settle()
        state = {"step": torch.tensor(self.step)}
        for name, layer in self.layers.items():
            with self.optimizer_state.gathered([layer.weight]):
                state[f"{name}.weight"] = layer.weight.detach().to("cpu", copy=True)
            state[f"{name}.core"] = self.optimizer_state.read_master(layer.core)
            for key in MOMENTS:
                state[f"{name}.{key}"] = self.optimizer_state.read_moment(layer.core, key)
            for key, value in zip(("left", "right"), layer.bases or (), strict=False):
                if value is not None:
                    state[f"{name}.{key}"] = value
            if layer.rounding is not None:
                state[f"{name}.rounding"] = layer.rounding
            counts = [layer.decay, layer.steps, layer.refreshes, layer.share]
            state[f"{name}.counts"] = torch.tensor(counts, dtype=torch.float64)
        return {key: value.cpu().contiguous() for key, value in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken; collective, after `attach`.

        Raises:
            InputError: a tensor is missing or of another shape, or DeepSpeed has no moments to set yet (see
                `optimizer_state.start_moments`).
        """
        self._check_state(state)
        self.step = int(state["step"])
        moments = {}
        for name, layer in self.layers.items():
            device = layer.core.device
            with self.optimizer_state.gathered([layer.weight]):
                layer.weight.copy_(state[f"{name}.weight"])
            self.optimizer_state.write_master(layer.core, state[f"{name}.core"].to(device))
            moments[layer.core] = {key: state[f"{name}.{key}"].to(device) for key in MOMENTS}
            layer.decay, steps, refreshes, layer.share = state[f"{name}.counts"].tolist()
            layer.steps, layer.refreshes = int(steps), int(refreshes)
            left, right, layer.rounding = (
                None if value is None else value.to(device)
                for value in (state.get(f"{name}.{key}") for key in ("left", "right", "rounding"))
            )
            layer.bases = (left, right) if layer.refreshes else None
        if self.step:
            self.optimizer_state.write_moments(moments, self.step)
        self._between_steps, self._is_last, self._open = True, True, False

    def _check_state(self, state: dict[str, Tensor]) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, layer in self.layers.items():
            shapes |= {f"{name}.weight": layer.shape, f"{name}.core": layer.core_shape, f"{name}.counts": (4,)}
            shapes |= {f"{name}.{key}": layer.core_shape for key in MOMENTS}
        for key, shape in shapes.items():
            if key not in state or tuple(state[key].shape) != tuple(shape):
                found = f"of shape {tuple(state[key].shape)}" if key in state else "missing"
                raise InputError(f"core engine's state: {key} is {found}; allowed is {tuple(shape)}")


# -------------------------------------------------------------------------------------------- refresh


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _decompose(layer: CoreLinear, svd: str) -> tuple[Bases, float]:
    """Bases of the gradient summed over ranks, and their energy share: rank 0 computes, the others receive."""
    G = layer.gradient.matrix()
    if _world() > 1:
        G = G.clone()
        dist.reduce(G, dst=0)
        if dist.get_rank() > 0:
            return _received(layer, G.device)
    G = remove(G, *layer.removed_before_bases()) if layer.removed_before_bases() else G
    bases = tuple(None if B is None else B.contiguous() for B in next_bases(G, layer.ranks, svd, layer.bases))
    return _sent(bases, energy_share(project(G, *bases), G).float())


def _sketch(layer: CoreLinear, seed: int) -> tuple[Bases, float]:
    """Bases from products that are summed over ranks, and their energy share; no gradient is formed or sent."""
    S, side = layer.removed_before_bases() or (None, None)

    def clear(M: Tensor, its_side: str) -> Tensor:
        return remove(M, S, "output") if side == its_side else M

    def times(M: Tensor) -> Tensor:
        return clear(_summed(layer.gradient.times(clear(M, "input"))), "output")

    def transposed_times(M: Tensor) -> Tensor:
        return clear(_summed(layer.gradient.transposed_times(clear(M, "output"))), "input")

    device = layer.core.device
    try:
        bases, share = sketched_bases(times, transposed_times, layer.shape, layer.ranks, layer.bases, seed, device)
    except torch.linalg.LinAlgError as error:
        log.warning("%s; the previous basis stays", error)
        nothing = torch.zeros((), device=device).expand(layer.shape)
        bases, share = next_bases(nothing, layer.ranks, previous=layer.bases), 0.0
    return _sent(bases, torch.tensor(share, device=device))  # the same already, unless ranks round differently


def _summed(M: Tensor) -> Tensor:
    M = M.contiguous()
    if _world() > 1:
        dist.all_reduce(M)
    return M


def _sent(bases: Bases, share: Tensor) -> tuple[Bases, float]:
    if _world() > 1:
        for tensor in (*bases, share):
            if tensor is not None:
                dist.broadcast(tensor, src=0)
    return bases, float(share)


def _received(layer: CoreLinear, device: torch.device) -> tuple[Bases, float]:
    empty = [None if not k else torch.empty(n, k, device=device) for n, k in zip(layer.shape, layer.ranks, strict=True)]
    return _sent(tuple(empty), torch.empty((), device=device))


# --------------------------------------------------------------------------------------------- checks


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _check_settings(gap: int, scale: float, refresh: str, side: str) -> None:
    if gap < 1:
        raise InputError(f"update_proj_gap: {gap}; allowed is a whole number from 1")
    if not scale > 0:
        raise InputError(f"scale: {scale}; allowed is a number above 0")
    if refresh not in REFRESHES:
        raise InputError(f"refresh: {refresh!r}; allowed are {', '.join(REFRESHES)}")
    if side not in SIDES:
        raise InputError(f"protect_side: {side!r}; allowed are {', '.join(SIDES)}")


def _check_targets(model: nn.Module, targets: dict[str, nn.Linear]) -> None:
    """Reject, by name, what is not a linear layer and a weight that more than one module uses."""
    for name, linear in targets.items():
        if type(linear) is not nn.Linear:
            raise InputError(f"{name}: a {type(linear).__name__}; allowed is a torch.nn.Linear")
    check_unshared(model, targets, "targets")

