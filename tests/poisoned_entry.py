"""The entry, but the second rank's loss is NaN at some steps, which must change no LoRA factor; `test_resume.py` runs
it under DeepSpeed."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

import run_uie_lora
import task_setup
from uie_trainer_lora import UIETrainer

BAD_STEPS = (2, 4, 5, 6)


class Poisoned(UIETrainer):
    def answer_loss(self, *args):
        loss, outputs = super().answer_loss(*args)
        bad = os.environ["RANK"] == "1" and self.state.global_step + 1 in BAD_STEPS
        return (loss * float("nan") if bad else loss), outputs

    def training_step(self, *args):
        factors = [factor for name, factor in self.model.named_parameters() if ".loranew_" in name]
        before = [factor.detach().clone() for factor in factors]
        loss = super().training_step(*args)
        same = all(torch.equal(*pair) for pair in zip(before, factors, strict=True))
        if same is not (self.state.global_step + 1 in BAD_STEPS):
            raise RuntimeError(f"step {self.state.global_step + 1}: the factors {'stay' if same else 'change'}")
        return loss


if __name__ == "__main__":
    task_setup.UIETrainer = Poisoned
    sys.exit(run_uie_lora.main())
