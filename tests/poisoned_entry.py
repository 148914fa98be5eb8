"""The entry, but the second rank's loss is NaN at some steps; `test_resume.py` runs it under DeepSpeed."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import run_uie_lora
from uie_trainer_lora import UIETrainer

BAD_STEPS = (2, 4, 5, 6)


class Poisoned(UIETrainer):
    def answer_loss(self, *args):
        loss, outputs = super().answer_loss(*args)
        bad = os.environ["RANK"] == "1" and self.state.global_step + 1 in BAD_STEPS
        return (loss * float("nan") if bad else loss), outputs

    def _get_grad_norm(self, model, grad_norm=None):
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise RuntimeError("a parameter is not finite after the step")
        return super()._get_grad_norm(model, grad_norm)


if __name__ == "__main__":
    run_uie_lora.UIETrainer = Poisoned
    sys.exit(run_uie_lora.main())
