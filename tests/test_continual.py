"""The comparison of methods: which trials there are, what the search keeps, what the table says of finished trials."""

import dataclasses
import itertools
import json
import random
import re
import shlex
import shutil
import string
from collections import Counter

import numpy
import pytest
import torch

from benchmarks import continual
from benchmarks.continual import Bench, compare, knobs, last_error, rates, search
from benchmarks.outcomes import Outcome, Trial, best_settings, learnt_tasks, read_outcomes, table, tried
from errors import InputError
from files import read_json
from helpers import ROOT, edit
from initial_model import pretrain_small_t5
from order_config import read_order

TINY = ROOT / "initial_model" / "tiny-t5"


@pytest.fixture
def bench(mini_benchmark, tmp_path):
    bench = Bench(mini_benchmark, TINY, tmp_path / "out", {"A": ["TC/dbpedia", "TC/agnews"]},
                  ("--max_steps", "2", "--max_predict_samples", "4"))
    bench.prepare()
    return bench


def finish(out, trial, right=("11", "11"), accuracies=((80.0, None), (60.0, 90.0))):
    """Let a trial of the short order be finished; `right`: which rows of each dataset it answered at the end."""
    outcome = Outcome(trial, [list(row) for row in accuracies], dict(zip(("dbpedia", "agnews"), right)), 1.0, 2, 3, "r")
    out.mkdir(exist_ok=True)
    with open(out / "outcomes.jsonl", "a") as file:
        file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
    return outcome


def test_every_method_is_searched_over_three_rates_and_two_more_settings():
    for method in continual.METHODS:
        assert len({rate for _, rate in rates(method)}) == 3
        more = knobs(method, rates(method)[1])
        assert len(set(more)) == 2 and not set(more) & set(rates(method))


def test_order_l_is_order_4_without_yahoo_and_runs_only_when_asked_for():
    published = [f"{step.task}/{step.dataset}" for step in read_order(ROOT / "configs" / "order4_configs")]
    assert continual.ORDERS["L"] == [task for task in published if task != "TC/yahoo"]
    assert continual.ORDERS.keys() - set(continual.SHORT) == {"L"}


def test_a_method_without_a_knob_gets_two_more_rates():
    assert knobs("slao", ("--learning_rate", "1e-3")) == [("--learning_rate", "0.0005"), ("--learning_rate", "0.002")]


def test_the_search_tries_the_knob_with_the_rate_that_is_best_over_seeds(bench, monkeypatch):
    score = {"3e-4": (50, 0), "1e-3": (30, 30), "3e-3": (20, 20), "5": (40, 40)}
    tried = []

    def fake(_, trials, __):
        for trial in trials:
            tried.append(trial.settings)
            value = score.get(trial.settings[-1], (0, 0))[trial.seed - 1]
            finish(bench.out, trial, accuracies=((value, None), (value, value)))
        return {}

    monkeypatch.setattr(continual, "run_all", fake)
    search(bench, ["olora"], [1, 2], 1)
    assert len(tried) == 10
    assert all(settings[:2] == ("--learning_rate", "1e-3") for settings in tried[6:])
    assert best_settings([bench.out], "olora") == ("--learning_rate", "1e-3", "--lamda_1", "5")


def test_a_repeated_search_tries_nothing_new(bench, monkeypatch):
    """Not even where the second stage found a better learning rate."""
    def fake(_, trials, __):
        for trial in set(trials) - read_outcomes(bench.out).keys():
            value = {"3e-4": 50, "0.0006": 60}.get(trial.settings[-1], 0)
            finish(bench.out, trial, accuracies=((value, None), (value, value)))
        return {}

    monkeypatch.setattr(continual, "run_all", fake)
    search(bench, ["slao"], [1], 1)
    found = read_outcomes(bench.out)
    search(bench, ["slao"], [1], 1)
    assert len(found) == 5 and read_outcomes(bench.out) == found
    assert best_settings([bench.out], "slao") == ("--learning_rate", "0.0006")


def test_a_method_with_a_failed_rate_does_not_go_on_to_its_knob(bench, monkeypatch):
    """And `--search` ends with 1. The other method's search is not stopped."""
    tried = []

    def fake(_, trials, __):
        failed = {trial: "no memory" for trial in trials if trial.settings[-1] == "3e-3" and trial.method == "olora"}
        for trial in trials:
            tried.append((trial.method, trial.settings))
            if trial not in failed:
                finish(bench.out, trial)
        return failed

    monkeypatch.setattr(continual, "run_all", fake)
    assert list(search(bench, ["olora", "slao"], [1], 1).values()) == ["no memory"]
    assert Counter(method for method, _ in tried) == {"olora": 3, "slao": 5}
    monkeypatch.setattr("sys.argv", ["continual.py", "--out", str(bench.out), "--search", "--methods", "olora"])
    assert continual.main() == 1


def test_a_trial_whose_process_raises_is_one_failure_among_the_others(bench, monkeypatch, capsys):
    """The folder of one trial cannot be made; what is stored already is said to be, with its revision."""
    stored, blocked, fine = (Trial("inclora", "A", seed) for seed in (1, 2, 3))
    finish(bench.out, stored)
    blocked.folder(bench.out).parent.mkdir(parents=True)
    blocked.folder(bench.out).touch()
    failures = continual.run_all(bench, [stored, blocked, fine], 1)
    assert failures.keys() == {blocked} and failures[blocked].startswith("FileExistsError: ")
    assert read_outcomes(bench.out).keys() == {stored, fine}
    assert capsys.readouterr().out.startswith("2 trials to run; 1 are stored, of revision r\n")


def test_a_method_is_its_name_with_flags_that_win():
    trial = Trial("gorp --learning_rate 7e-3", "A", 3, ("--learning_rate", "1e-3"))
    flags = trial.flags()
    assert flags[:4] == ["--method", "gorp", "--seed", "3"]
    assert flags.index("1e-3") < flags.index("7e-3")


def test_no_two_trials_share_a_folder(tmp_path):
    different = [("gorp", "gorp --protect none"), "AB", (1, 2), ((), ("--lamda_1", "5")), ("dev", "test")]
    trials = [Trial(*values) for values in itertools.product(*different)]
    assert len({trial.folder(tmp_path) for trial in trials}) == len(trials)


def test_the_search_sees_dev_rows_and_no_test_row(bench, mini_benchmark):
    copy, source = bench.out / "dev_benchmark" / "TC" / "dbpedia", mini_benchmark / "TC" / "dbpedia"
    assert read_json(copy / "test.json") == read_json(copy / "dev.json") == read_json(source / "dev.json")
    assert read_json(copy / "train.json") == read_json(source / "train.json")
    command = bench.command(Trial("olora", "A", 1, (), "dev"), 1, TINY)
    assert command[command.index("--data_dir") + 1] == str(bench.out / "dev_benchmark")


def test_results_of_other_weights_are_not_mixed(bench, tmp_path):
    with pytest.raises(InputError, match="--out: .*another base/model.safetensors"):
        dataclasses.replace(bench, model=ROOT / "initial_model" / "tiny-llama").prepare()
    path, other = bench.out / "made_of.json", tmp_path / "other"
    finish(other, Trial("gorp", "A", 1))
    shutil.copy(path, other)
    path.write_text(path.read_text().replace("model.safetensors", "model-00001-of-00002.safetensors"))
    for reject in (bench.prepare, dataclasses.replace(bench, also=(other,)).finished):
        with pytest.raises(InputError, match="another base/model-00001-of-00002.safetensors"):
            reject()
    path.unlink()
    finish(bench.out, Trial("gorp", "A", 1))
    with pytest.raises(InputError, match="--out: .*no made_of.json"):
        bench.prepare()


def test_results_of_other_flags_are_not_mixed(bench, monkeypatch):
    monkeypatch.setattr(continual, "COMMON", [*continual.COMMON, "--weight_decay", "0.1"])
    with pytest.raises(InputError, match="--out: .* holds results of another set of flags"):
        bench.prepare()


def test_missing_rows_are_named_before_anything_runs(bench, mini_benchmark, tmp_path):
    shutil.copytree(mini_benchmark / "TC", tmp_path / "data" / "TC")
    (tmp_path / "data" / "TC" / "agnews" / "test.json").unlink()
    with pytest.raises(InputError, match="--data_dir: .*TC/agnews"):
        dataclasses.replace(bench, data_dir=tmp_path / "data", out=tmp_path / "other").prepare()
    assert not (tmp_path / "other").exists()


def test_the_whole_matrix_is_measured_on_test_rows_of_the_small_t5(bench):
    def tests(split, model):
        command = dataclasses.replace(bench, model=model).command(Trial("olora", "A", 1, (), split), 1, TINY)
        return command[command.index("--predict_tasks") + 1]

    llama = ROOT / "initial_model" / "tiny-llama"
    assert [tests("test", TINY), tests("dev", TINY), tests("test", llama)] == ["all", "ends", "ends"]


def test_what_the_search_found_is_for_the_method_and_its_variants(tmp_path):
    assert best_settings([tmp_path], "gorp") == ()
    finish(tmp_path, Trial("gorp", "A", 1, ("--lr", "1"), "dev"))
    finish(tmp_path, Trial("gorp --b 2", "A", 1, ("--lr", "2"), "dev"))
    for elsewhere in (Trial("gorp", "B", 1, ("--lr", "3"), "dev"), Trial("gorp", "A", 1, ("--lr", "3"), "test")):
        finish(tmp_path, elsewhere, accuracies=((100.0, None), (100.0, 100.0)))
    assert best_settings([tmp_path], "gorp") == best_settings([tmp_path], "gorp --a 1") == ("--lr", "1")
    assert best_settings([tmp_path], "gorp --b 2") == best_settings([tmp_path], "gorp --b 2 --a 1") == ("--lr", "2")
    assert best_settings([tmp_path], "gorp --b 23") == ("--lr", "1")
    assert best_settings([tmp_path], "olora") == ()


def test_the_search_of_a_former_default_counts_for_the_method_alone(tmp_path):
    finish(tmp_path, Trial("sgorp --galore_svd exact", "A", 1, ("--lr", "1"), "dev"))
    finish(tmp_path, Trial("sgorp --protect step", "A", 1, ("--lr", "2"), "dev"))
    assert best_settings([tmp_path], "sgorp") == best_settings([tmp_path], "sgorp --protect none") == ("--lr", "1")
    assert best_settings([tmp_path], "sgorp --protect step") == ("--lr", "2")
    finish(tmp_path, Trial("sgorp", "A", 1, ("--lr", "3"), "dev"))
    assert best_settings([tmp_path], "sgorp") == ("--lr", "3")


def test_settings_are_compared_over_the_seeds_that_all_were_tried_with(tmp_path):
    for rate, seed, value in [("1", 1, 34), ("3", 1, 33), ("3", 2, 99), ("1", 2, 20), ("9", 1, 30)]:
        finish(tmp_path, Trial("gorp", "A", seed, ("--lr", rate), "dev"), accuracies=((value, None), (value, value)))
    assert best_settings([tmp_path], "gorp") == ("--lr", "1")


def test_the_trials_of_a_search_are_counted_with_their_seeds(tmp_path):
    for rate, seed in [("1", 1), ("1", 2), ("3", 1)]:
        finish(tmp_path, Trial("gorp", "A", seed, ("--lr", rate), "dev"))
    searched = finish(tmp_path, Trial("gorp", "A", 1, ("--lr", "1")))
    assert sum(map(len, tried([tmp_path], "gorp --b 2").values())) == 3
    assert "| gorp | `--lr 1` (3 trials) |" in table("gorp", [searched], {"gorp": 3})
    unsearched = finish(tmp_path, Trial("gorp --lr 7", "A", 1, ("--lr", "1")))
    assert "| gorp --lr 7 | `defaults` |" in table("gorp", [unsearched], {"gorp --lr 7": 3})


def test_a_task_is_learnt_if_its_answers_beat_the_most_frequent_label_by_more_than_chance(tmp_path):
    """Wilson's intervals begin at 57.0 % for 13 right of 16, and at 80.6 % for all 16."""
    outcomes = [finish(tmp_path, Trial("multitask", "A", seed), ("1" * 13 + "000", "1" * 16)) for seed in (1, 2)]
    assert learnt_tasks(outcomes, {"dbpedia": 0.56, "agnews": 0.80}) == ["dbpedia", "agnews"]
    assert learnt_tasks(outcomes, {"dbpedia": 0.58, "agnews": 0.80}) == ["agnews"]
    assert learnt_tasks(outcomes, {"dbpedia": 0.56, "agnews": 0.81}) == ["dbpedia"]
    with pytest.raises(InputError, match="made_of.json lacks the most frequent labels of agnews"):
        learnt_tasks(outcomes, {"dbpedia": 0.5})


def test_the_most_frequent_label_is_that_of_the_examples_that_are_answered(tmp_path):
    """Of MNLI's test examples those without a gold label, "-", are left out, as in a run."""
    (tmp_path / "labels.json").write_text(json.dumps(["a", "b"]))
    examples = [{"sentence": "x", "label": label} for label in "a" * 50 + "-" * 100 + "b" * 150 + "a" * 300]
    (tmp_path / "test.json").write_text(json.dumps(examples))
    assert continual.majority(tmp_path) == 0.75


def test_the_column_of_learnt_tasks_leaves_the_others_out(tmp_path):
    outcomes = [finish(tmp_path, Trial("gorp", "A", 1), ("1100", "0000")),
                finish(tmp_path, Trial("olora", "A", 1), ("1000", "1111"))]
    lines = table("gorp", outcomes, learnt=["dbpedia"]).splitlines()
    assert lines[0].endswith("| 1 learnt tasks: AP, gorp minus it, 95 % over examples |")
    assert lines[-1] == "Learnt: dbpedia."
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert table("gorp", outcomes, learnt=[]).endswith("\n\nLearnt: none.")
    cells = {line.split(" | ")[0]: line.split(" | ")[-1] for line in lines[2:4]}
    assert cells["| gorp"] == "50.0, - |" and cells["| olora"].startswith("25.0, +25.0 [")
    elsewhere = dataclasses.replace(outcomes[0], trial=Trial("gorp", "B", 1), right={"yelp": "11"})
    of_both = table("gorp", [*outcomes, elsewhere], learnt=["dbpedia"]).splitlines()
    assert of_both[2].endswith(" 50.0, - |"), "an order without a learnt task counts for nothing"


def test_the_bench_keeps_the_share_of_the_most_frequent_label(bench, mini_benchmark):
    labels = [row["label"] for row in read_json(mini_benchmark / "TC" / "agnews" / "test.json")]
    assert bench.majorities()["agnews"] == max(map(labels.count, labels)) / len(labels)


def test_settings_that_a_methods_own_flags_replace_are_not_shown():
    trial = Trial("gorp --lr 7 --b", "A", 1, ("--lr", "1", "--c", "2"))
    assert trial.effective_settings() == "--c 2"
    assert Trial("gorp --lr 7", "A", 1, ("--lr", "1")).effective_settings() == "defaults"


def test_a_trial_without_its_predictions_is_no_outcome(bench):
    trial = Trial("inclora", "A", 1)
    assert isinstance(continual.run(bench, trial), Outcome)
    (trial.folder(bench.out) / "outputs" / "2-agnews" / "predict_eval_predictions.jsonl").unlink()
    with pytest.raises(InputError, match="predictions are not there"):
        Outcome.of(trial, bench.out)


def test_half_a_line_is_named(tmp_path):
    finish(tmp_path, Trial("gorp", "A", 1))
    with open(tmp_path / "outcomes.jsonl", "a") as file:
        file.write('{"trial": {"me')
    with pytest.raises(InputError, match="outcomes.jsonl, line 2: no finished trial"):
        read_outcomes(tmp_path)


def test_trials_of_another_machine_count_unless_this_one_has_them(bench, tmp_path):
    both, theirs = Trial("gorp", "A", 1), Trial("gorp", "A", 2)
    here, other = finish(bench.out, both, ("11", "11")), tmp_path / "other"
    finish(other, both, ("00", "00"))
    there = finish(other, theirs)
    shutil.copy(bench.out / "made_of.json", other)
    bench = dataclasses.replace(bench, also=(other,))
    assert bench.finished() == {both: here, theirs: there}
    assert "| gorp |" in compare(bench, "gorp", [both, theirs], 1) and not theirs.folder(bench.out).exists()
    edit(other / "made_of.json", lambda made: made | {"TC/agnews/test.json": "0"})
    with pytest.raises(InputError, match="--also: .*other are of another TC/agnews/test.json than"):
        bench.finished()
    new = dataclasses.replace(bench, out=tmp_path / "new")
    with pytest.raises(InputError, match="of another TC/agnews/test.json"):
        compare(new, "gorp", [Trial("gorp", "A", 3)], 1)
    assert not (tmp_path / "new" / "test").exists(), "before anything runs"
    (other / "made_of.json").unlink()
    with pytest.raises(InputError, match="--also: .* has no made_of.json"):
        bench.finished()


@pytest.mark.parametrize("flags, fault", [
    (["--search", "--orders", "B"], "--search: found --orders"),
    (["--settings_from", "/nowhere"], "--settings_from: /nowhere has no outcomes.jsonl"),
    (["--also", "/nowhere"], "--also: /nowhere has no outcomes.jsonl"),
    (["--search", "--also", "x"], "--search: found --also"),
    (["--workers", "0"], "--workers: found 0"),
    (["--search", "--learnt_by", "multitask"], "--search: found --learnt_by"),
    (["--dev", "--learnt_by", "multitask"], "--learnt_by: found --dev"),
    (["--learnt_by", "multitask", "--methods", "gorp"], "--learnt_by: found 'multitask'; allowed: one of --methods"),
    (["--methods", "gorp", "olora 'x"], "--methods: found"),
    (["--methods", "gorpp"], "--method: found gorpp"),
    (["--methods", "gorp"], "--model: .* is a"),
])  # fmt: skip
def test_bad_flags_are_refused_in_one_line(flags, fault, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setattr("sys.argv", ["continual.py", "--model", str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit, match="2"):
        continual.main()
    said = capsys.readouterr().err
    assert re.match(f"error: .*{fault}", said) and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_outcome_survives_its_line(tmp_path):
    outcome = finish(tmp_path, Trial("gorp --b 2", "A", 1, ("--lr", "2")))
    assert read_outcomes(tmp_path) == {outcome.trial: outcome}


def test_the_table_has_means_spreads_and_the_interval(tmp_path):
    outcomes = [finish(tmp_path, Trial("gorp", "A", seed), accuracies=((80.0, None), (100.0, 100.0)))
                for seed in (1, 2)]
    outcomes += [finish(tmp_path, Trial("olora", "A", seed), ("00", "00"), ((80.0, None), (value, value)))
                 for seed, value in ((1, 0.0), (2, 20.0))]
    text = table("gorp", outcomes)
    assert "| gorp | `defaults` | 100.0 ± 0.0, 20.0 ± 0.0 | 100.0 | 20.0 | - | 0 k | 0.0 MB |" in text
    assert "| olora | `defaults` | 10.0 ± 14.1, -70.0 ± 14.1 | 10.0 | -70.0 | +100.0 [+100.0, +100.0] |" in text
    assert text.index("| gorp") < text.index("| olora"), "the best first"
    assert "95 % |" in text and "over examples" not in text and "95 % over examples |" in table("gorp", outcomes[::2])
    one_seed = dataclasses.replace(outcomes[-1], trial=Trial("slao", "A", 1))
    mixed = table("gorp", [*outcomes, one_seed]).splitlines()
    assert "minus it, 95 % |" in mixed[0]
    assert [line.split(" | ")[0][2:] for line in mixed if "] over examples |" in line] == ["slao"]


def test_a_method_without_some_of_the_trials_has_no_mean_and_comes_last(tmp_path):
    outcomes = [finish(tmp_path, Trial("gorp", order, 1), accuracies=((40.0, None), (40.0, 40.0))) for order in "AB"]
    outcomes.append(finish(tmp_path, Trial("olora", "B", 1), accuracies=((90.0, None), (90.0, 90.0))))
    text = table("gorp", outcomes)
    assert text.index("| gorp") < text.index("| olora") and "| - | 90.0, 0.0 | - | - |" in text


@pytest.mark.parametrize("orders", ["AB", "BA"])
def test_a_mean_over_orders_weighs_orders_alike(tmp_path, orders):
    """Order A has two seeds, B one; both methods have them."""
    trials = [Trial("gorp", order, seed) for order in orders for seed in ((1, 2) if order == "A" else (1,))]
    score = {"A": 20.0, "B": 50.0}
    outcomes = [finish(tmp_path, trial, accuracies=((80.0, None), (score[trial.order],) * 2)) for trial in trials]
    assert "| 35.0 | -45.0 | - |" in table("gorp", outcomes)


KEPT = ["made_of.json", "outcomes.jsonl"]
REPRODUCE = (ROOT / "REPRODUCE.md").read_text(encoding="utf-8")


def reproduce_commands():
    """The arguments of each command in REPRODUCE.md that prints a table, and the text after its block."""
    variables = {"DATA": "--data_dir none --model none"}
    for block in re.finditer(r"```bash\n(.*?)```", REPRODUCE, re.DOTALL):
        for line in block[1].replace("\\\n", " ").splitlines():
            line = string.Template(line).safe_substitute(variables)
            if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[assigned[1]] = assigned[2]
            elif line.startswith("python benchmarks/continual.py ") and "--search" not in line:
                yield pytest.param(shlex.split(line)[1:], REPRODUCE[block.end():].lstrip(), id=f"at {block.start()}")


def test_every_table_of_reproduce_has_its_command():
    assert len(list(reproduce_commands())) == REPRODUCE.count("\n| method | settings |") > 0


@pytest.mark.parametrize("words, following", list(reproduce_commands()))
def test_the_tables_of_reproduce_are_what_its_commands_print(words, following, tmp_path, monkeypatch, capsys):
    for kept in (ROOT / "benchmarks" / "results").glob("*/outcomes.jsonl"):
        copy = tmp_path / "COPY" / kept.parent.name
        copy.mkdir(parents=True)
        for name in KEPT:
            shutil.copy(kept.parent / name, copy)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", words)
    assert continual.main() == 0
    assert following.startswith(capsys.readouterr().out)
    assert all(sorted(path.name for path in folder.iterdir()) == KEPT for folder in (tmp_path / "COPY").iterdir()), (
        "nothing had to run")


def test_a_trial_runs_through_the_entry_and_is_not_run_again(bench):
    trial = Trial("inclora", "A", 1)
    text = compare(bench, "gorp", [trial], 1)
    assert "| inclora |" in text
    outcome = read_outcomes(bench.out)[trial]
    assert {dataset: len(hits) for dataset, hits in outcome.right.items()} == {"dbpedia": 4, "agnews": 4}
    assert outcome.measures[0] == 100 * sum(map(numpy.sum, outcome.rows().values())) / 8
    last = trial.folder(bench.out) / "outputs" / "2-agnews"
    assert read_json(last / "t5_adapter" / "adapter_config.json")["r_sum"] == 16, "from the first task's adapter"
    assert outcome.stored_bytes == sum(path.stat().st_size for path in last.glob("t5_adapter/*.safetensors"))
    assert outcome.trained_values == read_json(last / "run_record.json")["report"]["trained_values"]
    shutil.rmtree(trial.folder(bench.out))
    assert compare(bench, "gorp", [trial], 1) == text and not trial.folder(bench.out).exists()


def test_a_trials_own_flags_win_over_those_of_all_trials(bench):
    trial = Trial("gorp --max_steps 7", "A", 3, ("--learning_rate", "3e-3"))
    assert bench.command(trial, 1, TINY)[-len(trial.flags()) :] == trial.flags()


@pytest.mark.parametrize("part", ["labels", "train", "dev", "test"])
def test_results_of_any_other_file_are_not_mixed(part, bench, mini_benchmark, tmp_path):
    shutil.copytree(mini_benchmark / "TC", tmp_path / "data" / "TC")
    edit(tmp_path / "data" / "TC" / "agnews" / f"{part}.json", lambda rows: rows[::-1])
    with pytest.raises(InputError, match=f"--out: .*another TC/agnews/{part}.json"):
        dataclasses.replace(bench, data_dir=tmp_path / "data").prepare()


def test_dev_examples_that_are_the_test_examples_choose_nothing(bench, mini_benchmark, tmp_path):
    shutil.copytree(mini_benchmark / "TC", tmp_path / "data" / "TC")
    shutil.copy(tmp_path / "data" / "TC" / "agnews" / "test.json", tmp_path / "data" / "TC" / "agnews" / "dev.json")
    other = dataclasses.replace(bench, data_dir=tmp_path / "data", out=tmp_path / "other")
    other.prepare()
    with pytest.raises(InputError, match="--data_dir: .*agnews/dev.json is a copy of test.json"):
        other.prepare(dev=True)


def test_a_trial_that_fails_says_where_and_is_no_outcome(bench):
    trial = Trial("inclora --lora_dim 9999", "A", 1)
    text = compare(bench, "gorp", [trial], 1)
    assert f"failed: {trial}: task 1: error: --lora_dim: found 9999; " in text
    assert trial not in read_outcomes(bench.out)


def test_an_earlier_attempts_error_is_not_reported(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("error: of the first attempt\nmore\n")
    start = log.stat().st_size
    assert last_error(log, start) is None
    with open(log, "a") as file:
        file.write("error: of the second\n")
    assert last_error(log, start) == "error: of the second"


# What the small T5 reads


def test_pretraining_reads_no_dev_or_test_sentence(tmp_path):
    folder = tmp_path / "TC" / "news"
    folder.mkdir(parents=True)
    rows = {"train": ["one", "two", "three", "one"], "dev": ["two\n"], "test": ["three", "four"]}
    for split, texts in rows.items():
        (folder / f"{split}.json").write_text(json.dumps([{"sentence": text, "label": "x"} for text in texts]))
    assert pretrain_small_t5.sentences(tmp_path) == ["one"]


@pytest.fixture
def exercises():
    words = ["".join(random.Random(number).choices("bcdfgaeiou", k=6)) for number in range(60)]
    texts = [" ".join(random.Random(number).sample(words, 12)) for number in range(400)]
    made = pretrain_small_t5.Exercises(texts, 1)
    made.telling, made._is_telling = sorted(words), set(words)
    return made


def test_a_choice_can_be_made_and_its_text_hides_the_answer(exercises):
    for _ in range(50):
        prompt, answer = exercises.choose()
        options, text = prompt.split("Option: ")[1].split(" \n", 1)
        assert answer in options.split(", ")
        assert not set(answer.lower().split()) & set(text.lower().split())


def test_a_copy_exercise_shows_its_answer(exercises):
    for _ in range(50):
        prompt, answer = exercises.copy()
        options, text = prompt.removeprefix("Option: ").split(" \n", 1)
        assert answer in options.split(", ") and answer in text


def test_meanings_refuse_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match="--words_from.*unpack_small"):
        pretrain_small_t5.Meanings(tmp_path)


def test_meanings_are_of_each_word_whatever_stands_beside_it():
    meanings = pretrain_small_t5.Meanings(ROOT / "initial_model" / "tiny-llama", layer=1)
    words = ["river", "Company", "a longer phrase of words"]
    together, alone = meanings(words), torch.cat([meanings.states([word]) for word in words])
    assert torch.allclose(together, torch.nn.functional.normalize(alone - alone.mean(0), dim=1), atol=1e-4)
