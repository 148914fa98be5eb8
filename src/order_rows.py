"""The training rows of an order's other steps, for methods that look beyond their own task."""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from errors import InputError
from order_config import OrderStep, read_order


class OrderRows:
    """The steps of the order around one step, and the rows that each of them trains on, read when they are asked for.

    Args:
        config_dir: the step's folder; its parent is the order's.
        read: from a step's folder to its training rows, cut as the step's own training cuts them.
        seed: of everything that is drawn from the rows.
        fixed_steps: whether the number of optimizer steps is given, whatever the number of rows.
    """

    def __init__(self, config_dir: str | Path, read: Callable[[Path], Dataset], *, seed: int, fixed_steps: bool):
        self.config_dir = Path(config_dir)
        self.seed = seed
        self.fixed_steps = fixed_steps
        self._read = read

    def steps(self) -> list[OrderStep]:
        """The order's steps, first to last.

        Raises:
            InputError: the step's folder is not part of an order.
        """
        steps = read_order(self.config_dir.parent)
        if self.config_dir.name not in [step.folder.name for step in steps]:
            raise InputError(f"--task_config_dir: {self.config_dir} is no step of {self.config_dir.parent}")
        return steps

    def index(self) -> int:
        """Number of this step, from 0."""
        return [step.folder.name for step in self.steps()].index(self.config_dir.name)

    def earlier(self) -> list[Dataset]:
        """The training rows of each step before this one."""
        return [self._read(step.folder) for step in self.steps()[: self.index()]]

    def all(self) -> list[Dataset]:
        """The training rows of each step of the order."""
        return [self._read(step.folder) for step in self.steps()]
