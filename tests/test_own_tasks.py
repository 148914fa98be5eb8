"""Tasks of one's own, one of them with free-text answers: from the instruction file to the order's measures."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, ROOT, T5, T5_MODULES, edit, put
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from compute_metrics import compute_metrics
from errors import InputError
from uie_dataset_lora import ExampleOptions, load_uie_dataset, read_instructions

COLOURS, NUMBERS = ["red", "green", "blue"], ["one", "two", "three", "four"]
ROWS = {  # task/dataset -> its examples
    "Colour/balls": [{"sentence": f"The ball {i} is {COLOURS[i % 3]}.", "label": COLOURS[i % 3]} for i in range(24)],
    "Short/news": [{"sentence": f"{NUMBERS[i % 4]} people came. it rained.", "label": f"{NUMBERS[i % 4]} people came"}
                   for i in range(24)],
    "TC/counts": [{"sentence": f"{NUMBERS[i % 4]} cats", "label": NUMBERS[i % 4]} for i in range(24)],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A benchmark of three tasks, its instruction file, and the order `three`, as the user's commands make them."""
    tmp_path = tmp_path_factory.mktemp("own")
    for name, rows in ROWS.items():
        for subset in ("train", "dev", "test"):
            put(tmp_path / "data" / name / f"{subset}.json", rows)
    instructions = {task: [{"instruction_type": "zero-shot", "instruction": f"{task}?"}] for task in ("Colour", "TC")}
    instructions["Short"] = {"metric": "rougeL", "instructions": [
        {"instruction_type": "zero-shot", "instruction": "Shorten this."}]}
    put(tmp_path / "instructions.json", instructions)
    for name in ("Colour/balls", "TC/counts"):
        run("data/generate_labels.py", tmp_path / "data" / name)
    run("data/make_order.py", "--name", "three", "--tasks", *ROWS, "--configs_dir", tmp_path, "--data_dir",
        tmp_path / "data")
    return tmp_path


@pytest.fixture
def place(made, tmp_path):
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def run(*words) -> str:
    """What a program prints, its progress bars included."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def load(place, step):
    options = ExampleOptions(place / "data", place / "instructions.json")
    return load_uie_dataset(place / "three_configs" / step, options)


def test_the_instruction_file_says_which_tasks_there_are_and_how_they_are_scored(place):
    metrics = {"Colour": "exact_match", "TC": "exact_match", "Short": "rougeL"}
    declared = read_instructions(place / "instructions.json")
    assert {task: of_task["metric"] for task, of_task in declared.items()} == metrics
    test = load(place, "counts")["test"]
    assert dict(zip(test["Task"], test["Metric"])) == metrics
    prompts = {example["Dataset"]: example["Instance"]["instruction"] for example in test}
    assert prompts["news"] == "Shorten this.\n" and prompts["balls"] == "Colour?\nOption: red, green, blue \n"


@pytest.mark.parametrize("spoil, fault", [
    (lambda place: (place / "data/TC/counts/labels.json").unlink(), "TC/counts/labels.json: no such file"),
    (lambda place: put(place / "data/Short/news/test.json", [{"sentence": "a", "label": " "}]), "label is blank"),
    (lambda place: edit(place / "instructions.json", lambda tasks: {"TC": tasks["TC"]}),
     "unknown task .Colour.; allowed: the published ones"),
    (lambda place: put(place / "instructions.json", {"Short": {"metric": "bleu", "instructions": []}}),
     "instructions.json, Short: metric 'bleu'; allowed: exact_match, rougeL"),
    (lambda place: put(place / "instructions.json", {"Short": {"metric": "rougeL"}}), "Short: found object; allowed"),
])
def test_without_its_declaration_a_file_that_is_missing_stays_an_error(place, spoil, fault):
    spoil(place)
    with pytest.raises(InputError, match=fault):
        load(place, "counts")


def test_an_order_over_them_is_scored_by_exact_match_and_rouge(place):
    shown = run(
        "src/run_order.py", place / "three_configs", "--model_name_or_path", T5, "--output_dir", place / "run/outputs",
        "--data_dir", place / "data", "--instruction_file", place / "instructions.json", "--method", "seqlora",
        "--do_train", "--do_predict", "--predict_with_generate", "--max_steps", 4, "--learning_rate", "1e-2",
        "--logging_steps", 1, "--report_to", "tensorboard", "--save_strategy", "no", "--use_cpu", *T5_MODULES,
    )  # fmt: skip
    half = r"task 2 of 3: news, train: +50%\|.*\| 2/4 \[\d\d:\d\d, loss [\d.]+, order \d\d:\d\d left\]"
    assert re.search(half, shown)
    assert "task 3 of 3: counts, test: " in shown and "] after 3-counts (" in shown
    table = run("src/report", place / "run")
    folder = place / "run" / "outputs" / "3-counts"
    results = json.loads((folder / "predict_results.json").read_text())
    lines = [json.loads(line) for line in (folder / "predict_eval_predictions.jsonl").read_text().splitlines()]
    assert {line["Dataset"]: line["Metric"] for line in lines} == {
        "balls": "exact_match", "news": "rougeL", "counts": "exact_match"}
    news = [(line["Prediction"], line["Instance"]["label"]) for line in lines if line["Dataset"] == "news"]
    assert results["predict_score_for_news"] == compute_metrics(*zip(*news))["rougeL"]
    assert results["predict_score_for_balls"] == results["predict_exact_match_for_balls"]
    scores = [results[f"predict_score_for_{dataset}"] for dataset in ("balls", "news", "counts")]
    assert f"average performance (AP)  {sum(scores) / 3:.2f}" in table
    [events] = (folder / "runs").iterdir()
    tracked = EventAccumulator(str(events)).Reload()
    last = {name: tracked.Scalars(f"test/{name}")[-1].value for name in ("AP", "accuracy_news", "task")}
    assert last == pytest.approx({"AP": sum(scores) / 3, "accuracy_news": scores[1], "task": 3}, abs=1e-3)
    assert "test/BWT" in tracked.Tags()["scalars"]
