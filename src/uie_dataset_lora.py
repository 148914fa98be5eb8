"""The benchmark as instruction examples: `<data_dir>/<TASK>/<DATASET>/{train,dev,test,labels}.json` -> `DatasetDict`.

`load_uie_dataset` reads the datasets that a step's task files name, and checks every example. `prompt_parts` splits an
example into the parts of its prompt, which the collator tokenises.
"""

import dataclasses
import logging
import os
import random
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

from compute_metrics import normalise
from errors import InputError, nearest
from files import json_kind, read_json, read_object
from order_config import LIMITS, SUBSETS, TASKS, benchmark_datasets, read_task_config

logger = logging.getLogger("gorp")

SPLITS = dict(zip(SUBSETS, ("train", "validation", "test")))
INSTRUCTION_STRATEGIES = ("single", "multiple")
INSTRUCTION_TYPES = ("zero-shot", "few-shot")
METRICS = ("exact_match", "rougeL")
"""How a task is scored: by exact match with one of its labels, or, where answers are free text, by ROUGE-L."""
ANSWER_CUE = "\nAnswer:"
UNLABELLED = "-"
"""GLUE's mark for a dev or test example without a gold label."""

_TEXT = datasets.Value("string")
_EXAMPLE = {"sentence": _TEXT, "label": _TEXT}
FEATURES = datasets.Features(
    {
        **dict.fromkeys(("Task", "Dataset", "Metric", "subset"), _TEXT),
        "Samples": datasets.List(_EXAMPLE),
        "Instance": {"id": _TEXT, **_EXAMPLE, "ground_truth": _TEXT, "instruction": _TEXT},
    }
)


@dataclasses.dataclass(frozen=True)
class ExampleOptions:
    """What decides a step's examples besides its task files."""

    data_dir: str | os.PathLike
    instruction_file: str | os.PathLike
    instruction_strategy: str = "single"  # a task's first instruction; "multiple": a seeded choice for each example
    max_num_instances_per_task: int | None = LIMITS["train"]  # None or below 0: no limit
    max_num_instances_per_eval_task: int | None = LIMITS["dev"]
    # Labelled examples of its dataset's train.json that each prompt shows (`Samples`, a seeded choice without the
    # example itself), after one of the task's "few-shot" instructions.
    num_examples: int = 0
    over_sampling: bool = False  # repeat seeded training examples up to the limit, under either sampling strategy
    seed: int = 42

    def __post_init__(self) -> None:
        if self.instruction_strategy not in INSTRUCTION_STRATEGIES:
            allowed = ", ".join(INSTRUCTION_STRATEGIES)
            raise InputError(f"--instruction_strategy: {self.instruction_strategy!r}; allowed: {allowed}")
        if self.num_examples < 0:
            raise InputError(f"--num_examples: {self.num_examples}; allowed: 0 or more")

    def limit(self, subset: str) -> int | None:
        """The maximum number of examples of `subset` ("train", "dev", "test") to keep; None means all."""
        limit = {"train": self.max_num_instances_per_task, "dev": self.max_num_instances_per_eval_task}.get(subset)
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
    instructions: tuple[str, ...]  # to draw from

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def files(self, options: ExampleOptions) -> list[Path]:
        """The files to read: examples, labels (none for free text) and, for few-shot prompts, the examples to show."""
        names = [self.subset] + ["labels"] * (self.metric == "exact_match") + ["train"] * (options.num_examples > 0)
        return [self.file(name) for name in names]


def load_uie_dataset(
    task_config_dir: str | os.PathLike, options: ExampleOptions, subsets: Iterable[str] = SUBSETS
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

    `subsets` are those to read of "train", "dev" and "test". Anything invalid in a file raises InputError.
    """
    sources, splits = _sources(task_config_dir, options), datasets.DatasetDict()
    for subset in subsets:
        examples = [one for source in sources if source.subset == subset for one in _examples(source, options)]
        columns = {name: [example[name] for example in examples] for name in FEATURES}
        splits[SPLITS[subset]] = datasets.Dataset.from_dict(columns, features=FEATURES)
    return splits


def read_examples(task_config_dirs: Iterable[str | os.PathLike], options: ExampleOptions) -> Iterator[dict]:
    """The examples of many steps, each file read once and nothing written, to check a complete order."""
    listed = [source for step in task_config_dirs for source in _sources(step, options)]
    for source in dict.fromkeys(listed):
        yield from _examples(source, options)


def data_files(
    task_config_dir: str | os.PathLike, options: ExampleOptions, subsets: Collection[str] = SUBSETS
) -> dict[str, Path]:
    """Every file that a step's examples come from, by a name that does not depend on where the folders are."""
    files = {"instructions": Path(options.instruction_file)}
    files |= {f"{subset}_tasks.json": Path(task_config_dir) / f"{subset}_tasks.json" for subset in subsets}
    for source in _sources(task_config_dir, options):
        if source.subset in subsets:
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


def read_instructions(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """The tasks of an instruction file, each an array of instructions, or an object of them and a metric.

    Returns:
        Task -> "metric", one of `METRICS`; "zero-shot" and "few-shot", lists of instructions in file order, each ending
        in a newline.
    """
    tasks = {}
    for task, entries in read_object(path, "an object of task -> array of instructions").items():
        metric, texts = METRICS[0], {kind: [] for kind in INSTRUCTION_TYPES}
        if isinstance(entries, dict) and set(entries) == {"metric", "instructions"}:
            metric, entries = entries["metric"], entries["instructions"]
        if metric not in METRICS:
            raise InputError(f"{path}, {task}: metric {metric!r}; allowed: {', '.join(METRICS)}")
        if not isinstance(entries, list):
            raise InputError(f"{path}, {task}: found {json_kind(entries)}; allowed: an array of instructions")
        for index, entry in enumerate(entries):
            where = f"{path}, {task}, entry {index}"
            _check_object(entry, ("instruction_type", "instruction"), where)
            kind, text = entry["instruction_type"], entry["instruction"]
            if kind not in INSTRUCTION_TYPES:
                raise InputError(f"{where}: instruction_type {kind!r}; allowed: {', '.join(INSTRUCTION_TYPES)}")
            texts[kind].append(text if text.endswith("\n") else text + "\n")
        tasks[task] = {"metric": metric, **texts}
    return tasks


def read_labels(path: str | os.PathLike) -> list[str]:
    """The answers of a dataset, in the order of the options line: distinct, non-blank strings.

    Two labels that differ only in case, spaces or punctuation are rejected, because exact match would count a wrong
    answer as correct; so are two that differ only in how Unicode composes the same characters.
    """
    labels = read_json(path)
    if not isinstance(labels, list) or not labels:
        raise InputError(f"{path}: found {json_kind(labels)}; allowed: a non-empty array of strings")
    check_labels(labels, f"{path}, entry")
    return labels


def check_labels(labels: list, where: str) -> None:
    """Reject what `read_labels` describes; `where` and an index name a label in messages."""
    scored_as: dict[str, str] = {}
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip() or label in labels[:index]:
            raise InputError(f"{where} {index}: found {label!r}; allowed: distinct, non-blank strings")
        twin = scored_as.setdefault(normalise(_composed(label)), label)
        if twin is not label:
            raise InputError(f"{where} {index}: found {label!a} beside {twin!a}; allowed: labels that differ in more "
                             "than case, spaces and punctuation, which the score ignores, and Unicode's composition of "
                             "characters")


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def read_labelled(path: str | os.PathLike, labels: list[str] | None) -> list[dict[str, str]]:
    """The labelled examples of a data file as {"id", "sentence", "label"}; id is the index in the file.

    In dev.json and test.json, examples labelled "-" are left out and their number is logged, unless "-" is one of
    `labels`. Without `labels` answers are free text.
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
            found = row["label"]
            twins = [label for label in labels if _composed(label) == _composed(found)]
            hint = f" ({found!a} and {twins[0]!a} are the same characters, composed differently)" if twins else ""
            raise InputError(f"{where}: label {found!r}; allowed: {', '.join(labels)}{hint}")
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
        if not isinstance(entry[key], str) or not entry[key].strip():
            fault = "blank" if isinstance(entry[key], str) else json_kind(entry[key])
            raise InputError(f"{where}: {key} is {fault}; {allowed}")


def _sources(task_config_dir: str | os.PathLike, options: ExampleOptions) -> list[_Source]:
    """The datasets that a step's task files name, in their order, with every file inside the benchmark."""
    data_dir, sources, instructions = Path(options.data_dir), [], read_instructions(options.instruction_file)
    for subset in SUBSETS:
        config = Path(task_config_dir) / f"{subset}_tasks.json"
        for task, listed in read_task_config(config).items():
            if task not in (known := {*TASKS, *instructions}):
                raise InputError(f"{config}: unknown task {task!r}; allowed: the published ones, and those in "
                                 f"{options.instruction_file}{nearest(task, known)}")
            metric = instructions[task]["metric"] if task in instructions else METRICS[0]
            for entry in listed:
                name = entry["dataset name"]
                texts = _choose_instructions(task, instructions, options)
                folder = data_dir / task / name
                source = _Source(subset, task, name, entry["sampling strategy"], folder, metric, texts)
                if not folder.is_dir():
                    known = ", ".join(benchmark_datasets(data_dir)) or "none"
                    raise InputError(f"{config}: {task}/{name} is not in {data_dir}; allowed: {known}")
                for path in source.files(options):
                    _check_place(path, data_dir)
                sources.append(source)
    return sources


def _check_place(path: Path, data_dir: Path) -> None:
    """Reject a file that is missing, or that a link puts outside the benchmark."""
    if not path.is_file():
        hint = ("data/prepare_benchmark.py fills CL_Benchmark, and --data_dir (DATA_DIR for the scripts) names another "
                "benchmark")
        if path.name == "labels.json" and (path.parent / "train.json").is_file():
            hint = ("data/generate_labels.py writes it. A task of free-text answers needs none, if the instruction "
                    'file gives its metric, "rougeL"')
        raise InputError(f"{path}: no such file; {hint}")
    place = path.resolve()
    if not place.is_relative_to(data_dir.resolve()):
        raise InputError(f"{path}: a link to {place}; allowed: files inside {data_dir}")


def _choose_instructions(task: str, instructions: dict[str, dict], options: ExampleOptions) -> tuple[str, ...]:
    """The instructions to draw from for a task; none for COPA, unless the file has an entry for it."""
    kind = "few-shot" if options.num_examples else "zero-shot"
    texts = instructions.get(task, {kind: []})[kind]
    if not texts and (task != "COPA" or task in instructions):
        found = ", ".join(name for name, own in instructions.items() if own[kind]) or "none"
        raise InputError(f"{options.instruction_file}: no {kind} instruction for task {task}; allowed: {found}")
    return tuple(texts if options.instruction_strategy == "multiple" else texts[:1])


def _examples(source: _Source, options: ExampleOptions) -> list[dict]:
    """The examples of one file, with the fields of `FEATURES`."""
    labels = read_labels(source.file("labels")) if source.metric == "exact_match" else None
    rows = _choose(read_labelled(source.file(source.subset), labels), source, options)
    pool = read_labelled(source.file("train"), labels) if options.num_examples else []
    offered = f"Option: {', '.join(labels)} \n" if labels else ""
    examples = []
    for row in rows:
        instruction = ""
        if source.instructions:
            instruction = options.generator("instruction", source, row["id"]).choice(source.instructions) + offered
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
        logger.info("%s, %s: %d of %d examples, sampled", source.dataset, source.subset, limit, len(rows))
        return [rows[index] for index in sorted(draw.sample(range(len(rows)), limit))]
    if options.over_sampling and source.subset == "train" and limit > len(rows):
        return rows + draw.choices(rows, k=limit - len(rows))
    if limit < len(rows) and limit != LIMITS[source.subset]:  # was asked for
        logger.warning("%s, %s: the limit of %d examples is ignored, as the order's sampling strategy is full; "
                       "--max_train_samples and --max_eval_samples limit them", source.dataset, source.subset, limit)
    return rows


def _samples(pool: list[dict], row: dict, source: _Source, options: ExampleOptions) -> list[dict]:
    """Draw `num_examples` examples of `pool`, the dataset's train.json, without `row` itself."""
    own_id = row["id"] if source.subset == "train" else None
    wanted = options.num_examples
    drawn = options.generator("samples", source, row["id"]).sample(pool, min(wanted + 1, len(pool)))
    samples = [{"sentence": other["sentence"], "label": other["label"]} for other in drawn if other["id"] != own_id]
    if len(samples) < wanted:
        raise InputError(f"--num_examples: {wanted}; allowed: at most {len(samples)}, the other examples of "
                         f"{source.file('train')}")
    return samples[:wanted]
