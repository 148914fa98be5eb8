"""Steps with a loss or gradient that is not finite are skipped and logged; several in a row end the run."""

import logging

import torch
from torch import Tensor, nn

from errors import RunStopped

log = logging.getLogger("gorp")

EXAMPLES_NAMED = 16


class NonFiniteGuard:
    """Keeps NaN and infinity out of the weights during one task.

    In one process the complete step is skipped. Under DeepSpeed, where backward and step are one call, and with cores,
    whose backward pass computes bases, the rank's own gradients of that micro-batch are set to zero before they are
    reduced. With fp16 an infinite gradient is the loss scaler's normal signal, so only the loss is watched.

    Args:
        limit: number of non-finite steps in a row that ends the run.
        watch_gradients: whether gradients are checked too; false with fp16.
    """

    def __init__(self, limit: int, *, watch_gradients: bool = True):
        self.limit = limit
        self.watch_gradients = watch_gradients
        self.in_a_row = 0
        self._micro_batches: list[tuple[Tensor, list[str]]] = []
        self._gradients_bad: Tensor | None = None

    def clean_gradients(self, model: nn.Module) -> None:
        """Set each gradient that is not finite to zero before it is reduced."""
        if self.watch_gradients:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._cleaned)

    def _cleaned(self, gradient: Tensor) -> Tensor:
        finite = gradient.isfinite().all()  # stays on the device: no synchronisation
        bad = ~finite
        self._gradients_bad = bad if self._gradients_bad is None else self._gradients_bad | bad
        return torch.where(finite, gradient, torch.zeros_like(gradient))

    def note_micro_batch(self, loss: Tensor, examples: list[str]) -> None:
        """Note a micro-batch's loss and the names of its examples."""
        self._micro_batches.append((loss.detach(), examples))

    def end_of_step(self, step: int, gradient_norm: Tensor | float | None) -> bool:
        """Whether this step (counted from 1) may change the weights.

        Raises:
            RunStopped: it is the `limit`-th step in a row that may not.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        cleaned, self._gradients_bad = self._gradients_bad, None
        usable = not self.watch_gradients or gradient_norm is None or bool(torch.as_tensor(gradient_norm).isfinite())
        lost = [(loss, examples) for loss, examples in micro_batches if not loss.isfinite()]
        if usable and not lost and not (cleaned is not None and cleaned):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        what = f"loss is {lost[0][0].item()}" if lost else "gradient is not finite"
        examples = ", ".join([example for _, names in lost or micro_batches for example in names][:EXAMPLES_NAMED])
        if self.in_a_row >= self.limit:
            raise RunStopped(
                f"step {step}: {what}, the last of {self.in_a_row} such steps in a row (--max_non_finite_steps); "
                f"examples: {examples}; none of them changed the weights, and the last checkpoint is kept"
            )
        log.warning("step %d: %s, the update is skipped; examples: %s", step, what, examples)
        return usable
