"""Fill the benchmark folder with its 15 datasets, from the public hub or from a folder that already has this layout.

From the hub, a dataset gets up to 1,000 training examples per class and a test set of the published size, both drawn
with --seed; labels.json is the one in this repository. Unlike the published files, dev.json is not a copy of test.json:
it holds training examples that train.json does not use, as many as test.json if there are enough. Only CB and COPA,
which use all their training examples, have dev = test. Finished datasets are skipped, so that an interrupted run
resumes.

Examples: python data/prepare_benchmark.py
          python data/prepare_benchmark.py --datasets SC/amazon TC/dbpedia
          python data/prepare_benchmark.py --from ../my_copy
"""

import argparse
import logging
import random
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

from datasets import load_dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
from errors import InputError, entry_point
from files import atomic_folder, check_writable, write_json
from order_config import BENCHMARK_FILES, SUBSETS, benchmark_datasets, is_complete
from uie_dataset_lora import read_labelled, read_labels

logger = logging.getLogger("gorp")

ROOT = Path(__file__).resolve().parent.parent
TRAIN_ROWS_PER_CLASS = 1000

Row = dict[str, str]
Load = Callable[..., Any]


def _fields(columns: dict[str, str], end: str = "") -> Callable[[dict], str]:
    """A function that writes a hub example as lines ``marker: value`` and `end`, given marker -> column."""
    return lambda row: "\n".join(f"{marker}: {_line(row[column])}" for marker, column in columns.items()) + end


def _line(value: str | None) -> str:
    """A value on one line: a line break becomes the characters backslash and n, as in the published yelp examples."""
    return (value or "").replace("\r\n", "\\n").replace("\n", "\\n")


def _yahoo(row: dict) -> str:
    """The details are the question and the summary its title; without details, the summary is the question."""
    if (row["question_content"] or "").strip():
        lines = {"Title": "question_title", "Question": "question_content", "Answer": "best_answer"}
    else:
        lines = {"Question": "question_title", "Answer": "best_answer"}
    return _fields(lines, end="\n")(row)


def _copa(row: dict) -> str:
    question = f'Which sentence is the {row["question"]} of "{row["premise"]}"? Choose one between A and B.'
    return f"{question}\nA: {row['choice1']}\nB: {row['choice2']}"


def _sst2(row: dict) -> str:
    return f"Text: {row['sentence'].strip()} "  # the space is in the published examples


def _wic(row: dict) -> str:
    return f"word: {row['word']}\n{row['sentence1']}\n{row['sentence2']}"


@dataclass(frozen=True)
class Source:
    """Where the hub has a dataset, and how its examples become the benchmark's.

    Attributes:
        repo, config, test_split: the arguments for ``datasets.load_dataset``; training examples come from "train".
        train_rows, test_rows: the published sizes.
        sentence: hub example -> sentence.
        classes: labels in the order of the hub's class numbers, comma-separated.
        label_column, first_class: the column of the class number, and the lowest number.
    """

    repo: str
    config: str | None
    test_split: str
    train_rows: int
    test_rows: int
    sentence: Callable[[dict], str]
    classes: str
    label_column: str = "label"
    first_class: int = 0

    @cached_property
    def labels(self) -> dict[int, str]:
        """Class number -> label."""
        return dict(enumerate(self.classes.split(", "), self.first_class))

    def row(self, hub_row: dict) -> Row:
        """A hub example in the benchmark's form."""
        number = int(hub_row[self.label_column])
        if number not in self.labels:
            allowed = f"{min(self.labels)} to {max(self.labels)}"
            raise InputError(f"{self.repo}: a row has {self.label_column} {number}; allowed: {allowed}")
        return {"label": self.labels[number], "sentence": self.sentence(hub_row)}


STARS = "very negative, negative, neutral, positive, very positive"
NEWS = "World, Sports, Business, Science or Technology"
ENTITIES = (
    "Company, Educational Institution, Artist, Athlete, Office Holder, Mean of Transportation, Building, "
    "Natural Place, Village, Animal, Plant, Album, Film, Written Work"
)
TOPICS = (
    "Society & Culture, Science & Mathematics, Health, Education & Reference, Computers & Internet, Sports, "
    "Business & Finance, Entertainment & Music, Family & Relationships, Politics & Government"
)
BOOLEAN = "False, True"

TEXT = _fields({"Text": "text"}, end="\n")
REVIEW = _fields({"Title": "review_title", "Text": "review_text"}, end="\n")
ARTICLE = _fields({"Title": "title", "Text": "content"}, end="\n")
STORY = _fields({"Title": "title", "Text": "description"}, end="\n")
PREMISE = _fields({"sentence 1": "premise", "sentence 2": "hypothesis"})
PAIR = _fields({"sentence 1": "sentence1", "sentence 2": "sentence2"})
QUESTIONS = _fields({"first sentence": "question1", "second sentence": "question2"})
PASSAGE = _fields({"question": "question", "passage": "passage"})
PARAGRAPH = _fields({"paragraph": "paragraph", "question": "question", "candidate answer": "answer"})

AMAZON = "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes"
YAHOO = "community-datasets/yahoo_answers_topics"
GLUE, SUPERGLUE = "nyu-mll/glue", "aps/super_glue"

SOURCES = {
    "SC/yelp": Source("Yelp/yelp_review_full", None, "test", 5000, 7600, TEXT, STARS),
    "SC/amazon": Source(AMAZON, None, "test", 5000, 7600, REVIEW, STARS, "class_index", 1),
    "SC/IMDB": Source("stanfordnlp/imdb", None, "test", 2000, 7600, itemgetter("text"), "Bad, Good"),
    "SC/SST-2": Source(GLUE, "sst2", "validation", 2000, 872, _sst2, "Bad, Good"),
    "TC/dbpedia": Source("fancyzhx/dbpedia_14", None, "test", 14000, 7600, ARTICLE, ENTITIES),
    "TC/agnews": Source("sh0416/ag_news", None, "test", 4000, 7600, STORY, NEWS, "label", 1),
    "TC/yahoo": Source(YAHOO, None, "test", 10000, 7600, _yahoo, TOPICS, "topic"),
    "NLI/MNLI": Source(GLUE, "mnli", "validation_matched", 3000, 7600, PREMISE, "entailment, neutral, contradiction"),
    "NLI/CB": Source(SUPERGLUE, "cb", "validation", 250, 56, PREMISE, "entailment, contradiction, neutral"),
    "NLI/RTE": Source(GLUE, "rte", "validation", 2000, 277, PAIR, "entailment, contradiction"),
    "QQP/QQP": Source(GLUE, "qqp", "validation", 2000, 7600, QUESTIONS, BOOLEAN),
    "BoolQA/BoolQA": Source(SUPERGLUE, "boolq", "validation", 2000, 3270, PASSAGE, BOOLEAN),
    "MultiRC/MultiRC": Source(SUPERGLUE, "multirc", "validation", 2000, 4848, PARAGRAPH, BOOLEAN),
    "COPA/COPA": Source(SUPERGLUE, "copa", "validation", 400, 100, _copa, "A, B"),
    "WiC/WiC": Source(SUPERGLUE, "wic", "validation", 2000, 638, _wic, BOOLEAN),
}


class Reservoir:
    """A uniform sample of at most `size` of the items added, whatever their number (Vitter's algorithm R)."""

    def __init__(self, size: int, draw: random.Random):
        self.items: list = []
        self._size, self._draw, self._seen = size, draw, 0

    def add(self, item: Any) -> None:
        self._seen += 1
        if len(self.items) < self._size:
            self.items.append(item)
        elif (slot := self._draw.randrange(self._seen)) < self._size:
            self.items[slot] = item


def prepare_from_hub(
    data_dir: str | Path,
    names: Sequence[str] | None = None,
    *,
    seed: int = 42,
    overwrite: bool = False,
    load: Load = load_dataset,
) -> None:
    """Fill `data_dir` from the hub, one dataset after the other, each written completely or not at all.

    Args:
        names: ``TASK/DATASET`` keys of `SOURCES`; None is all of them.
        seed: decides which examples are drawn, and their order.
        overwrite: replace finished datasets.
        load: ``datasets.load_dataset``, or a function that is called like it.

    Raises:
        InputError: an unknown name, a folder that cannot be written, a download that fails, or an invalid example.
    """
    for name in names or ():
        if name not in SOURCES:
            raise InputError(f"--datasets: {name}; allowed: {', '.join(SOURCES)}")
    for name in _unfinished(data_dir, names or SOURCES, overwrite):
        target = Path(data_dir) / name
        rows = hub_subsets(name, seed=seed, load=load)
        labels = read_labels(ROOT / "CL_Benchmark" / name / "labels.json")
        with atomic_folder(target) as partial:
            write_json(partial / "labels.json", labels)
            for subset in SUBSETS:
                write_json(partial / f"{subset}.json", rows[subset], indent=None)
                read_labelled(partial / f"{subset}.json", labels)
        logger.info("%s: %s", target, ", ".join(f"{len(rows[subset])} {subset} examples" for subset in SUBSETS))


def hub_subsets(name: str, *, seed: int, load: Load) -> dict[str, list[Row]]:
    """The train, dev and test examples of one dataset, drawn in one pass over each hub split.

    Memory holds the drawn examples only. No training example has the text of a test example, and no dev example has
    that of a training example.
    """
    source = SOURCES[name]
    draw = random.Random(f"{seed}/{name}")
    test = Reservoir(source.test_rows, draw)
    for row in _hub_rows(name, source.test_split, load):
        test.add(row)
    tested = {row["sentence"] for row in test.items}
    spare = -(-source.test_rows // len(source.labels))
    pools = {label: Reservoir(TRAIN_ROWS_PER_CLASS + spare, draw) for label in source.labels.values()}
    for row in _hub_rows(name, "train", load):
        if row["sentence"] not in tested:
            pools[row["label"]].add(row)
    train, rest = [], []
    for pool in pools.values():
        draw.shuffle(pool.items)
        train += pool.items[:TRAIN_ROWS_PER_CLASS]
        rest += pool.items[TRAIN_ROWS_PER_CLASS:]
    trained = {row["sentence"] for row in train}
    dev = [row for row in rest if row["sentence"] not in trained]
    draw.shuffle(train)
    draw.shuffle(dev)
    for subset, rows, published in (("train", train, source.train_rows), ("test", test.items, source.test_rows)):
        if len(rows) != published:
            logger.warning("%s: %d %s examples; the published benchmark has %d", name, len(rows), subset, published)
    return {"train": train, "dev": dev[: source.test_rows] or test.items, "test": test.items}


def _hub_rows(name: str, split: str, load: Load) -> Iterator[Row]:
    """The examples of one hub split in the benchmark's form, streamed, with a progress bar."""
    source = SOURCES[name]
    try:
        hub_rows = load(source.repo, source.config, split=split, streaming=True)
        for hub_row in tqdm(hub_rows, desc=f"{name} {split}", unit=" examples", unit_scale=True):
            yield source.row(hub_row)
    except InputError:
        raise
    except Exception as error:  # the hub's libraries raise errors of many families, with no common base
        raise InputError(
            f"{name}: the hub's {source.repo}, split {split}, cannot be read ({type(error).__name__}: {error}); "
            "try again when the network is back, or use --from FOLDER"
        ) from error


def prepare_from_folder(
    data_dir: str | Path, folder: str | Path, names: Sequence[str] | None = None, *, overwrite: bool = False
) -> None:
    """Copy datasets from a folder of the same layout, after checking every example of all of them.

    Args:
        names: ``TASK/DATASET`` to copy; None copies all complete ones, and the log says which are missing.

    Raises:
        InputError: a requested dataset is missing, `folder` has none, or a file or example is bad.
    """
    present = benchmark_datasets(folder)
    complete = [name for name in present if is_complete(Path(folder) / name)]
    for name in names or ():
        if name not in complete:
            raise InputError(f"--datasets: {folder} lacks {name}, or has it in part; allowed: {', '.join(complete)}")
    if not complete:
        wanted = f"TASK/DATASET folders with {', '.join(BENCHMARK_FILES)}"
        raise InputError(f"--from: {folder} has no complete dataset; allowed: {wanted}")
    chosen = _unfinished(data_dir, names or complete, overwrite)
    files = {name: Path(folder) / name / "labels.json" for name in chosen}
    labels = {name: read_labels(path) for name, path in files.items() if path.exists()}
    for name in [name for name in files if name not in labels]:
        logger.info("%s: no labels.json, so its answers are free text", name)
    for name in tqdm(chosen, desc="checking", unit=" datasets"):
        for subset in SUBSETS:
            read_labelled(Path(folder) / name / f"{subset}.json", labels.get(name))
    for name in chosen:
        with atomic_folder(Path(data_dir) / name) as partial:
            if name in labels:
                write_json(partial / "labels.json", labels[name])
            for subset in SUBSETS:
                shutil.copyfile(Path(folder) / name / f"{subset}.json", partial / f"{subset}.json")
        logger.info("%s: copied from %s", Path(data_dir) / name, folder)
    missing = [name for name in dict.fromkeys([*SOURCES, *present]) if name not in complete]
    if names is None and missing:
        logger.warning("%s lacks, or has in part: %s", folder, ", ".join(missing))


def _unfinished(data_dir: str | Path, names: Iterable[str], overwrite: bool) -> list[str]:
    """The names of the datasets that are to be written; the log says which are finished."""
    check_writable(data_dir)
    finished = [name for name in names if is_complete(Path(data_dir) / name) and not overwrite]
    for folder in (Path(data_dir) / name for name in names if name not in finished and not overwrite):
        if own := sorted(path.name for path in folder.glob("[!.]*") if path.name != "labels.json"):
            missing = [name for name in BENCHMARK_FILES if not (folder / name).exists()]
            raise InputError(f"{folder}: holds {own[0]}, which would be deleted, and lacks {', '.join(missing)}; "
                             "complete the folder (data/generate_labels.py writes labels.json), move it away, or pass "
                             "--overwrite")
    if finished:
        logger.info("finished already: %s (--overwrite prepares them again)", ", ".join(finished))
    return [name for name in dict.fromkeys(names) if name not in finished]


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="CL_Benchmark", help="folder to fill (default: %(default)s)")
    parser.add_argument("--datasets", nargs="+", metavar="TASK/DATASET", help="only these (default: all)")
    parser.add_argument("--from", dest="folder", metavar="FOLDER", help="copy from here instead of the hub")
    parser.add_argument("--seed", type=int, default=42, help="decides which examples are drawn (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="prepare finished datasets again")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    common = {"names": arguments.datasets, "overwrite": arguments.overwrite}
    if arguments.folder:
        prepare_from_folder(arguments.data_dir, arguments.folder, **common)
    else:
        prepare_from_hub(arguments.data_dir, **common, seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
