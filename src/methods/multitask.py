"""Multi-task training: all tasks of the order at once, the ceiling for what training them in sequence could reach.

The order's first step trains one LoRA on the examples of all T tasks, shuffled together, with equal steps per task: T
times `--max_steps`, every task's examples repeated up to the largest task's number. Without `--max_steps` each example
counts once per epoch, and a task gets the steps that it would have had alone (`--task_epochs` is ignored). The later
steps train nothing: they copy the first one's folder and evaluate, so that the same scripts and the same report can be
used.
"""

from datasets import concatenate_datasets

from errors import InputError
from methods.seqlora import Seqlora


class Multitask(Seqlora):
    zero_stage = None  # DeepSpeed only evaluates what it has trained, and the later steps train nothing
    reads = "all"
    is_first = True

    def training_examples(self, own, order):
        self.is_first = order.index() == 0
        if not self.is_first:
            return own.select(range(0))
        tasks = order.all()
        self.step_factor = len(tasks)
        if order.fixed_steps:
            largest = max(map(len, tasks))
            tasks = [rows.select([index % len(rows) for index in range(largest)]) for rows in tasks]
        return concatenate_datasets(tasks)

    def prepare(self, model, previous, *, decoder_only, sharded=False):
        if not self.is_first and previous is None:
            raise InputError("--model_name_or_path: found a base model; multitask continues from its first step's "
                             "folder")
        return super().prepare(model, previous, decoder_only=decoder_only, sharded=sharded)
