"""The accuracy matrix from result folders, its measures, the table and the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from errors import InputError
from report import matrix as module
from report.matrix import (
    accuracy_matrix,
    average_performance,
    backward_transfer,
    forgetting,
    forward_transfer,
    format_table,
    measure,
    unseen_accuracy,
    zero_shot_matrix,
)

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


def table(folder):
    tasks, matrix = accuracy_matrix(folder)
    return format_table(tasks, matrix, measure(folder, tasks, matrix))


def write_part(folder, step, part, values, **more):
    results = {f"{part}_exact_match_for_{name}": value for name, value in values.items()}
    (folder / "outputs" / step / f"{part}_results.json").write_text(json.dumps(results | more))


def test_forgetting_counts_from_the_best_value_ever_reached():
    matrix = [[80.0, None, None], [90.0, 50.0, None], [60.0, 55.0, 70.0]]
    assert forgetting(matrix) == pytest.approx(((90 - 60) + (50 - 55)) / 2)
    assert forgetting(matrix[:1]) is None
    assert forgetting([[80.0, None], [None, 50.0]]) is None


def test_forward_transfer_is_the_gain_over_the_untrained_model(order):
    folder = order(DONE)
    write_part(folder, "1-dbpedia", "zero_shot", {"dbpedia": 5.0, "amazon": 10.0, "yahoo": 20.0})
    write_part(folder, "2-amazon", "zero_shot", {"amazon": 16.0, "yahoo": 1.0})
    before = zero_shot_matrix(folder, TASKS)
    assert before == [[5.0, 10.0, 20.0], [None, 16.0, 1.0], [None] * 3]
    assert (forward_transfer(before, 1), forward_transfer(before, 3)) == (None, None)
    assert forward_transfer(before, 2) == 6.0
    write_part(folder, "3-yahoo", "zero_shot", {"yahoo": 23.0})
    assert forward_transfer(zero_shot_matrix(folder, TASKS), 3) == pytest.approx((6 + 3) / 2)


def test_unseen_datasets_are_those_listed_whatever_their_kind_is_called(order):
    folder = order(DONE)
    step = folder / "outputs" / "3-yahoo"
    assert unseen_accuracy(step) == {}
    scores = {"BoolQA": 60.0, "NLI": 30.0, "CB": 20.0}
    write_part(folder, "3-yahoo", "unseen", scores, unseen_datasets=["BoolQA", "CB"])
    assert unseen_accuracy(step) == {"BoolQA": 60.0, "CB": 20.0}
    tasks, matrix = accuracy_matrix(folder)
    assert measure(folder, tasks, matrix)["unseen_accuracy"] == 40.0


def test_steps_are_sorted_as_numbers(order):
    tasks = [f"task-{i}" for i in range(1, 12)]
    assert accuracy_matrix(order([{task: 1.0} for task in tasks], tasks))[0] == tasks


def test_unfinished_order_has_the_measures_of_its_latest_task(order):
    folder = order([DONE[0], DONE[1], None])
    _, matrix = accuracy_matrix(folder)
    assert matrix[2] == [None, None, None]
    assert average_performance(matrix) == 70.0
    assert backward_transfer(matrix) == -8.0
    assert "not finished: no results for 3-yahoo; the measures are those after 2-amazon" in table(folder)


def test_one_task_has_no_backward_transfer(order):
    _, matrix = accuracy_matrix(order(DONE[:1]))
    assert (average_performance(matrix), backward_transfer(matrix)) == (98.0, None)


def test_a_missing_value_gives_no_measure_rather_than_another_one(order):
    _, matrix = accuracy_matrix(order([DONE[0], None, {"dbpedia": 95.0, "yahoo": 70.0}]))
    assert (average_performance(matrix), backward_transfer(matrix)) == (None, None)


def test_rows_of_the_latest_task_alone_are_no_average_over_rows(order):
    """`--predict_tasks ends` tests all tasks only after the order's last."""
    folder = order([{"dbpedia": 98.0}, {"amazon": 50.0}, None])
    measures = measure(folder, *accuracy_matrix(folder))
    assert measures["average_performance"] is None and measures["average_over_rows"] is None


def test_nothing_measured():
    assert average_performance([[None]]) is None
    assert backward_transfer([]) is None


def test_table(order):
    assert table(order(DONE)).splitlines() == [
        "after      dbpedia  amazon  yahoo",
        "1-dbpedia    98.00       -      -",
        "2-amazon     90.00   50.00      -",
        "3-yahoo      95.00   44.50  70.00",
        "",
        "average performance (AP)  69.83",
        "the same over examples    1.00",
        "backward transfer (BWT)   -4.25",
        "forgetting (F)            4.25",
    ]


@pytest.mark.parametrize("content, fault", [
    ("{", "not JSON"),
    ("[]", "found empty array; allowed: an object of metrics"),
    ('{"predict_exact_match_for_dbpedia": "98"}', "is '98'; allowed: a number"),
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
    with pytest.raises(InputError, match="found steps 1, 2, [24]; allowed: each"):
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
    assert done.stdout == table(folder) + "\n"
    assert json.loads((folder / "order_results.json").read_text()) == {
        "tasks": TASKS,
        "accuracy": [[98.0, None, None], [90.0, 50.0, None], [None, None, None]],
        "average_performance": 70.0,
        "average_over_rows": 1.0,
        "backward_transfer": -8.0,
        "forgetting": 8.0,
        "forward_transfer": None,
        "unseen_accuracy": None,
        "unfinished": ["3-yahoo"],
    }


def test_command_without_results_writes_nothing(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
