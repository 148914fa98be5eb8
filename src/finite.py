"""Steps whose loss or gradient is not finite: they change nothing, are said, and after some in a row end the run."""

import logging

import torch
from torch import Tensor, nn

from errors import RunStopped

log = logging.getLogger("gorp")

ROWS_NAMED = 16


class FiniteSteps:
    """Watches the optimizer steps of one task.

    In one process the whole step is left out. Under DeepSpeed, where backward and step are one call, the rank's own
    gradients of that micro-batch are set to zero before they are reduced; so are they where backward already computes
    the next bases from them (`CoreEngine`). With fp16 the loss scaler of either already
    leaves steps out, and an infinite gradient is its normal signal, so only the loss is watched.

    Args:
        limit: bad steps in a row that end the run.
        watch_gradients: false with fp16.
    """

    def __init__(self, limit: int, *, watch_gradients: bool = True):
        self.limit = limit
        self.watch_gradients = watch_gradients
        self.in_a_row = 0
        self._micro_batches: list[tuple[Tensor, list[str]]] = []
        self._gradients_bad: Tensor | None = None

    def clean_gradients(self, model: nn.Module) -> None:
        """From now on, set each trainable parameter's gradient to zero before it is reduced where it is not finite."""
        if self.watch_gradients:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._cleaned)

    def _cleaned(self, gradient: Tensor) -> Tensor:
        finite = gradient.isfinite().all()  # stays on the device: nothing waits for it here
        bad = ~finite
        self._gradients_bad = bad if self._gradients_bad is None else self._gradients_bad | bad
        return torch.where(finite, gradient, torch.zeros_like(gradient))

    def saw_micro_batch(self, loss: Tensor, rows: list[str]) -> None:
        """Note a micro-batch's loss and what its rows are called."""
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
        log.warning("step %d: %s, the update is left out; rows: %s", step, what, rows)
        return usable
