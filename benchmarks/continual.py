"""Compare the methods on real text under one protocol: which keeps most of what it learned, and is it more than noise?

    python initial_model/pretrain_small_t5.py --data_dir FOLDER
    python benchmarks/continual.py --data_dir FOLDER --out RESULTS --search        each method's settings, dev examples
    python benchmarks/continual.py --data_dir FOLDER --out RESULTS --seeds 1 2 3   the comparison, on test examples

Every method trains on the same 160 examples of each task for the same number of steps. After every task it answers the
same test examples (200 a task, where it has as many) of all tasks so far. On dev examples, and with a LLaMA, which is
slow, it answers only the current task's examples and, after the last task, all. A method is given by its name and,
optionally, flags, which override all others: `--methods olora "sgorp --protect none"`. Settings are chosen on dev
examples: `--search` tries, on one order, three learning rates and then, at the best rate, two more values of the
method's own knob (`KNOBS`), or two more rates if it has no knob; `--dev --methods` compares variants of a method. A
comparison uses the settings with the best average over seeds.

Each finished trial adds a line to RESULTS/outcomes.jsonl at once: all that the tables and intervals need, and no text
of the benchmark. Trials in that file do not run again, so with `--out COPY/small-t5 --data_dir none --model none`, a
copy of this project's finished trials in benchmarks/results, the tables in REPRODUCE.md are printed at once.
RESULTS/made_of.json has the digests of model and data; any others are rejected. An interrupted trial resumes, unless
the code has changed since: then delete its folder. `--also` adds the trials of other machines. `--learnt_by METHOD`
adds the AP over only the tasks that METHOD, usually multi-task training, learns: the most frequent label's share lies
below the 95 % (Wilson) interval of its accuracy. Two methods differ if the interval of their difference
(`src/report/bootstrap.py`) does not contain 0; with a single seed, this holds for that seed only.
"""

import argparse
import contextlib
import filecmp
import hashlib
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
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
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
TRAIN_EXAMPLES, TEST_EXAMPLES = 160, 200

COMMON = shlex.split(f"""
    --do_train --do_predict --predict_with_generate
    --max_train_samples {TRAIN_EXAMPLES} --max_predict_samples {TEST_EXAMPLES}
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
"""Flags by the model's type: examples per step, steps per task, and the modules that train, as published."""
ON_A_GPU = ["--per_device_eval_batch_size", "100"]  # small batches leave a GPU idle

# What `--search` tries: values of a method's main learning rate, then other values of the method's own knob.
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
"""Keys: a method's name, or its name and flags."""


@dataclass(frozen=True)
class Bench:
    """What all trials share: the tasks of each order, and for tests flags (`extra`) that no outcome records.

    `also` are results folders of other machines, whose trials count as finished.
    """

    data_dir: Path
    model: Path
    out: Path
    orders: Mapping[str, list[str]]
    extra: tuple[str, ...] = ()
    also: tuple[Path, ...] = ()

    def finished(self) -> dict[Trial, Outcome]:
        """The finished trials. Where several folders have one, the first of `out` and `also` counts.

        Raises:
            InputError: a folder of `also` has results of another model or of other examples, or does not say of which.
        """
        outcomes, known = read_outcomes(self.out), made_of(self.out)
        for folder in self.also:
            if not (theirs := made_of(folder)):
                raise InputError(f"--also: {folder} has no made_of.json; allowed: the --out of a comparison")
            if other := differing_file(theirs, known):
                raise InputError(f"--also: the results in {folder} are of another {other} than the others")
            outcomes, known = read_outcomes(folder) | outcomes, theirs | known
        return outcomes

    def family(self) -> str:
        """The key of `FAMILIES` whose flags the model gets: t5 or llama, whichever has the same module names."""
        from methods.base_modules import BY_TYPE  # slow, so only where something runs

        kind = read_json(self.model / "config.json").get("model_type")
        for family in FAMILIES:
            if BY_TYPE.get(kind) == BY_TYPE[family]:
                return family
        raise InputError(f"--model: {self.model} is a {kind}; allowed: {', '.join(FAMILIES)} and types like them")

    def prepare(self, *, dev: bool = False) -> None:
        """Write the orders' files, and a copy of the benchmark in which the dev examples replace the test examples.

        Raises:
            InputError: model or examples are missing, `out` holds results of another model or other examples, or
                trials on dev examples would see the test examples, as in the published benchmark's files.
        """
        self.family()
        for task in self.tasks() if dev else []:
            dev_file, test_file = (self.data_dir / task / f"{split}.json" for split in ("dev", "test"))
            if dev_file.exists() and test_file.exists() and digest(dev_file) == digest(test_file):
                raise InputError(f"--data_dir: {dev_file} is a copy of test.json, so settings would be chosen on test "
                                 "examples")
        self._reject_others()
        for order, tasks in self.orders.items():
            make_order(order, tasks, configs_dir=self.out / "configs", data_dir=self.data_dir, overwrite=True)
        for task in self.tasks():
            copy = self.out / "dev_benchmark" / task
            copy.mkdir(parents=True, exist_ok=True)
            for name, source in [("labels", "labels"), ("train", "train"), ("dev", "dev"), ("test", "dev")]:
                _copy_unless_there(self.data_dir / task / f"{source}.json", copy / f"{name}.json")

    def majorities(self) -> dict[str, float]:
        """Dataset -> share of its most frequent label among the test examples, 0 to 1."""
        kept = {name: value for folder in (*self.also, self.out) for name, value in made_of(folder).items()}
        return {task.split("/")[1]: kept[f"{task}/majority"] for task in self.tasks() if f"{task}/majority" in kept}

    def tasks(self) -> list[str]:
        """The tasks of all orders, each once."""
        return list(dict.fromkeys(task for tasks in self.orders.values() for task in tasks))

    def _reject_others(self) -> None:
        """Reject an `out` with results of another model or other examples; otherwise record the digests of these."""
        from model.loading import model_files  # slow, so only where something runs

        if missing := [task for task in self.tasks() if not is_complete(self.data_dir / task)]:
            raise InputError(f"--data_dir: {self.data_dir} has no examples of {', '.join(missing)}")
        weights = {name: path for name, path in model_files(str(self.model)).items() if path.suffix == ".safetensors"}
        examples = {f"{task}/{part}.json": self.data_dir / task / f"{part}.json"
                    for task in self.tasks() for part in ("labels", "train", "dev", "test")}
        found: dict[str, str | float] = {name: digest(path) for name, path in (weights | examples).items()}
        found |= {f"{task}/majority": majority(self.data_dir / task) for task in self.tasks()}
        flags = json.dumps([COMMON, FAMILIES[self.family()]])
        found |= {"instruction_config.json": digest(ROOT / "configs" / "instruction_config.json"),
                  "set of flags": hashlib.sha256(flags.encode()).hexdigest()}
        found |= {f"order {name}": " > ".join(tasks) for name, tasks in self.orders.items()}
        before = made_of(self.out)
        if not before and read_outcomes(self.out):
            raise InputError(f"--out: {self.out} has outcomes.jsonl but no made_of.json, which says of which model and "
                             "examples; use another folder")
        if other := differing_file(before, found):
            raise InputError(f"--out: {self.out} holds results of another {other}; use another folder, or that file")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "made_of.json", before | found, indent=2)

    def command(self, trial: Trial, number: int, start: Path) -> list[str]:
        """The flags for the trial's task `number` (from 1), which starts from the model or adapter folder `start`."""
        import torch  # slow, so only where something runs

        dataset = self.orders[trial.order][number - 1].split("/")[1]
        return [
            "--model_name_or_path", str(start),
            "--data_dir", str(self.data_dir if trial.split == "test" else self.out / "dev_benchmark"),
            "--instruction_file", str(ROOT / "configs" / "instruction_config.json"),
            "--task_config_dir", str(self.out / "configs" / f"{trial.order}_configs" / dataset),
            "--output_dir", str(trial.folder(self.out) / "outputs" / f"{number}-{dataset}"),
            "--predict_tasks", "all" if trial.split == "test" and self.family() == "t5" else "ends",
            *COMMON, *FAMILIES[self.family()], *(ON_A_GPU if torch.cuda.is_available() else []), *self.extra,
            *trial.flags(),
        ]  # fmt: skip


def made_of(out: Path) -> dict[str, str | float]:
    """File -> digest, of the model and the examples behind the results in `out`; also each task's majority."""
    path = out / "made_of.json"
    return read_json(path) if path.exists() else {}


def differing_file(one: Mapping[str, str | float], other: Mapping[str, str | float]) -> str | None:
    """A file, or the set of flags, that two `made_of.json` do not agree on, None without one. They may know different
    datasets, but one model, whose weights lie in the same files."""
    differing = {name for name in one.keys() & other.keys() if one[name] != other[name]}
    weights, others = ({name for name in made if name.endswith(".safetensors")} for made in (one, other))
    return min(differing | (weights ^ others if weights and others else set()), default=None)


def _copy_unless_there(source: Path, copy: Path) -> None:
    """Leave an equal file as it is, since another command's trial may be reading it."""
    if not copy.exists() or not filecmp.cmp(source, copy, shallow=False):
        shutil.copyfile(source, copy)


def majority(folder: Path) -> float:
    """The share of the most frequent label among a dataset's test examples that a run answers, 0 to 1."""
    from uie_dataset_lora import read_labelled, read_labels  # slow, so only where something runs

    tested = read_labelled(folder / "test.json", read_labels(folder / "labels.json"))[:TEST_EXAMPLES]
    labels = Counter(example["label"] for example in tested)
    return max(labels.values()) / labels.total()


def run(bench: Bench, trial: Trial) -> Outcome | str:
    """Train and test a trial's tasks one after the other in this process; return its outcome, or why it failed."""
    import run_uie_lora  # slow, so only where something runs

    folder, start = trial.folder(bench.out), bench.model
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / "log.txt"
    with open(log_file, "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        start_of_log = log.tell()
        for number in range(1, len(bench.orders[trial.order]) + 1):
            command = bench.command(trial, number, start)
            try:
                if status := run_uie_lora.main(command):
                    log.flush()
                    return f"task {number}: {last_error(log_file, start_of_log) or status}; {log_file}"
            except Exception as error:  # one method's failure must not stop the others
                traceback.print_exc()
                return f"task {number}: {type(error).__name__}: {error}; {log_file}"
            start = find_adapter(Path(command[command.index("--output_dir") + 1]))
    try:
        return Outcome.of(trial, bench.out)
    except (InputError, KeyError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def last_error(log: Path, start: int) -> str | None:
    """The last error message in the log from byte `start` on, None without one."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("error: ")), None)


def end_with_parent() -> None:
    """End this worker when the main program is killed; otherwise it would hold folders that the next run needs."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_all(bench: Bench, trials: Sequence[Trial], workers: int) -> dict[Trial, str]:
    """Run the trials that `outcomes.jsonl` lacks in worker processes; return those that failed, with the reason."""
    finished = bench.finished()
    waiting = [trial for trial in dict.fromkeys(trials) if trial not in finished]
    failures: dict[Trial, str] = {}
    if waiting:
        bench.prepare(dev=any(trial.split == "dev" for trial in waiting))
        bench.finished()  # rejects results of other examples in `also`, now that the digests of `out` are known
        if kept := [finished[trial].revision for trial in dict.fromkeys(trials) if trial in finished]:
            print(f"{len(waiting)} trials to run; {len(kept)} are stored, of revision "
                  f"{', '.join(sorted({str(revision)[:7] for revision in kept}))}", flush=True)
    # Spawned, not forked: PyTorch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        running = {pool.submit(run, bench, trial): trial for trial in waiting}
        try:
            for done in as_completed(running):
                trial, outcome = running[done], result_of(done)
                if isinstance(outcome, Outcome):
                    with open(bench.out / "outcomes.jsonl", "a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(outcome)) + "\n")
                    said = "AP {:.2f}, BWT {:+.2f}".format(*outcome.measures)
                else:
                    said = failures[trial] = outcome
                print(f"{time.strftime('%H:%M')} {trial}: {said}", flush=True)
        finally:  # interrupted: without this, all the waiting trials would still run
            pool.shutdown(cancel_futures=True)
    return failures


def result_of(done: Future) -> Outcome | str:
    """What `run` returned, or why its process returned nothing."""
    try:
        return done.result()
    except BrokenProcessPool:
        return "a worker process was killed, perhaps for lack of memory; the same command resumes"
    except Exception as error:  # such as a full disk: one trial's failure must not stop the others
        return f"{type(error).__name__}: {error}"


# The search


def rates(method: str) -> list[tuple[str, ...]]:
    """What `--search` tries first for a method."""
    flag, values = RATES.get(method, RATES.get(method.split()[0], RATES_OF_OTHERS))
    return [(flag, rate) for rate in values]


def knobs(method: str, rate: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What `--search` tries next: the knob at the best rate, or half and twice that rate if there is no knob."""
    if values := KNOBS.get(method, KNOBS.get(method.split()[0])):
        return [(*rate, *knob.split()) for knob in values]
    flag, best = rate
    return [(flag, f"{float(best) * factor:g}") for factor in (0.5, 2)]


def search(bench: Bench, methods: list[str], seeds: list[int], workers: int) -> dict[Trial, str]:
    """Try each method's settings on dev examples; return the trials that failed, with the reason. Only for a method
    whose rates were all tried is its knob tried as well: the best of some is not the result of an equal search."""
    def try_all(settings_of) -> dict[Trial, str]:
        trials = [Trial(method, SEARCHED, seed, settings, "dev") for seed in seeds for method in methods
                  for settings in settings_of(method)]
        return run_all(bench, trials, workers)

    failures = try_all(rates)
    methods = [method for method in methods if method not in {trial.method for trial in failures}]
    return failures | try_all(lambda method: knobs(method, best_settings([bench.out], method, among=rates(method))))


# The comparison


def compare(bench: Bench, reference: str, trials: list[Trial], workers: int,
            searched: Sequence[Path] = (), learnt_by: str | None = None) -> str:
    """Run the trials; return their table, and a line for each that failed.

    Args:
        searched: results folders of the searches that found the settings.
        learnt_by: the method whose learnt tasks get a column.
    """
    failures = run_all(bench, trials, workers)
    finished = bench.finished()
    outcomes = [finished[trial] for trial in trials if trial in finished]
    counts = {trial.method: sum(map(len, tried(searched, trial.method).values())) for trial in trials}
    learnt = None
    if learnt_by:
        learnt = learnt_tasks([one for one in outcomes if one.trial.method == learnt_by], bench.majorities())
    lines = [f"failed: {trial}: {failure}" for trial, failure in failures.items()]
    return "\n\n".join([table(reference, outcomes, counts, learnt), *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=ROOT / "CL_Benchmark", help="<TASK>/<DATASET>/*.json below it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", type=Path, default=ROOT / "initial_model" / "small-t5")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, help=f"default: {' '.join(SHORT)}")
    parser.add_argument("--methods", nargs="+", help="names, each optionally with flags; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--learnt_by", metavar="METHOD",
                        help="one of --methods; add a column for the tasks that it learns")
    parser.add_argument("--dev", action="store_true", help="compare --methods on dev examples, to choose among them")
    parser.add_argument("--settings_from", type=Path, nargs="+", default=[],
                        help="results folders that contain the searches; default: --out")
    parser.add_argument("--also", type=Path, nargs="+", default=[], metavar="FOLDER",
                        help="results folders of other machines, whose trials count as finished")
    parser.add_argument("--search", action="store_true", help="find each method's settings, on dev examples")
    args = parser.parse_args()
    orders = [SEARCHED] if args.search else list(dict.fromkeys(args.orders or SHORT))
    args.seeds = list(dict.fromkeys(args.seeds))
    bench = Bench(args.data_dir.resolve(), args.model.resolve(), args.out.resolve(),
                  {order: ORDERS[order] for order in orders}, also=tuple(args.also))
    try:
        _check(args)
        if args.search:
            failures = search(bench, args.methods or METHODS, args.seeds, args.workers)
            return 1 if failures else 0
        methods, split = args.methods or METHODS, "dev" if args.dev else "test"
        folders = args.settings_from or [bench.out]
        trials = [Trial(method, order, seed, best_settings(folders, method), split)
                  for seed in args.seeds for order in orders for method in methods]
        reference = OURS if OURS in methods and split == "test" else methods[0]
        print(compare(bench, reference, trials, args.workers, folders, args.learnt_by))
        return 0 if bench.finished().keys() >= set(trials) else 1
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


def _check(args: argparse.Namespace) -> None:
    """Reject flags that would be ignored, and those that would make a run fail late."""
    for flag in ("dev", "orders", "settings_from", "learnt_by", "also"):
        if args.search and getattr(args, flag):
            raise InputError(f"--search: found --{flag} as well, which it does not read")
    for flag, what in (("settings_from", "the --out of a --search"), ("also", "the --out of a comparison")):
        for folder in getattr(args, flag):
            if not (folder / "outcomes.jsonl").exists():
                raise InputError(f"--{flag}: {folder} has no outcomes.jsonl; allowed: {what}")
    if args.learnt_by and args.dev:
        raise InputError("--learnt_by: found --dev as well; the most frequent labels are those of the test examples")
    if args.learnt_by and args.learnt_by not in (args.methods or METHODS):
        raise InputError(f"--learnt_by: found {args.learnt_by!r}; allowed: one of --methods")
    if args.workers < 1:
        raise InputError(f"--workers: found {args.workers}; allowed: 1 or more")
    for method in args.methods or []:
        try:
            find_method(shlex.split(method)[0])
        except (IndexError, ValueError) as error:
            raise InputError(f"--methods: found {method!r} ({error}); allowed: a name, optionally with flags") from None


if __name__ == "__main__":
    sys.exit(main())
