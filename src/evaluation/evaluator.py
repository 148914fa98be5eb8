"""Each task's own metrics: accuracy, macro-F1, MultiRC's and BoolQ's measures, tuple F1 for information extraction.

    python src/evaluation/evaluator.py --predictions OUTPUT_DIR/predict_eval_predictions.jsonl

prints them for every dataset of a predictions file. A task's metrics are one function from rows and predictions to
named values in per cent, found by the task's name in `EVALUATORS`; a new task is one more entry there.

Extraction outputs are one line of text. Records are separated by ";", the fields of a record by "|":

    NER   type: entity; type: entity
    RE    relation: head | tail; relation: head | tail
    EE    event type: trigger | role: argument | role: argument; event type: trigger

"None", nothing at all, and punctuation alone stand for no record. Only the first ":" of a field separates, so
"time: 10:30" is one entity. Case and runs of white space do not count, nor does the order of records; equal records
count once. A record that does not follow the format stays as it is: it counts, and equals only the same text.
"""

import argparse
import json
import string
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file, Python looks for modules beside it; the project's lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compute_metrics import exact_match, normalise, read_predictions
from errors import InputError, entry_point

Metrics = dict[str, float]
Tuples = set[tuple[str, ...]]


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Per cent of predictions that equal their reference, as `exact_match` compares."""
    right = [exact_match(prediction, label) for prediction, label in zip(predictions, references, strict=True)]
    return _percent(sum(right), len(right))


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean of the classes' F1 in per cent, over the classes that occur in `references`.

    A generated text that is none of them is a miss for its reference's class and adds no class of its own.
    """
    predicted, wanted = list(map(normalise, predictions)), list(map(normalise, references))
    classes = sorted(set(wanted))
    return round(sum(_class_f1(predicted, wanted, name) for name in classes) / len(classes), 4)


def classification(rows: Sequence[Mapping], predictions: Sequence[str]) -> Metrics:
    """Accuracy and macro-F1, as SuperGLUE reports them for CB (Wang et al., 2019)."""
    references = _labels(rows)
    return {"accuracy": accuracy(predictions, references), "macro_f1": macro_f1(predictions, references)}


def boolq(rows: Sequence[Mapping], predictions: Sequence[str]) -> Metrics:
    """Accuracy, BoolQ's only measure in SuperGLUE."""
    return {"accuracy": accuracy(predictions, _labels(rows))}


def multirc(rows: Sequence[Mapping], predictions: Sequence[str]) -> Metrics:
    """MultiRC's two measures (Khashabi et al., 2018; the pair that SuperGLUE reports).

    `f1a`: F1 of the class True over all candidate answers. `em`: per cent of questions with every candidate right; a
    question is the rows with the same paragraph and question, whatever stands between them.

    Raises:
        InputError: a sentence has no line "candidate answer: ...".
    """
    references = _labels(rows)
    questions: dict[str, bool] = {}
    for row, prediction, reference in zip(rows, predictions, references, strict=True):
        question, marker, _ = row["Instance"].get("sentence", "").rpartition("\ncandidate answer:")
        if not marker:
            raise InputError(f"MultiRC, row {row['Instance'].get('id')}: the sentence has no line 'candidate answer:'")
        questions[question] = questions.get(question, True) and exact_match(prediction, reference)
    return {
        "f1a": round(_class_f1(list(map(normalise, predictions)), list(map(normalise, references)), "true"), 4),
        "em": _percent(sum(questions.values()), len(questions)),
    }


def entity_tuples(text: str) -> dict[str, Tuples]:
    """`entity`: (type, entity)."""
    return {"entity": {_key_and_value(record) for record in _records(text)}}


def relation_tuples(text: str) -> dict[str, Tuples]:
    """`relation`: (relation, head, tail)."""
    relations = (_split(record, "|") for record in _records(text))
    return {"relation": {(*_key_and_value(head), *tail) for head, *tail in relations}}


def event_tuples(text: str) -> dict[str, Tuples]:
    """`trigger`: (event type, trigger); `argument`: (event type, role, argument)."""
    triggers, arguments = set(), set()
    for record in _records(text):
        head, *fields = _split(record, "|")
        trigger = _key_and_value(head)
        triggers.add(trigger)
        arguments.update((trigger[0], *_key_and_value(field)) for field in fields)
    return {"trigger": triggers, "argument": arguments}


def extraction(tuples: Callable[[str], dict[str, Tuples]]) -> Callable[[Sequence[Mapping], Sequence[str]], Metrics]:
    """Evaluator of an extraction task: micro-averaged `<kind>_precision`, `_recall`, `_f1` of each kind of tuple.

    Args:
        tuples: maps a text to its set of tuples of every kind, always with the same kinds.
    """

    def evaluator(rows: Sequence[Mapping], predictions: Sequence[str]) -> Metrics:
        pairs = [(tuples(found), tuples(label)) for found, label in zip(predictions, _labels(rows), strict=True)]
        metrics = {}
        for kind in pairs[0][1]:
            right = sum(len(predicted[kind] & wanted[kind]) for predicted, wanted in pairs)
            found = sum(len(predicted[kind]) for predicted, _ in pairs)
            there = sum(len(wanted[kind]) for _, wanted in pairs)
            metrics[f"{kind}_precision"] = _percent(right, found)
            metrics[f"{kind}_recall"] = _percent(right, there)
            metrics[f"{kind}_f1"] = _percent(2 * right, found + there)
        return metrics

    return evaluator


EVALUATORS: dict[str, Callable[[Sequence[Mapping], Sequence[str]], Metrics]] = {
    **dict.fromkeys(("SC", "TC", "NLI", "QQP", "WiC", "COPA"), classification),
    "BoolQA": boolq,
    "MultiRC": multirc,
    "NER": extraction(entity_tuples),
    "RE": extraction(relation_tuples),
    "EE": extraction(event_tuples),
}


def evaluate_by_dataset(rows: Iterable[Mapping], predictions: Sequence[str]) -> dict[str, Metrics]:
    """The metrics that belong to each dataset's task, by `TASK/DATASET`, in order of appearance.

    Args:
        rows: dataset rows with `Task`, `Dataset` and `Instance` (`sentence`, `label`), in the order of `predictions`.

    Raises:
        InputError: a row's task has no evaluator.
    """
    datasets: dict[tuple[str, str], list[tuple[Mapping, str]]] = {}
    for row, prediction in zip(rows, predictions, strict=True):
        if row["Task"] not in EVALUATORS:
            raise InputError(f"{row['Dataset']}: no metrics for task {row['Task']!r}; known: {', '.join(EVALUATORS)}")
        datasets.setdefault((row["Task"], row["Dataset"]), []).append((row, prediction))
    return {f"{task}/{dataset}": EVALUATORS[task](*zip(*pairs)) for (task, dataset), pairs in datasets.items()}


def _labels(rows: Sequence[Mapping]) -> list[str]:
    return [row["Instance"]["label"] for row in rows]


def _percent(part: int, whole: int) -> float:
    """`part` of `whole` in per cent, 4 decimals; of nothing, 0."""
    return round(100 * part / whole, 4) if whole else 0.0


def _class_f1(predictions: Sequence[str], references: Sequence[str], name: str) -> float:
    """F1 of one class in per cent: 2 TP / (2 TP + FP + FN), 0 where the class is neither wanted nor predicted."""
    right = sum(prediction == reference == name for prediction, reference in zip(predictions, references))
    counted = predictions.count(name) + references.count(name)
    return 200 * right / counted if counted else 0.0


def _split(text: str, mark: str) -> list[str]:
    """The parts of `text` between marks that are not empty, in lower case, white space collapsed."""
    parts = (" ".join(part.lower().split()) for part in text.split(mark))
    return [part for part in parts if part]


def _records(text: str) -> list[str]:
    return [record for record in _split(text, ";") if record.strip(string.punctuation + " ") not in ("", "none")]


def _key_and_value(field: str) -> tuple[str, ...]:
    """("key", "value") of "key: value"; a field without ":" whole."""
    key, colon, value = field.partition(":")
    return (key.strip(), value.strip()) if colon else (field,)


@entry_point
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Each dataset's own metrics of a predictions file, as JSON.")
    parser.add_argument("--predictions", required=True, type=Path, help="predict_eval_predictions.jsonl of a run")
    options = parser.parse_args(arguments)
    rows = read_predictions(options.predictions)
    metrics = evaluate_by_dataset(rows, [row["Prediction"] for row in rows])
    print(json.dumps(metrics, indent=4, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
