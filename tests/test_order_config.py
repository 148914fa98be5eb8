"""Orders of tasks: the six published ones, reading and writing, and faults beside those of test_bad_input.py."""

import json
from pathlib import Path

import pytest

import order_config
from errors import InputError
from helpers import ROOT, edit
from order_config import TASK_FILES, TASKS, read_order, write_order


PUBLISHED = {
    1: "dbpedia amazon yahoo agnews",
    2: "dbpedia amazon agnews yahoo",
    3: "yahoo amazon agnews dbpedia",
    4: "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    5: "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    6: "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
}
THREE = [("TC", "dbpedia"), ("SC", "amazon"), ("TC", "agnews")]


def pairs(steps) -> list[tuple[str, str]]:
    return [(step.task, step.dataset) for step in steps]


def entry(name: str, **more: str) -> dict[str, str]:
    return {"sampling strategy": "full", "dataset name": name, **more}


@pytest.fixture
def order(tmp_path) -> Path:
    write_order(tmp_path / "three_configs", THREE)
    return tmp_path / "three_configs"


@pytest.mark.parametrize("number", PUBLISHED)
def test_published_orders(number):
    steps = read_order(ROOT / f"configs/order{number}_configs")
    assert [step.dataset for step in steps] == PUBLISHED[number].split()
    assert [step.folder.name for step in steps] == PUBLISHED[number].split()
    for index, step in enumerate(steps):
        train, dev, test = (json.loads((step.folder / name).read_text()) for name in TASK_FILES)
        assert list(train) == list(dev) == list(test) == list(TASKS)
        assert train[step.task] == [entry(step.dataset)] and sum(map(len, train.values())) == 1
        assert not any(dev.values())
        seen = pairs(steps[: index + 1])
        assert test == {task: [entry(name) for owner, name in seen if owner == task] for task in TASKS}


def test_published_orders_agree_with_the_labels_in_the_repository():
    known = set(order_config.benchmark_datasets(ROOT / "CL_Benchmark"))
    for number in PUBLISHED:
        assert {f"{step.task}/{step.dataset}" for step in read_order(ROOT / f"configs/order{number}_configs")} <= known


def test_what_is_written_is_read_back(tmp_path):
    steps = write_order(tmp_path / "mine_configs", THREE, sampling="random")
    assert pairs(steps) == THREE
    assert read_order(tmp_path / "mine_configs") == steps
    test = order_config.read_task_config(steps[-1].folder / "test_tasks.json")
    assert [one["dataset name"] for one in test["TC"]] == ["dbpedia", "agnews"]
    assert {one["sampling strategy"] for task in TASKS for one in test[task]} == {"random"}


def test_task_order_and_default_strategy_do_not_depend_on_the_file(tmp_path):
    path = tmp_path / "train_tasks.json"
    path.write_text(
        '{"TC": [{"dataset name": "agnews"}], "SC": [{"dataset name": "yelp", "sampling strategy": "full"}]}'
    )
    config = order_config.read_task_config(path)
    assert list(config) == list(TASKS)
    assert config["TC"] == [{"sampling strategy": "random", "dataset name": "agnews"}]
    assert config["SC"] == [entry("yelp")] and config["COPA"] == []


def test_hidden_folders_are_no_steps(order):
    (order / ".ipynb_checkpoints").mkdir()
    assert pairs(read_order(order)) == THREE


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tasks: tasks["SC"].append("yelp"), r"SC\[1\]: found 'yelp'; allowed: an object with a string under"),
        (lambda tasks: tasks["SC"].append({"sampling strategy": "full"}), r"SC\[1\]: found .* 'dataset name'"),
        (lambda tasks: tasks["SC"][0].update({"sampling strategy": ["full"]}), r"is \['full'\]; allowed"),
        (lambda tasks: tasks["SC"].append(entry("agnews")), r"dataset 'agnews' is listed 2 times; allowed: once"),
        (lambda tasks: tasks.update(SC=[entry("yelp")]), r"test_tasks\.json: lacks SC/amazon of an earlier step"),
    ],
)
def test_faults_of_a_test_list(order, change, message):
    edit(order / "agnews/test_tasks.json", lambda tasks: change(tasks) or tasks)
    with pytest.raises(InputError, match=message):
        read_order(order)


def test_faulty_dev_list(order):
    edit(order / "amazon/dev_tasks.json", lambda tasks: tasks | {"..": []})
    with pytest.raises(InputError, match=r"amazon/dev_tasks\.json, task: found '..'"):
        read_order(order)


@pytest.mark.parametrize("name", TASK_FILES)
def test_missing_and_broken_files(order, name):
    (order / "amazon" / name).write_text("[]")
    with pytest.raises(InputError, match=f"amazon/{name}: found empty array; allowed: an object"):
        read_order(order)
    (order / "amazon" / name).write_text("{")
    with pytest.raises(InputError, match=f"amazon/{name}, line 1, column 2: not JSON"):
        read_order(order)
    (order / "amazon" / name).unlink()
    with pytest.raises(InputError, match=f"amazon/{name}: no such file; a step's folder holds train_tasks.json, dev"):
        read_order(order)


@pytest.mark.parametrize(
    "datasets, message",
    [
        ([], "an order without tasks"),
        ([("..", "x")], "../x, task: found '..'; allowed: letters"),
        ([("SC", "..")], "dataset name: found '..'; allowed: letters"),
        ([("SC", "a"), ("TC", "a")], "TC/a: dataset 'a' occurs twice in the order; allowed: once"),
    ],
)
def test_an_order_that_cannot_be_written_leaves_nothing(tmp_path, datasets, message):
    with pytest.raises(InputError, match=message):
        write_order(tmp_path / "bad_configs", datasets)
    assert not list(tmp_path.iterdir())


def test_an_existing_order_is_kept_unless_told(order):
    with pytest.raises(InputError, match="three_configs: exists already"):
        write_order(order, THREE[:1])
    assert pairs(read_order(order)) == THREE
    assert pairs(write_order(order, THREE[:1], overwrite=True)) == THREE[:1]
    assert [path.name for path in order.iterdir()] == ["dbpedia"]


def test_a_write_that_fails_half_way_leaves_the_old_order(order, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(order_config, "write_json", full_disk)
    with pytest.raises(OSError):
        write_order(order, THREE[:2], overwrite=True)
    assert pairs(read_order(order)) == THREE
    assert [path.name for path in order.parent.iterdir()] == [order.name]
