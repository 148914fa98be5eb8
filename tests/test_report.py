"""The accuracy matrix from result folders, its measures, the table and the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from errors import InputError
from report import matrix as module
from report.matrix import accuracy_matrix, average_performance, backward_transfer, format_table

REPORT = Path(module.__file__).parent
DONE = [{"dbpedia": 98.0}, {"dbpedia": 90.0, "amazon": 50.0}, {"dbpedia": 95.0, "amazon": 44.5, "yahoo": 70.0}]
TASKS = ["dbpedia", "amazon", "yahoo"]


@pytest.fixture
def order(tmp_path):
    """Writes step folders: a dict gives a step its results, None leaves the folder without any."""
    def write(rows, tasks=TASKS):
        for i, (task, values) in enumerate(zip(tasks, rows), 1):
            folder = tmp_path / "outputs" / f"{i}-{task}"
            folder.mkdir(parents=True)
            if values is not None:
                results = {f"predict_exact_match_for_{name}": value for name, value in values.items()}
                (folder / "predict_results.json").write_text(json.dumps({"predict_exact_match": 1.0, **results}))
        return tmp_path
    return write


def test_matrix_of_a_finished_order(order):
    tasks, matrix = accuracy_matrix(order(DONE))
    assert tasks == TASKS
    assert matrix == [[98.0, None, None], [90.0, 50.0, None], [95.0, 44.5, 70.0]]
    assert average_performance(matrix) == pytest.approx((95 + 44.5 + 70) / 3)
    assert backward_transfer(matrix) == pytest.approx(((95 - 98) + (44.5 - 50)) / 2)


def test_steps_are_sorted_as_numbers(order):
    tasks = [f"task-{i}" for i in range(1, 12)]
    assert accuracy_matrix(order([{task: 1.0} for task in tasks], tasks))[0] == tasks


def test_unfinished_order_has_the_measures_of_its_latest_task(order):
    tasks, matrix = accuracy_matrix(order([DONE[0], DONE[1], None]))
    assert matrix[2] == [None, None, None]
    assert average_performance(matrix) == 70.0
    assert backward_transfer(matrix) == -8.0
    assert "not finished: no results of 3-yahoo; AP and BWT are those after 2-amazon" in format_table(tasks, matrix)


def test_one_task_has_no_backward_transfer(order):
    _, matrix = accuracy_matrix(order(DONE[:1]))
    assert (average_performance(matrix), backward_transfer(matrix)) == (98.0, None)


def test_a_missing_value_gives_no_measure_rather_than_another_one(order):
    _, matrix = accuracy_matrix(order([DONE[0], None, {"dbpedia": 95.0, "yahoo": 70.0}]))
    assert (average_performance(matrix), backward_transfer(matrix)) == (None, None)


def test_nothing_measured():
    assert average_performance([[None]]) is None
    assert backward_transfer([]) is None


def test_table(order):
    assert format_table(*accuracy_matrix(order(DONE))).splitlines() == [
        "after      dbpedia  amazon  yahoo",
        "1-dbpedia    98.00       -      -",
        "2-amazon     90.00   50.00      -",
        "3-yahoo      95.00   44.50  70.00",
        "",
        "average performance (AP)  69.83",
        "backward transfer (BWT)   -4.25",
    ]


@pytest.mark.parametrize("content, fault", [
    ("{", "not JSON"),
    ("[]", "found list"),
    ('{"predict_exact_match_for_dbpedia": "98"}', "is '98'; expected a number"),
])
def test_unusable_results_file(order, content, fault):
    folder = order(DONE[:1])
    path = folder / "outputs" / "1-dbpedia" / "predict_results.json"
    path.write_text(content)
    with pytest.raises(InputError, match=fault) as raised:
        accuracy_matrix(folder)
    assert str(path) in str(raised.value)


def test_no_results(order, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        accuracy_matrix(tmp_path)
    with pytest.raises(InputError, match="no task has results"):
        accuracy_matrix(order([None, None]))


@pytest.mark.parametrize("extra", ["2-yahoo", "4-agnews"])
def test_steps_counted_twice_or_left_out_are_refused(order, extra):
    folder = order(DONE[:2])
    (folder / "outputs" / extra).mkdir()
    with pytest.raises(InputError, match="found steps 1, 2, [24]; allowed is"):
        accuracy_matrix(folder)


def test_other_things_beside_the_steps_are_ignored(order):
    folder = order(DONE[:1])
    (folder / "outputs" / "runs").mkdir()
    (folder / "outputs" / "1-notes.txt").write_text("")
    assert accuracy_matrix(folder)[0] == ["dbpedia"]


def run(folder):
    return subprocess.run([sys.executable, str(REPORT), str(folder)], capture_output=True, text=True, check=False)


def test_command_prints_the_table_and_writes_the_results(order):
    folder = order([*DONE[:2], None])
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == format_table(*accuracy_matrix(folder)) + "\n"
    assert json.loads((folder / "order_results.json").read_text()) == {
        "tasks": TASKS,
        "accuracy": [[98.0, None, None], [90.0, 50.0, None], [None, None, None]],
        "average_performance": 70.0,
        "backward_transfer": -8.0,
        "unfinished": ["3-yahoo"],
    }


def test_command_without_results_writes_nothing(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
