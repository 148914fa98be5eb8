"""Finished trials of `benchmarks/continual.py`: what is stored of each, and the tables made from them.

`outcomes.jsonl` has a line for each trial; figures.py draws them.
"""

import json
import math
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import InputError
from files import read_json
from report.bootstrap import Interval, RunKey, paired_interval
from report.matrix import Matrix, average_performance, backward_transfer
from report.runs import read_run
from run_record import RECORD

SEARCHED = "A"
"""The order on which a method's settings are searched."""
DEFAULTS = "defaults"
STANDS_FOR = {"sgorp --galore_svd exact": "sgorp"}
"""Searches from before a default changed -> the method that they count for, until it has a search of its own."""


@dataclass(frozen=True)
class Trial:
    """One training run over an order: a method, as named on the command line, with the settings found for it."""

    method: str
    order: str
    seed: int
    settings: tuple[str, ...] = ()
    split: str = "test"

    def __str__(self) -> str:
        return f"{' '.join([self.method, *self.settings])}, order {self.order}, seed {self.seed}, {self.split} examples"

    def folder(self, out: Path) -> Path:
        """The folder of its results. Other flags get another folder, so that no trial finds another's results."""
        words = shlex.split(self.method)
        name = "_".join([words[0], *self.settings, *words[1:]])
        return out / self.split / re.sub(r"[^A-Za-z0-9.=-]+", "_", name) / self.order / str(self.seed)

    def effective_settings(self) -> str:
        """The settings that the method's own flags do not override."""
        own, pairs = shlex.split(self.method), zip(self.settings[::2], self.settings[1::2])
        return " ".join(f"{flag} {value}" for flag, value in pairs if flag not in own) or DEFAULTS

    def flags(self) -> list[str]:
        """Flags for `run_uie_lora.py`: the settings first, so that the method's own flags override them."""
        words = shlex.split(self.method)
        return ["--method", words[0], "--seed", str(self.seed), *self.settings, *words[1:]]


@dataclass(frozen=True)
class Outcome:
    """The result of a finished trial: a line of `outcomes.jsonl`.

    Attributes:
        accuracy: a[i][j], in per cent, on the order's task j after its task i (`src/report/matrix.py`).
        right: dataset -> a string with 1 or 0 for each test example, as answered after the order's last task.
        revision: git revision of the code that ran.
    """

    trial: Trial
    accuracy: Matrix
    right: dict[str, str]
    seconds: float
    trained_values: int
    stored_bytes: int
    revision: str | None

    @classmethod
    def of(cls, trial: Trial, out: Path) -> "Outcome":
        """Read the outcome of a trial from its files.

        Raises:
            InputError: some are missing.
        """
        run = read_run(trial.folder(out))
        if not run.scores:
            raise InputError(f"{run.folder}: the last task's predictions are not there")
        right = {dataset: "".join(str(int(hit)) for hit in hits) for dataset, hits in run.scores.items()}
        record = read_json(run.folder / "outputs" / f"{len(run.tasks)}-{run.tasks[-1]}" / RECORD)
        return cls(trial, run.matrix, right, run.seconds, run.trained_values, run.stored_bytes, record["git_revision"])

    @classmethod
    def from_line(cls, line: str) -> "Outcome":
        read = json.loads(line)
        trial = read.pop("trial")
        return cls(Trial(**trial | {"settings": tuple(trial["settings"])}), **read)

    @property
    def measures(self) -> tuple[float, float]:
        """AP and BWT."""
        return average_performance(self.accuracy), backward_transfer(self.accuracy)

    def rows(self) -> dict[str, np.ndarray]:
        """`right` as arrays of 0 and 1, (n,) for the n test examples of a dataset."""
        return {dataset: np.array([int(hit) for hit in hits]) for dataset, hits in self.right.items()}


def read_outcomes(out: Path) -> dict[Trial, Outcome]:
    """The finished trials in the results folder `out`.

    Raises:
        InputError: a line is not a complete trial, such as the last one after a full disk.
    """
    path = out / "outcomes.jsonl"
    outcomes = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            outcome = Outcome.from_line(line)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: no finished trial ({error!r}); delete the line") from None
        outcomes[outcome.trial] = outcome
    return outcomes


def tried(folders: Sequence[Path], method: str) -> dict[tuple[str, ...], dict[int, float]]:
    """Settings -> seed -> AP in the search for a method, or else for this method with fewer of its flags."""
    by_method: dict[str, dict[tuple[str, ...], dict[int, float]]] = {}
    for outcome in (one for folder in folders for one in read_outcomes(folder).values()):
        trial = outcome.trial
        if trial.split == "dev" and trial.order == SEARCHED and trial.settings:
            by_method.setdefault(trial.method, {}).setdefault(trial.settings, {})[trial.seed] = outcome.measures[0]
    for former, name in STANDS_FOR.items():
        if former in by_method:
            by_method.setdefault(name, by_method[former])
    nearest = max((name for name in by_method if f"{method} ".startswith(f"{name} ")), default=None, key=len)
    return by_method.get(nearest, {})


def best_settings(folders: Sequence[Path], method: str, among: Sequence[tuple[str, ...]] = ()) -> tuple[str, ...]:
    """The best settings that the search found for a method, or the best `among` these; empty without a search.

    They are compared over the seeds with which all of them were tried, or over all seeds if there is no such seed.
    """
    scores = {settings: of_seeds for settings, of_seeds in tried(folders, method).items()
              if not among or settings in among}
    common = set.intersection(*map(set, scores.values())) if scores else set()
    return max(scores, default=(), key=lambda settings: statistics.mean(
        value for seed, value in scores[settings].items() if seed in common or not common))


def table(reference: str, outcomes: list[Outcome], trials: Mapping[str, int] = {},
          learnt: Sequence[str] | None = None) -> str:
    """Return a Markdown table, a row per method: AP and BWT of each order (mean and standard deviation over seeds), the
    lead of `reference` over the method, the parameters that it trains and the bytes that it saves for the next task. A
    method that lacks some of the orders and seeds has no mean, and comes last.

    Args:
        trials: method -> number of trials in the search for its settings.
        learnt: datasets over which AP, with the reference's lead, gets a column.
    """
    orders = sorted({outcome.trial.order for outcome in outcomes})
    of_method: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        of_method.setdefault(outcome.trial.method, []).append(outcome)
    right = {method: _right(own) for method, own in of_method.items()}
    everything = set().union(*right.values())
    means = {method: _mean_over_orders(own) for method, own in of_method.items() if right[method].keys() == everything}
    covered, lead_over = _lead_cells(_leads(reference, right))
    head = ["method", "settings", *(f"{order}: AP, BWT" for order in orders), "mean AP", "mean BWT",
            f"{reference} minus it, {covered}", "trains", "stores"]  # fmt: skip
    if learnt:
        of_learnt = {method: _right(own, learnt) for method, own in of_method.items()}
        covered, lead_there = _lead_cells(_leads(reference, of_learnt))
        head.append(f"{len(learnt)} learnt tasks: AP, {reference} minus it, {covered}")
    rows = []
    for method in sorted(of_method, key=lambda method: -means.get(method, (0, 0))[0]):
        own = of_method[method]
        rows.append([
            method, _settings_cell(own[0].trial, trials), *(_order_cell(own, order) for order in orders),
            *(f"{mean:.1f}" for mean in means.get(method, ())), *["-"] * (0 if method in means else 2),
            lead_over(method), f"{max(one.trained_values for one in own) / 1000:,.0f} k",
            f"{statistics.mean(one.stored_bytes for one in own) / 1e6:.1f} MB",
        ])  # fmt: skip
        if learnt:
            there = of_learnt[method]
            rows[-1].append(f"{paired_interval(there).mean:.1f}, {lead_there(method)}" if there else "-")
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    if learnt is not None:
        lines += ["", f"Learnt: {', '.join(learnt) or 'none'}."]
    return "\n".join(lines)


def _settings_cell(trial: Trial, searched: Mapping[str, int]) -> str:
    """A method's settings, and the number of trials in the search that found them."""
    settings, count = trial.effective_settings(), searched.get(trial.method)
    return f"`{settings}`" + (f" ({count} trials)" if count and settings != DEFAULTS else "")


def _order_cell(outcomes: list[Outcome], order: str) -> str:
    """AP and BWT in an order, each with its standard deviation over seeds."""
    measures = _measures(outcomes, order)
    return ", ".join(map(_spread, zip(*measures))) if measures else "-"


def _right(outcomes: list[Outcome], datasets: Sequence[str] = ()) -> dict[RunKey, dict[str, np.ndarray]]:
    """Correct answers by order and seed, then by dataset: all of them, or those in `datasets`, and then without the
    orders that have none of these."""
    right = {(one.trial.order, str(one.trial.seed)): {
        dataset: hits for dataset, hits in one.rows().items() if dataset in (datasets or one.right)}
        for one in outcomes}  # fmt: skip
    return {run: of_run for run, of_run in right.items() if of_run}


def _leads(reference: str, right: Mapping[str, Mapping[RunKey, Mapping[str, np.ndarray]]]) -> dict[str, Interval]:
    """By how much the reference is above each method that shares an order and seed with it."""
    return {method: paired_interval(right[reference], own) for method, own in right.items()
            if method != reference and right.get(reference, {}).keys() & own.keys()}


def _lead_cells(leads: Mapping[str, Interval]) -> tuple[str, Callable[[str], str]]:
    """What the intervals of a column cover, for its head, and each method's cell: an interval over examples alone is
    marked where others are over seeds as well."""
    of_one_seed = {method for method, lead in leads.items() if lead.seeds == 1}
    if of_one_seed == leads.keys():
        return "95 %" + (" over examples" if leads else ""), lambda method: str(leads.get(method, "-"))
    return "95 %", lambda method: f"{leads.get(method, '-')}{' over examples' if method in of_one_seed else ''}"


def learnt_tasks(outcomes: list[Outcome], majorities: Mapping[str, float]) -> list[str]:
    """The datasets that these outcomes, all of one method, answer better than by always giving the most frequent label:
    its share lies below Wilson's 95 % interval of theirs. Seeds are averaged first, so it is over examples alone.

    Raises:
        InputError: the share of a dataset's most frequent label is not known.
    """
    hits: dict[str, list[np.ndarray]] = {}
    for outcome in outcomes:
        for dataset, own in outcome.rows().items():
            hits.setdefault(dataset, []).append(own)
    if missing := hits.keys() - majorities.keys():
        raise InputError(f"--learnt_by: made_of.json lacks the most frequent labels of {', '.join(sorted(missing))}")
    shares = {dataset: np.mean(own, axis=0) for dataset, own in hits.items()}
    return [dataset for dataset, own in shares.items() if _lower_bound(own) > majorities[dataset]]


def _lower_bound(shares: np.ndarray, z: float = 1.96) -> float:
    """The lower end of Wilson's interval of the mean of `shares` (n,), which also holds where all of few are right."""
    n = len(shares)
    margin = z * math.sqrt(shares.var() / n + (z / (2 * n)) ** 2)
    return (shares.mean() + z**2 / (2 * n) - margin) / (1 + z**2 / n)


def _measures(outcomes: list[Outcome], order: str) -> list[tuple[float, float]]:
    return [outcome.measures for outcome in outcomes if outcome.trial.order == order]


def _mean_over_orders(outcomes: list[Outcome]) -> tuple[float, float]:
    """AP and BWT: the mean over orders of the mean over an order's seeds."""
    of_orders = [_measures(outcomes, order) for order in sorted({outcome.trial.order for outcome in outcomes})]
    performance, transfer = zip(*([statistics.mean(values) for values in zip(*one)] for one in of_orders))
    return statistics.mean(performance), statistics.mean(transfer)


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
