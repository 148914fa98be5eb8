"""Exact match and ROUGE of generated answers: over all rows, for every task and for every dataset.

As a command it scores a predictions file again, without the model:

    python src/compute_metrics.py --predictions OUTPUT_DIR/predict_eval_predictions.jsonl [--multilingual]
"""

import argparse
import functools
import json
import logging
import os
import string
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer

from errors import InputError, entry_point

GPT2_FOLDER = Path(__file__).resolve().parents[1] / "data" / "gpt2tokenizer"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, ASCII punctuation deleted (no space put in its place), white space collapsed; articles stay.

    A text of nothing but punctuation, such as the label "+", stays as it is: deleted, it would equal no answer at all.
    """
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split()) or text.strip()


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both texts are equal after `normalise`; an empty prediction never matches."""
    return normalise(prediction) == normalise(reference) != ""


def compute_metrics(
    predictions: Sequence[str], references: Sequence[str], *, multilingual: bool = False
) -> dict[str, float]:
    """Mean `exact_match`, `rouge1` and `rougeL` (F-measure; Lin, 2004) of pairs of texts, in per cent, 4 decimals.

    With `multilingual`, ROUGE counts GPT-2's pieces instead of stemmed English words, which leave nothing of a text
    without Latin letters.

    Raises:
        ValueError: the two sequences differ in length, or are empty.
        InputError: `multilingual`, and GPT-2's vocabulary is neither in `data/gpt2tokenizer` nor to be had.
    """
    return _mean(_row_scores(predictions, references, multilingual))


def compute_grouped_metrics(
    predictions: Sequence[str], references: Sequence[str], groups: Sequence[str], *, multilingual: bool = False
) -> dict[str, float]:
    """`compute_metrics` of each group's rows, as `<metric>_for_<group>`, groups in order of appearance.

    Args:
        groups: the name of the group that each row belongs to, as many as there are predictions.
    """
    return _mean_by_group(_row_scores(predictions, references, multilingual), groups)


def evaluate_predictions(
    rows: Iterable[Mapping], predictions: Sequence[str], *, multilingual: bool = False
) -> dict[str, float]:
    """All metrics of one evaluation: over all rows, then `_for_<task>`, then `_for_<dataset>`.

    The overall values are means over rows, not over datasets. Where a task and a dataset share a name, as QQP does,
    the dataset's value is the one that stays.

    Args:
        rows: dataset rows with `Task`, `Dataset` and `Instance` (with `label`), in the order of `predictions`.
    """
    rows = list(rows)
    scores = _row_scores(predictions, [row["Instance"]["label"] for row in rows], multilingual)
    return {
        **_mean(scores),
        **_mean_by_group(scores, [row["Task"] for row in rows]),
        **_mean_by_group(scores, [row["Dataset"] for row in rows]),
    }


def accuracy_line(metrics: Mapping[str, float], datasets: Sequence[str], step: str = "", *, prefix: str = "") -> str:
    """One line for the terminal: "after 2-amazon: dbpedia 97.50  amazon 54.00  (mean 75.75)".

    Args:
        metrics: what `evaluate_predictions` gives, its names preceded by `prefix`.
        datasets: the evaluated datasets, in the order to show them; the mean is over datasets.
        step: what the values were measured after; without it the line begins with the first dataset.
    """
    values = {dataset: metrics[f"{prefix}exact_match_for_{dataset}"] for dataset in datasets}
    each = "  ".join(f"{dataset} {value:.2f}" for dataset, value in values.items())
    return f"{f'after {step}: ' if step else ''}{each}  (mean {sum(values.values()) / len(values):.2f})"


def read_predictions(path: str | os.PathLike) -> list[dict]:
    """The rows of a predictions file: one JSON object a line, with `Task`, `Dataset`, `Instance` and `Prediction`.

    Raises:
        InputError: the file cannot be read or has no row, or a line is not such an object (with its number).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None
    rows = [_prediction_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"{path}: no predictions; expected one JSON object a line")
    return rows


def _prediction_row(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: found {type(row).__name__}; expected an object")
    instance = row.get("Instance")
    label = instance.get("label") if isinstance(instance, dict) else None
    for key, value in [("Task", row.get("Task")), ("Dataset", row.get("Dataset")), ("Instance.label", label),
                       ("Prediction", row.get("Prediction"))]:
        if not isinstance(value, str):
            raise InputError(f"{place}: {key} is missing or not a text")
    return row


def _row_scores(predictions: Sequence[str], references: Sequence[str], multilingual: bool) -> list[dict[str, float]]:
    """The three metrics of every row, each in [0, 1]."""
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; as many, and some, needed")
    rouge = _rouge_scorer(multilingual)
    rows = []
    for prediction, reference in zip(predictions, references):
        scores = rouge.score(target=reference, prediction=prediction)
        rows.append({
            "exact_match": float(exact_match(prediction, reference)),
            "rouge1": scores["rouge1"].fmeasure,
            "rougeL": scores["rougeL"].fmeasure,
        })
    return rows


def _mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {metric: round(100 * sum(row[metric] for row in scores) / len(scores), 4) for metric in scores[0]}


def _mean_by_group(scores: Sequence[Mapping[str, float]], groups: Sequence[str]) -> dict[str, float]:
    members: dict[str, list] = {}
    for row, group in zip(scores, groups, strict=True):
        members.setdefault(group, []).append(row)
    return {f"{metric}_for_{group}": value for group, rows in members.items() for metric, value in _mean(rows).items()}


class GPT2RougeTokenizer:
    """ROUGE tokens for text in any script: the pieces of GPT-2's byte-level BPE, case and punctuation kept.

    Every word is cut as if a space stood before it, and the mark of that space is dropped, so that a word gives the
    same tokens wherever it stands.

    Args:
        folder: holds `vocab.json` and `merges.txt`.

    Raises:
        InputError: the two files are not a byte-level BPE vocabulary.
    """

    _SPACE_MARKS = "ĠĊĉ"  # how byte-level BPE writes space, line feed and tab

    def __init__(self, folder: Path):
        vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
        try:
            self._bpe = ByteLevelBPETokenizer(vocabulary, merges, add_prefix_space=True)
        except Exception as error:  # the library raises no narrower class
            raise InputError(f"{folder}: {error}; without its two files, the next run takes them again") from error

    def tokenize(self, text: str) -> list[str]:
        pieces = (piece.lstrip(self._SPACE_MARKS) for piece in self._bpe.encode(text).tokens)
        return [piece for piece in pieces if piece]


@functools.cache
def _rouge_scorer(multilingual: bool):
    from rouge_score.rouge_scorer import RougeScorer  # a sixth of a run's imports, not needed before it is evaluated

    tokenizer = GPT2RougeTokenizer(_gpt2_folder()) if multilingual else None
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True, tokenizer=tokenizer)


def _gpt2_folder() -> Path:
    """The folder of GPT-2's vocabulary, filled on first need by the script that lies in it."""
    if not all((GPT2_FOLDER / name).is_file() for name in ("vocab.json", "merges.txt")):
        script = GPT2_FOLDER / "fetch_gpt2_tokenizer.py"
        logging.getLogger("gorp").info("taking GPT-2's vocabulary into %s, for ROUGE in any language", GPT2_FOLDER)
        fetched = subprocess.run([sys.executable, str(script)], check=False, stderr=subprocess.PIPE, text=True)
        if fetched.returncode:
            raise InputError(fetched.stderr.splitlines()[-1].removeprefix("error: "))
    return GPT2_FOLDER


@entry_point
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Exact match and ROUGE of a predictions file, as JSON.")
    parser.add_argument("--predictions", required=True, type=Path, help="predict_eval_predictions.jsonl of a run")
    parser.add_argument("--multilingual", action="store_true", help="ROUGE over GPT-2's pieces instead of words")
    options = parser.parse_args(arguments)
    rows = read_predictions(options.predictions)
    metrics = evaluate_predictions(rows, [row["Prediction"] for row in rows], multilingual=options.multilingual)
    print(json.dumps(metrics, indent=4, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
