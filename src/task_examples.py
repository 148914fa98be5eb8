"""The training examples of an order's tasks, as a method may read them, and limits on numbers of examples."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset

from errors import InputError
from order_config import OrderStep, read_order


class OrderExamples:
    """The order of a task, and the training examples of each of its tasks, read on demand.

    Args:
        config_dir: the task's folder; its parent is the order's.
        read: returns the training examples of a task's folder, limited as for its own training.
        seed: for everything drawn from the examples.
        fixed_steps: whether the number of optimizer steps is given, whatever the number of examples.
        reads: the `Method.reads` that allows `earlier` and `all`; what they read is part of the run's record.
    """

    def __init__(
        self, config_dir: str | Path, read: Callable[[Path], Dataset], *, seed: int, fixed_steps: bool, reads: str
    ):
        self.config_dir = Path(config_dir)
        self.seed = seed
        self.fixed_steps = fixed_steps
        self._read, self._reads = read, reads

    def steps(self) -> list[OrderStep]:
        """The order's tasks, first to last; InputError if the task's folder is not one of them."""
        steps = read_order(self.config_dir.parent)
        if self.config_dir.name not in [step.folder.name for step in steps]:
            raise InputError(f"--task_config_dir: {self.config_dir} is not a step of {self.config_dir.parent}")
        return steps

    def index(self) -> int:
        """The index of this task, from 0."""
        return [step.folder.name for step in self.steps()].index(self.config_dir.name)

    def earlier(self) -> list[Dataset]:
        """The training examples of each task before this one, for a method that `reads` "earlier" or "all"."""
        return self._of("earlier", self.steps()[: self.index()])

    def all(self) -> list[Dataset]:
        """The training examples of each task of the order, for a method that `reads` "all"."""
        return self._of("all", self.steps())

    def _of(self, which: str, steps: list[OrderStep]) -> list[Dataset]:
        assert self._reads in (which, "all"), f"Method.reads is {self._reads!r}"
        return [self._read(step.folder) for step in steps]


def place_in_order(config_dir: str | Path) -> tuple[int, list[str]]:
    """The index of a task in its order, from 0, and the order's datasets; a folder outside an order counts as an order
    of its own."""
    config_dir = Path(config_dir)
    try:
        names = [step.dataset for step in read_order(config_dir.parent)]
        return names.index(config_dir.name), names
    except (InputError, ValueError):
        return 0, [config_dir.name]


def first_examples(examples: Dataset, limit: int | None) -> Dataset:
    """The first `limit` examples."""
    return examples if limit is None else examples.select(range(min(limit, len(examples))))


def sample_places(count: int, limit: int | None) -> Sequence[int]:
    """The places of at most `limit` of `count` examples, always the same ones; a random sample, because a file may be
    sorted by label."""
    return range(count) if limit is None or limit >= count else sorted(random.Random(0).sample(range(count), limit))


def first_examples_of_each(examples: Dataset, limit: int | None) -> Dataset:
    """The first `limit` examples of each dataset, so that a limit drops no earlier task."""
    if limit is None:
        return examples
    places: dict[str, list[int]] = {}
    for place, dataset in enumerate(examples["Dataset"]):
        places.setdefault(dataset, []).append(place)
    return examples.select(sorted(place for own in places.values() for place in own[:limit]))
