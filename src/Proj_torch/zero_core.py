"""Projected AdamW through small trainable cores, so that DeepSpeed ZeRO can shard it; exact, step by step.

ProjAdamW needs the gradient of a complete weight, and ZeRO hands an optimizer flat slices. But between two refreshes
the bases L and R are constant, and projecting the gradient, running Adam there and projecting back is the same as
training a small core C, zero at the refresh, in

    y = (d W + L C R^T) x,        dC = L^T (dL/dW) R,

with elementwise AdamW on C, whose result does not depend on how C is partitioned. What lives where:

* **Frozen, complete on every rank** (at stage 3 partitioned by DeepSpeed): the weight W. No gradient and no optimizer
  state of its size exist between refreshes.
* **Trained, sharded by ZeRO**: the cores and their moments, ordinary parameters of an ordinary AdamW.
* **The bases**, float32, complete on every rank. In a refresh step each rank's backward pass leaves its share of the
  gradient at the layer, as the factors GY and X. After the last micro-batch the shares are summed over the ranks
  (`exact`, `lowrank`: the matrix, on rank 0, which sends the bases to the others; `sketch`: only thin products), and
  the core's gradient L^T G R is formed with the new bases, before ZeRO reduces it like any other. Earlier
  micro-batches give the core a zero gradient, so that the basis sees the complete batch and nothing is lost.
* **The fold**: before the first micro-batch of a refresh step, W <- d W + L C R^T on every rank, C <- 0, d <- 1. The
  moments stay, as in published GaLore. A 16-bit W keeps its rounding error beside it, so small updates are not lost.
* **Weight decay** W <- (1 - lr wd) W is the number d of each layer, applied in the forward pass and in the fold; on C
  it is AdamW's own. GaLore's scale and the learning rate are one number, because the fold is linear: the core trains
  with lr * scale, and with wd / scale, so that lr wd is the same. eps acts on the gradient's own scale, as in
  ProjAdamW.

A step that the optimizer leaves out (all gradients None, or fp16 overflow) changes nothing, and its refresh is due
again. A protected space S acts as in ProjAdamW. As `gp_first` it is removed from the core's gradient; as `orthogonal`
also from the gradient that the bases are taken from, and from L C R^T in the forward pass and in the fold. `gp_second`
would have to change Adam's moment within its step, which works on ZeRO's slices: only ProjAdamW has it.

Clipping: the core's gradient enters the norm that DeepSpeed or `clip_grad_norm_` clips, not the full gradient.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from errors import InputError
from module_matching import check_unshared
from Proj_torch.adamw import ProjectionReport, check_values
from Proj_torch.core_linear import CoreLinear
from Proj_torch.layer_gradient import sketched_bases
from Proj_torch.optimizer_state import LocalState, ZeroState, optimizer_state_of, read_parameters, write_parameters
from Proj_torch.proj_projector import (
    SIDES, Bases, back_factors, check_space, kept_bases, matrix_bases, mode_ranks, project, remove,
)  # fmt: skip
from Proj_torch.svd import SVD_METHODS, energy_share, warn_once

CORE_GROUP = "projected_cores"  # key that marks the cores' optimizer group
BASES = ("left", "right")
COUNTS = ("decay", "refreshes", "fell_back", "share")  # a layer's numbers in a checkpoint


class CoreEngine:
    """Trains linear layers of a model through low-rank gradient projection, in one process or many.

        cores = CoreEngine(model, targets, rank=8, update_proj_gap=10)
        optimizer = torch.optim.AdamW([*other_groups, *cores.core_groups(lr, weight_decay)])
        # ... deepspeed.initialize(model, optimizer), or DistributedDataParallel, or neither
        cores.begin_training(optimizer, deepspeed)
        for every micro-batch:
            cores.begin_micro_batch(is_last)
            # forward, backward; after the last one the optimizer's step
        cores.finish()

    Its other methods are those of every engine (`engine.py`).

    Args:
        model: holds the targets; they are replaced in it by `CoreLinear` layers.
        targets: module name -> layer, whose weight is frozen. May be empty where there are factors to protect.
        rank, update_proj_gap, scale, proj_type: as in ProjAdamW; `lr` of the targets, for `create_optimizer`.
        svd: "exact", "lowrank" (randomised SVD of the summed gradient) or "sketch" (no gradient is summed).
        spaces: module name -> S (out, c) or (in, c), or None.
        protect_side: "output" or "input".
        orthogonal: S acts on a target as ProjAdamW's `orthogonal`, otherwise as its `gp_first`.
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
        targets: Mapping[str, nn.Linear],
        *,
        rank: int,
        update_proj_gap: int,
        scale: float = 1.0,
        proj_type: str = "std",
        lr: float | None = None,
        svd: str = "exact",
        spaces: Mapping[str, Tensor | None] | None = None,
        protect_side: str = "output",
        orthogonal: bool = False,
        factor_spaces: Mapping[str, tuple[nn.Parameter, Tensor | None]] | None = None,
    ):
        spaces, factor_spaces = spaces or {}, factor_spaces or {}
        check_values({"update_proj_gap": update_proj_gap, "scale": scale, "protect_side": protect_side})
        if svd not in (*SVD_METHODS, "sketch"):
            raise InputError(f"svd is {svd!r}; allowed is {', '.join(SVD_METHODS)}, sketch")
        if not targets and not factor_spaces:
            raise InputError("targets: no module matches, so nothing would be projected")
        for name, linear in targets.items():
            if type(linear) is not nn.Linear:
                raise InputError(f"{name}: a {type(linear).__name__}; allowed is a torch.nn.Linear")
        check_unshared(model, targets, "targets")
        self.model, self.lr, self.gap, self.scale, self.svd = model, lr, update_proj_gap, scale, svd
        self.side = protect_side
        self.layers: dict[str, CoreLinear] = {}
        for index, (name, linear) in enumerate(targets.items()):
            try:
                ranks = mode_ranks((linear.out_features, linear.in_features), rank, proj_type)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            space = spaces.get(name)
            if space is not None:
                check_space(space, linear.weight.shape[SIDES.index(protect_side)], f"space of {name}")
            layer = CoreLinear(linear, ranks, space, protect_side, orthogonal)
            layer.core.register_hook(lambda grad, layer=layer, index=index: self._on_core_gradient(layer, index, grad))
            _replace(model, name, layer)
            self.layers[name] = layer
        self.factors = {name: param for name, (param, _) in factor_spaces.items()}
        self.factor_spaces = {name: S.detach().float() for name, (_, S) in factor_spaces.items() if S is not None}
        for name in self.factor_spaces:
            self.factors[name].register_hook(lambda grad, name=name: self._on_factor_gradient(name, grad))
        self.step = 0  # optimizer steps taken
        self.trained_weights: dict[str, Tensor] = {}  # see `finish`
        self.optimizer_state: LocalState | ZeroState | None = None
        # Of micro-batches: whether the current one ends a step (the last one did, between two steps), and whether that
        # step has yet to be taken.
        self._is_last, self._open = True, False

    # ----------------------------------------------------------------------------------- set-up

    def create_optimizer(self, factors: Mapping[str, nn.Parameter], **adam: Any) -> torch.optim.AdamW:
        """The AdamW of the cores and of LoRA factors; `adam` is lr, betas, eps, weight_decay."""
        cores = self.core_groups(self.lr, adam["weight_decay"])
        return torch.optim.AdamW([{"params": list(factors.values())}, *cores], **adam)

    def core_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The cores' group for `torch.optim.AdamW`; `lr` and `weight_decay` are those of the weights."""
        cores = list(self._cores().values())
        group = {"params": cores, "lr": lr * self.scale, "weight_decay": weight_decay / self.scale, CORE_GROUP: True}
        return [group] if cores else []

    def begin_training(self, optimizer: Optimizer, deepspeed: Any = None) -> None:
        """Follow the optimizer that holds `core_groups`; once, before the first micro-batch.

        Args:
            optimizer: the AdamW itself, not a wrapper. Not `fused` where a torch GradScaler skips steps, because
                there a skipped step looks like one that was taken.
            deepspeed: what `deepspeed.initialize` returned, if DeepSpeed trains the model.
        """
        if self.layers and not any(group.get(CORE_GROUP) for group in optimizer.param_groups):
            raise InputError("optimizer: it has no group from core_groups, so the projected weights would not train")
        if deepspeed is not None:
            self.name = "trainable cores under DeepSpeed, AdamW"
        self.optimizer_state = optimizer_state_of(optimizer, deepspeed)
        optimizer.register_step_post_hook(self._on_step)
        for layer in self.layers.values():
            layer.space = None if layer.space is None else layer.space.to(layer.core.device)
        for name, space in self.factor_spaces.items():
            self.factor_spaces[name] = space.to(self.factors[name].device)

    def _cores(self) -> dict[str, nn.Parameter]:
        return {f"{name}.core": layer.core for name, layer in self.layers.items()}

    # ---------------------------------------------------------------------------------- training

    def begin_micro_batch(self, is_last: bool = True) -> None:
        """Call before each micro-batch's forward pass; `is_last` where the optimizer steps after it. Collective."""
        if self.optimizer_state is None:
            raise InputError("CoreEngine: begin_training(optimizer) comes before the first micro-batch")
        if self._is_last:
            self._settle()
            self._open = True
            for layer in self.layers.values():
                if layer.fell_back or self.step % self.gap == 0:
                    self._fold(layer)
                    layer.prepare_refresh()
        self._is_last = is_last

    @torch.no_grad()
    def finish(self, in_pieces: bool = False) -> None:
        """Fold the cores, and put plain linear layers into the model again unless stage 3 has its weights `in_pieces`.

        Then `trained_weights` has each target's weight (out, in), float32 on the CPU, without the rounding of a 16-bit
        weight in the model. Collective.
        """
        self._settle()
        for name, layer in self.layers.items():
            self._fold(layer, keep_as=name)
            if not in_pieces:
                linear = nn.Linear(*layer.shape[::-1], bias=layer.bias is not None, device="meta")
                linear.weight, linear.bias = layer.weight, layer.bias
                linear.weight.requires_grad_(layer.trainable_before)
                _replace(self.model, name, linear.train(layer.training))

    def _fold(self, layer: CoreLinear, keep_as: str | None = None) -> None:
        """Fold the layer's core into its weight, and keep the result in `trained_weights` if that has a name."""
        core = self.optimizer_state.read_master(layer.core)
        with self.optimizer_state.gathered([layer.weight]):
            weight = layer.fold(core)
            if keep_as is not None:
                self.trained_weights[keep_as] = weight.to("cpu", copy=True)
        self.optimizer_state.write_master(layer.core, torch.zeros_like(core))

    def _settle(self) -> None:
        """If the last step was left out, return to the bases before it."""
        if self._open:
            for layer in self.layers.values():
                layer.close_refresh(taken=False)
            self._open = False

    def _on_step(self, optimizer: Optimizer, *_: Any) -> None:
        """After the optimizer's step, which ZeRO makes once a group or slice, and not at all when it overflows."""
        groups = [group for group in optimizer.param_groups if group.get(CORE_GROUP)
                  and any(slice_.grad is not None for slice_ in group["params"])]  # fmt: skip
        if not (self._open and groups):
            return
        self._open = False
        self.step += 1
        for layer in self.layers.values():
            layer.decay *= 1 - groups[0]["lr"] * groups[0]["weight_decay"]
            layer.close_refresh(taken=True)

    # --------------------------------------------------------------------------------- gradients

    def _on_factor_gradient(self, name: str, grad: Tensor) -> Tensor:
        return remove(grad, self.factor_spaces[name], self.side).to(grad.dtype)

    @torch.no_grad()
    def _on_core_gradient(self, layer: CoreLinear, index: int, grad: Tensor) -> Tensor:
        """The core's gradient, once every use of the layer in this backward pass has been summed."""
        if layer.gradient is None or not self._is_last:
            return grad
        _refresh(layer, self.svd, seed=index + len(self.layers) * self.step)
        left, right, space = layer.factors(from_update=False, dtype=torch.float32)
        core_gradient = layer.gradient.projected(left, right)
        layer.gradient.clear()  # before backward reaches the next layer, so that one at a time is in memory
        return (core_gradient if space is None else remove(core_gradient, space, layer.side)).to(grad.dtype)

    # ------------------------------------------------------------------------------- after the last step

    def first_moments(self) -> dict[str, tuple[Tensor, ...]]:
        """Adam's first moments by name, as one float32 matrix or as two whose product it is; collective.

        Of each target (out, in), projected back with the current bases and without `scale`, and of each factor.
        """
        self._settle()
        moments = {name: (self.optimizer_state.read_moment(param, "exp_avg"),) for name, param in self.factors.items()}
        for name, layer in self.layers.items():
            moment, back = self.optimizer_state.read_moment(layer.core, "exp_avg"), layer.removed(from_update=True)
            taken = layer.bases is not None
            moments[name] = back_factors(moment, *layer.bases, *back) if taken else (moment.new_zeros(layer.shape),)
        return moments

    def effective_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each target's trained weight (out, in), float32, differentiable: for penalties. Not at ZeRO stage 3."""
        for name, layer in self.layers.items():
            yield name, layer.effective_weight()

    def report(self) -> ProjectionReport:
        """What the projection has done so far, by module name."""
        return ProjectionReport({
            name: {"shape": layer.shape, "ranks": layer.ranks, "steps": self.step, "refreshes": layer.refreshes,
                   "energy": float(layer.share)} for name, layer in self.layers.items()})  # fmt: skip

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """All that a run needs to resume between two steps, as CPU tensors; the same for any number of ranks. Collective."""
        self._settle()
        state = {"step": torch.tensor(self.step)} | read_parameters(self.optimizer_state, self._cores())
        for name, layer in self.layers.items():
            with self.optimizer_state.gathered([layer.weight]):
                state[f"{name}.weight"] = layer.weight.detach().to("cpu", copy=True)
            kept = dict(zip(BASES, layer.bases or (), strict=False)) | {"rounding": layer.rounding}
            state |= {f"{name}.{key}": value.cpu().contiguous() for key, value in kept.items() if value is not None}
            counts = [float(getattr(layer, count)) for count in COUNTS]
            state[f"{name}.counts"] = torch.tensor(counts, dtype=torch.float64)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume where `state_dict` was taken; collective, after `begin_training`.

        Raises:
            InputError: a tensor is missing or of another shape, or DeepSpeed has no moments to set yet (see
                `optimizer_state.start_moments`).
        """
        for name, layer in self.layers.items():
            for key, shape in ((f"{name}.weight", layer.shape), (f"{name}.counts", (len(COUNTS),))):
                if key not in state or tuple(state[key].shape) != shape:
                    found = tuple(state[key].shape) if key in state else "nothing"
                    raise InputError(f"{key}: found {found}; allowed is {shape}")
        self.step = int(state["step"])
        write_parameters(self.optimizer_state, self._cores(), state, self.step)
        for name, layer in self.layers.items():
            with self.optimizer_state.gathered([layer.weight]):
                layer.weight.copy_(state[f"{name}.weight"])
            layer.decay, refreshes, fell_back, layer.share = state[f"{name}.counts"].tolist()
            layer.refreshes, layer.fell_back = int(refreshes), bool(fell_back)
            left, right, layer.rounding = (
                None if value is None else value.to(layer.core.device)
                for value in (state.get(f"{name}.{key}") for key in (*BASES, "rounding"))
            )
            layer.bases = (left, right) if self.step else None
        self._is_last, self._open = True, False


# -------------------------------------------------------------------------------------------- refresh


def _refresh(layer: CoreLinear, svd: str, seed: int) -> None:
    """Give `layer` the bases of its gradient summed over the ranks, or the previous ones where it has none.

    Rank 0 decides, and sends what it has to the others.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    found = None
    try:
        if not any(layer.ranks):  # full rank: plain AdamW
            found = (None, None), torch.ones(())
        elif svd == "sketch":
            found = _sketch(layer, seed, ranks)
        else:
            found = _decompose(layer, svd, ranks)
    except torch.linalg.LinAlgError as error:
        warn_once(f"{error}; the previous basis stays")
    bases, share = found or (kept_bases(layer.weight.new_empty(()).expand(layer.shape), layer.ranks, layer.bases), None)
    layer.fell_back = found is None
    if ranks > 1 and any(layer.ranks):
        bases = tuple(None if basis is None else basis.clone(memory_format=torch.contiguous_format) for basis in bases)
        told = torch.full((), torch.nan, device=layer.core.device) if share is None else share.float()
        for tensor in (*bases, told):
            if tensor is not None:
                dist.broadcast(tensor, src=0)
        share = told
        if dist.get_rank() > 0:
            layer.fell_back = bool(told.isnan())
    layer.bases = bases
    layer.share = layer.share if layer.fell_back else share


def _decompose(layer: CoreLinear, svd: str, ranks: int) -> tuple[Bases, Tensor] | None:
    """On rank 0 the bases of the gradient and the share of its energy that they hold; None on the others."""
    G = layer.gradient.matrix()
    if ranks > 1:
        G = G.clone()
        dist.reduce(G, dst=0)
        if dist.get_rank() > 0:
            return None
    G = remove(G, *layer.removed_before_bases()) if layer.removed_before_bases() else G
    bases = matrix_bases(G, layer.ranks, svd)
    return bases, energy_share(project(G, *bases), G)


def _sketch(layer: CoreLinear, seed: int, ranks: int) -> tuple[Bases, Tensor]:
    """Bases from products with the gradient, which are summed over the ranks in its place, and their energy share."""
    S, side = layer.removed_before_bases() or (None, None)

    def clear(M: Tensor, its_side: str) -> Tensor:
        return remove(M, S, "output") if side == its_side else M

    def summed(M: Tensor) -> Tensor:
        M = M.contiguous()
        if ranks > 1:
            dist.all_reduce(M)
        return M

    def times(M: Tensor) -> Tensor:
        return clear(summed(layer.gradient.times(clear(M, "input"))), "output")

    def transposed_times(M: Tensor) -> Tensor:
        return clear(summed(layer.gradient.transposed_times(clear(M, "output"))), "input")

    return sketched_bases(times, transposed_times, layer.shape, layer.ranks, layer.bases, seed, layer.core.device)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
