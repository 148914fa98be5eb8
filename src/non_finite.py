"""Steps with a loss or gradient that is not finite: logged, without an effect, and some in a row end the run."""

import logging

import torch
from torch import Tensor, nn

from errors import RunStopped

log = logging.getLogger("gorp")

ROWS_NAMED = 16


class NonFiniteGuard:
    """Keeps NaN and infinity out of the weights during one task.

    In one process the complete step is skipped. Under DeepSpeed, where backward and step are one call, the rank's own
    gradients of that micro-batch are set to zero before they are reduced; likewise where backward already computes the
    next bases from them (`CoreEngine`). With fp16 the loss scaler skips steps itself, and an infinite gradient is its
    normal signal, so only the loss is watched.

    Args:
        limit: number of bad steps in a row that ends the run.
        watch_gradients: whether a gradient can make a step bad; false with fp16.
    """

    def __init__(self, limit: int, *, watch_gradients: bool = True):
        self.limit = limit
        self.watch_gradients = watch_gradients
        self.in_a_row = 0
        self._micro_batches: list[tuple[Tensor, list[str]]] = []
        self._gradients_bad: Tensor | None = None

    def clean_gradients(self, model: nn.Module) -> None:
        """Have each gradient that is not finite set to zero before it is reduced."""
        if self.watch_gradients:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._cleaned)

    def _cleaned(self, gradient: Tensor) -> Tensor:
        finite = gradient.isfinite().all()  # stays on the device: nothing waits for it here
        bad = ~finite
        self._gradients_bad = bad if self._gradients_bad is None else self._gradients_bad | bad
        return torch.where(finite, gradient, torch.zeros_like(gradient))

    def note_micro_batch(self, loss: Tensor, rows: list[str]) -> None:
        """Note a micro-batch's loss and the names of its examples."""
        self._micro_batches.append((loss.detach(), rows))

    def end_of_step(self, step: int, gradient_norm: Tensor | float | None) -> bool:
        """Whether this step (counted from 1) may change the weights.

        Raises:
            RunStopped: it is bad, and so were the `limit` - 1 before it.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        cleaned, self._gradients_bad = self._gradients_bad, None
        usable = not self.watch_gradients or gradient_norm is None or bool(torch.as_tensor(gradient_norm).isfinite())
        lost = [(loss, rows) for loss, rows in micro_batches if not loss.isfinite()]
        if usable and not lost and not (cleaned is not None and cleaned):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        what = f"loss is {lost[0][0].item()}" if lost else "gradient is not finite"
        rows = ", ".join([row for _, names in lost or micro_batches for row in names][:ROWS_NAMED])
        if self.in_a_row >= self.limit:
            raise RunStopped(
                f"step {step}: {what}, the {self.in_a_row} steps in a row that --max_non_finite_steps allows are used "
                f"up; rows: {rows}; no update of these steps entered the weights, the last checkpoint stays"
            )
        log.warning("step %d: %s, the update is skipped; rows: %s", step, what, rows)
        return usable
