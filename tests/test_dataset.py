"""The loader: the exact prompt of each dataset, sampling, few-shot, and bad input beside test_bad_input.py."""

import json
import logging

import pytest
from datasets import Dataset

from errors import InputError
from helpers import GOLDEN, INSTRUCTIONS, REAL_BENCHMARK, Benchmark, put
from order_config import TASKS
from task_examples import first_examples_of_each
from task_setup import warn_of_lost_labels
from uie_dataset_lora import FEATURES, prompt_parts


@pytest.fixture
def benchmark(tmp_path):
    return Benchmark(tmp_path)


@pytest.fixture
def golden(benchmark):
    for (task, dataset), (labels, sentence, label, _) in GOLDEN.items():
        benchmark.add(task, dataset, labels, [{"label": label, "sentence": sentence}], **{"sampling strategy": "full"})
    return benchmark


def numbered(count, labels=("False", "True")):
    return [{"sentence": f"question {index}", "label": labels[index % len(labels)]} for index in range(count)]


def ids(rows):
    return [int(row["Instance"]["id"]) for row in rows]


# Prompts


def prompt(example, *, names=True):
    return "".join(prompt_parts(example, add_task_name=names, add_dataset_name=names))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_dataset_has_its_exact_prompt(golden, split):
    rows = golden.load()[split]
    found = {(row["Task"], row["Dataset"]): prompt(row) for row in rows}
    assert found == {key: expected for key, (_, _, _, expected) in GOLDEN.items()}
    assert [row["Task"] for row in rows] == sorted((task for task, _ in GOLDEN), key=TASKS.index)


def test_row_layout(golden):
    rows = golden.load()
    row = next(row for row in rows["validation"] if row["Dataset"] == "CB")
    assert rows["train"].features == FEATURES
    assert row == {
        "Task": "NLI",
        "Dataset": "CB",
        "Metric": "exact_match",
        "subset": "dev",
        "Samples": [],
        "Instance": {
            "id": "0",
            "sentence": "sentence 1: I think she left. Did she?\nsentence 2: she left",
            "label": "neutral",
            "ground_truth": "neutral",
            "instruction": INSTRUCTIONS["NLI"] + "Option: entailment, contradiction, neutral \n",
        },
    }


@pytest.mark.parametrize(
    "task_name, dataset_name, start",
    [
        (False, False, "What is the text"),
        (True, False, "Task:TC\nWhat"),
        (False, True, "Dataset:agnews\nWhat"),
    ],
)
def test_names_are_prefixed_only_where_asked_for(golden, task_name, dataset_name, start):
    row = next(row for row in golden.load()["test"] if row["Dataset"] == "agnews")
    head, sentence, tail = prompt_parts(row, add_task_name=task_name, add_dataset_name=dataset_name)
    assert head.startswith(start) and head.endswith(" \n")
    assert (sentence, tail) == (row["Instance"]["sentence"], "\nAnswer:")


def test_braces_in_instructions_and_labels_are_text(benchmark):
    benchmark.add("QQP", "QQP", ["{0}", "a}"], [{"sentence": "{x", "label": "{0}"}])
    benchmark.instruct({"QQP": [("zero-shot", "Which {} {?\n")]})
    assert prompt(benchmark.load()["train"][0], names=False) == "Which {} {?\nOption: {0}, a} \n{x\nAnswer:"


def test_an_instruction_without_newline_gets_one(benchmark):
    benchmark.add("QQP", "QQP", ["False", "True"], numbered(1))
    benchmark.instruct({"QQP": [("zero-shot", "Same?")]})
    assert benchmark.load()["train"][0]["Instance"]["instruction"] == "Same?\nOption: False, True \n"


def test_copa_uses_an_entry_of_its_own(benchmark):
    benchmark.add("COPA", "COPA", ["A", "B"], [{"sentence": "Why?\nA: x\nB: y", "label": "A"}])
    benchmark.instruct({"COPA": [("zero-shot", "Pick.\n")]})
    assert prompt(benchmark.load()["train"][0], names=False) == "Pick.\nOption: A, B \nWhy?\nA: x\nB: y\nAnswer:"


def test_instruction_strategies(benchmark):
    benchmark.add("QQP", "QQP", ["False", "True"], numbered(60))
    benchmark.instruct({"QQP": [("zero-shot", f"Wording {index}\n") for index in range(3)]})

    def wordings(**options):
        return [row["Instance"]["instruction"].split("\n")[0] for row in benchmark.load(**options)["train"]]

    assert set(wordings()) == {"Wording 0"}
    drawn = wordings(instruction_strategy="multiple")
    assert set(drawn) == {"Wording 0", "Wording 1", "Wording 2"}
    assert drawn == wordings(instruction_strategy="multiple")
    assert drawn != wordings(instruction_strategy="multiple", seed=7)


# Sampling


def test_full_keeps_every_row_and_random_a_seeded_choice_in_file_order(benchmark):
    benchmark.add("QQP", "full", ["False", "True"], numbered(50), **{"sampling strategy": "full"})
    benchmark.add("QQP", "random", ["False", "True"], numbered(50), **{"sampling strategy": "random"})
    benchmark.add("QQP", "unnamed", ["False", "True"], numbered(50))

    def chosen(dataset, split, **options):
        rows = benchmark.load(max_num_instances_per_task=20, max_num_instances_per_eval_task=5, **options)[split]
        return ids(row for row in rows if row["Dataset"] == dataset)

    assert all(chosen("full", split) == list(range(50)) for split in ("train", "validation", "test"))
    for dataset in ("random", "unnamed"):
        train = chosen(dataset, "train")
        assert len(set(train)) == 20 and train == sorted(train) and train != list(range(20))
        assert len(chosen(dataset, "validation")) == 5
        assert chosen(dataset, "test") == list(range(50))
        assert train == chosen(dataset, "train") != chosen(dataset, "train", seed=1)


def test_a_sample_is_reported(benchmark, caplog):
    benchmark.add("QQP", "QQP", ["False", "True"], numbered(50), **{"sampling strategy": "random"})
    with caplog.at_level(logging.INFO, "gorp"):
        benchmark.load(max_num_instances_per_task=20, max_num_instances_per_eval_task=-1)
    assert caplog.messages == ["QQP, train: 20 of 50 examples, sampled"]


def test_a_limit_that_the_orders_strategy_ignores_is_reported(benchmark, caplog):
    benchmark.add("QQP", "QQP", ["False", "True"], numbered(300), **{"sampling strategy": "full"})
    with caplog.at_level(logging.WARNING, "gorp"):
        assert len(benchmark.load()["validation"]) == 300  # the default of 200 was not asked for
        assert not caplog.messages
        assert len(benchmark.load(max_num_instances_per_task=20)["train"]) == 300
    assert caplog.messages == ["QQP, train: the limit of 20 examples is ignored, as the order's sampling strategy is "
                               "full; --max_train_samples and --max_eval_samples limit them"]


@pytest.mark.parametrize("limit", [None, -1])
def test_no_limit(benchmark, limit):
    benchmark.add("QQP", "QQP", ["False", "True"], numbered(300))
    rows = benchmark.load(max_num_instances_per_task=limit, max_num_instances_per_eval_task=limit)
    assert {split: len(part) for split, part in rows.items()} == {"train": 300, "validation": 300, "test": 300}


@pytest.mark.parametrize("strategy", ["full", "random"])
def test_over_sampling_repeats_training_examples_up_to_the_limit(strategy, benchmark):
    benchmark.add("QQP", "QQP", ["False", "True"], numbered(6), **{"sampling strategy": strategy})
    rows = benchmark.load(over_sampling=True, max_num_instances_per_task=40, max_num_instances_per_eval_task=40)
    assert ids(rows["train"])[:6] == list(range(6)) and len(rows["train"]) == 40
    assert set(ids(rows["train"])[6:]) <= set(range(6)) and len(set(ids(rows["train"])[6:])) > 1
    assert len(rows["validation"]) == len(rows["test"]) == 6


def test_a_limit_that_loses_all_examples_of_a_label_is_reported(caplog):
    labels, kinds = "aaab", {"mine": "exact_match", "free": "rougeL"}
    rows = [{"Dataset": name, "Metric": metric, "Instance": {"label": label}}
            for name, metric in kinds.items() for label in labels]  # fmt: skip
    examples = Dataset.from_list(rows)
    kept = first_examples_of_each(examples, 3)
    with caplog.at_level(logging.WARNING, "gorp"):
        warn_of_lost_labels(examples, examples, "train")
        warn_of_lost_labels(examples, kept, "test")
    [said] = caplog.messages
    assert said.startswith("mine: the first test examples, which a limit keeps, lack 1 of 2 labels, such as 'b'")


def test_a_split_without_datasets_is_empty(benchmark):
    benchmark.add("QQP", "QQP", ["False", "True"], numbered(3), subsets=("train", "test"))
    rows = benchmark.load()
    assert {split: len(part) for split, part in rows.items()} == {"train": 3, "validation": 0, "test": 3}
    assert rows["validation"].features == FEATURES


# Few-shot


def test_few_shot_shows_other_rows_of_train(benchmark):
    folder = benchmark.add("QQP", "QQP", ["False", "True"], numbered(8))
    put(folder / "test.json", [{"sentence": "test question", "label": "True"}])
    benchmark.instruct({"QQP": [("zero-shot", "Zero\n"), ("few-shot", "Few\n")]})
    rows = benchmark.load(num_examples=3)
    train = {row["sentence"]: row["label"] for row in numbered(8)}
    for row in rows["train"]:
        shown = [sample["sentence"] for sample in row["Samples"]]
        assert len(set(shown)) == 3 and row["Instance"]["sentence"] not in shown
        assert all(train[sample["sentence"]] == sample["label"] for sample in row["Samples"])
    assert len({row["Samples"][0]["sentence"] for row in rows["train"]}) > 1
    [row] = rows["test"]
    first, second, third = row["Samples"]
    assert prompt(row, names=False) == (
        "Few\nOption: False, True \n"
        f"{first['sentence']}\nAnswer: {first['label']}\n"
        f"{second['sentence']}\nAnswer: {second['label']}\n"
        f"{third['sentence']}\nAnswer: {third['label']}\n"
        "test question\nAnswer:"
    )


def test_few_shot_may_show_all_other_rows_but_no_more(benchmark):
    folder = benchmark.add("COPA", "COPA", ["A", "B"], numbered(4, "AB"))
    rows = benchmark.load(num_examples=3)
    for row in rows["train"]:
        others = {f"question {index}" for index in range(4)} - {row["Instance"]["sentence"]}
        assert {sample["sentence"] for sample in row["Samples"]} == others
    expected = f"--num_examples: 4; allowed: at most 3, the other examples of {folder / 'train.json'}"
    with pytest.raises(InputError, match=f"^{expected}$"):
        benchmark.load(num_examples=4)


# Bad input


def test_rows_without_gold_label_are_left_out_with_one_line(benchmark, caplog):
    rows = numbered(4)
    rows[1]["label"] = rows[2]["label"] = "-"
    folder = benchmark.add("QQP", "QQP", ["False", "True"], rows, subsets=("dev", "test"))
    with caplog.at_level(logging.INFO, logger="gorp"):
        loaded = benchmark.load()
    assert ids(loaded["test"]) == ids(loaded["validation"]) == [0, 3]
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / name}: left out 2 examples labelled '-'" for name in ("dev.json", "test.json")
    ]


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("SC", {"num_examples": 1}, "no few-shot instruction for task SC; allowed: TC"),
        ("NLI", {}, "no zero-shot instruction for task NLI; allowed: SC"),
        ("COPA", {}, "no zero-shot instruction for task COPA; allowed: SC"),
    ],
)
def test_missing_instructions(benchmark, task, options, message):
    benchmark.add(task, "mine", ["False", "True"], numbered(4))
    benchmark.instruct({"SC": [("zero-shot", "x")], "TC": [("few-shot", "x")], "COPA": []})
    with pytest.raises(InputError) as error:
        benchmark.load(**options)
    assert str(error.value) == f"{benchmark.instructions}: {message}"


def test_a_negative_number_of_examples_to_show(golden):
    with pytest.raises(InputError, match="^--num_examples: -1; allowed: 0 or more$"):
        golden.load(num_examples=-1)


# Real data


@pytest.mark.skipif(not REAL_BENCHMARK.is_dir(), reason="the small real benchmark is not here")
def test_every_row_of_the_small_benchmark_gets_through(benchmark):
    benchmark.data = REAL_BENCHMARK
    for labels in REAL_BENCHMARK.glob("*/*/labels.json"):
        for listed in benchmark.listed.values():
            listed[labels.parts[-3]].append({"dataset name": labels.parts[-2], "sampling strategy": "full"})
    benchmark.configure()
    rows = benchmark.load()
    for subset, split in (("train", "train"), ("dev", "validation"), ("test", "test")):
        files = REAL_BENCHMARK.glob(f"*/*/{subset}.json")
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        assert len(rows[split]) == sum(row["label"] != "-" for content in contents for row in content)
        assert all(prompt(row).count(row["Instance"]["sentence"]) >= 1 for row in rows[split])
