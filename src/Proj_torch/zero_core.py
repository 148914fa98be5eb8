"""Projected AdamW through small trainable cores, so that DeepSpeed ZeRO can shard it; exact, step by step.

ProjAdamW needs the gradient of a complete weight, and ZeRO hands an optimizer flat slices. But between two refreshes
the bases L and R are constant, and projecting the gradient, running Adam there and projecting back is the same as
training a small core C, zero at the refresh, in

    y = (d W + L C R^T) x,        dC = L^T (dL/dW) R,

with elementwise AdamW on C, whose result does not depend on how C is partitioned. What lives where:

* **Frozen, complete on every rank** (at stage 3 partitioned by DeepSpeed): the weight W. No gradient and no optimizer
  state of its size exist between refreshes.
* **Trained, sharded by ZeRO**: the cores and their moments, ordinary parameters of an ordinary AdamW.
* **The bases**, float32, complete on every rank. In a refresh step each rank's backward pass stores its share of the
  gradient in the layer, as the factors GY and X. After the last micro-batch the shares are summed over the ranks
  (`exact`, `lowrank`: the matrix, on rank 0, which sends the bases to the others; `sketch`: only thin products), and
  the core's gradient L^T G R is formed with the new bases, before ZeRO reduces it like any other. Earlier
  micro-batches give the core a zero gradient, so that the basis sees the complete batch. Only a layer that LayerDrop
  skips in the last micro-batch loses what it has collected.
* **The fold**: before the first micro-batch of a refresh step, W <- d W + L C R^T on every rank, C <- 0, d <- 1. The
  moments stay, as in published GaLore. A 16-bit W keeps its rounding error beside it, so small updates are not lost.
* **Weight decay** W <- (1 - lr wd) W is the number d of each layer, applied in the forward pass and in the fold; on C
  it is AdamW's own. GaLore's scale multiplies the learning rate, because the fold is linear: the core trains with
  lr * scale, and with wd / scale, so that lr wd is the same. eps acts on the gradient's own scale, as in ProjAdamW.

A step that the optimizer skips (all gradients None, or fp16 overflow) changes nothing, and its refresh is due again.

A protected space S acts as in ProjAdamW. As `gp_first` it is removed from the core's gradient; as `orthogonal` also
from the gradient that the bases are taken from, and from L C R^T in the forward pass and in the fold. `gp_second` would
have to change Adam's moment within its step, which works on ZeRO's slices: only ProjAdamW has it.

Clipping: the core's gradient enters the norm that DeepSpeed or `clip_grad_norm_` clips, not the full gradient.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from Proj_torch.core_linear import CoreLinear, EffectiveWeight
from Proj_torch.layer_gradient import sketched_bases
from Proj_torch.optimizer_state import optimizer_state_of, read_parameters, write_parameters
from Proj_torch.plan import Plan
from Proj_torch.proj_projector import Bases, back_factors, kept_bases, matrix_bases, mode_ranks, project, remove
from Proj_torch.svd import energy_share, warn_once

CORE_GROUP = "projected_cores"  # key that marks the cores' optimizer group
BASES = ("left", "right")
COUNTS = ("decay", "refreshes", "fell_back", "share")  # a layer's numbers in a checkpoint


class CoreEngine:
    """Trains linear layers of a model through low-rank gradient projection, in one process or many.

    Its methods and attributes are those of every engine (`engine.py`); all but the constructor are collective.
    `CoreLinear` layers replace the plan's targets in the model, and a hook removes S from a factor's gradient before it
    is reduced. The plan's `svd` is "exact", "lowrank" (randomised SVD of the summed gradient) or "sketch" (no gradient
    is summed). Raises InputError where a rank does not fit a target.
    """

    name = "trainable cores, AdamW"
    own_state = True

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self.plan = model, plan
        self.gap, self.scale = plan.projection["update_proj_gap"], plan.projection["scale"]
        self.spaces = {name: S.detach().float() for name, S in plan.spaces.items()}
        self.layers: dict[str, CoreLinear] = {}
        for index, (name, linear) in enumerate(plan.targets.items()):
            ranks = mode_ranks(linear.weight.shape, plan.projection["rank"], plan.projection["proj_type"])
            layer = CoreLinear(linear, ranks, self.spaces.get(name), plan.side, plan.way == "orthogonal")
            layer.core.register_hook(lambda grad, layer=layer, index=index: self._on_core_gradient(layer, index, grad))
            model.set_submodule(name, layer)
            self.layers[name] = layer
        for name in plan.factors.keys() & self.spaces.keys():
            plan.factors[name].register_hook(
                lambda grad, name=name: remove(grad, self.spaces[name], plan.side).to(grad.dtype)
            )
        self.step = 0  # optimizer steps taken
        self._is_last = True  # whether the current micro-batch (between steps, the previous one) ends its step
        self._open = False  # whether that step has yet to be taken

    def create_optimizer(self, factors: Mapping[str, nn.Parameter], **adam: Any) -> torch.optim.AdamW:
        """AdamW of the cores and of LoRA factors."""
        return torch.optim.AdamW([{"params": list(factors.values())}, *self.core_groups(adam["weight_decay"])], **adam)

    def core_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The cores' group for `torch.optim.AdamW`, if there are cores; `weight_decay` is that of the weights."""
        group = {"lr": self.plan.projection["lr"] * self.scale, "weight_decay": weight_decay / self.scale}
        return [{"params": list(self._cores().values()), CORE_GROUP: True} | group] if self.layers else []

    def begin_training(self, optimizer: Optimizer, deepspeed: Any = None) -> None:
        """Follow the AdamW that holds `core_groups`, itself and not a wrapper; once, before the first micro-batch.

        It must not be `fused` where a torch GradScaler skips steps: a skipped step then looks like one that was taken.
        """
        self.optimizer_state = optimizer_state_of(optimizer, deepspeed)
        optimizer.register_step_post_hook(self._on_step)
        for name, S in self.spaces.items():
            if name in self.layers:
                self.layers[name].space = S.to(self.layers[name].core.device)
            elif name in self.plan.factors:
                self.spaces[name] = S.to(self.plan.factors[name].device)

    def _cores(self) -> dict[str, nn.Parameter]:
        return {f"{name}.core": layer.core for name, layer in self.layers.items()}

    # ---------------------------------------------------------------------------------- training

    def begin_micro_batch(self, is_last: bool = True) -> None:
        """Settle the last step before a new one; where bases are due, fold the core (out or k, in or l) into W."""
        if self._is_last:
            self._settle()
            self._open = True
            for layer in self.layers.values():
                if layer.fell_back or self.step % self.gap == 0:
                    self._fold(layer)
                    layer.prepare_refresh()
        self._is_last = is_last

    @torch.no_grad()
    def finish(self, partitioned: bool = False) -> None:
        """Fold the cores, and put plain linear layers into the model again unless stage 3 has it `partitioned`."""
        self._settle()
        for name, layer in self.layers.items():
            self._fold(layer)
            self.plan.targets[name].register_buffer("rounding", layer.rounding, persistent=False)
            if not partitioned:
                self.model.set_submodule(name, self.plan.targets[name])

    def _fold(self, layer: CoreLinear) -> None:
        """Fold the layer's core into its weight."""
        core = self.optimizer_state.read_master(layer.core)
        with self.optimizer_state.gathered([layer.weight]):
            layer.fold(core)
        self.optimizer_state.write_master(layer.core, torch.zeros_like(core))

    def _settle(self) -> None:
        """If the last step was skipped, return to the bases before it."""
        if self._open:
            for layer in self.layers.values():
                layer.close_refresh(taken=False)
            self._open = False

    def _on_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Called after the optimizer's step, which ZeRO takes once per group or slice, and not at all on overflow."""
        for group in optimizer.param_groups:
            if self._open and group.get(CORE_GROUP) and any(slice_.grad is not None for slice_ in group["params"]):
                self._open = False
                self.step += 1
                for layer in self.layers.values():
                    layer.decay *= 1 - group["lr"] * group["weight_decay"]
                    layer.close_refresh(taken=True)

    @torch.no_grad()
    def _on_core_gradient(self, layer: CoreLinear, index: int, grad: Tensor) -> Tensor:
        """The core's gradient, once every use of the layer in this backward pass has been summed."""
        if layer.gradient is None or not self._is_last:
            return grad
        _refresh(layer, self.plan.projection["svd"], seed=index + len(self.layers) * self.step)
        left, right, space = layer.factors(layer.space, torch.float32)
        core_gradient = remove(layer.gradient.projected(left, right), space, layer.side)
        layer.gradient.clear()  # before backward reaches the next layer, so that one at a time is in memory
        return core_gradient.to(grad.dtype)

    # ------------------------------------------------------------------------------- after the last step

    def first_moments(self) -> dict[str, tuple[Tensor, ...]]:
        """Those of the factors, and of the targets projected back with the current bases, without `scale`; float32."""
        self._settle()
        read = self.optimizer_state.read_moment
        moments = {name: (read(factor, "exp_avg"),) for name, factor in self.plan.factors.items()}
        for name, layer in self.layers.items():
            moment, bases = read(layer.core, "exp_avg"), layer.bases
            zero = (moment.new_zeros(layer.shape),)  # before the first step
            moments[name] = back_factors(moment, *bases, layer.from_update(), layer.side) if bases else zero
        return moments

    def effective_weights(self) -> Iterator[tuple[str, Tensor]]:
        """By name, (out, in), differentiable; not at ZeRO stage 3, where no rank has a complete weight."""
        for name, layer in self.layers.items():
            yield name, EffectiveWeight.apply(layer.core, layer)

    def report(self) -> dict[str, dict[str, float]]:
        """By name: optimizer steps, refreshes, and the share of the gradient's energy that the last bases held."""
        return {name: {"steps": self.step, "refreshes": layer.refreshes, "energy": float(layer.share)}
                for name, layer in self.layers.items()}  # fmt: skip

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The engine's state as CPU tensors, the same for any number of ranks."""
        self._settle()
        state = {"step": torch.tensor(self.step)} | read_parameters(self.optimizer_state, self._cores())
        for name, layer in self.layers.items():
            with self.optimizer_state.gathered([layer.weight]):
                state[f"{name}.weight"] = layer.weight.detach().to("cpu", copy=True)
            kept = dict(zip(BASES, layer.bases or (), strict=False)) | {"rounding": layer.rounding}
            state |= {f"{name}.{key}": value.cpu().contiguous() for key, value in kept.items() if value is not None}
            state[f"{name}.counts"] = torch.tensor([float(getattr(layer, key)) for key in COUNTS], dtype=torch.float64)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume where `state_dict` was taken, after `begin_training`; raises InputError as `write_parameters` does."""
        self.step = int(state["step"])
        write_parameters(self.optimizer_state, self._cores(), state, self.step)
        for name, layer in self.layers.items():
            with self.optimizer_state.gathered([layer.weight]):
                layer.weight.copy_(state[f"{name}.weight"])
            layer.decay, refreshes, fell_back, layer.share = state[f"{name}.counts"].tolist()
            layer.refreshes, layer.fell_back = int(refreshes), bool(fell_back)
            kept = {key: state[f"{name}.{key}"].to(layer.core.device) for key in (*BASES, "rounding")
                    if f"{name}.{key}" in state}  # fmt: skip
            found = tuple(map(kept.get, BASES))
            layer.bases = found if layer.refreshes or found != (None, None) else None
            layer.rounding = kept.get("rounding")
        self._is_last, self._open = True, False


# -------------------------------------------------------------------------------------------- refresh


def _refresh(layer: CoreLinear, svd: str, seed: int) -> None:
    """Give `layer` the bases of its gradient summed over the ranks; rank 0 decides and sends them to the others.

    Where it has none, as when it is zero, the previous bases stay, and the share that is sent is NaN.
    """
    if not any(layer.ranks):  # full rank: plain AdamW
        layer.bases, layer.share, layer.fell_back = (None, None), 1.0, False
        return
    ranks, found = dist.get_world_size() if dist.is_initialized() else 1, None
    try:
        found = _sketch(layer, seed, ranks) if svd == "sketch" else _decompose(layer, svd, ranks)
    except torch.linalg.LinAlgError as error:
        warn_once(f"{error}; the previous basis stays")
    kept = kept_bases(layer.core.new_empty(()).expand(layer.shape), layer.ranks, layer.bases)
    bases, share = found or (kept, layer.core.new_full((), torch.nan))
    layer.fell_back = found is None
    if ranks > 1:
        share = share.float()
        bases = tuple(None if basis is None else basis.clone(memory_format=torch.contiguous_format) for basis in bases)
        for tensor in (*bases, share):
            if tensor is not None:
                dist.broadcast(tensor, src=0)
        if dist.get_rank() > 0:
            layer.fell_back = bool(share.isnan())
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
    G = remove(G, layer.space if layer.orthogonal else None, layer.side)
    bases = matrix_bases(G, layer.ranks, svd)
    return bases, energy_share(project(G, *bases), G)


def _sketch(layer: CoreLinear, seed: int, ranks: int) -> tuple[Bases, Tensor]:
    """Bases from products with the gradient, which are summed over the ranks in its place, and their energy share."""

    def clear(M: Tensor, side: str) -> Tensor:
        return remove(M, layer.space, "output") if layer.orthogonal and layer.side == side else M

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
