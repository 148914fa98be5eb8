"""The accuracy of every task after every task, and what continual learning measures in it.

Row i, column j of the matrix is a[i][j], the exact match in per cent on task j after training on task i, None where
it was not measured. With T tasks, the last row being T:

    average performance  AP  = 1/T sum_j a[T][j]                        (Lopez-Paz & Ranzato, 2017, there ACC;
                                                                         Chaudhry et al., 2018, there A_T)
    backward transfer    BWT = 1/(T-1) sum_{i<T} (a[T][i] - a[i][i])    (Lopez-Paz & Ranzato, 2017)

BWT below zero is forgetting. An order that is not finished has the measures of its latest finished task.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from errors import InputError
from files import read_json

Matrix = list[list[float | None]]


def accuracy_matrix(order_dir: str | os.PathLike) -> tuple[list[str], Matrix]:
    """The datasets of an order's output folder, in training order, and their accuracy matrix, square.

    Reads `outputs/<i>-<dataset>/predict_results.json`. A step that has a folder but no results yet is a row of None.

    Raises:
        InputError: there are no results, a results file is not one, or the steps are not numbered 1, 2, ...
    """
    folders = _step_folders(Path(order_dir) / "outputs")
    tasks = [folder.name.partition("-")[2] for folder in folders]
    matrix = [_row(folder / "predict_results.json", tasks) for folder in folders]
    if last_finished(matrix) is None:
        raise InputError(f"{order_dir}: no task has results; expected outputs/<i>-<dataset>/predict_results.json")
    return tasks, matrix


def last_finished(matrix: Matrix) -> int | None:
    """Index of the last row that has values, None if there is none."""
    return max((i for i, row in enumerate(matrix) if any(value is not None for value in row)), default=None)


def average_performance(matrix: Matrix) -> float | None:
    """AP after the latest finished task, over the tasks seen by then; None if one of their values is missing."""
    last = last_finished(matrix)
    return None if last is None else _mean(matrix[last][: last + 1])


def backward_transfer(matrix: Matrix) -> float | None:
    """BWT after the latest finished task; None after the first one, or if a value that it needs is missing."""
    last = last_finished(matrix)
    if not last:
        return None
    pairs = [(matrix[last][i], matrix[i][i]) for i in range(last)]
    return _mean([None if None in pair else pair[0] - pair[1] for pair in pairs])


def order_results(tasks: Sequence[str], matrix: Matrix) -> dict:
    """The content of `order_results.json`; values have 4 decimals, as the metrics have."""
    measures = {"average_performance": average_performance(matrix), "backward_transfer": backward_transfer(matrix)}
    return {
        "tasks": list(tasks),
        "accuracy": matrix,
        **{name: value if value is None else round(value, 4) for name, value in measures.items()},
        "unfinished": unfinished_steps(tasks, matrix),
    }


def unfinished_steps(tasks: Sequence[str], matrix: Matrix) -> list[str]:
    """Names `<i>-<dataset>` of the steps without results."""
    return [step_name(i, task) for i, (task, row) in enumerate(zip(tasks, matrix), 1) if set(row) == {None}]


def step_name(number: int, dataset: str) -> str:
    """The output folder of a step, counted from 1."""
    return f"{number}-{dataset}"


def format_table(tasks: Sequence[str], matrix: Matrix) -> str:
    """The matrix as aligned text, with AP and BWT below it and, where there are any, the steps without results."""
    steps = [step_name(i, task) for i, task in enumerate(tasks, 1)]
    cells = [["after", *tasks]] + [[step, *map(_cell, row)] for step, row in zip(steps, matrix)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([step.ljust(widths[0]), *map(str.rjust, values, widths[1:])]) for step, *values in cells]
    lines += [
        "",
        f"average performance (AP)  {_cell(average_performance(matrix))}",
        f"backward transfer (BWT)   {_cell(backward_transfer(matrix))}",
    ]
    if unfinished := unfinished_steps(tasks, matrix):
        last = steps[last_finished(matrix)]
        lines += ["", f"not finished: no results of {', '.join(unfinished)}; AP and BWT are those after {last}"]
    return "\n".join(lines)


def _step_folders(outputs: Path) -> list[Path]:
    """The folders `<i>-<dataset>`, i = 1, 2, ..., in order; others, such as hidden ones, are not steps."""
    if not outputs.is_dir():
        raise InputError(f"{outputs}: no such folder; expected the output folder of an order")
    folders = [folder for folder in outputs.iterdir() if folder.is_dir()]
    numbered = [(int(match[1]), folder) for folder in folders if (match := re.match(r"(\d+)-.", folder.name))]
    numbers = sorted(number for number, _ in numbered)
    if numbers != list(range(1, len(numbers) + 1)):
        raise InputError(f"{outputs}: found steps {', '.join(map(str, numbers))}; allowed is each of 1, 2, ... once")
    return [folder for _, folder in sorted(numbered)]


def _row(path: Path, tasks: Sequence[str]) -> list[float | None]:
    """Exact match on every task in a step's results file, None where it has none; without a file all are None."""
    if not path.exists():
        return [None] * len(tasks)
    results = read_json(path)
    if not isinstance(results, dict):
        raise InputError(f"{path}: found {type(results).__name__}; expected an object of metrics")
    row = [results.get(_key(task)) for task in tasks]
    for task, value in zip(tasks, row):
        if not isinstance(value, int | float | None):
            raise InputError(f"{path}: {_key(task)} is {value!r}; expected a number")
    return row


def _key(dataset: str) -> str:
    return f"predict_exact_match_for_{dataset}"


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
