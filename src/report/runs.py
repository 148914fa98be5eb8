"""Finished orders on disk as `Run`s, and what a set of them comes to: mean, spread, paired differences."""

import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compute_metrics import exact_match, read_predictions
from errors import InputError
from files import read_json
from report.bootstrap import Interval, paired_interval
from report.matrix import Matrix, accuracy_matrix, last_finished, measure, step_name, unfinished_steps

CEILING = "multitask"
"""The method that sees all tasks at once: a ceiling to compare with, not a way to learn in sequence."""


@dataclass
class Run:
    """One order, trained once by one method.

    Attributes:
        method: the method's name, followed by options that tell it from other runs of its name, the fewest that do.
        varying: all options in which runs of its name differ, with this run's values.
        measures: see `report.matrix.MEASURES`.
        right: by dataset, whether each test row (n,) was answered rightly after the order's last task; empty before
            that, and where the predictions are gone.
        seconds: training time of all tasks together.
        trained_values: most values that any task trained; stored_bytes: what the last task left for a next one.
        unfinished: steps without results; the measures are then those of the last finished step.
    """

    folder: Path
    model: str
    method: str
    order: str
    seed: str
    tasks: list[str]
    matrix: Matrix
    measures: dict[str, float | None]
    right: dict[str, np.ndarray]
    seconds: float | None
    trained_values: int | None
    values: int | None
    stored_bytes: int | None
    unfinished: list[str]
    options: dict = field(default_factory=dict)
    varying: dict = field(default_factory=dict)

    def final(self, name: str) -> float | None:
        """A measure after the order's last task; None before that, when it cannot be compared with other runs'."""
        return None if self.unfinished else self.measures.get(name)


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Every order at or below the folders that has results, by model, method, order and seed.

    Raises:
        InputError: a folder is missing, holds no order with results, or a file in it is damaged; or two folders hold
            the same order by the same method with the same options and seed, which would count as two seeds.
    """
    runs: dict[Path, Run] = {}  # by place, for folders may lie within one another
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; expected one with orders below it")
        orders = sorted(path.parent for path in folder.rglob("outputs") if is_order(path.parent))
        found = [order for order in orders if any(order.glob("outputs/*/predict_results.json"))]
        if not found:
            raise InputError(f"{folder}: no task has results; expected outputs/<i>-<dataset>/predict_results.json")
        runs |= {order.resolve(): read_run(order) for order in found}
    _complete_tasks(list(runs.values()))
    _name_variants(list(runs.values()))
    _refuse_twice(list(runs.values()))
    return sorted(runs.values(), key=lambda run: (run.model, run.method, natural(run.order), natural(run.seed)))


def is_order(folder: Path) -> bool:
    """Whether a folder is an order's output folder."""
    return any(re.match(r"1-.", path.name) for path in folder.glob("outputs/*"))


def read_run(order_dir: Path) -> Run:
    """The run of an order's output folder; folder names stand in for what `run_record.json` would say."""
    tasks, matrix = accuracy_matrix(order_dir)
    steps = [order_dir / "outputs" / step_name(i, task) for i, task in enumerate(tasks, 1)]
    about = [_object(step / "run_record.json", "report") for step in steps]
    last = last_finished(matrix)
    unfinished = unfinished_steps(tasks, matrix)
    first = about[0]
    return Run(
        folder=order_dir,
        model=Path(str(first.get("base_model", "unknown model"))).name,
        method=str(first.get("method", order_dir.parent.name)),
        order=str(first.get("order", order_dir.name)),
        seed=str(first.get("seed", "?")),
        tasks=tasks,
        matrix=matrix,
        measures=measure(order_dir, tasks, matrix),
        right={} if unfinished else _right_answers(steps[last] / "predict_eval_predictions.jsonl", tasks),
        seconds=_total([_number(step / "train_results.json", "train_runtime") for step in steps[: last + 1]]),
        trained_values=max((one["trained_values"] for one in about if "trained_values" in one), default=None),
        values=first.get("values"),
        stored_bytes=_stored_bytes(steps[last]),
        unfinished=unfinished,
        options=_options(steps[0] / "run_record.json"),
    )


def _options(record: Path) -> dict:
    """What makes two runs of a method different ones beside order and seed; input files (data, instructions, DeepSpeed)
    by their content."""
    about, files = _object(record, "report"), _object(record, "data")
    made_of = {"processes": about.get("processes")}
    if files:
        made_of["input_files"] = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]
    return _object(record, "report", "options") | made_of


def _right_answers(predictions: Path, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """By task, whether each of its rows was answered rightly; empty without the file."""
    hits: dict[str, list[bool]] = {task: [] for task in tasks}
    for row in read_predictions(predictions) if predictions.exists() else []:
        if row["Dataset"] in hits:
            hits[row["Dataset"]].append(exact_match(row["Prediction"], row["Instance"]["label"]))
    return {task: np.array(own, dtype=int) for task, own in hits.items()} if all(hits.values()) else {}


def _stored_bytes(step: Path) -> int | None:
    """Size of what a task left for the next one, without the tokenizer's files; None where it is gone."""
    files = list(step.glob("*_adapter/*.safetensors"))
    return sum(path.stat().st_size for path in files) if files else None


def finished(runs: Sequence[Run]) -> list[Run]:
    """Those of the runs that are finished; where none is, all of them, so that there is something to look at."""
    return [run for run in runs if not run.unfinished] or list(runs)


def select(runs: Iterable[Run], **wanted: str) -> list[Run]:
    """The runs whose attributes have these values."""
    return [run for run in runs if all(getattr(run, name) == value for name, value in wanted.items())]


def distinct(runs: Iterable[Run], attribute: str) -> list[str]:
    """The values of an attribute, in order of appearance."""
    return list(dict.fromkeys(getattr(run, attribute) for run in runs))


@dataclass(frozen=True)
class Summary:
    """Mean of the orders' means, sample standard deviation of all runs (None for one), number of runs."""

    mean: float
    spread: float | None
    count: int


def summarise(runs: Sequence[Run], name: str) -> Summary | None:
    """A measure over finished runs; None where none has it. An order counts once, however many seeds it has."""
    by_order: dict[str, list[float]] = {}
    for run in runs:
        if run.final(name) is not None:
            by_order.setdefault(run.order, []).append(run.final(name))
    if not by_order:
        return None
    values = [value for group in by_order.values() for value in group]
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.mean(map(statistics.mean, by_order.values())), spread, len(values))


def paired_difference(ours: Iterable[Run], theirs: Iterable[Run]) -> Interval | None:
    """Ours minus theirs in average performance, over the orders and seeds that both have finished; None without one,
    or without their predictions.

    Raises:
        InputError: the two answered other rows.
    """
    mine, others = ({(run.order, run.seed): run.right for run in runs if run.right} for runs in (ours, theirs))
    return paired_interval(mine, others) if mine.keys() & others.keys() else None


def base_method(method: str) -> str:
    """The method that a variant is one of."""
    return method.split(" ")[0]


def is_ceiling(method: str) -> bool:
    """Whether a method, or a variant of it, is the ceiling."""
    return base_method(method) == CEILING


def ranked_methods(runs: Sequence[Run]) -> list[str]:
    """The methods of one model, best average performance first; those without one come last."""
    def key(method: str) -> float:
        result = summarise(select(runs, method=method), "average_performance")
        return -result.mean if result else float("inf")
    return sorted(distinct(runs, "method"), key=key)


def mean_matrix(runs: Sequence[Run]) -> Matrix:
    """The mean over runs (seeds) of one order's tasks; None where a run lacks the value."""
    size = len(runs[0].tasks)
    cells = [[[run.matrix[i][j] for run in runs] for j in range(size)] for i in range(size)]
    return [[None if None in values else statistics.mean(values) for values in row] for row in cells]


def _complete_tasks(runs: list[Run]) -> None:
    """Add to `unfinished` the steps that a run has no folder for yet, by what other runs of its order have."""
    for order in distinct(runs, "order"):
        own = select(runs, order=order)
        longest = max((run.tasks for run in own), key=len)
        for run in own:
            begun = len(run.tasks)
            if run.tasks == longest[:begun]:
                run.unfinished += [step_name(i, task) for i, task in enumerate(longest[begun:], begun + 1)]


def _name_variants(runs: list[Run]) -> None:
    """Append to a method's name what tells apart its runs with other options on one model and one order.

    What differs only between orders, as the published settings do, makes no other method.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.model, run.method), []).append(run)
    for group in groups.values():
        keys = list(dict.fromkeys(key for run in group for key in run.options))
        varying = [key for key in keys if any(
            len({repr(run.options.get(key)) for run in select(group, order=order)}) > 1
            for order in distinct(group, "order")
        )]  # fmt: skip
        for run in group if varying else []:
            run.varying = {key: run.options.get(key) for key in varying}
        for run, name in zip(group, _fewest_options([run.varying for run in group])):
            run.method += name


def _refuse_twice(runs: Iterable[Run]) -> None:
    places: dict[tuple[str, ...], Path] = {}
    for run in runs:
        first = places.setdefault((run.model, run.method, run.order, run.seed), run.folder)
        if first != run.folder:
            raise InputError(f"{run.folder}: {run.method}, {run.order}, seed {run.seed}, as {first} is, with the same "
                             "options; a run counts once, so name the folders that shall count")


def _fewest_options(settings: Sequence[dict]) -> list[str]:
    """For each of the settings, ` (option=value, ...)` with options enough to tell it from the others."""
    def distinguished(keys: Iterable[str]) -> int:
        return len({repr([one[key] for key in keys]) for one in settings})

    needed: list[str] = []
    for key in settings[0]:
        if distinguished([*needed, key]) > distinguished(needed):
            needed.append(key)
    return [f" ({', '.join(f'{key}={one[key]}' for key in needed)})" if needed else "" for one in settings]


def _object(path: Path, *keys: str) -> dict:
    """The object in a file, or the one that `keys` lead to; empty where there is none."""
    content = read_json(path) if path.exists() else {}
    for key in (None, *keys):
        content = content if key is None else content.get(key, {})
        if not isinstance(content, dict):
            raise InputError(f"{path}: found {type(content).__name__}; expected an object" + (f" {key}" if key else ""))
    return content


def _number(path: Path, key: str) -> float | None:
    """A number in the object of a file, None where there is none."""
    value = _object(path).get(key)
    if not isinstance(value, int | float | None):
        raise InputError(f"{path}: {key} is {value!r}; expected a number")
    return value


def _total(values: Sequence[float | None]) -> float | None:
    return None if None in values or not values else sum(values)


def natural(text: str) -> list:
    """A sort key under which 10 follows 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]
