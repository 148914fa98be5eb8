"""The tasks' own metrics against values worked out by hand and against scikit-learn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.metrics import f1_score

from errors import InputError
from evaluation import evaluator
from evaluation.evaluator import (
    EVALUATORS,
    accuracy,
    entity_tuples,
    evaluate_by_dataset,
    event_tuples,
    macro_f1,
    relation_tuples,
)
from order_config import TASKS


def row(label, sentence="text", task="SC", dataset="data"):
    return {"Task": task, "Dataset": dataset, "Instance": {"id": "7", "sentence": sentence, "label": label}}


def score(task, predictions, labels, sentences=None):
    rows = [row(label, sentence) for label, sentence in zip(labels, sentences or [""] * len(labels))]
    return EVALUATORS[task](rows, predictions)


def test_every_task_of_the_benchmark_has_metrics():
    assert set(TASKS) <= set(EVALUATORS)


def test_macro_f1_by_hand():
    # entailment: 1 of 2 predicted right, 1 wanted: F1 2/3. neutral: found in none of 1: 0. The mean is 1/3.
    assert score("NLI", ["entailment", "Entailment."], ["entailment", "neutral"]) == {
        "accuracy": 50.0, "macro_f1": 33.3333}


def test_macro_f1_is_scikit_learns_over_the_wanted_classes():
    labels = ["good", "bad", "good", "bad", "fair", "good"]
    predictions = ["good", "good", "bad", "bad", "nonsense", "fair"]
    expected = f1_score(labels, predictions, labels=["good", "bad", "fair"], average="macro", zero_division=0)
    assert macro_f1(predictions, labels) == round(100 * expected, 4)


def test_labels_of_punctuation_are_classes():
    assert score("SC", ["+", "-", ""], ["+", "-", "-"]) == {"accuracy": 66.6667, "macro_f1": 83.3333}


def test_boolq_is_accuracy_alone():
    assert score("BoolQA", ["true", "True", "yes"], ["True", "False", "True"]) == {"accuracy": 33.3333}


def test_lengths_must_agree():
    with pytest.raises(ValueError):
        accuracy(["a"], ["a", "b"])


def multirc_sentence(question, answer):
    return f"paragraph: P\nquestion: {question}\ncandidate answer: {answer}"


def test_multirc_by_hand():
    # Question 1 is right in both answers, though question 2 stands between them; question 2 has one false alarm.
    # Over answers: 2 True wanted, 3 predicted, 2 right: F1 = 4/5.
    sentences = [multirc_sentence("1", "a"), multirc_sentence("2", "a"), multirc_sentence("1", "b"),
                 multirc_sentence("2", "candidate answer: b")]
    labels = ["True", "True", "False", "False"]
    assert score("MultiRC", ["True", "True", "False", "True"], labels, sentences) == {"f1a": 80.0, "em": 50.0}
    # One wrong answer spoils a question for good, whatever follows it.
    assert score("MultiRC", ["False", "True", "False", "False"], labels, sentences)["em"] == 50.0


def test_multirc_answer_that_is_no_label_is_wrong_but_no_alarm():
    sentences = [multirc_sentence("1", "a"), multirc_sentence("2", "a")]
    assert score("MultiRC", ["True", "perhaps"], ["True", "False"], sentences) == {"f1a": 100.0, "em": 50.0}
    assert score("MultiRC", ["False", "False"], ["False", "False"], sentences) == {"f1a": 0.0, "em": 100.0}


def test_multirc_question_ends_at_the_last_candidate_line():
    paragraph = "paragraph: P\ncandidate answer: quoted\nquestion: "
    sentences = [f"{paragraph}{question}\ncandidate answer: a" for question in "12"]
    assert score("MultiRC", ["True", "False"], ["True", "True"], sentences)["em"] == 50.0


def test_multirc_needs_its_candidate_line():
    with pytest.raises(InputError, match="row 7.*candidate answer"):
        score("MultiRC", ["True"], ["True"], ["paragraph: P\nquestion: Q"])


def test_entities_forgive_case_spaces_order_and_repetition():
    wanted = entity_tuples("person: Ann Lee; time: 10:30")["entity"]
    assert wanted == {("person", "ann lee"), ("time", "10:30")}
    assert entity_tuples(" TIME :10:30 ;Person:  ann\nlee; person: Ann Lee;")["entity"] == wanted


@pytest.mark.parametrize("text", ["None", "none.", "", "  ", ";", "None; ;", "| :"])
def test_no_record(text):
    for tuples in (entity_tuples, relation_tuples, event_tuples):
        assert not any(tuples(text).values())


def test_a_malformed_record_counts_and_equals_only_itself():
    assert entity_tuples("Ann; person: Ann")["entity"] == {("ann",), ("person", "ann")}
    assert relation_tuples("works for: Ann")["relation"] == {("works for", "ann")}


def test_relations_and_events():
    assert relation_tuples("born in: Ann | Paris, Texas; works for: Ann | Acme")["relation"] == {
        ("born in", "ann", "paris, texas"), ("works for", "ann", "acme")}
    assert event_tuples("Attack: fired | attacker: rebels | place: town; Die: killed") == {
        "trigger": {("attack", "fired"), ("die", "killed")},
        "argument": {("attack", "attacker", "rebels"), ("attack", "place", "town")}}


def test_entity_f1_is_micro_averaged():
    # Right: 1 + 0 + 0; predicted: 2 + 1 + 0; wanted: 1 + 0 + 3. F1 = 2 * 1 / (3 + 4).
    labels = ["person: Ann", "None", "place: A; place: B; place: C"]
    predictions = ["person: Ann; place: Ann", "person: Bo", ""]
    assert score("NER", predictions, labels) == {
        "entity_precision": 33.3333, "entity_recall": 25.0, "entity_f1": 28.5714}


def test_relation_direction_counts():
    assert score("RE", ["likes: B | A"], ["likes: A | B"])["relation_f1"] == 0.0


def test_event_triggers_and_arguments_are_scored_apart():
    metrics = score("EE", ["attack: fired | place: town"], ["attack: shot | place: town | attacker: rebels"])
    assert (metrics["trigger_f1"], metrics["argument_precision"], metrics["argument_recall"]) == (0.0, 100.0, 50.0)
    assert metrics["argument_f1"] == 66.6667


def test_nothing_wanted_and_nothing_found_is_zero_not_a_crash():
    assert set(score("NER", ["None"], ["None"]).values()) == {0.0}


def test_datasets_are_kept_apart_by_task_too():
    rows = [row(label, task=task, dataset="NYT") for label, task in [("a", "TC"), ("None", "NER"), ("b", "TC")]]
    metrics = evaluate_by_dataset(rows, ["a", "person: Ann", "a"])
    assert list(metrics) == ["TC/NYT", "NER/NYT"]
    assert metrics["TC/NYT"]["accuracy"] == 50.0 and metrics["NER/NYT"]["entity_f1"] == 0.0


def test_unknown_task():
    with pytest.raises(InputError, match="no metrics for task 'POS'; known: SC,"):
        evaluate_by_dataset([row("a", task="POS")], ["a"])


def test_command(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({**row("True", task="BoolQA", dataset="BoolQA"), "Prediction": "true"}) + "\n")
    command = [sys.executable, str(Path(evaluator.__file__)), "--predictions"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"BoolQA/BoolQA": {"accuracy": 100.0}}
    done = subprocess.run([*command, str(tmp_path / "none.jsonl")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
