"""The benchmark as instruction examples: `<data_dir>/<TASK>/<DATASET>/{train,dev,test,labels}.json` -> `DatasetDict`.

`load_uie_dataset` reads the datasets that a step's task files name, checks every example and caches the result. The
cache key covers the contents of the files, so that an edited file is read again. `prompt_parts` splits an example into
the parts of its prompt, which the collator tokenises.
"""

import dataclasses
import hashlib
import json
import logging
import os
import random
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

from compute_metrics import normalise
from errors import InputError, nearest
from files import check_writable, digest, json_kind, locked, read_json, read_object, whole_folder, write_json
from order_config import SUBSETS, TASKS, benchmark_datasets, read_task_config

logger = logging.getLogger("gorp")

SPLITS = dict(zip(SUBSETS, ("train", "validation", "test")))
INSTRUCTION_STRATEGIES = ("single", "multiple")
INSTRUCTION_TYPES = ("zero-shot", "few-shot")
METRICS = ("exact_match", "rougeL")
"""How a task is scored: by exact match with one of its labels, or, where answers are free text, by ROUGE-L."""
ANSWER_CUE = "\nAnswer:"
DIGESTS = "digests.json"
UNLABELLED = "-"
"""GLUE's mark for a dev or test example without a gold label."""

_TEXTS = {"sentence": datasets.Value("string"), "label": datasets.Value("string")}
FEATURES = datasets.Features(
    {
        "Task": datasets.Value("string"),
        "Dataset": datasets.Value("string"),
        "Metric": datasets.Value("string"),
        "subset": datasets.Value("string"),
        "Samples": datasets.List(_TEXTS),
        "Instance": {
            "id": datasets.Value("string"),
            **_TEXTS,
            "ground_truth": datasets.Value("string"),
            "instruction": datasets.Value("string"),
        },
    }
)


@dataclasses.dataclass(frozen=True)
class ExampleOptions:
    """What decides a step's examples beside its task files.

    Args:
        data_dir: the benchmark.
        instruction_strategy: "single" takes a task's first instruction, "multiple" a seeded choice for each example.
        max_num_instances_per_task, max_num_instances_per_eval_task: None or a negative number means no limit.
        num_examples: how many labelled examples from its dataset's train.json each prompt shows (`Samples`, a seeded
            choice without the example itself). Above 0, the task's "few-shot" instructions are used.
        over_sampling: repeat seeded training examples up to `max_num_instances_per_task`, under either sampling
            strategy.

    Raises:
        InputError: an unknown strategy, or a negative number of examples.
    """

    data_dir: str | os.PathLike
    instruction_file: str | os.PathLike
    instruction_strategy: str = "single"
    max_num_instances_per_task: int | None = 10000
    max_num_instances_per_eval_task: int | None = 200
    num_examples: int = 0
    over_sampling: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        if self.instruction_strategy not in INSTRUCTION_STRATEGIES:
            allowed = ", ".join(INSTRUCTION_STRATEGIES)
            raise InputError(f"--instruction_strategy: {self.instruction_strategy!r}; allowed: {allowed}")
        if self.num_examples < 0:
            raise InputError(f"--num_examples: {self.num_examples}; allowed: 0 or more")

    def limit(self, subset: str) -> int | None:
        """Most examples of `subset` ("train", "dev", "test") to keep; None means all."""
        limits = {"train": self.max_num_instances_per_task, "dev": self.max_num_instances_per_eval_task}
        limit = limits.get(subset)
        return None if limit is None or limit < 0 else limit

    def generator(self, purpose: str, source: "_Source", example_id: str = "") -> random.Random:
        """A separate generator for each purpose, dataset and example, so that no draw depends on earlier ones."""
        return random.Random(f"{self.seed}/{purpose}/{source.task}/{source.dataset}/{source.subset}/{example_id}")


@dataclasses.dataclass(frozen=True)
class _Source:
    """One file of one dataset, as a task file names it."""

    subset: str
    task: str
    dataset: str
    strategy: str
    folder: Path
    metric: str

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def files(self, options: ExampleOptions) -> list[Path]:
        """What is read of this dataset: examples, labels (none for free text) and, few-shot, the examples to show."""
        names = [self.subset] + ["labels"] * (self.metric == "exact_match") + ["train"] * (options.num_examples > 0)
        return [self.file(name) for name in names]


def load_uie_dataset(
    task_config_dir: str | os.PathLike,
    options: ExampleOptions,
    *,
    cache_dir: str | os.PathLike | None = None,
    overwrite_cache: bool = False,
) -> datasets.DatasetDict:
    """The instruction examples of one step of an order, splits "train", "validation" and "test" with `FEATURES`.

    Examples keep the order of the task file, then of the data file. `Instance.id` is the index in the data file;
    `Instance.instruction` holds the instruction and the line of options. For COPA it is empty, unless the instruction
    file has an entry for it.

    The task file sets each dataset's sampling strategy:

    * "full": every example, whatever the limits.
    * "random" (the default): at most N examples, a seeded choice in file order. N is `max_num_instances_per_task` for
      train, `max_num_instances_per_eval_task` for dev; test has no limit. The published code takes the *first* N
      under this name, which in a file sorted by label are all of one label.

    Args:
        cache_dir: folder of the Arrow files; None is the `datasets` library's own cache. Ranks that share it wait for
            the first of them.
        overwrite_cache: rebuild the cached examples, on the first rank of each machine.

    Raises:
        InputError: an invalid file, example, label or name, found before anything is written.
    """
    sources = _sources(task_config_dir, options)
    instructions = _choose_instructions(sources, options)
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "cl_benchmark"
    check_writable(cache)
    folder = cache / _cache_key(sources, options)
    rebuild = overwrite_cache and os.environ.get("LOCAL_RANK", "0") == "0"
    with locked(f"{folder}.lock"):  # one rank builds while the others wait, and none opens a folder being replaced
        if folder.is_dir() and not _is_intact(folder):
            logger.warning("%s: the cached examples are damaged, and are built again", folder)
            rebuild = True
        if rebuild or not folder.is_dir():
            built = _build(sources, instructions, options)
            with whole_folder(folder) as partial:
                built.save_to_disk(partial, num_shards=dict.fromkeys(built, 1))  # an empty split gets none by itself
                write_json(partial / DIGESTS, _digests(partial))
        return datasets.load_from_disk(folder)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    return {str(path.relative_to(folder)): digest(path) for path in files}


def _is_intact(folder: Path) -> bool:
    """Return whether a folder of the cache holds what was written there."""
    try:
        return read_json(folder / DIGESTS) == _digests(folder)
    except InputError:
        return False


def read_examples(task_config_dirs: Iterable[str | os.PathLike], options: ExampleOptions) -> Iterator[dict]:
    """The examples of many steps, each file read once and nothing written, to check a complete order.

    Raises:
        InputError: as `load_uie_dataset`.
    """
    listed = [source for step in task_config_dirs for source in _sources(step, options)]
    instructions = _choose_instructions(listed, options)
    for source in dict.fromkeys(listed):
        yield from _examples(source, instructions[source.task], options)


def data_files(task_config_dir: str | os.PathLike, options: ExampleOptions) -> dict[str, Path]:
    """Every file that a step's examples are made from, by a name that does not depend on the folders' location.

    Raises:
        InputError: a task file is invalid, or names a dataset that the benchmark does not have.
    """
    files = {"instructions": Path(options.instruction_file)}
    files |= {f"{subset}_tasks.json": Path(task_config_dir) / f"{subset}_tasks.json" for subset in SUBSETS}
    for source in _sources(task_config_dir, options):
        files |= {f"{source.task}/{source.dataset}/{path.name}": path for path in source.files(options)}
    return files


def prompt_parts(example: dict, *, add_task_name: bool, add_dataset_name: bool) -> tuple[str, str, str]:
    """Split an example's prompt into (head, sentence, tail), of which only the sentence may be cut.

    The head holds the `Task:` and `Dataset:` lines if asked for, instruction, options and few-shot samples; the tail
    is the answer cue. In a sample, as in training, one space separates the answer from the cue.
    """
    head = f"Task:{example['Task']}\n" if add_task_name else ""
    head += f"Dataset:{example['Dataset']}\n" if add_dataset_name else ""
    head += example["Instance"]["instruction"]
    for sample in example["Samples"]:
        head += f"{sample['sentence']}{ANSWER_CUE} {sample['label']}\n"
    return head, example["Instance"]["sentence"], ANSWER_CUE


def read_instructions(path: str | os.PathLike) -> dict[str, dict[str, list[str]]]:
    """Task -> instruction type ("zero-shot", "few-shot") -> instructions in file order, each ending in a newline.

    Raises:
        InputError: unreadable, or not an object of task -> array of {"instruction_type", "instruction"}.
    """
    instructions = {}
    for task, (_, entries) in _read_tasks(path).items():
        instructions[task] = {kind: [] for kind in INSTRUCTION_TYPES}
        for index, entry in enumerate(entries):
            where = f"{path}, {task}, entry {index}"
            _check_object(entry, ("instruction_type", "instruction"), where)
            kind, text = entry["instruction_type"], entry["instruction"]
            if kind not in INSTRUCTION_TYPES:
                raise InputError(f"{where}: instruction_type {kind!r}; allowed: {', '.join(INSTRUCTION_TYPES)}")
            instructions[task][kind].append(text if text.endswith("\n") else text + "\n")
    return instructions


def read_metrics(path: str | os.PathLike) -> dict[str, str]:
    """Task -> one of `METRICS`, from an instruction file."""
    return {task: metric for task, (metric, _) in _read_tasks(path).items()}


def _read_tasks(path: str | os.PathLike) -> dict[str, tuple[str, list]]:
    """Task -> its metric and its instructions: an array, or an object of both."""
    tasks = {}
    for task, entries in read_object(path, "an object of task -> array of instructions").items():
        metric = METRICS[0]
        if isinstance(entries, dict) and set(entries) == {"metric", "instructions"}:
            metric, entries = entries["metric"], entries["instructions"]
        if metric not in METRICS:
            raise InputError(f"{path}, {task}: metric {metric!r}; allowed: {', '.join(METRICS)}")
        if not isinstance(entries, list):
            raise InputError(f"{path}, {task}: found {json_kind(entries)}; allowed: an array of instructions")
        tasks[task] = (metric, entries)
    return tasks


def read_labels(path: str | os.PathLike) -> list[str]:
    """The answers of a dataset, in the order of the options line.

    Raises:
        InputError: unreadable, or not a non-empty array of distinct, non-blank strings; or two of them differ only in
            case, spaces or punctuation, so that exact match would count a wrong answer as correct, or in how Unicode
            composes the same characters.
    """
    labels = read_json(path)
    if not isinstance(labels, list) or not labels:
        raise InputError(f"{path}: found {json_kind(labels)}; allowed: a non-empty array of strings")
    scored_as: dict[str, str] = {}
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip() or label in labels[:index]:
            raise InputError(f"{path}, entry {index}: found {label!r}; allowed: distinct, non-blank strings")
        twin = scored_as.setdefault(normalise(unicodedata.normalize("NFC", label)), label)
        if twin is not label:
            raise InputError(
                f"{path}, entry {index}: found {label!a} beside {twin!a}; allowed: labels that differ in more than "
                "case, spaces and punctuation, which the score ignores, and Unicode's composition of characters"
            )
    return labels


def read_rows(path: str | os.PathLike, labels: list[str] | None) -> list[dict[str, str]]:
    """The labelled examples of a data file as {"id", "sentence", "label"}; id is the index in the file.

    In dev.json and test.json, examples labelled "-" are left out and their number is logged, unless "-" is one of
    `labels`. Without `labels` answers are free text.

    Raises:
        InputError: unreadable, not an array, no labelled example, or an example (named by its index) that is not
            {"sentence": non-blank string, "label": one of `labels`}.
    """
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: found {json_kind(content)}; allowed: a non-empty array of examples")
    may_lack_label = Path(path).stem in ("dev", "test") and UNLABELLED not in (labels or ())
    rows = []
    for index, row in enumerate(content):
        where = f"{path}, example {index}"
        _check_object(row, ("sentence", "label"), where)
        if may_lack_label and row["label"] == UNLABELLED:
            continue
        if labels is not None and row["label"] not in labels:
            raise InputError(f"{where}: label {row['label']!r}; allowed: {', '.join(labels)}")
        rows.append({"id": str(index), "sentence": row["sentence"], "label": row["label"]})
    if not rows:
        raise InputError(f"{path}: {len(content)} examples, all labelled {UNLABELLED!r}; at least one needs a label")
    if len(rows) < len(content):
        logger.info("%s: left out %d examples labelled %r", path, len(content) - len(rows), UNLABELLED)
    return rows


def _check_object(entry: Any, keys: tuple[str, str], where: str) -> None:
    """Reject anything but an object with exactly these two keys and non-blank strings."""
    allowed = f"allowed: an object of exactly {keys[0]!r} and {keys[1]!r}, both non-blank strings"
    if not isinstance(entry, dict):
        raise InputError(f"{where}: found {json_kind(entry)}; {allowed}")
    if set(entry) != set(keys):
        raise InputError(f"{where}: keys {', '.join(map(repr, entry)) or 'none'}; {allowed}")
    for key in keys:
        if not isinstance(entry[key], str):
            raise InputError(f"{where}: {key} is {json_kind(entry[key])}; {allowed}")
        if not entry[key].strip():
            raise InputError(f"{where}: {key} is blank; {allowed}")


def _sources(task_config_dir: str | os.PathLike, options: ExampleOptions) -> list[_Source]:
    """The datasets that a step's task files name, in their order, with every file inside the benchmark."""
    data_dir, sources, metrics = Path(options.data_dir), [], read_metrics(options.instruction_file)
    for subset in SUBSETS:
        config = Path(task_config_dir) / f"{subset}_tasks.json"
        for task, listed in read_task_config(config).items():
            if task not in (known := {*TASKS, *metrics}):
                raise InputError(f"{config}: unknown task {task!r}; allowed: the published ones, and those in "
                                 f"{options.instruction_file}{nearest(task, known)}")
            for entry in listed:
                name = entry["dataset name"]
                source = _Source(subset, task, name, entry["sampling strategy"], data_dir / task / name,
                                 metrics.get(task, METRICS[0]))
                if not source.folder.is_dir():
                    known = ", ".join(benchmark_datasets(data_dir)) or "none"
                    raise InputError(f"{config}: {task}/{name} is not in {data_dir}; allowed: {known}")
                for path in source.files(options):
                    _check_place(path, data_dir)
                sources.append(source)
    return sources


def _check_place(path: Path, data_dir: Path) -> None:
    """Reject a file that is missing, or that a link puts outside the benchmark."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; data/prepare_benchmark.py fills CL_Benchmark, and --data_dir (of the scripts "
            "DATA_DIR) names another benchmark"
        )
    place = path.resolve()
    if not place.is_relative_to(data_dir.resolve()):
        raise InputError(f"{path}: a link to {place}; allowed: files inside {data_dir}")


def _cache_key(sources: list[_Source], options: ExampleOptions) -> str:
    """A digest of what decides the examples: entries of the task files, contents of the files, options, this module."""
    contents = {"data_dir": None, "instruction_file": digest(options.instruction_file)}  # paths do not count
    parts: list[Any] = [digest(__file__), dataclasses.asdict(options) | contents]
    for source in sources:
        parts.append([source.subset, source.task, source.dataset, source.strategy])
        parts.append([digest(path) for path in source.files(options)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _build(sources: list[_Source], instructions: dict[str, list[str]], options: ExampleOptions) -> datasets.DatasetDict:
    """Read, check and lay out every source; a split without datasets is empty."""
    examples: dict[str, list[dict]] = {split: [] for split in SPLITS.values()}
    for source in sources:
        examples[SPLITS[source.subset]] += _examples(source, instructions[source.task], options)
    columns = {split: {name: [one[name] for one in of] for name in FEATURES} for split, of in examples.items()}
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(of_split, features=FEATURES) for split, of_split in columns.items()}
    )


def _choose_instructions(sources: Iterable[_Source], options: ExampleOptions) -> dict[str, list[str]]:
    """The instructions to draw from for each task; none for COPA, unless the file has an entry for it."""
    kind = "few-shot" if options.num_examples else "zero-shot"
    path = options.instruction_file
    available = {task: texts[kind] for task, texts in read_instructions(path).items()}
    chosen = {}
    for task in dict.fromkeys(source.task for source in sources):
        texts = available.get(task, [])
        if not texts and (task != "COPA" or task in available):
            found = ", ".join(name for name in available if available[name]) or "none"
            raise InputError(f"{path}: no {kind} instruction for task {task}; allowed: {found}")
        chosen[task] = texts if options.instruction_strategy == "multiple" else texts[:1]
    return chosen


def _examples(source: _Source, instructions: list[str], options: ExampleOptions) -> list[dict]:
    """The examples of one file, laid out as `FEATURES`."""
    labels = read_labels(source.file("labels")) if source.metric == "exact_match" else None
    rows = _choose(read_rows(source.file(source.subset), labels), source, options)
    pool = read_rows(source.file("train"), labels) if options.num_examples else []
    examples = []
    for row in rows:
        instruction = ""
        if instructions:
            instruction = options.generator("instruction", source, row["id"]).choice(instructions)
        if instructions and labels:
            instruction += f"Option: {', '.join(labels)} \n"
        examples.append({
            "Task": source.task,
            "Dataset": source.dataset,
            "Metric": source.metric,
            "subset": source.subset,
            "Samples": _samples(pool, row, source, options),
            "Instance": {**row, "ground_truth": row["label"], "instruction": instruction},
        })
    return examples


def _choose(rows: list[dict], source: _Source, options: ExampleOptions) -> list[dict]:
    """Apply the sampling strategy, the limits and over-sampling."""
    limit = options.limit(source.subset)
    if limit is None:
        return rows
    draw = options.generator("rows", source)
    if source.strategy == "random" and limit < len(rows):
        return [rows[index] for index in sorted(draw.sample(range(len(rows)), limit))]
    if options.over_sampling and source.subset == "train" and limit > len(rows):
        return rows + draw.choices(rows, k=limit - len(rows))
    return rows


def _samples(pool: list[dict], row: dict, source: _Source, options: ExampleOptions) -> list[dict]:
    """Draw `num_examples` examples of `pool`, the dataset's train.json, without `row` itself."""
    own_id = row["id"] if source.subset == "train" else None
    wanted = options.num_examples
    drawn = options.generator("samples", source, row["id"]).sample(pool, min(wanted + 1, len(pool)))
    samples = [{"sentence": other["sentence"], "label": other["label"]} for other in drawn if other["id"] != own_id]
    if len(samples) < wanted:
        raise InputError(
            f"--num_examples: {wanted}; allowed: at most {len(samples)}, the other examples of {source.file('train')}"
        )
    return samples[:wanted]
