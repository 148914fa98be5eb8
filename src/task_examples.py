"""The training examples of an order's tasks as a method may read them, and the limits on examples."""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from errors import InputError
from order_config import OrderStep, read_order


class OrderExamples:
    """The tasks of the order around one task, and the examples that each of them trains on, read when asked for.

    Args:
        config_dir: the task's folder; its parent is the order's.
        read: from a task's folder to its training examples, cut as the task's own training cuts them.
        seed: of everything that is drawn from the examples.
        fixed_steps: whether the number of optimizer steps is given, whatever the number of examples.
    """

    def __init__(self, config_dir: str | Path, read: Callable[[Path], Dataset], *, seed: int, fixed_steps: bool):
        self.config_dir = Path(config_dir)
        self.seed = seed
        self.fixed_steps = fixed_steps
        self._read = read

    def steps(self) -> list[OrderStep]:
        """The order's tasks, first to last.

        Raises:
            InputError: the task's folder is not part of an order.
        """
        steps = read_order(self.config_dir.parent)
        if self.config_dir.name not in [step.folder.name for step in steps]:
            raise InputError(f"--task_config_dir: {self.config_dir} is no step of {self.config_dir.parent}")
        return steps

    def index(self) -> int:
        """Number of this task, from 0."""
        return [step.folder.name for step in self.steps()].index(self.config_dir.name)

    def earlier(self) -> list[Dataset]:
        """The training examples of each task before this one."""
        return [self._read(step.folder) for step in self.steps()[: self.index()]]

    def all(self) -> list[Dataset]:
        """The training examples of each task of the order."""
        return [self._read(step.folder) for step in self.steps()]


def first_examples(examples: Dataset, limit: int | None) -> Dataset:
    """At most `limit` examples, the first ones."""
    return examples if limit is None else examples.select(range(min(limit, len(examples))))


def first_examples_of_each(examples: Dataset, limit: int | None) -> Dataset:
    """At most `limit` examples of each dataset, the first ones: a limit must not drop complete tasks of the past."""
    if limit is None:
        return examples
    seen: dict[str, int] = {}
    kept = []
    for index, dataset in enumerate(examples["Dataset"]):
        seen[dataset] = seen.get(dataset, 0) + 1
        if seen[dataset] <= limit:
            kept.append(index)
    return examples.select(kept)
