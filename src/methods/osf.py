"""OSF (Nayak et al., 2025, "Sculpting Subspaces"): orthogonal subspace fine-tuning, as PEFT ships it.

`peft.OSFConfig` splits each weight by its SVD. The leading `effective_rank` directions stay, the others train, with
gradients kept orthogonal to the leading ones. PEFT's guide computes a new SVD between tasks and preserves more each
time. Its example calls `unload`, which in this PEFT drops what was trained, so here the change is merged first.
The weights are those that `--optim_target_modules` names, and `--learning_rate` is theirs.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from peft import OSFConfig, get_peft_model
from transformers.hf_argparser import HfArg

from errors import InputError, check
from files import read_json, write_json
from loranew.adapter import CONFIG_FILE
from methods.base import FullRankMethod
from methods.base_options import TargetArguments

MOST_PRESERVED = 0.95


@dataclass
class OsfArguments(TargetArguments):
    osf_preserved: float = HfArg(
        default=0.5, help="Share of a weight's singular directions that the first task preserves."
    )
    osf_growth: float = HfArg(
        default=0.1, help="Share that each later task preserves beyond those; at most 0.95 in total."
    )

    def __post_init__(self):
        super().__post_init__()
        check(0 < self.osf_preserved < 1, "osf_preserved", self.osf_preserved, "above 0 and below 1")
        check(0 <= self.osf_growth < 1, "osf_growth", self.osf_growth, "0 up to, not including, 1")


class Osf(FullRankMethod):
    Arguments = OsfArguments

    def prepare(self, model, previous: Path | None, *, decoder_only, sharded=False):
        model = super().prepare(model, previous, decoder_only=decoder_only)
        self.finished = 0 if previous is None else read_json(previous / CONFIG_FILE).get("osf_tasks", 0)
        self.share = self._preserved_share()
        for name, layer in self.targets.items():
            if self.share * min(layer.weight.shape) < 1:
                raise InputError(f"--osf_preserved: found {self.share}, less than one direction of {name}; allowed: "
                                 f"at least 1/{min(layer.weight.shape)}")
        modules = "|".join(map(re.escape, self.targets))
        self.model = get_peft_model(model, OSFConfig(effective_rank=self.share, target_modules=f"({modules})"))
        return self.model

    def _preserved_share(self) -> float:
        """The share of every weight's singular directions to preserve; grows with the finished tasks."""
        first = self.options.osf_preserved
        return max(first, min(MOST_PRESERVED, first + self.finished * self.options.osf_growth))

    def end_task(self) -> None:
        """Merge the change into the weights; the next task computes a new SVD of them."""
        self.model.merge_adapter()
        self.finished += 1

    def save(self, folder: Path) -> None:
        super().save(folder)
        path = folder / CONFIG_FILE
        write_json(path, read_json(path) | {"osf_tasks": self.finished})

    def describe(self) -> str:
        return f"{super().describe()}, the leading {self.share:.0%} of each one's singular directions preserved"
