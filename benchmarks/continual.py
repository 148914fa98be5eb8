"""The methods side by side on real text under one fixed protocol: who keeps most of what it learned, and is it chance?

    python initial_model/pretrain_small_t5.py --data_dir FOLDER
    python benchmarks/continual.py --data_dir FOLDER --out RESULTS --search        each method's settings, on dev rows
    python benchmarks/continual.py --data_dir FOLDER --out RESULTS --question side --seeds 1 2 3     GORP's, on dev rows
    python benchmarks/continual.py --data_dir FOLDER --out RESULTS --seeds 1 2 3   the comparison, on test rows

Every method trains on the same 160 rows of each task for the same number of steps and answers the same test rows (200
of each task, where it has them) after every task; on dev rows, and with a LLaMA, which answers slowly, after a task
only that task's own, all of them after the last. A method is its name and, if wanted, flags, which win over all
others: `--methods olora "gorp --protect gp_second"`. What is decided is decided on dev rows: `--question` compares
variants of GORP (`QUESTIONS`); `--search` tries three learning rates, then with the best of them two more values of the
method's own knob (`KNOBS`), on one order with one seed, and notes the best in RESULTS/search.json, where a comparison
finds them.

Results are written as they come: RESULTS/table.md and table.csv hold what is finished. The same command goes on
where it was ended; what its run records say is finished is not run again. Two methods differ where the interval of
their difference (`src/report/bootstrap.py`) does not hold 0.
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import re
import shlex
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "data")]

from compute_metrics import exact_match  # noqa: E402
from errors import InputError  # noqa: E402
from files import read_json, whole_file, write_json  # noqa: E402
from make_order import make_order  # noqa: E402
from report.bootstrap import paired_interval  # noqa: E402
from report.runs import Run, read_run  # noqa: E402
from run_record import find_adapter  # noqa: E402

ORDERS = {
    "A": ["TC/dbpedia", "SC/amazon", "SC/yelp", "TC/agnews"],
    "B": ["TC/agnews", "SC/yelp", "SC/amazon", "TC/dbpedia"],
    "C": ["NLI/MNLI", "NLI/CB", "WiC/WiC", "COPA/COPA", "QQP/QQP", "SC/SST-2", "TC/dbpedia", "TC/agnews"],
}
OURS = "gorp"
METHODS = [
    "seqlora", "inclora", "olora", "nlora", "galore", "osf", "replay", "multitask", OURS,
    "gorp --protect none", "gorp --optim_target_modules none", "gorp --proj_lora_modules none",
    "gorp --preset published",
]  # fmt: skip
INPUT = "--protect_side input"
QUESTIONS = {
    "side": ["gorp --protect none", *(f"gorp --protect {how} {side}" for how in ("gp_first", "gp_second")
                                      for side in ("--protect_side output", INPUT)),
             f"gorp --protect structural {INPUT}"],
    "energy": [f"gorp --protect structural {INPUT} --space_energy {share}" for share in (0.5, 0.9, 0.99)],
    "parts": [f"gorp --protect structural {INPUT} --{modules} none"
              for modules in ("optim_target_modules", "proj_lora_modules")],
    "rank": [f"gorp --protect structural {INPUT} --galore_rank {rank}" for rank in (4, 8, 32)],
    "source": [f"gorp --protect {how} {INPUT} --space_from {source}" for how in ("gp_second", "structural")
               for source in ("moments", "inputs")],
    "penalty": [f"gorp --protect structural {INPUT} --lamda_1 {weight}" for weight in (0, 0.5, 5)],
}
"""What decides GORP's defaults: variants that `--question` compares."""
TRAIN_ROWS, TEST_ROWS = 160, 200

COMMON = shlex.split(f"""
    --do_train --do_predict --predict_with_generate --max_train_samples {TRAIN_ROWS} --max_predict_samples {TEST_ROWS}
    --add_task_name True --add_dataset_name True --max_target_length 16 --generation_max_length 16
    --lr_scheduler_type constant --warmup_steps 0 --logging_steps 10 --eval_strategy no --save_strategy no
    --report_to none --disable_tqdm True --lora_dropout 0
""")
FAMILIES = {
    "t5": shlex.split("""
        --max_source_length 128 --max_steps 300 --per_device_train_batch_size 8 --per_device_eval_batch_size 100
        --lora_modules .*SelfAttention.(q|v).* --optim_target_modules .*EncDecAttention.(q|v).*
        --proj_lora_modules .*SelfAttention.(q|v).loranew_A.*
    """),
    "llama": shlex.split("""
        --max_source_length 256 --max_steps 40 --per_device_train_batch_size 4 --per_device_eval_batch_size 20
        --lora_modules .*self_attn.(q_proj|v_proj).* --optim_target_modules .*mlp.gate_proj.*
        --proj_lora_modules .*self_attn.(q_proj|v_proj).loranew_A.*
    """),
}
"""Flags by the model's type: rows a step and steps a task, and where the methods train, as published."""

# What `--search` tries: the rate of what a method trains most, then other values of the knob that is the method's own.
RATES = {"galore": ("--galore_lr", ["1e-3", "3e-3", "1e-2"])}
RATES_OF_OTHERS = ("--learning_rate", ["3e-4", "1e-3", "3e-3"])
KNOBS = {
    "olora": ("--lamda_1", ["0.05", "5"]),
    "nlora": ("--nlora_lamda", ["1e-4", "1e-3"]),
    "galore": ("--galore_rank", ["16", "32"]),
    "osf": ("--osf_preserved", ["0.3", "0.8"]),
    "replay": ("--replay_rows", ["40", "80"]),
    "gorp": ("--galore_lr", ["3e-4", "3e-3"]),
}
SEARCHED = "A"  # the order of the search
SHOWN = ("average_performance", "backward_transfer")


@dataclass(frozen=True)
class Trial:
    """One order, trained once: a method, as the command line names it, with the settings that were found for it."""

    method: str
    order: str
    seed: int
    settings: tuple[str, ...] = ()
    split: str = "test"

    def folder(self, out: Path) -> Path:
        """Where its results are. Other settings go elsewhere, so that no trial meets another's results."""
        words = shlex.split(self.method)
        name = "_".join([words[0], *self.settings, *words[1:]])
        return out / self.split / re.sub(r"[^A-Za-z0-9.=-]+", "_", name) / self.order / str(self.seed)

    def flags(self) -> list[str]:
        """Of `run_uie_lora.py`; what was found first, so that the method's own flags win."""
        words = shlex.split(self.method)
        return ["--method", words[0], "--seed", str(self.seed), *self.settings, *words[1:]]


@dataclass(frozen=True)
class Bench:
    """What all trials share."""

    data_dir: Path
    model: Path
    out: Path
    extra: tuple[str, ...] = ()

    def family(self) -> str:
        kind = read_json(self.model / "config.json").get("model_type")
        if kind not in FAMILIES:
            raise InputError(f"--model: {self.model} is a {kind}; allowed: {', '.join(FAMILIES)}")
        return kind

    def prepare(self, orders: Iterable[str]) -> None:
        """Write the orders' files, and the benchmark in which dev rows stand in for test rows."""
        for order in orders:
            make_order(order, ORDERS[order], configs_dir=self.out / "configs", data_dir=self.data_dir, overwrite=True)
        for labels in self.data_dir.glob("*/*/labels.json"):
            copy = self.out / "dev_benchmark" / labels.parent.relative_to(self.data_dir)
            copy.mkdir(parents=True, exist_ok=True)
            for name, source in [("labels", "labels"), ("train", "train"), ("dev", "dev"), ("test", "dev")]:
                shutil.copyfile(labels.with_name(f"{source}.json"), copy / f"{name}.json")

    def command(self, trial: Trial, number: int, start: Path) -> list[str]:
        """Flags of a trial's task, counted from 1, that starts from the model or adapter folder `start`."""
        dataset = ORDERS[trial.order][number - 1].split("/")[1]
        return [
            "--model_name_or_path", str(start),
            "--data_dir", str(self.data_dir if trial.split == "test" else self.out / "dev_benchmark"),
            "--instruction_file", str(ROOT / "configs" / "instruction_config.json"),
            "--task_config_dir", str(self.out / "configs" / f"{trial.order}_configs" / dataset),
            "--output_dir", str(trial.folder(self.out) / "outputs" / f"{number}-{dataset}"),
            "--predict_tasks", "all" if trial.split == "test" and self.family() == "t5" else "ends",
            *COMMON, *FAMILIES[self.family()], *self.extra, *trial.flags(),
        ]  # fmt: skip


def run(bench: Bench, trial: Trial) -> tuple[Trial, str]:
    """Train and test a trial's tasks one after the other in this process; the trial, and what ended it if it failed."""
    import run_uie_lora  # slow, so only where something runs

    folder, start = trial.folder(bench.out), bench.model
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        for number in range(1, len(ORDERS[trial.order]) + 1):
            command = bench.command(trial, number, start)
            try:
                status = run_uie_lora.main(command)
            except Exception as error:  # one method's fault must not cost the others their runs
                status = f"{type(error).__name__}: {error}"
            if status != 0:
                return trial, f"task {number}: {status}; {folder / 'log.txt'}"
            start = find_adapter(Path(command[command.index("--output_dir") + 1]))
    return trial, ""


def end_with_parent() -> None:
    """Have a worker end when this program is killed, or it would still hold folders that the next one wants."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_all(bench: Bench, trials: list[Trial], workers: int, after_each) -> None:
    """Run trials in worker processes; `after_each` gets the trial, and its failure or an empty text."""
    # Started anew, not forked: PyTorch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        for done in as_completed([pool.submit(run, bench, trial) for trial in trials]):
            after_each(*done.result())


# The search


def rates(method: str) -> list[tuple[str, ...]]:
    """What `--search` tries first for a method."""
    flag, values = RATES.get(method.split()[0], RATES_OF_OTHERS)
    return [(flag, rate) for rate in values]


def knobs(method: str, rate: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What it tries then, with the rate that was best."""
    flag, values = KNOBS.get(method.split()[0], ("", []))
    return [(*rate, flag, value) for value in values]


def search(bench: Bench, methods: list[str], seed: int, workers: int) -> None:
    """Try each method's settings on dev rows; RESULTS/search.json gets every score, and the best settings."""
    path = bench.out / "search.json"
    found = read_json(path) if path.exists() else {}

    def note(trial: Trial, failure: str) -> None:
        score = None if failure else read_run(trial.folder(bench.out)).final("average_performance")
        print(f"{trial.method} {' '.join(trial.settings)}: {failure or f'AP {score:.2f}'}", flush=True)
        entry = found.setdefault(trial.method, {"scores": {}})
        entry["scores"][" ".join(trial.settings)] = score
        entry["best"] = " ".join(best_of(entry["scores"], map(str.split, entry["scores"])))
        write_json(path, found)

    def try_all(settings_of) -> None:
        run_all(bench, [Trial(method, SEARCHED, seed, settings, "dev") for method in methods
                        for settings in settings_of(method)], workers, note)

    try_all(rates)
    try_all(lambda method: knobs(method, best_of(found[method]["scores"], rates(method))))


def best_of(scores: dict[str, float | None], tried: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Of the settings, those with the highest score; none where all failed."""
    finished = [settings for settings in tried if scores[" ".join(settings)] is not None]
    return tuple(max(finished, key=lambda settings: scores[" ".join(settings)], default=()))


def best_settings(out: Path, method: str) -> tuple[str, ...]:
    """What the search found for a method, or else for it with fewer of its flags; nothing without a search."""
    path = out / "search.json"
    found = read_json(path) if path.exists() else {}
    nearest = max((name for name in found if f"{method} ".startswith(f"{name} ")), key=len, default=None)
    return tuple(found[nearest]["best"].split()) if nearest else ()


# The comparison


def answers(folder: Path) -> dict[str, np.ndarray]:
    """By dataset, which test rows (n,) were answered rightly after the order's last task."""
    last = max(folder.glob("outputs/*-*"), key=lambda step: int(step.name.partition("-")[0]))
    right: dict[str, list[bool]] = {}
    with open(last / "predict_eval_predictions.jsonl", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            right.setdefault(row["Dataset"], []).append(exact_match(row["Prediction"], row["Instance"]["label"]))
    return {dataset: np.array(rows) for dataset, rows in right.items()}


def read_finished(out: Path, trials: list[Trial]) -> dict[Trial, Run]:
    """The trials whose every task is finished."""
    complete = [trial for trial in trials if all(
        (trial.folder(out) / "outputs" / f"{number}-{task.split('/')[1]}" / "completed.json").exists()
        for number, task in enumerate(ORDERS[trial.order], 1)
    )]  # fmt: skip
    return {trial: read_run(trial.folder(out)) for trial in complete}


def write_tables(out: Path, name: str, reference: str, finished: dict[Trial, Run], failures: dict[Trial, str]) -> str:
    """Write <name>.csv and <name>.md anew from what is finished; the latter's text."""
    with whole_file(out / f"{name}.csv") as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["method", "order", "seed", "settings", "AP", "BWT", "forgetting", "seconds", "trained values"])
        for trial, run in finished.items():
            measures = [run.final(measure) for measure in (*SHOWN, "forgetting")]
            rows.writerow([trial.method, trial.order, trial.seed, " ".join(trial.settings), *measures, run.seconds,
                           run.trained_values])
    lines = [f"failed: {trial.method}, order {trial.order}, seed {trial.seed}: {failure}"
             for trial, failure in failures.items()]
    text = "\n\n".join([table(out, reference, finished), *lines])
    with whole_file(out / f"{name}.md") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return text


def table(out: Path, reference: str, finished: dict[Trial, Run]) -> str:
    """Markdown: method x order, AP and BWT as mean and spread over seeds, and by how much `reference` is above each."""
    orders = sorted({trial.order for trial in finished})
    right: dict[str, dict] = {}
    for trial in finished:
        right.setdefault(trial.method, {})[trial.order, str(trial.seed)] = answers(trial.folder(out))
    lines = [f"| method | settings | {' | '.join(f'{order}: AP, BWT' for order in orders)} | mean AP | mean BWT "
             f"| {reference} minus it, 95 % |", "|---|---|" + "---|" * (len(orders) + 3)]
    for method in right:
        runs = {order: [run for trial, run in finished.items() if (trial.method, trial.order) == (method, order)]
                for order in orders}
        cells = [", ".join(_spread([run.final(name) for run in runs[order]]) for name in SHOWN) if runs[order] else "-"
                 for order in orders]
        cells += [f"{statistics.mean(_means(runs, name)):.1f}" for name in SHOWN]
        both = method != reference and right.get(reference, {}).keys() & right[method].keys()
        cells.append(str(paired_interval(right[reference], right[method])) if both else "-")
        settings = next(" ".join(trial.settings) for trial in finished if trial.method == method) or "defaults"
        lines.append(f"| {method} | `{settings}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _means(runs: dict[str, list[Run]], name: str) -> list[float]:
    """A measure's mean over seeds, for each order that has runs."""
    return [statistics.mean(run.final(name) for run in of_order) for of_order in runs.values() if of_order]


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def compare(bench: Bench, name: str, reference: str, trials: list[Trial], workers: int) -> str:
    """Run the trials, keeping the tables up to date; the table of `write_tables`."""
    failures: dict[Trial, str] = {}

    def note(trial: Trial, failure: str) -> None:
        if failure:
            failures[trial] = failure
        finished = read_finished(bench.out, trials)
        write_tables(bench.out, name, reference, finished, failures)
        scores = failure or ", ".join(f"{measure} {finished[trial].final(measure):.2f}" for measure in SHOWN)
        print(f"{time.strftime('%H:%M')} {trial.method}, order {trial.order}, seed {trial.seed}: {scores}", flush=True)

    run_all(bench, trials, workers, note)
    return write_tables(bench.out, name, reference, read_finished(bench.out, trials), failures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="benchmark folder: <TASK>/<DATASET>/*.json")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", type=Path, default=ROOT / "initial_model" / "small-t5")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names, each with flags if wanted")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--extra", default="", help="more flags of src/run_uie_lora.py, for every method")
    decide = parser.add_mutually_exclusive_group()
    decide.add_argument("--search", action="store_true", help="find each method's settings, on dev rows")
    decide.add_argument("--question", choices=QUESTIONS, help="compare these variants of GORP, on dev rows")
    args = parser.parse_args()
    bench = Bench(args.data_dir.resolve(), args.model.resolve(), args.out.resolve(), tuple(shlex.split(args.extra)))
    try:
        bench.family()
        bench.prepare({*args.orders, SEARCHED})
        if args.search:
            search(bench, args.methods, args.seeds[0], args.workers)
            return
        methods = QUESTIONS[args.question] if args.question else args.methods
        trials = [Trial(method, order, seed, best_settings(bench.out, method), "dev" if args.question else "test")
                  for seed in args.seeds for order in args.orders for method in methods]
        print(compare(bench, args.question or "table", methods[0] if args.question else OURS, trials, args.workers))
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
