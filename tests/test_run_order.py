"""An order in one process: the same bits as one process a task, and the same ends."""

import gc
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import ranks
import run_order
import run_uie_lora
from errors import InputError, RunStopped
from helpers import ENVIRONMENT, LLAMA, LLAMA_MODULES, ROOT, T5, T5_MODULES, arguments, edit, free_port, losses, put
from order_config import read_order, step_name, write_order
from uie_trainer_lora import UIETrainer

TASKS = [("TC", "dbpedia"), ("SC", "amazon")]
FAMILIES = {"t5": (T5, T5_MODULES), "llama": (LLAMA, LLAMA_MODULES)}
OF_A_TASK = ("--model_name_or_path", "--task_config_dir", "--output_dir")


@pytest.fixture(scope="module")
def order(tmp_path_factory) -> Path:
    """dbpedia, then amazon."""
    folder = tmp_path_factory.mktemp("orders") / "two_configs"
    write_order(folder, TASKS)
    return folder


@pytest.fixture
def command(order, mini_benchmark, tmp_path):
    """A function that makes the command line of a short chain; its outputs are in `tmp_path / "outputs"`."""
    short = ["--max_steps", "4", "--max_predict_samples", "4"]
    return lambda *extra: chain_words(order, mini_benchmark, tmp_path / "outputs", "t5", *short, *extra)


def test_flags_spelt_with_dashes_reach_the_order(command):
    dashed = [word.replace("_", "-") if word in OF_A_TASK else word for word in command()]
    options, flags = run_order.parse_order(dashed)
    assert options.output_dir.name == "outputs" and options.model_name_or_path == str(T5)
    assert not {"--output-dir", "--model-name-or-path"} & set(flags)


def test_a_tilde_is_the_home_folder_as_in_each_task(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options, _ = run_order.parse_order(["configs/order1_configs", "--model_name_or_path", "m", "--output_dir=~/out"])
    assert str(options.output_dir) == "/home/me/out"


def test_a_checkpoint_of_one_task_is_none_of_an_order(command, capfd):
    assert run_order.main(command("--resume-from-checkpoint", "outputs/checkpoint-2")) == 2
    assert "error: --resume_from_checkpoint: found outputs/checkpoint-2; allowed: true" in capfd.readouterr().err


def test_the_folder_of_one_task_is_none_of_an_order(command, capfd):
    assert run_order.main(command("--task_config_dir", "configs/order1_configs/dbpedia")) == 2
    assert "error: --task_config_dir: found configs/order1_configs/dbpedia; allowed: none" in capfd.readouterr().err


@pytest.mark.parametrize("method, steps, said", [
    ("multitask", "-1", "--task_epochs is ignored: multitask trains all tasks together"),
    ("olora", "4", "--task_epochs is ignored: each task trains for --max_steps 4"),
    ("olora", "-1", None),
])
def test_epochs_of_single_tasks_are_ignored_only_where_they_mean_nothing(method, steps, said, command, capfd):
    options, flags = run_order.parse_order(command("--max_steps", steps, "--method", method, "--task_epochs",
                                                   "amazon=2"))
    run_order.begin(options, flags)
    printed = capfd.readouterr().out
    assert (said in printed) if said else ("is ignored" not in printed)
    assert options.task_epochs == ({} if said else {"amazon": "2"})


def test_the_next_task_starts_from_an_adapter_and_not_silently_from_an_older_one(tmp_path):
    folder, start = tmp_path / "1-dbpedia", tmp_path / "model"
    put(folder / "run_record.json", {"configuration": {"do_train": False}})
    assert run_order.next_start(folder, start) == start
    put(folder / "run_record.json", {"configuration": {"do_train": True}})
    with pytest.raises(InputError, match="1-dbpedia: finished, but the adapter folder that the next task starts from"):
        run_order.next_start(folder, start)
    (folder / "t5_adapter").mkdir()
    assert run_order.next_start(folder, start) == folder / "t5_adapter"


def test_a_file_that_is_written_while_the_order_runs_ends_it(command, mini_benchmark, monkeypatch, tmp_path, capfd):
    own = shutil.copytree(mini_benchmark, tmp_path / "own")
    words = [str(own) if word == str(mini_benchmark) else word for word in command()]
    begun = []

    def task(flags: list[str]) -> int:
        begun.append(flags)
        with (own / "SC" / "amazon" / "labels.json").open("a") as labels:
            labels.write("\n")
        return 0

    monkeypatch.setattr(run_uie_lora, "main", task)
    monkeypatch.setattr(run_order, "next_start", lambda folder, start: start)
    assert run_order.main(words) == 2 and len(begun) == 1
    assert "amazon/labels.json: was written while the order ran; with its earlier content" in capfd.readouterr().err


def test_an_order_without_training_tests_the_base_after_every_task(command, tmp_path):
    words = command()
    words.remove("--do_train")
    assert run_order.main(words) == 0
    assert len(list((tmp_path / "outputs").glob("*/predict_results.json"))) == 2


def test_ranks_that_cannot_connect_are_one_line(command):
    """Another program listens on the port of the first rank."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(taken.getsockname()[1])}
        done = subprocess.run([sys.executable, "src/run_order.py", *command()], cwd=ROOT, env=ENVIRONMENT | place,
                              capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"the processes cannot connect (MASTER_ADDR:MASTER_PORT 127.0.0.1:{place['MASTER_PORT']}): " in done.stderr


def test_a_rank_left_over_in_the_environment_is_no_rank(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert ranks.is_first()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not ranks.is_first()


def chain_words(order: Path, benchmark: Path, outputs: Path, family: str, *extra: str) -> list[str]:
    model, modules = FAMILIES[family]
    words = arguments(benchmark, outputs, "dbpedia", model, modules, *extra)
    for flag in OF_A_TASK:
        place = words.index(flag)
        del words[place : place + 2]
    return [str(order), "--model_name_or_path", str(model), "--output_dir", str(outputs), *words]


def one_process_a_task(launch: list[str], words: list[str]) -> None:
    """The same tasks, each in a process of its own (or one for each rank)."""
    options, flags = run_order.parse_order(words)
    start = options.model_name_or_path
    for number, step in enumerate(read_order(options.order), start=1):
        task = run_order.task_flags(options, number, step, start, "chain")
        subprocess.run([*launch, "src/run_uie_lora.py", *task, *flags], cwd=ROOT, env=ENVIRONMENT, check=True)
        start = next((options.output_dir / step_name(number, step.dataset)).glob("*_adapter"))


def results(outputs: Path) -> dict[str, bytes]:
    """Predictions and every tensor that the next task starts from, bit for bit."""
    found = {str(path.relative_to(outputs)): path.read_bytes()
             for path in outputs.glob("*/predict_eval_predictions.jsonl")}
    for path in outputs.glob("*/*_adapter/*.safetensors"):
        tensors = load_file(path).items()
        found |= {f"{path.relative_to(outputs)}: {name}": value.numpy().tobytes() for name, value in tensors}
    assert len(found) > 30
    return found


# --- the same bits ---


@pytest.mark.parametrize("family", ("t5", pytest.param("llama", marks=pytest.mark.recipe)))
def test_a_chain_gives_what_one_process_a_task_gives(family, order, mini_benchmark, tmp_path):
    dropout = ["--lora_dropout", "0.1"]  # so that the state of the random numbers matters
    words = [chain_words(order, mini_benchmark, tmp_path / name, family, *dropout) for name in ("chain", "alone")]
    one_process_a_task([sys.executable], words[1])
    subprocess.run([sys.executable, "src/run_order.py", *words[0]], cwd=ROOT, env=ENVIRONMENT, check=True)
    assert results(tmp_path / "chain") == results(tmp_path / "alone")


@pytest.mark.recipe
def test_a_chain_on_two_ranks_gives_what_two_processes_a_task_give(order, mini_benchmark, tmp_path):
    # Stage 3, which leaves most behind in a process: it cuts up every model that is made while it is on.
    sharded = ["--deepspeed", "configs/ds_configs/stage3.config", "--lamda_1", "0", "--per_device_train_batch_size",
               "4"]
    words = [chain_words(order, mini_benchmark, tmp_path / name, "t5", *sharded) for name in ("chain", "alone")]
    launch = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    one_process_a_task(launch, words[1])
    launched = [*launch, "src/run_order.py", *words[0]]
    done = subprocess.run(launched, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("[gorp] two, task 2 of 2: SC/amazon") == 1
    assert results(tmp_path / "chain") == results(tmp_path / "alone")
    refused = subprocess.run([*launched, "--galore_rank", "4096"], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
                             text=True)
    assert refused.returncode == 2 and "error: --galore_rank: found 4096" in refused.stderr  # of any rank, or of both


@pytest.mark.recipe
@pytest.mark.parametrize("bits, loss_apart, apart", [(32, 2e-4, 1e-2), (16, 2e-2, 0.5)])
@pytest.mark.parametrize("method", ["nlora", "inflora", "ella", "slao", "magmax", "ewc", "olora --lamda_2 0.1"])
def test_other_methods_train_on_two_ranks_what_they_train_in_one_process(
    method, bits, loss_apart, apart, order, mini_benchmark, tmp_path
):
    """Both tasks, so that what a method passes on is read under DeepSpeed too."""
    exact = ["--method", *method.split(), "--lora_dropout", "0", "--learning_rate", "1e-4", "--adam_epsilon", "1e-4",
             "--max_steps", "6", "--logging_steps", "1", "--max_train_samples", "48", "--max_predict_samples", "4",
             "--bf16", str(bits == 16)]
    ranks = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    stage_2 = ["--deepspeed", "configs/ds_configs/stage2.config", "--per_device_train_batch_size", "4"]
    for name, launch, sharded in (("one", [sys.executable], []), ("two", ranks, stage_2)):
        words = chain_words(order, mini_benchmark, tmp_path / name, "t5", *exact, *sharded)
        done = subprocess.run([*launch, "src/run_order.py", *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    for task in ("1-dbpedia", "2-amazon"):
        one, two = (tmp_path / name / task for name in ("one", "two"))
        assert losses(two) == pytest.approx(losses(one), rel=loss_apart)
        files = sorted(path.name for path in (one / "t5_adapter").glob("*.safetensors"))
        assert files == sorted(path.name for path in (two / "t5_adapter").glob("*.safetensors"))
        for file in files:
            alone, sharded = (load_file(folder / "t5_adapter" / file) for folder in (one, two))
            assert alone.keys() == sharded.keys()
            for name, tensor in alone.items():
                # The sign that an l1 penalty takes of a number near 0 turns with the last digits.
                close = (sharded[name] - tensor).norm() <= apart * tensor.norm()
                assert close or method.split()[0] in ("nlora", "olora"), (file, name)


def test_each_task_starts_from_the_one_before():
    steps = read_order(ROOT / "configs" / "order4_configs")
    options, _ = run_order.parse_order(["configs/order4_configs", "--model_name_or_path", "m", "--output_dir", "out"])
    folders = [step_name(number, step.dataset) for number, step in enumerate(steps, 1)]
    assert folders[:2] + folders[-1:] == ["1-MNLI", "2-CB", "15-yahoo"]
    assert run_order.task_flags(options, 2, steps[1], "out/1-MNLI/t5_adapter", "order4-gorp-seed42") == [
        "--model_name_or_path", "out/1-MNLI/t5_adapter", "--task_config_dir", str(steps[1].folder),
        "--output_dir", "out/2-CB", "--run_name", "order4-gorp-seed42-2-CB"]


# --- ends, and going on ---


@pytest.fixture
def second_task_raises(monkeypatch):
    """A function that has the next chain's second task raise an error right before training."""

    def arrange(patch, error: BaseException) -> None:
        build, count = run_uie_lora.build_trainer, iter(range(2))

        def build_or_raise(*args):
            if next(count) == 1:
                raise error
            return build(*args)

        patch.setattr(run_uie_lora, "build_trainer", build_or_raise)

    return arrange


@pytest.mark.parametrize("error, code", [(RunStopped("bad losses"), 1), (KeyboardInterrupt(), 130)])
def test_a_second_task_that_ends_leaves_the_first_whole_and_the_order_goes_on(
    error, code, second_task_raises, command, monkeypatch, tmp_path, capfd
):
    with monkeypatch.context() as patch:
        second_task_raises(patch, error)
        assert run_order.main(command()) == code
    first = tmp_path / "outputs" / "1-dbpedia"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.name != ".lock"}
    assert first / "completed.json" in before and not (tmp_path / "outputs" / "2-amazon" / "completed.json").exists()
    capfd.readouterr()
    assert run_order.main(command()) == 0
    said = capfd.readouterr().out
    assert f"[gorp] {first}: finished before" in said and "[gorp] after 2-amazon (" in said
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.name != ".lock"} == before
    assert (tmp_path / "outputs" / "2-amazon" / "completed.json").exists()


def test_starting_over_beside_a_live_run_is_rejected(command, tmp_path, capfd):
    live = tmp_path / "outputs" / "1-dbpedia"
    live.mkdir(parents=True)
    with run_uie_lora.lock(live):
        assert run_order.main([*command(), "--fresh", str(tmp_path / "log.txt")]) == 2
    assert f"another run is writing to {live}" in capfd.readouterr().err and live.exists()


def test_bad_input_of_a_later_task_is_one_line(command, tmp_path, capfd):
    stray = tmp_path / "outputs" / "2-amazon" / "predict_results.json"
    stray.parent.mkdir(parents=True)
    stray.touch()
    assert run_order.main(command()) == 2
    assert "error: --output_dir: " in capfd.readouterr().err
    assert (tmp_path / "outputs" / "1-dbpedia" / "completed.json").exists()


def test_checkpoints_of_a_finished_task_go_if_asked_and_its_trainer_always(command, tmp_path):
    saving = ["--save_strategy", "steps", "--save_steps", "2"]
    assert run_order.main(command(*saving)) == 0
    assert not [held for held in gc.get_objects() if isinstance(held, UIETrainer)]
    assert len(list(tmp_path.glob("outputs/*/checkpoint-*"))) == 4
    assert run_order.main(command(*saving, "--drop_checkpoints")) == 0
    assert not list(tmp_path.glob("outputs/*/checkpoint-*"))


def test_weights_that_no_later_task_needs_go_if_asked_and_the_order_still_resumes(command, tmp_path, capfd):
    assert run_order.main(command("--drop_weights")) == 0
    *earlier, last = sorted((tmp_path / "outputs").iterdir())
    assert earlier and all(list(folder.glob("t5_adapter/*.json")) for folder in earlier)
    assert not [path for folder in earlier for path in folder.rglob("*.safetensors")]
    assert list(last.glob("t5_adapter/*.safetensors"))
    capfd.readouterr()
    assert run_order.main(command("--drop_weights")) == 0
    assert capfd.readouterr().out.count("nothing to do") == len(earlier) + 1
    assert run_order.main(command("--seed", "7")) == 2
    assert "--seed was" in capfd.readouterr().err


ALIVE = """
import gc, pathlib, sys, torch, ranks, run_order, run_uie_lora
import deepspeed.comm.torch
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled anew in each new environment
run = run_uie_lora.main
def run_and_count(command):
    status = run(command)
    gc.collect()
    held = [x.untyped_storage() for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    print("bytes alive:", sum({storage.data_ptr(): storage.nbytes() for storage in held}.values()))
    return status
run_uie_lora.main = run_and_count
status = run_order.main()
ranks.disconnect()
print("threads of gloo:", sum("gloo" in path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")))
sys.exit(status)
"""


@pytest.mark.parametrize("stage", (3, *(pytest.param(n, marks=pytest.mark.recipe) for n in (None, 0, 1, 2))))
def test_a_finished_task_leaves_no_tensor_in_memory(stage, mini_benchmark, tmp_path):
    """One rank of DeepSpeed's launcher, without the launcher. A tiny T5 has 4 MB of weights."""
    write_order(tmp_path / "three_configs", [*TASKS, ("TC", "agnews")])
    words = chain_words(tmp_path / "three_configs", mini_benchmark, tmp_path / "outputs", "t5",
                        "--max_steps", "1", "--max_predict_samples", "1", "--lamda_1", "0")  # fmt: skip
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port())}  # fmt: skip
    if stage is not None:
        words += ["--deepspeed", f"configs/ds_configs/stage{stage}.config"]
    done = subprocess.run([sys.executable, "-c", ALIVE, *words], cwd=ROOT, capture_output=True, text=True,
                          env=ENVIRONMENT | (rank if stage is not None else {}) | {"PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 0, done.stdout + done.stderr
    alive = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("bytes alive:")]
    assert len(alive) == 3 and max(alive) < 1000, alive
    assert "threads of gloo: 0" in done.stdout  # one of them would now and then abort the process as it exits


# --- before the first task ---


def test_what_the_check_refuses_touches_nothing(order, mini_benchmark, tmp_path, capfd):
    outputs, log = tmp_path / "outputs", tmp_path / "log"
    (outputs / "1-dbpedia").mkdir(parents=True)
    bad = tmp_path / "benchmark"
    subprocess.run(["cp", "-r", mini_benchmark, bad], check=True)
    edit(bad / "SC" / "amazon" / "test.json", lambda rows: rows + [{"sentence": "x", "label": "none"}])
    log.touch()
    before = sorted(outputs.rglob("*"))
    assert run_order.main(chain_words(order, bad, outputs, "t5", "--fresh", str(log))) == 2
    assert "label 'none'; allowed: " in capfd.readouterr().err
    assert sorted(outputs.rglob("*")) == before and log.exists()


def claim(order: Path, outputs: Path, *extra: str) -> None:
    words = [str(order), "--model_name_or_path", str(T5), "--output_dir", str(outputs), *extra]
    run_order.claim(run_order.parse_order(words)[0], read_order(order))


def test_fresh_moves_earlier_results_and_the_log_aside(order, tmp_path, capfd):
    outputs, log = tmp_path / "outputs", tmp_path / "order.log"
    claim(order, outputs, "--fresh", str(log))  # nothing there yet
    (outputs / "2-amazon").mkdir(parents=True)
    (outputs / "2-amazon" / "mark").touch()
    log.touch()
    claim(order, outputs)
    assert (outputs / "2-amazon" / "mark").exists() and log.exists()
    claim(order, outputs, "--fresh", str(log))
    [aside] = tmp_path.glob("outputs.*")
    assert f"[gorp] earlier results of two: moved to {aside}" in capfd.readouterr().out
    assert (aside / "2-amazon" / "mark").exists() and (aside / "order.log").exists()
    assert not outputs.exists() and not log.exists()


def test_a_folder_that_is_no_task_of_the_order(command, tmp_path, capfd):
    (tmp_path / "outputs" / "2-yelp").mkdir(parents=True)
    assert run_order.main(command()) == 2
    assert "2-yelp: not a task of two as it is now; --fresh starts over" in capfd.readouterr().err
    assert not (tmp_path / "outputs" / "1-dbpedia").exists()


@pytest.mark.parametrize("words, said", [([], "order"), (["configs/order1_configs"], "--model_name_or_path"),
                                         (["none", "--model_name_or_path", str(T5), "--output_dir", "x",
                                           "--lora_modules", ".*"], "none: no such order folder")])
def test_a_command_line_that_lacks_something(words, said, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_order.main(words) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line and not list(tmp_path.iterdir())
