"""The report over many runs: what it counts, what its pages say, and that nothing in them is markup from outside."""

import csv
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy
import pytest

from errors import InputError
from helpers import edit, put
from report import figures as draw
from report import page
from report.__main__ import main
from report.runs import find_runs, interval, paired_difference, ranked_methods, read_run, select, summarise

REPORT = Path(page.__file__).parent
TASKS = ["dbpedia", "amazon", "agnews"]
LAST_ROW = {"gorp": 80.0, "olora": 70.0, "multitask": 85.0}  # of every task, order A, seed 1


def write_run(root: Path, method: str, order: str, seed: int, last: float, options: dict | None = None,
              model: str = "initial_model/tiny-t5", finished: int = 3, data: dict | None = None) -> Path:
    """An order's folder: 90 on each task right after its training, `last` on all tasks after the last one, which are
    the first rows of 100."""
    folder = root / f"{method}-{order}-{seed}-{len(list(root.iterdir())) if root.exists() else 0}"
    for i, task in enumerate(TASKS):
        step = folder / "outputs" / f"{i + 1}-{task}"
        about = {"method": method, "order": order, "seed": seed, "base_model": model, "values": 1000,
                 "trained_values": 10, "options": options or {}}
        put(step / "run_record.json", {"report": about, "data": data or {}})
        if i < finished:
            value = last if i == len(TASKS) - 1 else 90.0
            scores = {f"predict_exact_match_for_{name}": value for name in TASKS[: i + 1]}
            put(step / "predict_results.json", scores | {"predict_exact_match": value})
            put(step / "train_results.json", {"train_runtime": 20.0})
            put(step / "t5_adapter" / "adapter_model.safetensors", bytes(2_500_000 * (i + 1) // 3))
            rows = [{"Task": "TC", "Dataset": name, "Instance": {"label": "x"}, "Prediction": "x" if k < value else "y"}
                    for name in TASKS[: i + 1] for k in range(100)]
            (step / "predict_eval_predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three methods, two orders, two seeds; order B is 10 lower, seed 2 is 2 lower (gorp: 4)."""
    root = tmp_path / "runs"
    for method, best in LAST_ROW.items():
        for order, lower in (("A", 0), ("B", 10)):
            for seed in (1, 2):
                write_run(root, method, order, seed, best - lower - (seed - 1) * (4 if method == "gorp" else 2))
    return root


def test_an_average_has_an_interval_only_of_the_same_runs(runs):
    gorp = select(find_runs([runs]), method="gorp")
    assert interval(gorp).mean == pytest.approx(summarise(gorp, "average_performance").mean)
    (gorp[0].folder / "outputs" / "3-agnews" / "predict_eval_predictions.jsonl").unlink()
    assert interval(select(find_runs([runs]), method="gorp")) is None


def test_mean_counts_orders_alike_and_differences_are_paired(runs):
    found = find_runs([runs])
    assert len(found) == 12
    gorp, olora = select(found, method="gorp"), select(found, method="olora")
    result = summarise(gorp, "average_performance")
    assert (result.mean, result.count) == ((80 + 76 + 70 + 66) / 4, 4)
    assert result.spread == pytest.approx(6.2183, abs=1e-3)
    more = [*gorp, *[gorp[0]] * 5]  # more seeds of one order leave the orders' weights alone
    assert summarise(more, "average_performance").mean == pytest.approx(((80 * 6 + 76) / 7 + 68) / 2)
    gap = paired_difference(gorp, olora)
    assert (round(gap.mean, 9), gap.runs, gap.seeds) == (9.0, 4, 2) and gap.low < 9 < gap.high
    assert paired_difference(select(gorp, order="A"), select(olora, order="B")) is None
    assert ranked_methods(found) == ["multitask", "gorp", "olora"]


def test_answer_names_the_method_the_lead_and_the_cost(runs):
    said = page.conclusion(find_runs([runs]))
    assert said.startswith("Best: gorp, average performance 73.0 ± 6.2 over 4 runs, backward transfer -17.0.")
    assert re.search(r"It leads olora by 9\.0 \[-\d\.\d, 2\d\.\d\] points \(4 paired runs\), not significant", said)
    assert "60 s of training per order, 10 trainable parameters (1 % of the model), 2.50 MB saved between tasks" in said
    assert re.search(r"Against multitask, all tasks at once: -6\.0 \[-\d+\.\d, \+\d\.\d\] points, not", said)


def test_an_order_that_is_not_finished_is_not_compared(tmp_path):
    write_run(tmp_path, "inclora", "A", 1, 50.0, finished=2)
    runs = find_runs([tmp_path])
    assert runs[0].measures["average_performance"] == 90.0
    assert summarise(runs, "average_performance") is None and page.conclusion(runs) == "No order is finished yet."


def test_runs_that_are_not_finished_leave_the_others_pictures_and_costs_alone(tmp_path):
    write_run(tmp_path / "runs", "gorp", "A", 2, 70.0)
    killed = write_run(tmp_path / "runs", "gorp", "A", 1, 70.0, finished=1)
    for step in ("2-amazon", "3-agnews"):  # an order makes a task's folder when it comes to the task
        shutil.rmtree(killed / "outputs" / step)
    runs = find_runs([tmp_path / "runs", tmp_path])
    assert len(runs) == 2, "a folder within another counts once"
    page.write_report(runs, tmp_path / "report")
    said = (tmp_path / "report" / "report.md").read_text()
    assert "60 s of training per order" in said and "gorp, A, seed 1" in said
    assert ">70</text>" in (tmp_path / "report" / "figures" / "tiny-t5-A-gorp-matrix.svg").read_text()


def test_the_best_on_average_may_be_behind_where_both_were_run(tmp_path):
    write_run(tmp_path, "gorp", "A", 1, 60.0)
    write_run(tmp_path, "gorp", "B", 1, 90.0)
    write_run(tmp_path, "olora", "A", 1, 63.0)
    said = page.conclusion(find_runs([tmp_path]))
    assert re.search(r"On the same orders and seeds olora leads by 3\.0 \[\d\.\d, \d\.\d\] points", said)


def test_a_difference_weighs_orders_alike(tmp_path):
    for order, seed, ours in [("A", 1, 70.0), ("A", 2, 70.0), ("B", 1, 40.0)]:
        write_run(tmp_path, "gorp", order, seed, ours)
        write_run(tmp_path, "olora", order, seed, 60.0)
    runs = find_runs([tmp_path])
    gap = paired_difference(select(runs, method="gorp"), select(runs, method="olora"))
    assert (round(gap.mean, 9), gap.runs, gap.seeds) == ((10 - 20) / 2, 3, 1)


def test_runs_over_other_examples_are_not_paired(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, "gorp", "A", seed, 70.0)
        step = write_run(tmp_path, "olora", "A", seed, 60.0) / "outputs" / "3-agnews"
    lines = (step / "predict_eval_predictions.jsonl").read_text().splitlines(keepends=True)
    (step / "predict_eval_predictions.jsonl").write_text("".join(lines[:-1]))
    runs = find_runs([tmp_path])
    assert paired_difference(select(runs, method="gorp"), select(runs, method="olora")).runs == 1


def test_a_mean_over_fewer_orders_is_not_the_best(tmp_path):
    write_run(tmp_path, "gorp", "A", 1, 90.0)
    for order, value in (("A", 85.0), ("B", 40.0)):
        write_run(tmp_path, "olora", order, 1, value)
    runs = find_runs([tmp_path])
    assert ranked_methods(runs) == ["olora", "gorp"]
    assert "| gorp (1 of 2 orders) | " in page._method_table(runs, ranked_methods(runs))


@pytest.mark.parametrize("pairs, caution", [
    ([(70.0, 60.0), (60.0, 69.0)], ", not significant: the interval contains 0."),
    ([(70.0, 60.0)], "; an order has one seed only, so others may differ."),
    ([(70.0, 60.0), (70.0, 60.0)], "2 paired runs)."),
])  # fmt: skip
def test_the_answer_says_why_a_gap_is_not_significant(pairs, caution, tmp_path):
    for seed, (ours, theirs) in enumerate(pairs):
        write_run(tmp_path, "gorp", "A", seed, ours)
        write_run(tmp_path, "olora", "A", seed, theirs)
    assert caution in page.conclusion(find_runs([tmp_path]))


def test_a_lead_over_the_next_method_is_told_where_a_variant_comes_before_it(tmp_path):
    for rank, value in ((8, 70.0), (32, 65.0)):
        write_run(tmp_path, "gorp", "A", 1, value, {"galore_rank": rank})
    write_run(tmp_path, "olora", "A", 1, 60.0)
    said = page.conclusion(find_runs([tmp_path]))
    assert "It leads gorp (galore_rank=32) by 5.0" in said and "It leads olora by 10.0" in said


def test_the_next_method_is_one_with_a_finished_order(tmp_path):
    write_run(tmp_path, "gorp", "A", 1, 70.0)
    write_run(tmp_path, "olora", "A", 1, 70.0, finished=1)
    assert "olora" not in page.conclusion(find_runs([tmp_path]))


def test_without_predictions_there_is_no_difference(tmp_path):
    write_run(tmp_path, "gorp", "A", 1, 70.0)
    last = write_run(tmp_path, "olora", "A", 1, 60.0) / "outputs" / "3-agnews"
    (last / "predict_eval_predictions.jsonl").unlink()
    said = page.conclusion(find_runs([tmp_path]))
    assert "It has no order and seed in common with olora for which both have predictions." in said


def test_a_run_counts_once_and_other_data_make_another_method(tmp_path):
    write_run(tmp_path, "gorp", "A", 1, 70.0, data={"TC/dbpedia/train.json": "one"})
    write_run(tmp_path, "gorp", "A", 1, 60.0, data={"TC/dbpedia/train.json": "other"})
    assert len({run.method for run in find_runs([tmp_path])}) == 2
    write_run(tmp_path, "gorp", "A", 1, 70.0, data={"TC/dbpedia/train.json": "one"})
    with pytest.raises(InputError, match="gorp-A-1-2: gorp .*, A, seed 1 with the same options as .*gorp-A-1-0"):
        find_runs([tmp_path])


def change_record(step: Path, **changes) -> None:
    """Change parts of a step's record, in place."""
    edit(step / "run_record.json", lambda record: record | changes)


def test_a_later_task_and_the_base_model_count_too(tmp_path):
    """Each of these once counted as another seed of the same method."""
    options = {"num_train_epochs": 1.0}
    first, second, third, _ = (write_run(tmp_path, "gorp", "A", seed, 70.0, options) for seed in range(1, 5))
    change_record(second / "outputs" / "2-amazon", data={"SC/amazon/train.json": "other"})
    record = json.loads((third / "outputs" / "3-agnews" / "run_record.json").read_text())
    change_record(third / "outputs" / "3-agnews", report=record["report"] | {"options": {"num_train_epochs": 2.0}})
    method = {run.seed: run.method for run in find_runs([tmp_path])}
    assert method["1"] == method["4"] and len({*method.values()}) == 3
    change_record(first / "outputs" / "1-dbpedia", model={"base/model.safetensors": "other"})
    assert len({run.method for run in find_runs([tmp_path])}) == 4


def test_runs_that_have_come_as_far_are_compared_that_far(tmp_path):
    whole = write_run(tmp_path, "gorp", "A", 1, 70.0, {"galore_rank": 8})
    begun = write_run(tmp_path, "gorp", "A", 2, 70.0, {"galore_rank": 8}, finished=1)
    for run in (whole, begun):
        for number, step in enumerate(sorted((run / "outputs").iterdir())):
            change_record(step, data={"file": number})
    shutil.rmtree(begun / "outputs" / "3-agnews")
    (begun / "outputs" / "2-amazon" / "run_record.json").unlink()  # its model is being loaded
    assert {run.method for run in find_runs([tmp_path])} == {"gorp"}
    other = write_run(tmp_path, "gorp", "A", 3, 70.0, {"galore_rank": 8})
    change_record(other / "outputs" / "1-dbpedia", data={"file": "other"})
    method = {run.seed: run.method for run in find_runs([tmp_path])}
    assert method["1"] == method["2"] != method["3"]


def test_settings_of_all_runs_are_those_of_orders_of_any_length(tmp_path):
    write_run(tmp_path / "runs", "gorp", "A", 1, 70.0, {"galore_rank": 8})
    shorter = write_run(tmp_path / "runs", "gorp", "B", 1, 70.0, {"galore_rank": 8})
    shutil.rmtree(shorter / "outputs" / "3-agnews")
    page.write_report(find_runs([tmp_path / "runs"]), tmp_path / "report")
    assert "settings of all runs: galore\\_rank=8." in (tmp_path / "report" / "report.md").read_text()


def test_runs_of_a_method_with_other_options_are_other_methods(tmp_path):
    write_run(tmp_path, "gorp", "A", 1, 70.0, {"protect": "none", "galore_rank": 8})
    write_run(tmp_path, "gorp", "A", 1, 75.0, {"protect": "gp_first", "galore_rank": 8})
    write_run(tmp_path, "gorp", "B", 1, 75.0, {"protect": "gp_first", "galore_rank": 32})
    methods = {run.method: run.order for run in find_runs([tmp_path])}
    assert set(methods) == {"gorp (protect=none)", "gorp (protect=gp_first)"}


def test_a_name_has_the_fewest_options_that_tell_it_apart_and_the_page_all(tmp_path):
    variants = [("input", "gp_first", 8), ("input", "gp_first", 32), ("output", "gp_second", 8)]
    for values in variants:
        options = dict(zip(("protect_side", "protect", "galore_rank"), values))
        write_run(tmp_path / "runs", "gorp", "A", 1, 70.0, options)
    runs = find_runs([tmp_path / "runs"])
    assert {run.method for run in runs} == {
        "gorp (protect_side=input, galore_rank=8)",
        "gorp (protect_side=input, galore_rank=32)",
        "gorp (protect_side=output, galore_rank=8)",
    }
    page.write_report(runs, tmp_path / "report")
    said = (tmp_path / "report" / "report.html").read_text()
    assert "gorp (protect_side=output, galore_rank=8): protect_side=output, protect=gp_second, galore_rank=8" in said


def test_command_writes_pages_pictures_and_tables(runs, tmp_path):
    write_run(runs, "inclora", "A", 1, 50.0, finished=2)
    out = tmp_path / "report"
    done = subprocess.run([sys.executable, str(REPORT), str(runs), "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tiny-t5: Best: gorp" in done.stdout  # inclora is ahead after two tasks, but not finished
    html, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "secondary summaries" not in html  # published results stand beside models of their size alone
    for name in (*LAST_ROW, "dbpedia", "Made with", "Unfinished"):
        assert name in html and name in text
    assert "src=" not in html and "<script" not in html  # one file, offline
    assert not re.search('href="(?!#)', html)
    assert 'name="viewport"' in html and "color-scheme: light dark" in html and "@media print" in html
    figures = list((out / "figures").glob("*.svg"))
    assert len(figures) == 2 + 2 + 2 * 3  # methods; costs; curves of two orders; matrices of methods and orders
    for figure in figures:
        ElementTree.parse(figure)
        assert f"figures/{figure.name}" in text
    rows = list(csv.DictReader((out / "measures.csv").open()))
    assert len(rows) == 13
    best = next(row for row in rows if (row["method"], row["order"], row["seed"]) == ("gorp", "A", "1"))
    assert (best["average_performance"], best["backward_transfer"], best["forgetting"]) == ("80.0", "-10.0", "10.0")
    cells = list(csv.DictReader((out / "accuracy.csv").open()))
    assert len(cells) == 12 * 6 + 3
    [cell] = [cell for cell in cells if [cell[key] for key in ("method", "order", "seed", "step", "task")]
              == ["gorp", "A", "1", "2", "dbpedia"]]  # fmt: skip
    assert (cell["after"], cell["accuracy"]) == ("amazon", "90.0")
    again = subprocess.run([sys.executable, str(REPORT), str(runs), "--out", str(out)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr  # a report replaces a report


def test_the_table_of_methods_has_each_value_under_its_name(runs):
    found = find_runs([runs])
    head, _, *rows = [line.strip("| ").split(" | ") for line in
                      page._method_table(found, ranked_methods(found)).splitlines()]
    ceiling, best, olora = (dict(zip(head, row)) for row in rows)
    assert ceiling["method"] == "multitask (ceiling)" and ceiling["against the best"].startswith("+6.0 ")
    assert (best["method"], best["against the best"]) == ("gorp", "-")
    assert olora["against the best"].startswith("-9.0 ")
    assert [olora[name] for name in ("AP", "BWT", "F", "training", "trained", "stored", "runs")] == [
        "64.0 ± 5.9", "-26.0 ± 5.9", "26.0 ± 5.9", "60 s", "10", "2.50 MB", "4"]


def test_long_times_are_minutes(runs):
    found = find_runs([runs])
    for run in found:
        run.seconds = 5400
    assert page._costs(found)[0] == "90 min"


def test_figures_show_each_task_over_time_and_each_cost_on_its_axis(tmp_path):
    write_run(tmp_path, "gorp", "A", 1, 70.0)
    [run] = find_runs([tmp_path])
    look = draw.styles(["gorp"])
    panels = draw.curves({"gorp": [run]}, look, "t").axes
    assert [list(axes.lines[0].get_ydata()) for axes in panels] == [[90, 90, 70], [90, 70], [70]]
    [axes] = draw.heat_map(run.tasks, numpy.array(run.matrix, float), "t").axes
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0.5, 0.5): "90", (0.5, 1.5): "90", (1.5, 1.5): "90", (0.5, 2.5): "70", (1.5, 2.5): "70", (2.5, 2.5): "70"}
    cells = numpy.ma.filled(axes.collections[0].get_array(), numpy.nan).reshape(3, 3)
    numpy.testing.assert_array_equal(cells, numpy.array(run.matrix, float))
    costs = draw.costs({"gorp": (70.0, 60.0, 2.5)}, look, "t").axes
    assert [(axes.get_xlabel(), axes.lines[0].get_xdata()[0]) for axes in costs] == [
        ("training of an order, seconds", 60), ("kept between tasks, MB", 2.5)]


def colours_of(path: Path) -> set[str]:
    return {color for color in draw.COLOURS if color in path.read_text()}


def test_a_method_has_one_colour_in_every_figure_and_figures_come_as_pdf_too(runs, tmp_path):
    page.write_report(find_runs([runs]), tmp_path / "all", tmp_path / "pdf")
    figures = tmp_path / "all" / "figures"
    three = colours_of(figures / "tiny-t5-methods.svg")
    assert len(three) == 3
    assert three == colours_of(figures / "tiny-t5-costs.svg") == colours_of(figures / "tiny-t5-A-curves.svg")
    look = draw.styles([f"method {number}" for number in range(12)])
    assert len({(one["color"], one["linestyle"]) for one in look.values()}) == 12
    pdfs = {path.stem: path.read_bytes()[:4] for path in (tmp_path / "pdf").iterdir()}
    assert pdfs == {path.stem: b"%PDF" for path in figures.iterdir()}


def test_text_and_axes_take_the_pages_colour_and_ids_are_no_ones_else(runs, tmp_path):
    page.write_report(find_runs([runs]), tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text()
    assert "currentColor" in html and draw.INK not in html
    assert "#000000" not in html and " id=\"axes_1\"" not in html


def test_published_results_stand_beside_models_of_their_size(runs, tmp_path):
    found = find_runs([runs])
    for run in found:
        run.values = 737_668_096
    page.write_report(found, tmp_path / "report")
    said = (tmp_path / "report" / "report.md").read_text()
    assert "secondary summaries" in said and "| 1-3 | GORP | 79.8 |" in said and "78.6" not in said


def test_a_single_method_is_not_called_best(tmp_path):
    write_run(tmp_path / "runs", "gorp", "A", 1, 70.0)
    found = find_runs([tmp_path / "runs"])
    assert page.conclusion(found).startswith("gorp: average performance 70.0 over 1 run, backward transfer -20.0.")
    page.write_report(found, tmp_path / "report")
    assert "against the best" not in (tmp_path / "report" / "report.md").read_text()


def test_the_foot_has_revision_versions_and_settings(tmp_path):
    folder = write_run(tmp_path / "runs", "gorp", "A", 1, 70.0, {"max_steps": 150, "learning_rate": 0.003})
    path = folder / "outputs" / "1-dbpedia" / "run_record.json"
    made = {"git_revision": "0123abc", "versions": {"torch": "2.13.0"}, "machine": {"device": "x86_64"}}
    edit(path, lambda record: record | made)
    page.write_report(find_runs([tmp_path / "runs"]), tmp_path / "report")
    said = (tmp_path / "report" / "report.html").read_text()
    for text in ("git revision 0123abc", "torch 2.13.0", "x86_64", "max_steps=150", "learning_rate=0.003"):
        assert text in said


def test_names_from_outside_are_text(tmp_path):
    evil = "<img src=x onerror=alert(1)>|"
    write_run(tmp_path, "gorp", "A", 1, 70.0, model=f"models/{evil}")
    write_run(tmp_path, "olora", evil.replace("/", ""), 1, 60.0, {"data_dir": evil})
    blocks_of = find_runs([tmp_path])
    page.write_report(blocks_of, tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text()
    assert "<img" not in html and "&lt;img" in html
    assert "<img" not in (tmp_path / "report" / "report.md").read_text().replace("\\<img", "")
    for figure in (tmp_path / "report" / "figures").iterdir():
        assert not [element for element in ElementTree.parse(figure).iter() if element.tag.endswith("img")]


@pytest.mark.parametrize("prepare, fault", [
    (lambda folder: None, "no task has results"),
    (lambda folder: (folder / "order/outputs/1-dbpedia").mkdir(parents=True), "no task has results"),
    (lambda folder: (write_run(folder, "gorp", "A", 1, 1.0) / "outputs/1-dbpedia/run_record.json").write_text("[]"),
     "run_record.json: found empty array; allowed: an object"),
    (lambda folder: (write_run(folder, "gorp", "A", 1, 1.0) / "outputs/1-dbpedia/run_record.json").write_text(
        '{"report": {"options": [1]}}'), "run_record.json, options: found array; allowed: an object"),
    (lambda folder: (write_run(folder, "gorp", "A", 1, 1.0) / "outputs/1-dbpedia/train_results.json").write_text(
        '{"train_runtime": "long"}'), "train_runtime is 'long'; allowed: a number"),
    (lambda folder: (write_run(folder, "gorp", "A", 1, 1.0) / "outputs/3-agnews/predict_eval_predictions.jsonl"
                     ).write_text("{"), "predict_eval_predictions.jsonl, line 1: not JSON"),
])  # fmt: skip
def test_what_is_no_run_is_refused_in_one_line(prepare, fault, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    prepare(runs)
    done = subprocess.run([sys.executable, str(REPORT), str(runs), "--out", str(tmp_path / "report")],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert fault in done.stderr and not (tmp_path / "report").exists()


def test_a_folder_with_other_things_is_not_replaced(runs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    (tmp_path / "mine" / "report.html").write_text("another program's")
    done = subprocess.run([sys.executable, str(REPORT), str(runs), "--out", str(tmp_path / "mine")],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "mine is or holds notes.txt; allowed:" in done.stderr
    assert (tmp_path / "mine" / "notes.txt").exists()


def test_free_text_is_scored_as_the_run_scored_it(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "runs", "gorp", "A", 1, 80.0)
    step = folder / "outputs" / "3-agnews"
    lines = [{"Task": "X", "Dataset": name, "Metric": "rougeL", "Instance": {"label": "世"}, "Prediction": "世"}
             for name in ("dbpedia", "amazon", "agnews")]  # fmt: skip
    (step / "predict_eval_predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr("report.runs.compute_metrics", lambda *texts, multilingual: {"rougeL": 100.0 * multilingual})
    for multilingual in (False, True):
        edit(step / "run_record.json", lambda record: record | {"configuration": {"multilingual": multilingual}})
        scores = read_run(folder).scores
        assert {name: list(own) for name, own in scores.items()} == dict.fromkeys(scores, [float(multilingual)]) != {}


ODD = [float("nan"), float("inf"), -1, "x", True, [], {}]
NUMBERS = [("predict_results.json", "predict_exact_match"), ("predict_results.json", "predict_exact_match_for_dbpedia"),
           ("zero_shot_results.json", "zero_shot_exact_match_for_agnews"), ("train_results.json", "train_runtime"),
           ("unseen_results.json", "unseen_exact_match_for_x"), ("run_record.json", "trained_values"),
           ("run_record.json", "values")]  # fmt: skip


@pytest.mark.parametrize("file, key", NUMBERS)
def test_an_odd_number_is_one_line_with_file_and_key(file, key, tmp_path, capfd):
    folder = write_run(tmp_path / "runs", "gorp", "A", 1, 80.0)
    path = folder / "outputs" / "3-agnews" / file
    if key == "values":  # of the first step
        path = folder / "outputs" / "1-dbpedia" / file
    content = json.loads(path.read_text()) if path.exists() else {"unseen_datasets": ["x"]}
    for value in ODD + [101] * ("exact_match" in key):
        inner = content["report"] if file == "run_record.json" else content
        inner[key] = value
        put(path, content)
        assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
        [line] = capfd.readouterr().err.splitlines()
        assert line.startswith(f"error: {path}: {key} is {value!r}; allowed: a number ")
