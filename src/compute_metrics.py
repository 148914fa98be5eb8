"""Exact match and ROUGE of generated answers: over all examples, for every task and for every dataset.

As a command it scores a predictions file without the model:

    python src/compute_metrics.py --predictions OUTPUT_DIR/predict_eval_predictions.jsonl [--multilingual]
"""

import argparse
import functools
import json
import logging
import os
import re
import string
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer

from errors import InputError, entry_point
from files import json_kind, read_text

logger = logging.getLogger("gorp")
MEASURED = ("exact_match", "rouge1", "rougeL")
GPT2_FOLDER = Path(__file__).resolve().parents[1] / "data" / "gpt2tokenizer"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower-case a text, delete ASCII punctuation (without a space in its place) and collapse white space.

    Articles stay. So does a text of nothing but punctuation, such as the label "+", which would otherwise be empty.
    """
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split()) or text.strip()


def exact_match(prediction: str, reference: str) -> bool:
    """Return whether both texts are equal after `normalise`; an empty prediction never matches."""
    return normalise(prediction) == normalise(reference) != ""


def compute_metrics(
    predictions: Sequence[str], references: Sequence[str], *, multilingual: bool = False
) -> dict[str, float]:
    """Mean `exact_match`, `rouge1` and `rougeL` (F-measure; Lin, 2004) of pairs of texts, in per cent, 4 decimals.

    With `multilingual`, ROUGE compares GPT-2 tokens instead of stemmed English words, which need Latin letters.
    """
    return _mean(_scores(predictions, references, multilingual))


def evaluate_predictions(
    examples: Iterable[Mapping], predictions: Sequence[str], *, multilingual: bool = False
) -> dict[str, float]:
    """All metrics of one evaluation: over all examples, then `_for_<task>`, then `_for_<dataset>`.

    The overall values are means over examples, not over datasets. If a task has free-text answers, `score` is ROUGE-L
    for such tasks and exact match for the others.

    Args:
        examples: with `Task`, `Dataset` and `Instance` (with `label`), and `Metric` "rougeL" where answers are free
            text, in the order of `predictions`.
    """
    examples = list(examples)
    references = [example["Instance"]["label"] for example in examples]
    if not multilingual and (lost := sum(not re.search("[a-zA-Z0-9]", reference) for reference in references)):
        logger.info("%d of %d answers have no Latin letter or digit, so that their ROUGE is 0; --multilingual counts "
                    "them", lost, len(references))
    scores = _scores(predictions, references, multilingual)
    metrics = [example.get("Metric", "exact_match") for example in examples]
    if "rougeL" in metrics:
        scores = [score | {"score": score[metric]} for score, metric in zip(scores, metrics)]
    results = _mean(scores)
    for kind in ("Task", "Dataset"):  # where they share a name, as with QQP, the value is the dataset's
        groups: dict[str, list] = {}
        for example, score in zip(examples, scores):
            groups.setdefault(example[kind], []).append(score)
        for name, own in groups.items():
            results |= {f"{metric}_for_{name}": value for metric, value in _mean(own).items()}
    return results


def score_key(metrics: Mapping[str, float], dataset: str = "", prefix: str = "") -> str:
    """The key of a dataset's score (by default of that over all examples) in the results of `evaluate_predictions`:
    exact match, or ROUGE-L of free-text answers."""
    ending = f"_for_{dataset}" if dataset else ""
    score = f"{prefix}score{ending}"
    return score if score in metrics else f"{prefix}exact_match{ending}"


def accuracy_line(metrics: Mapping[str, float], datasets: Sequence[str], step: str = "", prefix: str = "") -> str:
    """One line for the terminal: "after 2-amazon (41 s): dbpedia 97.5, amazon 54 (mean 75.75)".

    `metrics` are those of `evaluate_predictions` with `prefix` before each name, `step` what they were measured after.
    """
    values = {dataset: metrics.get(score_key(metrics, dataset, prefix)) for dataset in datasets}
    each = ", ".join(f"{dataset} {round(value, 2):g}" for dataset, value in values.items())
    return f"{f'after {step}: ' if step else ''}{each} (mean {round(sum(values.values()) / len(values), 2):g})"


def read_predictions(path: str | os.PathLike) -> list[dict]:
    """The examples of a predictions file: on each line an object of `Task`, `Dataset`, `Instance` and `Prediction`."""
    lines = enumerate(read_text(path).split("\n"), 1)
    examples = [_predicted(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not examples:
        raise InputError(f"{path}: no predictions; allowed: one JSON object per line")
    return examples


def _predicted(line: str, where: str) -> dict:
    """The example in a line of a predictions file; `where` names the line in messages."""
    try:
        example = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(example, dict):
        raise InputError(f"{where}: found {json_kind(example)}; allowed: an object")
    instance = example.get("Instance")
    label = instance.get("label") if isinstance(instance, dict) else None
    texts = {key: example.get(key) for key in ("Task", "Dataset", "Prediction")} | {"Instance.label": label}
    if missing := [key for key, text in texts.items() if not isinstance(text, str)]:
        raise InputError(f"{where}: {missing[0]} is missing or not a string")
    return example


def _scores(predictions: Sequence[str], references: Sequence[str], multilingual: bool) -> list[dict[str, float]]:
    """The three metrics of every pair of texts, each in [0, 1]."""
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; both must be equal and > 0")
    rouge = _rouge_scorer(multilingual)
    scores = []
    for prediction, reference in zip(predictions, references):
        overlap = rouge.score(target=reference, prediction=prediction)
        matches = {"exact_match": float(exact_match(prediction, reference))}
        scores.append(matches | {name: score.fmeasure for name, score in overlap.items()})
    return scores


def _mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {metric: round(100 * sum(score[metric] for score in scores) / len(scores), 4) for metric in scores[0]}


class GPT2RougeTokenizer:
    """ROUGE tokens for text in any script: GPT-2's byte-level BPE tokens, with case and punctuation.

    Every word is tokenised as if it followed a space, whose mark is dropped: its tokens do not depend on its position.
    """

    _SPACE_MARKS = "ĠĊĉ"  # how byte-level BPE writes space, line feed and tab

    def __init__(self, folder: Path):
        vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
        try:
            self._bpe = ByteLevelBPETokenizer(vocabulary, merges, add_prefix_space=True)
        except Exception as error:  # the library raises no narrower class
            raise InputError(f"{folder}: {error}; delete both files, and the next run fetches them again") from error

    def tokenize(self, text: str) -> list[str]:
        pieces = (piece.lstrip(self._SPACE_MARKS) for piece in self._bpe.encode(text).tokens)
        return [piece for piece in pieces if piece]


@functools.cache
def _rouge_scorer(multilingual: bool):
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, and not needed before evaluation

    tokenizer = GPT2RougeTokenizer(gpt2_folder()) if multilingual else None
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True, tokenizer=tokenizer)


def gpt2_folder() -> Path:
    """The folder of GPT-2's vocabulary, which the script in it fetches on first use."""
    if not all((GPT2_FOLDER / name).is_file() for name in ("vocab.json", "merges.txt")):
        script = GPT2_FOLDER / "fetch_gpt2_tokenizer.py"
        logger.info("fetching GPT-2's vocabulary into %s, for ROUGE in any language", GPT2_FOLDER)
        fetched = subprocess.run([sys.executable, str(script)], check=False, stderr=subprocess.PIPE, text=True)
        if fetched.returncode:
            said = fetched.stderr.strip() or f"{script} was killed"
            raise InputError(said.splitlines()[-1].removeprefix("error: "))
    return GPT2_FOLDER


@entry_point
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", required=True, type=Path, help="predict_eval_predictions.jsonl of a run")
    parser.add_argument("--multilingual", action="store_true", help="ROUGE over GPT-2 tokens instead of words")
    options = parser.parse_args(arguments)
    examples = read_predictions(options.predictions)
    predictions = [example["Prediction"] for example in examples]
    metrics = evaluate_predictions(examples, predictions, multilingual=options.multilingual)
    print(json.dumps(metrics, indent=4, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
