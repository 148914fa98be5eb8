"""The methods side by side on real text under one fixed protocol: who keeps most of what it learned, and is it chance?

    python initial_model/pretrain_small_t5.py --data_dir FOLDER
    python benchmarks/continual.py --data_dir FOLDER --out RESULTS --question protection  variants of SGORP, on dev rows
    python benchmarks/continual.py --data_dir FOLDER --out RESULTS --search        each method's settings, on dev rows
    python benchmarks/continual.py --data_dir FOLDER --out RESULTS --seeds 1 2 3   the comparison, on test rows

Every method trains on the same 160 rows of each task for the same number of steps and answers the same test rows (200
of each task, where it has them) after every task; on dev rows, and with a LLaMA, which answers slowly, after a task
only that task's own, all of them after the last. A method is its name and, if wanted, flags, which win over all others:
`--methods olora "sgorp --protect none"`. Settings are decided on dev rows: `--question` compares variants of
SGORP (`QUESTIONS`); `--search` tries three learning rates, then with the best of them two more values of the method's
own knob (`KNOBS`), or two more rates where it has none, on one order. A comparison takes the settings that were best on
average over seeds.

RESULTS/outcomes.jsonl gets a line for each finished trial, as it comes: all that the tables and intervals need, and no
text of the benchmark. What it holds is not run again, so that with `--out benchmarks/results/small-t5`, this project's
finished trials, the tables in REPRODUCE.md come at once, without model and data. RESULTS/made_of.json has the digests
of model and data; others are refused. A trial that was ended goes on where it stood, unless the code has changed since:
then its folder is to be deleted. `--learnt_by METHOD` adds the AP of those tasks alone that METHOD, multi-task
training as a rule, answers better than by always giving the most frequent label. Two methods differ where the interval
of their difference (`src/report/bootstrap.py`) does not hold 0; that of a single seed holds for that seed.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "data")]

from benchmarks.outcomes import (  # noqa: E402
    SEARCHED,
    Outcome,
    Trial,
    best_settings,
    learnt_tasks,
    read_outcomes,
    table,
    tried,
)
from errors import InputError  # noqa: E402
from files import digest, read_json, write_json  # noqa: E402
from make_order import make_order  # noqa: E402
from methods import find_method  # noqa: E402
from order_config import is_complete  # noqa: E402
from run_record import find_adapter  # noqa: E402

ORDERS = {
    "A": ["TC/dbpedia", "SC/amazon", "SC/yelp", "TC/agnews"],
    "B": ["TC/agnews", "SC/yelp", "SC/amazon", "TC/dbpedia"],
    "C": ["NLI/MNLI", "NLI/CB", "WiC/WiC", "COPA/COPA", "QQP/QQP", "SC/SST-2", "TC/dbpedia", "TC/agnews"],
    "L": ["NLI/MNLI", "NLI/CB", "WiC/WiC", "COPA/COPA", "QQP/QQP", "BoolQA/BoolQA", "NLI/RTE", "SC/IMDB", "SC/yelp",
          "SC/amazon", "SC/SST-2", "TC/dbpedia", "TC/agnews", "MultiRC/MultiRC"],
}
"""L is the published order 4 without yahoo. It takes longer than the others together and runs only when asked for."""
SHORT = ("A", "B", "C")
OURS = "sgorp"
METHODS = [
    "seqlora", "inclora", "olora", "nlora", "galore", "osf", "replay", "multitask", "gorp", "gorp --preset released",
    OURS, "inflora", "ella", "slao", "magmax", "magmax --magmax_merge ties", "ewc",
    "seqlora --lora_optimizer muon", "inclora --lora_optimizer muon", f"{OURS} --protect step",
]  # fmt: skip
INPUT, MOMENTS = "--protect_side input", "--space_from moments"
ASKED = "sgorp --lamda_1 0.5"  # then the default
STRUCTURAL = f"{ASKED} --protect structural {INPUT} --space_from inputs"
QUESTIONS = {
    "protection": [STRUCTURAL, f"{ASKED} --protect none",
                   f"{ASKED} --protect gp_first --protect_side output {MOMENTS}",
                   f"{ASKED} --protect gp_first {INPUT} --space_from inputs",
                   *(f"{ASKED} --protect {how} {INPUT} {MOMENTS}" for how in ("gp_first", "structural"))],
    "energy": [STRUCTURAL, *(f"{STRUCTURAL} --space_energy {share}" for share in (0.5, 0.8, 0.95, 0.99))],
    "rate": [STRUCTURAL, *(f"{STRUCTURAL} --galore_lr {rate}" for rate in ("1e-4", "1e-3", "3e-3"))],
    "rank": [f"{STRUCTURAL} --galore_lr 1e-3{rank}" for rank in ("", " --galore_rank 4", " --galore_rank 32")],
    "parts": [f"{STRUCTURAL} --galore_lr 1e-3{part}"
              for part in ("", " --optim_target_modules none", " --proj_lora_modules none")],
    "penalty": [STRUCTURAL.replace(ASKED, f"sgorp --lamda_1 {weight}") for weight in (0.5, 0, 5)],
}
"""What decides SGORP's defaults: variants that `--question` compares with the first one."""
TRAIN_ROWS, TEST_ROWS = 160, 200

COMMON = shlex.split(f"""
    --do_train --do_predict --predict_with_generate --max_train_samples {TRAIN_ROWS} --max_predict_samples {TEST_ROWS}
    --add_task_name True --add_dataset_name True --max_target_length 16 --generation_max_length 16
    --lr_scheduler_type constant --warmup_steps 0 --logging_steps 10 --eval_strategy no --save_strategy no
    --report_to none --disable_tqdm True --lora_dropout 0 --learning_rate 1e-3
""")
FAMILIES = {
    "t5": shlex.split("""
        --max_source_length 128 --max_steps 300 --per_device_train_batch_size 8 --per_device_eval_batch_size 100
        --lora_modules .*SelfAttention.(q|v).* --optim_target_modules .*EncDecAttention.(q|v).*
        --proj_lora_modules .*SelfAttention.(q|v).loranew_A.*
    """),
    "llama": shlex.split("""
        --max_source_length 128 --max_steps 40 --per_device_train_batch_size 4 --per_device_eval_batch_size 20
        --lora_modules .*self_attn.(q_proj|v_proj).* --optim_target_modules .*mlp.gate_proj.*
        --proj_lora_modules .*self_attn.(q_proj|v_proj).loranew_A.*
    """),
}
"""Flags by the model's type: rows a step and steps a task, and where the methods train, as published."""

# What `--search` tries: the rate of what a method trains most, then other values of the knob that is the method's own.
RATES = {"galore": ("--galore_lr", ["1e-3", "3e-3", "1e-2"]), "osf": ("--learning_rate", ["1e-4", "3e-4", "1e-3"])}
RATES_OF_OTHERS = ("--learning_rate", ["3e-4", "1e-3", "3e-3"])
KNOBS = {
    "olora": ["--lamda_1 0.05", "--lamda_1 5"],
    "nlora": ["--nlora_lamda 1e-4", "--nlora_lamda 1e-3"],
    "nlora --nlora_form factors": ["--nlora_lamda 0.4", "--nlora_lamda 1.2"],  # published; square weights only
    "inflora": ["--inflora_energy 0.95", "--inflora_energy 0.99"],
    "ella": ["--ella_lamda 10", "--ella_lamda 1000"],
    "magmax": ["--magmax_scale 0.3", "--magmax_scale 1"],
    "ewc": ["--ewc_lamda 1", "--ewc_lamda 1e4"],
    "galore": ["--galore_rank 16", "--galore_rank 32"],
    "osf": ["--osf_preserved 0.3", "--osf_preserved 0.8"],
    "replay": ["--replay_rows 40", "--replay_rows 80"],
    "gorp": ["--galore_lr 1e-4", "--galore_lr 1e-3 --galore_rank 32"],
    "sgorp": ["--galore_lr 1e-4", "--galore_lr 1e-3 --galore_rank 32"],
}
"""By the method's name, or by its name and flags."""


@dataclass(frozen=True)
class Bench:
    """What all trials share; `extra` flags, which an outcome does not tell, are for tests."""

    data_dir: Path
    model: Path
    out: Path
    extra: tuple[str, ...] = ()
    orders: Mapping[str, list[str]] = field(default_factory=lambda: ORDERS)

    def family(self) -> str:
        """Whose flags the model gets: those of t5 or llama, if its modules have the same names."""
        from methods.base_modules import BY_TYPE  # slow, so only where something runs

        kind = read_json(self.model / "config.json").get("model_type")
        for family in FAMILIES:
            if BY_TYPE.get(kind) == BY_TYPE[family]:
                return family
        raise InputError(f"--model: {self.model} is a {kind}; allowed: {', '.join(FAMILIES)} and types like them")

    def prepare(self) -> None:
        """Write the orders' files, and the benchmark in which dev rows stand in for test rows.

        Raises:
            InputError: the model or rows in `data_dir` are missing, or `out` holds the results of others.
        """
        self.family()
        for order, tasks in self.orders.items():
            where = {"configs_dir": self.out / "configs", "data_dir": self.data_dir}
            _, chosen = make_order(order, tasks, **where, overwrite=True)
            if missing := [task for task in chosen if not is_complete(self.data_dir / task)]:
                raise InputError(f"--data_dir: {self.data_dir} has no rows of {', '.join(missing)}")
        self._refuse_others()
        for task in self.tasks():
            copy = self.out / "dev_benchmark" / task
            copy.mkdir(parents=True, exist_ok=True)
            for name, source in [("labels", "labels"), ("train", "train"), ("dev", "dev"), ("test", "dev")]:
                shutil.copyfile(self.data_dir / task / f"{source}.json", copy / f"{name}.json")

    def majorities(self) -> dict[str, float]:
        """By dataset, the share of its most frequent label among the test rows, 0 to 1."""
        kept = self._made_of()
        return {task.split("/")[1]: kept[f"{task}/majority"] for task in self.tasks() if f"{task}/majority" in kept}

    def _made_of(self) -> dict[str, str | float]:
        path = self.out / "made_of.json"
        return read_json(path) if path.exists() else {}

    def tasks(self) -> list[str]:
        """Of all orders, each once."""
        return list(dict.fromkeys(task for tasks in self.orders.values() for task in tasks))

    def _refuse_others(self) -> None:
        """Results of one model on one set of rows stay apart from all others'."""
        from model.loading import model_files  # slow, so only where something runs

        files = {name: path for name, path in model_files(str(self.model)).items() if path.suffix == ".safetensors"}
        files |= {f"{task}/{part}.json": self.data_dir / task / f"{part}.json"
                  for task in self.tasks() for part in ("labels", "train", "dev", "test")}
        found: dict[str, str | float] = {name: digest(path) for name, path in files.items()}
        found |= {f"{task}/majority": majority(self.data_dir / task / "test.json") for task in self.tasks()}
        before = self._made_of()
        for name, value in found.items():
            if before.get(name, value) != value:
                raise InputError(f"--out: {self.out} holds results of another {name}; another folder, or that file")
        write_json(self.out / "made_of.json", before | found, indent=2)

    def command(self, trial: Trial, number: int, start: Path) -> list[str]:
        """Flags of a trial's task, counted from 1, that starts from the model or adapter folder `start`."""
        dataset = self.orders[trial.order][number - 1].split("/")[1]
        return [
            "--model_name_or_path", str(start),
            "--data_dir", str(self.data_dir if trial.split == "test" else self.out / "dev_benchmark"),
            "--instruction_file", str(ROOT / "configs" / "instruction_config.json"),
            "--task_config_dir", str(self.out / "configs" / f"{trial.order}_configs" / dataset),
            "--output_dir", str(trial.folder(self.out) / "outputs" / f"{number}-{dataset}"),
            "--predict_tasks", "all" if trial.split == "test" and self.family() == "t5" else "ends",
            *COMMON, *FAMILIES[self.family()], *self.extra, *trial.flags(),
        ]  # fmt: skip


def majority(rows: Path) -> float:
    """The share of the most frequent label among a file's rows, 0 to 1."""
    labels = Counter(row["label"] for row in read_json(rows))
    return max(labels.values()) / labels.total()


def run(bench: Bench, trial: Trial) -> Outcome | str:
    """Train and test a trial's tasks one after the other in this process; what it came to, or what ended it."""
    import run_uie_lora  # slow, so only where something runs

    folder, start = trial.folder(bench.out), bench.model
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        for number in range(1, len(bench.orders[trial.order]) + 1):
            command = bench.command(trial, number, start)
            try:
                if status := run_uie_lora.main(command):
                    log.flush()
                    return f"task {number}: {last_error(folder / 'log.txt') or status}; {folder / 'log.txt'}"
            except Exception as error:  # one method's fault must not cost the others their runs
                traceback.print_exc()
                return f"task {number}: {type(error).__name__}: {error}; {folder / 'log.txt'}"
            start = find_adapter(Path(command[command.index("--output_dir") + 1]))
    try:
        return Outcome.of(trial, bench.out)
    except (InputError, KeyError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def last_error(log: Path) -> str | None:
    """The last line in which the entry said what was wrong."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("error: ")), None)


def end_with_parent() -> None:
    """Have a worker end when this program is killed, or it would still hold folders that the next one wants."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_all(bench: Bench, trials: list[Trial], workers: int) -> dict[Trial, str]:
    """Run in worker processes the trials that `outcomes.jsonl` does not hold; those that failed, with the reason."""
    finished = read_outcomes(bench.out)
    waiting = [trial for trial in dict.fromkeys(trials) if trial not in finished]
    failures: dict[Trial, str] = {}
    if waiting:
        bench.prepare()
    # Started anew, not forked: PyTorch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        running = {pool.submit(run, bench, trial): trial for trial in waiting}
        for done in as_completed(running):
            trial = running[done]
            try:
                outcome = done.result()
            except BrokenProcessPool:
                outcome = "a process was killed, for want of memory perhaps; the same command goes on"
            if isinstance(outcome, Outcome):
                with open(bench.out / "outcomes.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
                said = "AP {:.2f}, BWT {:+.2f}".format(*outcome.measures)
            else:
                said = failures[trial] = outcome
            print(f"{time.strftime('%H:%M')} {trial}: {said}", flush=True)
    return failures


# The search


def rates(method: str) -> list[tuple[str, ...]]:
    """What `--search` tries first for a method."""
    flag, values = RATES.get(method, RATES.get(method.split()[0], RATES_OF_OTHERS))
    return [(flag, rate) for rate in values]


def knobs(method: str, rate: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What it tries then: the knob with the rate that was best, or half and double that rate where there is no knob."""
    if values := KNOBS.get(method, KNOBS.get(method.split()[0])):
        return [(*rate, *knob.split()) for knob in values]
    flag, best = rate
    return [(flag, f"{float(best) * factor:g}") for factor in (0.5, 2)]


def search(bench: Bench, methods: list[str], seeds: list[int], workers: int) -> None:
    """Try each method's settings on dev rows."""
    def try_all(settings_of) -> None:
        trials = [Trial(method, SEARCHED, seed, settings, "dev") for seed in seeds for method in methods
                  for settings in settings_of(method)]
        run_all(bench, trials, workers)

    try_all(rates)
    try_all(lambda method: knobs(method, best_settings([bench.out], method)[:2]))


# The comparison


def compare(bench: Bench, reference: str, trials: list[Trial], workers: int,
            searched: Sequence[Path] = (), learnt_by: str | None = None) -> str:
    """Run the trials; their table, and a line for each that failed.

    Args:
        searched: folders of the results in which the settings were found.
        learnt_by: the method whose tasks learnt get a column.
    """
    failures = run_all(bench, trials, workers)
    finished = read_outcomes(bench.out)
    outcomes = [finished[trial] for trial in trials if trial in finished]
    counts = {trial.method: sum(map(len, tried(searched, trial.method).values())) for trial in trials}
    learnt = learnt_tasks([one for one in outcomes if one.trial.method == learnt_by], bench.majorities()) \
        if learnt_by else []  # fmt: skip
    lines = [f"failed: {trial}: {failure}" for trial, failure in failures.items()]
    return "\n\n".join([table(reference, outcomes, counts, learnt), *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=ROOT / "CL_Benchmark", help="<TASK>/<DATASET>/*.json below it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", type=Path, default=ROOT / "initial_model" / "small-t5")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, help=f"default: {' '.join(SHORT)}")
    parser.add_argument("--methods", nargs="+", help="names, each with flags if wanted; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--learnt_by", metavar="METHOD",
                        help="one of --methods; add a column for the tasks that it learns")
    parser.add_argument("--dev", action="store_true", help="compare --methods on dev rows, to decide something")
    parser.add_argument("--settings_from", type=Path, nargs="+", default=[],
                        help="folders of the results that a search is in; default: --out")
    decide = parser.add_mutually_exclusive_group()
    decide.add_argument("--search", action="store_true", help="find each method's settings, on dev rows")
    decide.add_argument("--question", choices=QUESTIONS, help="compare these variants of SGORP, on dev rows")
    args = parser.parse_args()
    orders = [SEARCHED] if args.search else args.orders or SHORT
    bench = Bench(args.data_dir.resolve(), args.model.resolve(), args.out.resolve(),
                  orders={order: ORDERS[order] for order in orders})
    try:
        _check(args)
        if args.search:
            search(bench, args.methods or METHODS, args.seeds, args.workers)
            return 0
        methods = QUESTIONS[args.question] if args.question else args.methods or METHODS
        split = "dev" if args.dev or args.question else "test"
        folders = [] if args.question else args.settings_from or [bench.out]
        trials = [Trial(method, order, seed, best_settings(folders, method), split)
                  for seed in args.seeds for order in orders for method in methods]
        reference = OURS if OURS in methods and split == "test" else methods[0]
        print(compare(bench, reference, trials, args.workers, folders, args.learnt_by))
        return 0 if read_outcomes(bench.out).keys() >= set(trials) else 1
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect, and those that would end a run late."""
    without_effect = {"search": ("dev", "orders", "settings_from", "learnt_by"),
                      "question": ("dev", "methods", "settings_from", "learnt_by")}
    for mode, flags in without_effect.items():
        for flag in flags:
            if getattr(args, mode) and getattr(args, flag):
                raise InputError(f"--{mode}: found --{flag} beside it, which it does not read")
    for folder in args.settings_from:
        if not (folder / "outcomes.jsonl").exists():
            raise InputError(f"--settings_from: {folder} has no outcomes.jsonl; a folder of --search is needed")
    if args.learnt_by and args.learnt_by not in (args.methods or METHODS):
        raise InputError(f"--learnt_by: found {args.learnt_by!r}; allowed: one of --methods")
    if args.workers < 1:
        raise InputError(f"--workers: found {args.workers}; 1 or more")
    for method in args.methods or []:
        try:
            find_method(shlex.split(method)[0])
        except (IndexError, ValueError) as error:
            raise InputError(f"--methods: found {method!r} ({error}); a name, with flags if wanted") from None


if __name__ == "__main__":
    sys.exit(main())
