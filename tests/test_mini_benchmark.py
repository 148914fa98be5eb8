"""The mini benchmark: complete, repeatable, in the real shape, and neither trivial nor hopeless for word counts."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from helpers import ROOT

SCRIPT = ROOT / "data" / "mini_benchmark.py"
SPLITS = ("train", "dev", "test")

# What every sentence of a dataset looks like, and the accuracy band that word counts must fall into.
SHAPES = {
    "SC/yelp": (r"Text: [^\n]+\n", 0.88, 0.99),
    "SC/amazon": (r"Title: [^\n]+\nText: [^\n]+\n", 0.88, 0.99),
    "SC/IMDB": (r"i saw [^\n]+<br />[^\n]+", 0.88, 0.99),
    "SC/SST-2": (r"Text: [^\n]+ \. ", 0.88, 0.99),
    "TC/dbpedia": (r"Title: [^\n]+\nText: [^\n]+\n", 0.88, 0.995),
    "TC/agnews": (r"Title: [^\n]+\nText: [^\n]+\n", 0.88, 0.99),
    "TC/yahoo": (r"(Title: [^\n]+\n)?Question: [^\n]+\nAnswer: [^\n]+\n", 0.88, 0.995),
    "NLI/MNLI": (r"sentence 1: [^\n]+\nsentence 2: [^\n]+", 0.60, 0.98),
    "NLI/CB": (r"sentence 1: [^\n]+\nsentence 2: [^\n]+", 0.50, 0.95),
    "NLI/RTE": (r"sentence 1: [^\n]+\nsentence 2: [^\n]+", 0.65, 0.98),
    "QQP/QQP": (r"first sentence: [^\n]+\nsecond sentence: [^\n]+", 0.65, 0.95),
    "BoolQA/BoolQA": (r"question: [^\n]+\npassage: [^\n]+", 0.65, 0.95),
    "MultiRC/MultiRC": (r"paragraph: [^\n]+\nquestion: [^\n]+\ncandidate answer: [^\n]+", 0.65, 0.95),
    "COPA/COPA": (
        r'Which sentence is the (cause|effect) of "[^\n]+"\? Choose one between A and B\.\nA: [^\n]+\nB: [^\n]+',
        0.65,
        0.95,
    ),
    "WiC/WiC": (r"word: [^\n]+\n[^\n]+\n[^\n]+", 0.65, 0.95),
}


def generate(out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--out", out, *options]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def rows_of(benchmark: Path, dataset: str, split: str) -> list[dict]:
    return json.loads((benchmark / dataset / f"{split}.json").read_text(encoding="utf-8"))


def counted_words(sentence: str) -> list[str]:
    """Words, words with the line they stand on, and how many longer words two lines share."""
    lines = [re.findall(r"\w+", line.lower()) for line in sentence.strip().split("\n")]
    words = [word for line in lines for word in line]
    placed = [f"{number}:{word}" for number, line in enumerate(lines) for word in line]
    shared = [f"{one}={two}" for two in range(len(lines)) for one in range(two)
              for word in set(lines[one]) & set(lines[two]) if len(word) > 3]
    return words + placed + shared


def test_holds_the_15_datasets_with_their_real_labels(mini_benchmark):
    found = {f"{path.parent.parent.name}/{path.parent.name}" for path in mini_benchmark.glob("*/*/labels.json")}
    assert found == set(SHAPES)
    for dataset in SHAPES:
        real = ROOT / "CL_Benchmark" / dataset / "labels.json"
        assert json.loads((mini_benchmark / dataset / "labels.json").read_text()) == json.loads(real.read_text())


@pytest.mark.parametrize("dataset", SHAPES)
def test_rows_have_the_real_shape_and_even_labels(mini_benchmark, dataset):
    labels = json.loads((mini_benchmark / dataset / "labels.json").read_text())
    for split in SPLITS:
        rows = rows_of(mini_benchmark, dataset, split)
        assert all(set(row) == {"sentence", "label"} for row in rows)
        assert all(re.fullmatch(SHAPES[dataset][0], row["sentence"]) for row in rows)
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(labels) and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("dataset", SHAPES)
def test_splits_have_their_sizes_and_share_no_sentence(mini_benchmark, dataset):
    sentences = {split: [row["sentence"] for row in rows_of(mini_benchmark, dataset, split)] for split in SPLITS}
    assert 120 <= len(sentences["train"]) <= 1700 and len(sentences["dev"]) == len(sentences["test"]) == 100
    together = [sentence for split in SPLITS for sentence in sentences[split]]
    assert len(set(together)) == len(together)


@pytest.mark.parametrize("dataset", SHAPES)
def test_word_counts_neither_fail_nor_suffice(mini_benchmark, dataset):
    train = rows_of(mini_benchmark, dataset, "train")
    unseen = rows_of(mini_benchmark, dataset, "dev") + rows_of(mini_benchmark, dataset, "test")
    counter = CountVectorizer(analyzer=counted_words)
    model = LogisticRegression(max_iter=1000).fit(
        counter.fit_transform(row["sentence"] for row in train), [row["label"] for row in train])
    accuracy = model.score(counter.transform(row["sentence"] for row in unseen), [row["label"] for row in unseen])
    _, lowest, highest = SHAPES[dataset]
    assert lowest <= accuracy <= highest


def test_a_seed_names_one_benchmark(mini_benchmark, tmp_path):
    assert generate(tmp_path / "same").returncode == 0 and generate(tmp_path / "other", "--seed", "7").returncode == 0
    for path in mini_benchmark.glob("*/*/*.json"):
        relative = path.relative_to(mini_benchmark)
        assert (tmp_path / "same" / relative).read_bytes() == path.read_bytes()
        if path.name != "labels.json":
            assert (tmp_path / "other" / relative).read_bytes() != path.read_bytes()


def test_refuses_to_touch_what_is_there(tmp_path):
    kept = tmp_path / "mine" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("keep")
    run = generate(kept.parent)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "already there" in run.stderr
    assert [path.name for path in kept.parent.iterdir()] == ["notes.txt"]


def test_says_in_one_line_that_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    run = generate(tmp_path / "file" / "benchmark")
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
