"""Orders of tasks as JSON files: read, check and write ``configs/<order>_configs/``.

An order is a folder with one folder per step, each holding ``train_tasks.json``, ``dev_tasks.json`` and
``test_tasks.json``. Each file maps task names to lists of ``{"sampling strategy": ..., "dataset name": ...}``. A step
trains on one dataset and tests on all datasets seen so far, so the sizes of the test files give the order of the steps.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterable, Sequence

from errors import InputError, nearest
from files import atomic_folder, check_writable, json_kind, read_object, write_json

TASKS = ("SC", "TC", "NLI", "QQP", "WiC", "MultiRC", "COPA", "BoolQA")
SUBSETS = ("train", "dev", "test")
TASK_FILES = tuple(f"{subset}_tasks.json" for subset in SUBSETS)
BENCHMARK_FILES = (*(f"{subset}.json" for subset in SUBSETS), "labels.json")
SAMPLING = ("random", "full")
LIMITS = {"train": 10000, "dev": 200}
"""How many examples of a dataset that is sampled at random are read, unless a flag says otherwise; all for test."""
ENTRY_KEYS = ("sampling strategy", "dataset name")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # a folder's name, safe on every system and in every shell
_NAME_RULE = "letters, digits, '_', '-' and '.', starting with a letter or digit, at most 100"


@dataclass(frozen=True)
class OrderStep:
    """One step of an order: the dataset it trains on, and the folder of its task files."""

    task: str
    dataset: str
    folder: Path


def read_task_config(path: str | Path) -> dict[str, list[dict[str, str]]]:
    """Read and check a task file; returns every published task, and any other in the file, with its (possibly empty)
    list of entries. The sampling strategy is ``random`` by default, as in the published loader."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; a step's folder holds {_listed(TASK_FILES)}")
    content = read_object(path, f"an object whose keys are tasks, such as {_listed(TASKS)}")
    for key, entries in content.items():
        check_name(key, f"{path}, task")
        if not isinstance(entries, list):
            raise InputError(f"{path}, {key}: found {json_kind(entries)}; allowed: an array of objects")
    config = {
        task: [_entry(entry, f"{path}, {task}[{index}]") for index, entry in enumerate(content.get(task, []))]
        for task in _tasks(content)
    }
    names = [dataset for _, dataset in _datasets(config)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: dataset {name!r} is listed {names.count(name)} times; allowed: once")
    return config


def read_order(config_dir: str | Path) -> list[OrderStep]:
    """The steps of an order, first to last. Each trains the dataset that its folder is named after, and its test file
    lists one dataset more than that of the previous step."""
    config_dir = Path(config_dir)
    if not config_dir.is_dir():
        known = sorted(path.name for path in config_dir.parent.glob("[!.]*_configs"))
        raise InputError(f"{config_dir}: no such order folder; in {config_dir.parent}: {_listed(known)}")
    folders = sorted(path for path in config_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise InputError(f"{config_dir}: no steps; allowed: one folder per dataset, with {_listed(TASK_FILES)}")
    steps = [_read_step(folder) for folder in folders]
    steps.sort(key=lambda step_and_tested: len(step_and_tested[1]))
    _check_growth(steps)
    return [step for step, _ in steps]


def write_order(
    config_dir: str | Path, datasets: Sequence[tuple[str, str]], *, sampling: str = "full", overwrite: bool = False
) -> list[OrderStep]:
    """Write the JSON files of an order atomically, and return it as `read_order` reads it.

    Args:
        config_dir: folder of the order, such as ``configs/mine_configs``; an existing one needs `overwrite`.
        datasets: (task, dataset) of each step, first to last.
        sampling: strategy of every entry, ``full`` or ``random``.
    """
    config_dir = Path(config_dir)
    if not datasets:
        raise InputError(f"{config_dir}: an order without tasks; allowed: one TASK/DATASET or more")
    if config_dir.exists() and not overwrite:
        raise InputError(f"{config_dir}: exists already; allowed: another name, or --overwrite")
    for index, (task, dataset) in enumerate(datasets):
        check_name(task, f"{task}/{dataset}, task")
        check_name(dataset, f"{task}/{dataset}, dataset name")
        if dataset in [name for _, name in datasets[:index]]:
            raise InputError(f"{task}/{dataset}: dataset {dataset!r} occurs twice in the order; allowed: once")
    check_writable(config_dir.parent)
    with atomic_folder(config_dir) as partial:
        for index, (task, dataset) in enumerate(datasets):
            folder = partial / dataset
            write_json(folder / "train_tasks.json", _task_config([(task, dataset)], sampling))
            write_json(folder / "dev_tasks.json", _task_config([], sampling))
            write_json(folder / "test_tasks.json", _task_config(datasets[: index + 1], sampling))
        steps = read_order(partial)
    return [replace(step, folder=config_dir / step.dataset) for step in steps]


def benchmark_datasets(data_dir: str | Path) -> list[str]:
    """``TASK/DATASET`` of every dataset folder in a benchmark, complete or not, the published tasks first."""
    return [
        f"{task}/{folder.name}"
        for task in _tasks(sorted(path.name for path in Path(data_dir).glob("[!.]*/")))
        for folder in sorted((Path(data_dir) / task).glob("[!.]*"))
        if folder.is_dir()
    ]


def order_name(config_dir: str | Path) -> str:
    """The name of an order, from its folder ``<order>_configs``."""
    return Path(config_dir).resolve().name.removesuffix("_configs")


def step_name(number: int, dataset: str) -> str:
    """The output folder of a step, counted from 1."""
    return f"{number}-{dataset}"


def is_complete(dataset_dir: str | Path) -> bool:
    """Whether a dataset folder has its files, unread; labels.json is optional for a task that is not published."""
    folder = Path(dataset_dir)
    return all((folder / name).is_file() or (name == "labels.json" and folder.parent.name not in TASKS)
               for name in BENCHMARK_FILES)  # fmt: skip


def check_name(name: str, where: str) -> None:
    """Reject a name that could lead outside its folder: names become parts of paths."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{where}: found {name!r}; allowed: {_NAME_RULE}")


def _entry(entry: object, where: str) -> dict[str, str]:
    """Check an entry of a task file and fill in its default; `where` names it in messages."""
    for key in entry if isinstance(entry, dict) else ():
        if key not in ENTRY_KEYS:
            raise InputError(f"{where}: unknown key {key!r}; allowed: {_listed(ENTRY_KEYS)}{nearest(key, ENTRY_KEYS)}")
    if not isinstance(entry, dict) or not isinstance(entry.get("dataset name"), str):
        raise InputError(f"{where}: found {entry!r}; allowed: an object with a string under 'dataset name'")
    check_name(entry["dataset name"], f"{where}, 'dataset name'")
    strategy = entry.get("sampling strategy", "random")
    if strategy not in SAMPLING:
        raise InputError(f"{where}: 'sampling strategy' is {strategy!r}; allowed: {_listed(SAMPLING)}")
    return {"sampling strategy": strategy, "dataset name": entry["dataset name"]}


def _read_step(folder: Path) -> tuple[OrderStep, list[tuple[str, str]]]:
    """The step in `folder`, and the (task, dataset) pairs that it tests."""
    trained, _, tested = (_datasets(read_task_config(folder / name)) for name in TASK_FILES)
    train_file = folder / "train_tasks.json"
    if len(trained) != 1:
        raise InputError(f"{train_file}: found {len(trained)} datasets; allowed: exactly one")
    if trained[0][1] != folder.name:
        raise InputError(f"{train_file}: trains {trained[0][1]!r}; allowed: {folder.name!r}, the name of the folder")
    if trained[0] not in tested:
        raise InputError(f"{folder / 'test_tasks.json'}: lacks {_pairs(trained)}, which train_tasks.json trains; "
                         f"found: {_pairs(tested)}")
    return OrderStep(*trained[0], folder), tested


def _check_growth(steps: list[tuple[OrderStep, list[tuple[str, str]]]]) -> None:
    """Reject steps, sorted by the size of their test lists, that do not test exactly the datasets seen so far."""
    for (one, tested_one), (other, tested_other) in zip(steps, steps[1:]):
        if len(tested_one) == len(tested_other):
            raise InputError(f"{one.folder / 'test_tasks.json'} and {other.folder / 'test_tasks.json'}: both list "
                             f"{len(tested_one)} datasets, so which step comes first is not clear; allowed: one more "
                             "at each step")
    seen = set()
    for step, tested in steps:
        seen.add((step.task, step.dataset))
        path = step.folder / "test_tasks.json"
        if dropped := seen - set(tested):
            raise InputError(f"{path}: lacks {_pairs(dropped)} of an earlier step; allowed: all datasets seen so far")
        if unseen := set(tested) - seen:
            raise InputError(f"{path}: lists {_pairs(unseen)}, which no step up to this one trains; allowed: "
                             f"{_pairs(seen)}")


def _task_config(datasets: Sequence[tuple[str, str]], sampling: str) -> dict[str, list[dict[str, str]]]:
    """The content of a task file that lists these (task, dataset) pairs."""
    return {
        task: [{"sampling strategy": sampling, "dataset name": name} for owner, name in datasets if owner == task]
        for task in _tasks(task for task, _ in datasets)
    }


def _tasks(names: Iterable[str]) -> list[str]:
    """The published tasks, then the others among the names."""
    return list(dict.fromkeys([*TASKS, *names]))


def _datasets(config: dict[str, list[dict[str, str]]]) -> list[tuple[str, str]]:
    """The (task, dataset) pairs of a task file, in file order."""
    return [(task, entry["dataset name"]) for task, entries in config.items() for entry in entries]


def _listed(names: Iterable[str]) -> str:
    """Names for a message, comma-separated."""
    return ", ".join(names) or "none"


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return _listed(sorted("/".join(pair) for pair in pairs))
