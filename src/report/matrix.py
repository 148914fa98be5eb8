"""The accuracy of every task after every task, and the measures of continual learning taken from it.

Row i, column j of the matrix is a[i][j], the exact match (ROUGE-L where answers are free text) in per cent on task j
after training on task i, None where it was not measured; b[i][j], j >= i, is the same before training on task i
(`--zero_shot`). A measure is taken after task T, the latest finished one, and is None if a value that it needs is
missing. The sources are Lopez-Paz & Ranzato, 2017 (LR), and Chaudhry et al., 2018 (C); docs/METRICS.md has a table.
"""

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from compute_metrics import score_key
from errors import InputError
from files import read_object
from order_config import step_name

Matrix = list[list[float | None]]


def accuracy_matrix(order_dir: str | os.PathLike) -> tuple[list[str], Matrix]:
    """The datasets of an order's output folder, in training order, and their accuracy matrix, square.

    Reads `outputs/<i>-<dataset>/predict_results.json`. A step without results is a row of None.
    """
    folders = _step_folders(Path(order_dir) / "outputs")
    tasks = [folder.name.partition("-")[2] for folder in folders]
    matrix = [_row(folder, "predict", tasks) for folder in folders]
    if last_finished(matrix) is None:
        raise InputError(f"{order_dir}: no task has results; expected outputs/<i>-<dataset>/predict_results.json")
    return tasks, matrix


def last_finished(matrix: Matrix) -> int | None:
    """Index of the last row with a value; None if there is none."""
    return max((i for i, row in enumerate(matrix) if any(value is not None for value in row)), default=None)


def average_performance(matrix: Matrix) -> float | None:
    """AP = 1/T sum_{j<=T} a[T][j] (ACC in LR, A_T in C)."""
    last = last_finished(matrix)
    return None if last is None else _mean(matrix[last][: last + 1])


def backward_transfer(matrix: Matrix) -> float | None:
    """BWT = 1/(T-1) sum_{j<T} (a[T][j] - a[j][j]) (LR), forgetting if below 0; None after the first task."""
    last = last_finished(matrix)
    return _mean_difference([(matrix[last][i], matrix[i][i]) for i in range(last or 0)])


def forgetting(matrix: Matrix) -> float | None:
    """F = 1/(T-1) sum_{j<T} (max_{j<=i<T} a[i][j] - a[T][j]) (C); None after the first task."""
    last = last_finished(matrix)
    columns = [[matrix[i][j] for i in range(j, last)] for j in range(last or 0)]
    best = [None if None in column else max(column) for column in columns]
    return _mean_difference([(value, matrix[last][j]) for j, value in enumerate(best)])


def forward_transfer(before: Matrix, tasks_finished: int) -> float | None:
    """FWT = 1/(T-1) sum_{1<j<=T} (b[j][j] - b[1][j]) (LR, b[1] of an untrained model); None after one task."""
    return _mean_difference([(before[j][j], before[0][j]) for j in range(1, tasks_finished)])


def zero_shot_matrix(order_dir: str | os.PathLike, tasks: Sequence[str]) -> Matrix:
    """The matrix b, None where `--zero_shot` did not measure it."""
    return [_row(folder, "zero_shot", tasks) for folder in _step_folders(Path(order_dir) / "outputs")]


def unseen_accuracy(folder: str | os.PathLike) -> dict[str, float | None]:
    """Exact match after a step on each dataset that its order never trains; empty if it was not measured."""
    path = Path(folder) / "unseen_results.json"
    tasks = _results(path).get("unseen_datasets", [])
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise InputError(f"{path}: unseen_datasets is {tasks!r}; allowed: an array of names")
    return dict(zip(tasks, _row(path.parent, "unseen", tasks)))


MEASURES = {
    "average_performance": "average performance (AP)",
    "average_over_rows": "the same over examples",  # sum_j n[j] a[T][j] / sum_j n[j], the published exact_match
    "backward_transfer": "backward transfer (BWT)",
    "forgetting": "forgetting (F)",
    "forward_transfer": "forward transfer (FWT)",
    "unseen_accuracy": "accuracy on unseen datasets",
}
"""The measures of an order, and their titles."""


def measure(order_dir: str | os.PathLike, tasks: Sequence[str], matrix: Matrix) -> dict[str, float | None]:
    """Every measure of `MEASURES` after the latest finished task."""
    last = last_finished(matrix)
    folder = Path(order_dir) / "outputs" / step_name(last + 1, tasks[last])
    path, average, unseen = folder / "predict_results.json", average_performance(matrix), unseen_accuracy(folder)
    results = _results(path)
    over_examples = number(results, score_key(results, prefix="predict_"), path, 100)
    return {
        "average_performance": average,
        # `--predict_tasks ends` may have tested the latest task alone, and then there is no AP either.
        "average_over_rows": None if average is None else over_examples,
        "backward_transfer": backward_transfer(matrix),
        "forgetting": forgetting(matrix),
        "forward_transfer": forward_transfer(zero_shot_matrix(order_dir, tasks), last + 1),
        "unseen_accuracy": _mean(unseen.values()) if unseen else None,
    }


def unfinished_steps(tasks: Sequence[str], matrix: Matrix) -> list[str]:
    """Names `<i>-<dataset>` of the steps without results."""
    return [step_name(i, task) for i, (task, row) in enumerate(zip(tasks, matrix), 1) if set(row) == {None}]


def format_table(tasks: Sequence[str], matrix: Matrix, measures: Mapping[str, float | None]) -> str:
    """The matrix as aligned text, then the measures taken, then the steps without results."""
    steps = [step_name(i, task) for i, task in enumerate(tasks, 1)]
    cells = [["after", *tasks]] + [[step, *map(cell, row)] for step, row in zip(steps, matrix)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([step.ljust(widths[0]), *map(str.rjust, values, widths[1:])]) for step, *values in cells]
    always = ("average_performance", "backward_transfer")
    shown = [name for name in MEASURES if measures[name] is not None or name in always]
    width = max(len(MEASURES[name]) for name in shown)
    lines += ["", *(f"{MEASURES[name].ljust(width)}  {cell(measures[name])}" for name in shown)]
    if unfinished := unfinished_steps(tasks, matrix):
        last = steps[last_finished(matrix)]
        lines += ["", f"not finished: no results for {', '.join(unfinished)}; the measures are those after {last}"]
    return "\n".join(lines)


def cell(value: float | None) -> str:
    """A number with two decimals for a table, "-" for None."""
    return "-" if value is None else f"{value:.2f}"


def _step_folders(outputs: Path) -> list[Path]:
    """The folders `<i>-<dataset>`, i = 1, 2, ..., in order; others are not steps."""
    if not outputs.is_dir():
        raise InputError(f"{outputs}: no such folder; an order's output folder has one")
    folders = [folder for folder in outputs.iterdir() if folder.is_dir()]
    numbered = [(int(match[1]), folder) for folder in folders if (match := re.match(r"(\d+)-.", folder.name))]
    numbers = sorted(number for number, _ in numbered)
    if numbers != list(range(1, len(numbers) + 1)):
        raise InputError(f"{outputs}: found steps {', '.join(map(str, numbers))}; allowed: each of 1, 2, ... once")
    return [folder for _, folder in sorted(numbered)]


def _row(folder: Path, part: str, tasks: Sequence[str]) -> list[float | None]:
    """The score on every task in a step's results of a part; None where the file, or its value, is missing."""
    path = folder / f"{part}_results.json"
    results = _results(path)
    return [number(results, score_key(results, task, f"{part}_"), path, most=100) for task in tasks]


def number(content: Mapping, key: str, path: Path, most: float = math.inf) -> float | None:
    """The number under a key of a file's object, from 0 to `most`; None if it is missing.

    Anything else, such as the NaN of a failed run, is an error.
    """
    value = content.get(key)
    if value is None or (type(value) in (int, float) and math.isfinite(value) and 0 <= value <= most):
        return value
    allowed = "0 or more" if most == math.inf else f"from 0 to {most}"
    raise InputError(f"{path}: {key} is {value!r}; allowed: a number {allowed}")


def _results(path: Path) -> dict:
    """The metrics in a step's results file, if there is one."""
    return read_object(path, "an object of metrics") if path.exists() else {}


def _mean(values: Collection[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def _mean_difference(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    return _mean([None if None in pair else pair[0] - pair[1] for pair in pairs]) if pairs else None
