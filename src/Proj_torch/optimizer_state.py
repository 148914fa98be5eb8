"""A parameter's float32 values and its Adam moments, wherever the optimizer keeps them.

In one process and under DistributedDataParallel they are the parameter itself and `optimizer.state[parameter]`.
DeepSpeed's stages 1 to 3 flatten the parameters of a group and give each rank a slice of the result. Only DeepSpeed's
public calls are used. Every function and method is collective: all ranks call it, in the same order.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_state_of(optimizer: Optimizer, deepspeed: Any) -> "LocalState | ZeroState":
    """Access to the state of the `torch.optim.AdamW` that steps, with or without DeepSpeed's engine."""
    sharded = deepspeed is not None and deepspeed.zero_optimization_stage() > 0
    return ZeroState(optimizer, deepspeed) if sharded else LocalState(optimizer, deepspeed)


def read_parameters(state: "LocalState | ZeroState", params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Float32 values and moments of parameters, by name, on the CPU, as `write_parameters` takes them."""
    saved = {}
    for name, param in params.items():
        saved[name] = state.read_master(param)
        saved |= {f"{name}.{key}": state.read_moment(param, key) for key in MOMENTS}
    return {name: value.to("cpu", copy=True).contiguous() for name, value in saved.items()}


def write_parameters(
    state: "LocalState | ZeroState", params: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor], step: int
) -> None:
    """Resume with the values and moments that `read_parameters` returned after `step` steps.

    Raises InputError, before anything changes, where a tensor is missing or of another shape.
    """
    for name, param in params.items():
        shape = tuple(getattr(param, "ds_shape", param.shape))  # stage 3 leaves an empty tensor in its place
        for key in (name, *(f"{name}.{moment}" for moment in MOMENTS)):
            found = tuple(saved[key].shape) if key in saved else "nothing"
            if found != shape:
                raise InputError(f"{key}: found {found}; allowed: {shape}")
    for name, param in params.items():
        state.write_master(param, saved[name].to(param.device))
    moments = {param: {key: saved[f"{name}.{key}"].to(param.device) for key in MOMENTS}
               for name, param in params.items()}  # fmt: skip
    if params and (step or steps_taken(state.optimizer)):  # a step that only made the state must not count
        state.write_moments(moments, step)


def steps_taken(optimizer: Optimizer) -> int:
    """Steps that Adam's bias correction has counted, without skipped ones."""
    return max((int(state["step"]) for state in optimizer.state.values() if state), default=0)


class LocalState:
    """Every rank has the complete optimizer state: plain PyTorch, and DeepSpeed's stage 0.

    At stage 0 DeepSpeed keeps float32 copies of 16-bit parameters, without public access where it fuses them.
    """

    def __init__(self, optimizer: Optimizer, deepspeed: Any):
        self.optimizer = optimizer
        self._masters = {}
        if deepspeed is not None and deepspeed.optimizer is not optimizer:
            if not hasattr(deepspeed.optimizer, "fp32_groups"):
                raise InputError("DeepSpeed stage 0: 16-bit training with a fused optimizer; allowed: stages 1 to 3")
            for copies, masters in zip(deepspeed.optimizer.fp16_groups, deepspeed.optimizer.fp32_groups, strict=True):
                self._masters.update(zip(copies, masters, strict=True))
            if deepspeed.global_steps == 0:  # DeepSpeed makes this state in an empty step, which must not count
                for state in optimizer.state.values():
                    state["step"].zero_()

    def gathered(self, params: list[nn.Parameter]) -> contextlib.AbstractContextManager:
        """Inside the block `params` are complete: they can be read, and written if all ranks write the same."""
        return contextlib.nullcontext()

    def read_master(self, param: nn.Parameter) -> Tensor:
        """The float32 values (the parameter's shape) that the optimizer updates."""
        return self._masters.get(param, param).detach().float()

    @torch.no_grad()
    def write_master(self, param: nn.Parameter, value: Tensor) -> None:
        """Set the float32 values and the working copy in the model to `value` (the parameter's shape)."""
        self._masters.get(param, param).copy_(value)
        param.copy_(value)

    def read_moment(self, param: nn.Parameter, key: str) -> Tensor:
        """`exp_avg` or `exp_avg_sq` (the parameter's shape), zeros before the first step."""
        master = self._masters.get(param, param)
        moment = self.optimizer.state.get(master, {}).get(key)
        return torch.zeros_like(master, dtype=torch.float32) if moment is None else moment.detach().float()

    def write_moments(self, moments: Mapping[nn.Parameter, dict[str, Tensor]], step: int) -> None:
        """Set `MOMENTS` of these parameters and the number of steps that Adam's bias correction counts from."""
        for param, values in moments.items():
            master = self._masters.get(param, param)
            state = {key: value.to(master.device, torch.float32, copy=True) for key, value in values.items()}
            self.optimizer.state[master] = {"step": torch.tensor(float(step)), **state}


class ZeroState:
    """Each rank has a slice of the optimizer state: ZeRO stages 1, 2 and 3. Its methods are those of `LocalState`."""

    def __init__(self, optimizer: Optimizer, deepspeed: Any):
        from deepspeed import utils, zero  # slow to import, so only when it trains

        self.optimizer, self._zero, self._utils = optimizer, zero, utils
        self._partitioned = deepspeed.zero_optimization_stage() == 3
        if not self._partitioned:
            self._create_moments()

    def _create_moments(self) -> None:
        """Zero moments, as AdamW makes them itself in its first step.

        At stages 1 and 2 DeepSpeed 0.19.8 steps one group after another and makes the moments of all groups
        accessible after the first, when the others have none; theirs would then stay out of reach.
        """
        for slice_ in (p for group in self.optimizer.param_groups for p in group["params"]):
            if not self.optimizer.state[slice_]:
                step = torch.tensor(0.0) if isinstance(self.optimizer, torch.optim.Adam) else 0  # each class's own form
                self.optimizer.state[slice_] = {"step": step, **{key: torch.zeros_like(slice_) for key in MOMENTS}}

    def gathered(self, params: list[nn.Parameter]) -> contextlib.AbstractContextManager:
        return self._zero.GatheredParameters(params, modifier_rank=0)

    def read_master(self, param: nn.Parameter) -> Tensor:
        return self._utils.safe_get_full_fp32_param(param).detach().float().clone()

    @torch.no_grad()
    def write_master(self, param: nn.Parameter, value: Tensor) -> None:
        if self._partitioned:
            slice_ = self._utils.safe_get_local_fp32_param(param)
            self._utils.safe_set_local_fp32_param(param, _own_slice(value, slice_))
        else:
            self._utils.safe_set_full_fp32_param(param, value.contiguous())
        with self.gathered([param]):
            param.copy_(value)

    def read_moment(self, param: nn.Parameter, key: str) -> Tensor:
        if not steps_taken(self.optimizer):
            return torch.zeros_like(self.read_master(param))
        return self._utils.safe_get_full_optimizer_state(param, key).detach().float().clone()

    def write_moments(self, moments: Mapping[nn.Parameter, dict[str, Tensor]], step: int) -> None:
        """For all parameters at once, as they share one step count; after `start_moments`."""
        for param, values in moments.items():
            for key, value in values.items():
                if self._partitioned:
                    slice_ = self._utils.safe_get_local_optimizer_state(param, key)
                    self._utils.safe_set_local_optimizer_state(param, _own_slice(value, slice_), key)
                else:
                    self._utils.safe_set_full_optimizer_state(param, value.contiguous(), key)
        for state in self.optimizer.state.values():
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step


def _own_slice(value: Tensor, like: Tensor) -> Tensor:
    """This rank's slice of `value`, flattened and padded so that every rank's slice has the size of `like`."""
    flat = value.flatten().to(like)
    padding = like.numel() * torch.distributed.get_world_size() - flat.numel()
    start = like.numel() * torch.distributed.get_rank()
    return nn.functional.pad(flat, (0, padding))[start : start + like.numel()]


def start_moments(deepspeed: Any, optimizer: Optimizer, loss: Callable[[], Tensor]) -> None:
    """Make DeepSpeed create its optimizer state, all zero, without changing a weight.

    ZeRO creates the moments in its first step, and only then can they be set; this is that step, with zero gradients
    and a learning rate of zero. It counts in DeepSpeed's own step and schedule, which the caller sets afterwards.
    `loss` computes the loss of a micro-batch through `deepspeed`, its engine.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(deepspeed.gradient_accumulation_steps()):
        deepspeed.backward(loss() * 0.0)
        deepspeed.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
