"""The rows of one step of an order: what it trains and tests on, and what methods may read of the other steps."""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, DatasetDict

from arguments import DataArguments, UIETrainingArguments
from errors import InputError
from order_config import OrderStep, read_order
from uie_dataset_lora import load_uie_dataset


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


def load_rows(data_args: DataArguments, training_args: UIETrainingArguments, method) -> DatasetDict:
    """The step's examples, cut to the sample limits; every split that the run needs has rows.

    The training rows are those that the method chooses, and `--max_steps` becomes the number of steps that it takes.
    """
    rows = read_step(data_args.task_config_dir, data_args, training_args)
    needed = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    for split, is_needed in needed.items():
        if is_needed and len(rows[split]) == 0:
            raise InputError(f"--task_config_dir: {data_args.task_config_dir} has no dataset for {split}; one at least")
    rows["validation"] = first_rows(rows["validation"], data_args.max_eval_samples)
    rows["test"] = first_rows_of_each(rows["test"], data_args.max_predict_samples)
    order = OrderRows(
        data_args.task_config_dir,
        lambda folder: read_step(folder, data_args, training_args)["train"],
        seed=training_args.seed,
        fixed_steps=training_args.max_steps > 0,
    )
    if data_args.predict_tasks == "ends" and order.index() + 1 < len(order.steps()):
        own = order.steps()[order.index()].dataset
        rows["test"] = rows["test"].select([i for i, name in enumerate(rows["test"]["Dataset"]) if name == own])
    if data_args.zero_shot:
        waiting = {step.dataset for step in order.steps()[order.index() :]}
        rows["zero_shot"] = read_test_rows(order.steps()[-1].folder, waiting.__contains__, data_args, training_args)
    if data_args.unseen_config_dir:
        trained = {step.dataset for step in order.steps()}
        rows["unseen"] = read_test_rows(
            data_args.unseen_config_dir, lambda dataset: dataset not in trained, data_args, training_args
        )
        if len(rows["unseen"]) == 0:
            raise InputError(f"--unseen_config_dir: {data_args.unseen_config_dir} tests only what this order trains")
    if training_args.do_train:
        rows["train"] = method.training_rows(rows["train"], order)
        if training_args.max_steps > 0:
            training_args.max_steps *= method.step_factor
    return rows


def read_step(config_dir, data_args: DataArguments, training_args: UIETrainingArguments) -> DatasetDict:
    """The examples of the step of `config_dir`, its training rows cut to `--max_train_samples`."""
    rows = load_uie_dataset(
        task_config_dir=config_dir,
        overwrite_cache=data_args.overwrite_cache,
        **row_options(data_args, training_args),
    )
    rows["train"] = first_rows(rows["train"], data_args.max_train_samples)
    return rows


def read_test_rows(config_dir, wanted: Callable[[str], bool], data_args: DataArguments,
                   training_args: UIETrainingArguments) -> Dataset:
    """The test rows of the step of `config_dir`, of the datasets that are wanted, cut to `--max_predict_samples`."""
    rows = read_step(config_dir, data_args, training_args)["test"]
    rows = rows.select([index for index, dataset in enumerate(rows["Dataset"]) if wanted(dataset)])
    return first_rows_of_each(rows, data_args.max_predict_samples)


def row_options(data_args: DataArguments, training_args: UIETrainingArguments) -> dict:
    """What decides an example beside the step: the options that `load_uie_dataset` and `read_examples` share."""
    return {
        "data_dir": data_args.data_dir,
        "instruction_file": data_args.instruction_file,
        "instruction_strategy": data_args.instruction_strategy,
        "max_num_instances_per_task": data_args.max_num_instances_per_task,
        "max_num_instances_per_eval_task": data_args.max_num_instances_per_eval_task,
        "num_examples": data_args.num_examples,
        "over_sampling": data_args.over_sampling,
        "seed": training_args.seed,
    }


def first_rows(rows: Dataset, limit: int | None) -> Dataset:
    """At most `limit` rows, the first ones."""
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def first_rows_of_each(rows: Dataset, limit: int | None) -> Dataset:
    """At most `limit` rows of each dataset, the first ones: a limit must not drop whole tasks of the past."""
    if limit is None:
        return rows
    seen: dict[str, int] = {}
    kept = []
    for index, dataset in enumerate(rows["Dataset"]):
        seen[dataset] = seen.get(dataset, 0) + 1
        if seen[dataset] <= limit:
            kept.append(index)
    return rows.select(kept)
