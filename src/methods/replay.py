"""Experience replay: one LoRA trained through all tasks, on each task's examples and a buffer of earlier ones.

The buffer holds `--replay_rows` of each earlier task's training examples, or all if it had fewer. They are drawn
without replacement by the run's seed and the task's place in the order, so every later task gets the same ones. They
are mixed with the task's own examples, each once per epoch. The number of optimizer steps stays `--max_steps`, so a
step on an old example is one step less on a new one.
"""

import random
from dataclasses import dataclass

from datasets import concatenate_datasets
from transformers.hf_argparser import HfArg

from errors import check
from methods.base_options import LoraArguments
from methods.seqlora import Seqlora


@dataclass
class ReplayArguments(LoraArguments):
    replay_rows: int = HfArg(default=16, help="Examples of each earlier task in the buffer.")

    def __post_init__(self):
        super().__post_init__()
        check(self.replay_rows > 0, "replay_rows", self.replay_rows, "a number above 0")


class Replay(Seqlora):
    Arguments = ReplayArguments
    reads = "earlier"

    def training_examples(self, own, order):
        buffers = [self._draw(rows, f"{order.seed}/replay/{place}") for place, rows in enumerate(order.earlier())]
        return concatenate_datasets([own, *buffers])

    def _draw(self, rows, seed: str):
        count = min(self.options.replay_rows, len(rows))
        return rows.select(sorted(random.Random(seed).sample(range(len(rows)), count)))
