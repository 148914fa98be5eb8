"""Steps with a loss or gradient that is not finite change nothing and are logged; several in a row end the run."""

import logging
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from errors import RunStopped

logger = logging.getLogger("gorp")

EXAMPLES_NAMED = 16


class NonFiniteGuard:
    """Keeps NaN and infinity out of the weights during one task.

    Right before the optimizer steps, all ranks agree on whether one has seen a loss or gradient that is not
    finite. If so, every gradient becomes None, so that the optimizer leaves parameters, moments and counts as they
    are. This reads one value per step from the device, and works for each slice that a ZeRO optimizer updates.

    Args:
        limit: number of non-finite steps in a row that ends the run.
        watch_gradients: false with fp16, where an infinite gradient is the loss scaler's normal signal.
    """

    def __init__(self, limit: int, *, watch_gradients: bool = True):
        self.limit, self.watch_gradients = limit, watch_gradients
        self.in_a_row = 0
        self._step = 0
        self._micro_batches: list[tuple[Tensor, list[str]]] = []
        self._gradients_bad: list[Tensor] = []
        self._skips: bool | None = None  # None until decided
        self._loss_is_bad = False  # on some rank

    def watch(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter] = ()) -> None:
        """Guard the steps of `optimizer`.

        Where the gradients' norm is known only after the step, as under DeepSpeed, pass the `parameters`: their
        gradients are then checked in the backward pass, and set to zero if they are not finite.
        """
        optimizer.register_step_pre_hook(self._before_step)
        for parameter in parameters if self.watch_gradients else ():
            parameter.register_hook(self._checked)

    def note_micro_batch(self, step: int, loss: Tensor, examples: list[str]) -> None:
        """Note a micro-batch's loss and the names of its examples; `step` counts from 1."""
        if step != self._step:
            self._step, self._micro_batches, self._gradients_bad, self._skips = step, [], [], None
        self._micro_batches.append((loss.detach(), examples))

    def note_gradient_norm(self, norm: Tensor | float) -> None:
        """Note the norm of the step's gradients, a scalar: the step is skipped if it is watched and not finite."""
        if self.watch_gradients:
            self._gradients_bad.append(~torch.as_tensor(norm).isfinite())

    def skips_step(self) -> bool:
        """Whether the step of the noted micro-batches is skipped (RunStopped after `limit` in a row); collective."""
        if self._skips is None and self._micro_batches:
            self._skips = self._is_bad()
            self.in_a_row = self.in_a_row + 1 if self._skips else 0
            if self._skips:
                self._report()
        return bool(self._skips)

    def _checked(self, gradient: Tensor) -> Tensor:
        if self._skips is not None:  # not of a step: a method's own pass after training
            return gradient
        finite = gradient.isfinite().all()  # stays on the device
        self._gradients_bad.append(~finite)
        return torch.where(finite, gradient, torch.zeros_like(gradient))

    def _before_step(self, optimizer: Optimizer, *_) -> None:
        if self.skips_step():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _is_bad(self) -> bool:
        losses = torch.stack([loss.float() for loss, _ in self._micro_batches])
        lost = ~losses.isfinite().all()
        bad = torch.stack([lost, *(flag.to(losses.device) for flag in self._gradients_bad)]).any()
        worst = lost.float() + bad.float()  # 2 for a loss, which is bad too, 1 for a gradient
        if dist.is_initialized():
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        found = worst.item()
        self._loss_is_bad = found == 2
        return found > 0

    def _report(self) -> None:
        lost = [(loss, examples) for loss, examples in self._micro_batches if not loss.isfinite()]
        # A lost loss makes gradients bad, on other ranks too where they have been summed by now.
        here = lost or not self._loss_is_bad and any(self._gradients_bad)
        what = f"loss is {lost[0][0].item()}" if lost else (
            "loss is not finite" if self._loss_is_bad else "gradient is not finite")  # fmt: skip
        named = [example for _, names in lost or self._micro_batches for example in names][:EXAMPLES_NAMED]
        examples = f"; examples: {', '.join(named)}" if here else "; found on another rank"
        if self.in_a_row >= self.limit:
            raise RunStopped(f"step {self._step}: {what}, the last of {self.in_a_row} such steps in a row "
                             f"(--max_non_finite_steps){examples}; these steps changed no weights, and the last "
                             "checkpoint is kept")
        logger.warning("step %d: %s, the update is skipped%s", self._step, what, examples)
