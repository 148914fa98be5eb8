"""Orders on disk as `Run`s, and statistics over them: mean, spread, paired differences."""

import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compute_metrics import compute_metrics, exact_match, read_predictions
from errors import InputError
from files import json_kind, read_object
from order_config import step_name
from report.bootstrap import Interval, RunKey, paired_interval
from report.matrix import Matrix, accuracy_matrix, last_finished, measure, number, unfinished_steps

CEILING = "multitask"
"""The method that sees all tasks at once: a ceiling, which does not learn in sequence."""


@dataclass
class Run:
    """One order, trained once by one method."""

    folder: Path
    model: str
    method: str  # its name, and the fewest options that distinguish it from other runs of that name
    order: str
    seed: str
    tasks: list[str]
    matrix: Matrix
    measures: dict[str, float | None]  # see `report.matrix.MEASURES`
    scores: dict[str, np.ndarray]  # by dataset, each test example's score (n,) at the end, 0 to 1; empty if unknown
    seconds: float | None  # of training, all tasks together
    trained_values: int | None  # most parameters that any task trained
    values: int | None  # all parameters of the model
    stored_bytes: int | None  # what the last task saved for a next one
    unfinished: list[str]  # steps without results
    options: dict[str, list]  # by name, the value in each step so far
    made_with: dict  # git revision, versions and machine
    varying: dict = field(default_factory=dict)  # the options in which runs of its name differ

    def final(self, name: str) -> float | None:
        """A measure after the order's last task; None if the order is unfinished, and so cannot be compared."""
        return None if self.unfinished else self.measures.get(name)


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Every order with results at or below the folders, sorted by model, method, order and seed.

    The same order by the same method with the same options and seed in two folders is an error: they would count as
    two seeds.
    """
    runs: dict[Path, Run] = {}  # by folder, as the given folders may contain one another
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; allowed: one with orders below it")
        orders = sorted(path.parent for path in folder.rglob("outputs") if is_order(path.parent))
        found = [order for order in orders if any(order.glob("outputs/*/predict_results.json"))]
        if not found:
            raise InputError(f"{folder}: no task has results; expected outputs/<i>-<dataset>/predict_results.json")
        runs |= {order.resolve(): read_run(order) for order in found}
    _complete_tasks(list(runs.values()))
    _name_variants(list(runs.values()))
    _reject_twice(list(runs.values()))
    return sorted(runs.values(), key=lambda run: (run.model, run.method, natural(run.order), natural(run.seed)))


def is_order(folder: Path) -> bool:
    """Return whether a folder is an order's output folder."""
    return any(re.match(r"1-.", path.name) for path in folder.glob("outputs/*"))


def read_run(order_dir: Path) -> Run:
    """The run in an order's output folder; without `run_record.json`, folder names stand for method and order."""
    tasks, matrix = accuracy_matrix(order_dir)
    steps = [order_dir / "outputs" / step_name(i, task) for i, task in enumerate(tasks, 1)]
    paths = [step / "run_record.json" for step in steps]
    records = [_object(path, "report") for path in paths]
    last, unfinished = last_finished(matrix), unfinished_steps(tasks, matrix)
    trained = [step / "train_results.json" for step in steps[: last + 1]]
    seconds = [number(_object(path), "train_runtime", path) for path in trained]
    stored = [path.stat().st_size for path in steps[last].glob("*_adapter/*.safetensors")]
    first, sizes = records[0], [number(one, "trained_values", path) for one, path in zip(records, paths)]
    return Run(
        folder=order_dir,
        model=Path(str(first.get("base_model", "unknown model"))).name,
        method=str(first.get("method", order_dir.parent.name)),
        order=str(first.get("order", order_dir.name)),
        seed=str(first.get("seed", "?")),
        tasks=tasks,
        matrix=matrix,
        measures=measure(order_dir, tasks, matrix),
        scores={} if unfinished else _scores_of_examples(steps[last], tasks),
        seconds=None if None in seconds else sum(seconds),
        trained_values=max(filter(None, sizes), default=None),
        values=number(first, "values", paths[0]),
        stored_bytes=sum(stored) or None,
        unfinished=unfinished,
        options=_options(paths),
        made_with=_made_with(paths[0]),
    )


def _options(records: Sequence[Path]) -> dict[str, list]:
    """What distinguishes runs of a method besides order and seed, in each step so far; input files (data, instructions,
    DeepSpeed) and model files count by content."""
    steps = [_object(path, "report", "options") | {"input_files": _digest(_object(path, "data")),
                                                   "processes": _object(path, "report").get("processes")}
             for path in records if path.exists()]  # fmt: skip
    values = {name: [step.get(name) for step in steps] for name in dict.fromkeys(itertools.chain(*steps))}
    return values | {"base_model": [_digest(_object(records[0], "model"))]}


def _digest(content: object) -> str | None:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8] if content else None


def setting(values: list) -> object:
    """An option's value, or a digest of its values where the steps of a run differ."""
    return values[0] if all(value == values[0] for value in values) else f"differs by task ({_digest(values)})"


def _made_with(record: Path) -> dict:
    revision = {"git revision": _object(record).get("git_revision")}
    found = revision | _object(record, "versions") | _object(record, "machine")
    return {name: value for name, value in found.items() if value is not None}


def _scores_of_examples(step: Path, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """By task, the score of each of its examples, 0 to 1; empty without the predictions of the task folder `step`."""
    predictions, hits = step / "predict_eval_predictions.jsonl", {task: [] for task in tasks}
    multilingual = bool(_object(step / "run_record.json", "configuration").get("multilingual"))
    for example in read_predictions(predictions) if predictions.exists() else []:
        if example["Dataset"] in hits:
            hits[example["Dataset"]].append(_score(example, multilingual))
    return {task: np.array(own, dtype=float) for task, own in hits.items()} if all(hits.values()) else {}


def _score(example: dict, multilingual: bool) -> float:
    """Whether an answer is correct, or its ROUGE-L where answers are free text, as the run computed it."""
    prediction, label = example["Prediction"], example["Instance"]["label"]
    if example.get("Metric") == "rougeL":
        return compute_metrics([prediction], [label], multilingual=multilingual)["rougeL"] / 100
    return float(exact_match(prediction, label))


def finished(runs: Sequence[Run]) -> list[Run]:
    """The finished runs, or all of them if none is."""
    return [run for run in runs if not run.unfinished] or list(runs)


def select(runs: Iterable[Run], **wanted: str) -> list[Run]:
    """The runs whose attributes have these values."""
    return [run for run in runs if all(getattr(run, name) == value for name, value in wanted.items())]


def distinct(runs: Iterable[Run], attribute: str) -> list[str]:
    """The values of an attribute, in order of appearance."""
    return list(dict.fromkeys(getattr(run, attribute) for run in runs))


@dataclass(frozen=True)
class Summary:
    """Mean of the orders' means, sample standard deviation of all runs (None for one run), number of runs."""

    mean: float
    spread: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.spread is None else f" ± {self.spread:.1f}")


def summarise(runs: Sequence[Run], name: str) -> Summary | None:
    """A measure over finished runs; None if none has it. Each order has the same weight, whatever its seeds."""
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
    """Ours minus theirs in average performance, over the orders and seeds that both have finished, with predictions for
    equally many examples of the same tasks; None if there are none."""
    def sizes(scores: dict[str, np.ndarray]) -> dict[str, int]:
        return {dataset: len(hits) for dataset, hits in scores.items()}

    mine, others = _right(ours), _right(theirs)
    alike = [run for run in mine.keys() & others.keys() if sizes(mine[run]) == sizes(others[run])]
    return paired_interval({run: mine[run] for run in mine if run in alike}, others) if alike else None


def interval(runs: Iterable[Run]) -> Interval | None:
    """The average performance of finished runs and its 95 % interval; None without a run, or if one of them has no
    predictions: the interval would be of other runs than the average beside it."""
    finished = [run for run in runs if not run.unfinished]
    return paired_interval(_right(finished)) if finished and all(run.scores for run in finished) else None


def _right(runs: Iterable[Run]) -> dict[RunKey, dict[str, np.ndarray]]:
    return {(run.order, run.seed): run.scores for run in runs if run.scores}


def base_method(method: str) -> str:
    """A method's name without its options."""
    return method.split(" ")[0]


def is_ceiling(method: str) -> bool:
    """Return whether a method, whatever its options, is the ceiling."""
    return base_method(method) == CEILING


def ranked_methods(runs: Sequence[Run]) -> list[str]:
    """The methods of one model: those that have finished most orders first, as a mean over fewer is another measure;
    among them the highest average performance first."""
    def place(method: str) -> tuple[int, float]:
        own = select(runs, method=method)
        result = summarise(own, "average_performance")
        return -len({run.order for run in finished(own)}), -result.mean if result else np.inf

    return sorted(distinct(runs, "method"), key=place)


def _complete_tasks(runs: list[Run]) -> None:
    """Add to `unfinished` the steps that a run has no folder for yet, known from other runs of its order."""
    for order in distinct(runs, "order"):
        own = select(runs, order=order)
        longest = max((run.tasks for run in own), key=len)
        for run in own:
            begun = len(run.tasks)
            if run.tasks == longest[:begun]:
                run.unfinished += [step_name(i, task) for i, task in enumerate(longest[begun:], begun + 1)]


def _name_variants(runs: list[Run]) -> None:
    """Append to a method's name the options that distinguish its runs on one model and one order.

    Options that differ only between orders, as in the published settings, do not count.
    """
    for model, method in dict.fromkeys((run.model, run.method) for run in runs):
        group = select(runs, model=model, method=method)
        keys = list(dict.fromkeys(key for run in group for key in run.options))
        varying = [key for key in keys if any(
            _differ([run.options.get(key, [None]) for run in select(group, order=order)])
            for order in distinct(group, "order")
        )]  # fmt: skip
        for run in group:
            # An unfinished run is named after one that agrees with it so far and is furthest along.
            alike = {key: [values for other in select(group, order=run.order)
                           if not _differ([values := other.options.get(key, [None]), run.options.get(key, [None])])]
                     for key in varying}  # fmt: skip
            run.varying = {key: setting(max(values, key=len)) for key, values in alike.items()}
        for run, name in zip(group, _fewest_options([run.varying for run in group])):
            run.method += name


def _differ(runs: Sequence[list]) -> bool:
    """Whether two runs have different values in a step that both have reached."""
    return any(len({repr(values[step]) for values in runs if step < len(values)}) > 1
               for step in range(max(map(len, runs))))  # fmt: skip


def _reject_twice(runs: Iterable[Run]) -> None:
    places: dict[tuple[str, ...], Path] = {}
    for run in runs:
        first = places.setdefault((run.model, run.method, run.order, run.seed), run.folder)
        if first != run.folder:
            raise InputError(f"{run.folder}: {run.method}, {run.order}, seed {run.seed} with the same options as "
                             f"{first}; allowed: each run once, so name the folders to compare")


def _fewest_options(settings: Sequence[dict]) -> list[str]:
    """For each of the settings, ` (option=value, ...)` with enough options to distinguish it from the others."""
    def distinguished(keys: Iterable[str]) -> int:
        return len({repr([one[key] for key in keys]) for one in settings})

    needed: list[str] = []
    for key in settings[0]:
        if distinguished([*needed, key]) > distinguished(needed):
            needed.append(key)
    return [f" ({', '.join(f'{key}={one[key]}' for key in needed)})" if needed else "" for one in settings]


def _object(path: Path, *keys: str) -> dict:
    """The object in a file, or the one that `keys` lead to; empty if it is missing."""
    content = read_object(path) if path.exists() else {}
    for key in keys:
        content = content.get(key, {})
        if not isinstance(content, dict):
            raise InputError(f"{path}, {key}: found {json_kind(content)}; allowed: an object")
    return content


def natural(text: str) -> list:
    """A sort key that puts 10 after 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]
