"""The shell scripts: settings, overrides, what they refuse, how an order runs, set-up, and what reaches the terminal.

Whole orders run in a small checkout of their own whose entry is a stand-in that only leaves files; the real entry runs
behind the real scripts in the recipe tests.
"""

import io
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scripts.terminal import Terminal

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.relative_to(ROOT) for path in ROOT.glob("scripts*/*.sh"))
VARIABLES = ("MODEL", "DATA_DIR", "METHOD", "NPROC", "DS_CONFIG", "SEED", "OUTPUT", "EXTRA", "SAVE_STEPS",
             "DRY_RUN", "VIRTUAL_ENV")


def bash(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Run bash with this interpreter's environment first on PATH and none of the scripts' variables but `variables`."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(["bash", *command], cwd=cwd, env=environment | variables, capture_output=True, text=True)


def dry_run(*command: str, **variables: str) -> list[list[str]]:
    """The commands that a script would run, one for each order, as argument lists."""
    done = bash(*command, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def flags(command: list[str]) -> dict[str, str]:
    """Value of every flag of a command; the last one counts, as for the entry."""
    found, name = {}, None
    for word in command:
        if word.startswith("--"):
            name = word.removeprefix("--")
            found[name] = ""
        elif name:
            found[name] = f"{found[name]} {word}".strip()
    return found


# --- form ---

@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_syntax(script):
    assert bash("-n", str(script)).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
def test_shellcheck():
    done = subprocess.run(["shellcheck", "-x", "-P", "SCRIPTDIR", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- settings ---

T5 = {
    "lora_modules": ".*SelfAttention.(q|v).*", "optim_target_modules": ".*EncDecAttention.(q|v).*",
    "proj_lora_modules": ".*SelfAttention.(q|v).loranew_A.*", "model_name_or_path": "initial_model/t5-large",
    "learning_rate": "1e-3", "galore_lr": "1e-5",
    "per_device_train_batch_size": "4", "gradient_accumulation_steps": "2",
}
T5_SHORT = T5 | {"galore_rank": "8", "galore_scale": "1", "galore_update_proj_gap": "10", "lamda_2": "0",
                 "lamda_3": "0.05", "per_device_eval_batch_size": "64"}
T5_LONG = T5 | {"galore_rank": "32", "galore_scale": "0.25", "lamda_2": "0.1", "lamda_3": "0",
                "per_device_eval_batch_size": "128"}
LLAMA = {
    "lora_modules": ".*self_attn.(q_proj|v_proj).*", "optim_target_modules": ".*mlp.gate_proj.*",
    "proj_lora_modules": ".*self_attn.(q_proj|v_proj).loranew_A.*", "model_name_or_path": "initial_model/llama",
    "learning_rate": "2e-4", "galore_lr": "1e-6", "galore_rank": "8", "galore_scale": "0.25",
    "lamda_2": "0", "per_device_train_batch_size": "1", "per_device_eval_batch_size": "4",
    "activation_checkpointing": "True",
}
EVERYWHERE = {
    "method": "gorp", "seed": "42", "data_dir": "CL_Benchmark", "do_train": "", "do_predict": "",
    "predict_with_generate": "", "instruction_file": "configs/instruction_config.json",
    "instruction_strategy": "single", "add_task_name": "True", "add_dataset_name": "True", "max_source_length": "512",
    "max_target_length": "50", "generation_max_length": "50", "num_train_epochs": "1", "lr_scheduler_type": "constant",
    "warmup_steps": "0", "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "steps",
    "logging_steps": "10",
}


@pytest.mark.parametrize("script, published", [
    *((f"scripts/order_{order}.sh", T5_SHORT) for order in (1, 2, 3)),
    *((f"scripts/order_{order}.sh", T5_LONG) for order in (4, 5, 6)),
    *((f"scripts_llama/order_{order}.sh", LLAMA) for order in (1, 2, 3)),
])
def test_published_settings(script, published):
    [command] = dry_run(script)
    assert command[1] == "src/run_order.py"
    assert flags(command).items() >= (EVERYWHERE | published).items()


def test_every_flag_is_one_of_the_entry(tmp_path):
    from command_line import parse_arguments
    from run_order import parse_order

    for script in ("scripts/order_1.sh", "scripts/order_4.sh", "scripts_llama/order_1.sh"):
        [command] = dry_run(script, OUTPUT=str(tmp_path), SAVE_STEPS="5")
        options, rest = parse_order(command[2:])
        assert options.drop_checkpoints and options.fresh is None
        own = ["--model_name_or_path", options.model_name_or_path, "--output_dir", str(tmp_path)]
        _, data, method, training = parse_arguments([*own, *rest])
        assert method.optim_target_modules == [flags(command)["optim_target_modules"]]
        assert training.predict_with_generate and data.add_task_name


def test_run_scripts_run_the_orders():
    def orders(*command):
        return [it[2] for it in dry_run(*command)]

    assert orders("scripts/run.sh") == [f"configs/order{number}_configs" for number in range(1, 7)]
    assert orders("scripts/run.sh", "--tiny", "4", "2") == ["configs/order4_configs", "configs/order2_configs"]
    assert orders("scripts_llama/run_llama.sh") == [f"configs/order{number}_configs" for number in (1, 2, 3)]
    assert dry_run("scripts/order.sh", "order4") == dry_run("scripts/run.sh", "4")


def test_overrides():
    command = flags(dry_run("scripts/order_1.sh", MODEL="some/model", DATA_DIR="configs", METHOD="inclora", SEED="7",
                            OUTPUT="elsewhere", EXTRA="--galore_rank 16 --bf16")[0])
    assert command.items() >= {
        "model_name_or_path": "some/model", "data_dir": "configs", "method": "inclora", "seed": "7",
        "output_dir": "elsewhere/order_1/outputs", "galore_rank": "16", "bf16": "",
    }.items()


def test_checkpoints_are_off_unless_asked_for():
    assert flags(dry_run("scripts/order_1.sh", SAVE_STEPS="50")[0]).items() >= {
        "save_strategy": "steps", "save_steps": "50", "save_total_limit": "2", "drop_checkpoints": ""}.items()
    assert not {"save_steps", "drop_checkpoints"} & flags(dry_run("scripts/order_1.sh")[0]).keys()


def test_extra_is_only_words(tmp_path):
    command = dry_run("scripts/order_1.sh", EXTRA=f"--lora_modules *\n $(touch {tmp_path}/made)")[0]
    assert command[-4:] == ["--lora_modules", "*", "$(touch", f"{tmp_path}/made)"]
    assert not list(tmp_path.iterdir())


def test_several_ranks_use_the_launcher_and_keep_the_rows_of_a_step():
    command = dry_run("scripts/order_1.sh", NPROC="2")[0]
    assert command[:3] == ["deepspeed", "--num_accelerators", "2"]
    assert flags(command)["deepspeed"] == "configs/ds_configs/stage2.config"
    assert flags(command)["gradient_accumulation_steps"] == "1"
    assert ("use_cpu" in flags(command)) is not torch.cuda.is_available()
    assert "use_cpu" not in flags(dry_run("scripts/order_1.sh")[0])
    four = flags(dry_run("scripts/order_1.sh", NPROC="4")[0])
    assert (four["per_device_train_batch_size"], four["gradient_accumulation_steps"]) == ("2", "1")
    tiny = flags(dry_run("scripts/order_1.sh", "--tiny", NPROC="2")[0])
    assert (tiny["per_device_train_batch_size"], tiny["gradient_accumulation_steps"]) == ("2", "1")
    command = flags(dry_run("scripts_llama/order_1.sh", NPROC="8")[0])
    assert command["gradient_accumulation_steps"] == "8"
    assert command["deepspeed"] == "configs/ds_configs/stage2_llama.config"


def test_one_rank_uses_the_launcher_where_a_deepspeed_config_is_given():
    command = dry_run("scripts/order_1.sh", DS_CONFIG="configs/ds_configs/stage3.config")[0]
    assert command[:3] == ["deepspeed", "--num_accelerators", "1"]
    assert flags(command)["deepspeed"] == "configs/ds_configs/stage3.config"


@pytest.mark.parametrize("script, model", [
    ("scripts/order_5.sh --tiny", "tiny-t5"), ("scripts_llama/order_1.sh --tiny", "tiny-llama"),
    ("scripts_llama/order_1.sh --small", "smollm2-135m"),
])
def test_small_models(script, model):
    command = flags(dry_run(*script.split())[0])
    assert command["model_name_or_path"] == f"initial_model/{model}"
    assert command["data_dir"] == ("data/mini_benchmark" if "--tiny" in script else "CL_Benchmark")


# --- refusals ---

@pytest.mark.parametrize("command, variables, said", [
    ("scripts/run.sh 7", {}, "order '7'"),
    ("scripts/run.sh 1 x", {}, "order 'x'"),
    ("scripts_llama/run_llama.sh 4", {}, "order '4'"),
    ("scripts/run.sh --small 1", {}, "--small"),
    ("scripts/run.sh --fast", {}, "--fast"),
    ("scripts/order_1.sh --tiny again", {}, "2 orders"),
    ("scripts/order.sh", {}, "0 orders"),
    ("scripts/order.sh nowhere", {}, "configs/nowhere_configs"),
    ("scripts/order.sh ../configs/order1", {}, "order '../configs/order1'"),
    ("scripts/order.sh ds", {}, "order 'ds'"),
    ("scripts/order_1.sh --tiny", {"NPROC": "two"}, "NPROC=two"),
    ("scripts/order_1.sh --tiny", {"NPROC": "0"}, "NPROC=0"),
    ("scripts/order_1.sh --tiny", {"SAVE_STEPS": "often"}, "SAVE_STEPS=often"),
    ("scripts/order_1.sh --tiny", {"DS_CONFIG": "none.config"}, "DS_CONFIG=none.config"),
    ("scripts/order_1.sh --tiny", {"DATA_DIR": "none"}, "DATA_DIR=none"),
])
def test_bad_arguments_are_one_line(command, variables, said):
    done = bash(*command.split(), **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_help():
    done = bash("scripts/run.sh", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: bash scripts/run.sh [--tiny]")


# --- orders ---

ENTRY = """
import json, os, pathlib, sys
order = pathlib.Path(sys.argv[1])
outputs = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
print("a library's line", file=sys.stderr)
print("[gorp] began", *sys.argv)
for number, dataset in enumerate(("dbpedia", "amazon", "yahoo", "agnews"), 1):
    if dataset == os.environ.get("FAIL_AT"):
        print("error: --flag: bad")
        sys.exit(int(os.environ["FAIL_WITH"]))
    folder = outputs / f"{number}-{dataset}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "completed.json").touch()
(outputs / "command.json").write_text(json.dumps(sys.argv))
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the real scripts, a stand-in for the entry, and nothing to install."""
    root = tmp_path / "checkout"
    for folder in ("scripts", "scripts_llama", "configs/order1_configs"):
        shutil.copytree(ROOT / folder, root / folder)
    (root / "src" / "report").mkdir(parents=True)
    (root / "src" / "run_order.py").write_text(ENTRY)
    (root / "src" / "report" / "__main__.py").write_text("import sys; print('table of', sys.argv[1])")
    (root / "requirements.txt").write_text("")
    (root / "data" / "mini_benchmark").mkdir(parents=True)
    return root


def order_1(checkout: Path, **variables: str) -> subprocess.CompletedProcess:
    return bash("scripts/order_1.sh", "--tiny", cwd=checkout, **variables)


def test_an_order_from_anywhere(checkout, tmp_path):
    done = bash(str(checkout / "scripts" / "order_1.sh"), "--tiny", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    terminal = done.stdout.splitlines()
    assert terminal[0] == "[gorp] checking order1: data, flags and model"
    assert terminal[1].startswith("[gorp] began src/run_order.py configs/order1_configs --model_name_or_path initial_m")
    assert terminal[-2] == "table of logs_and_outputs/order_1"
    log = (checkout / "logs" / "order_1.log").read_text()
    assert log.count("a library's line") == 1 and "a library's line" not in done.stdout
    assert " src/run_order.py configs/order1_configs" in log.splitlines()[0] and "table of" in log
    assert (checkout / "logs_and_outputs" / "order_1" / "outputs" / "4-agnews" / "completed.json").exists()
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("code", [1, 0])
def test_a_task_that_fails_ends_the_order(checkout, code):
    done = order_1(checkout, FAIL_AT="amazon", FAIL_WITH=str(code))
    assert done.returncode == 1  # 0 without results is a failure too
    assert done.stderr.splitlines() == [
        "error: --flag: bad", "error: order1 stopped with exit code 1 in task 2 of 4; its log: logs/order_1.log"]
    assert "table of" not in done.stdout
    again = order_1(checkout)
    assert again.returncode == 0 and (checkout / "logs" / "order_1.log").read_text().count("began") == 2


def test_bad_input_is_said_once(checkout):
    done = order_1(checkout, FAIL_AT="dbpedia", FAIL_WITH="2")
    assert (done.returncode, done.stderr) == (2, "error: --flag: bad\n")
    assert "table of" not in done.stdout


def test_fresh_is_passed_on_with_the_log_that_goes_too():
    assert flags(dry_run("scripts/order_1.sh", "--fresh")[0])["fresh"] == "logs/order_1.log"
    assert "fresh" not in flags(dry_run("scripts/order_1.sh")[0])


def test_output_takes_results_and_log(checkout, tmp_path):
    assert order_1(checkout, OUTPUT=str(tmp_path / "mine")).returncode == 0
    assert (tmp_path / "mine" / "order_1" / "outputs" / "4-agnews" / "completed.json").exists()
    assert (tmp_path / "mine" / "order_1.log").exists() and not (checkout / "logs").exists()


def test_the_real_check_stands_before_a_real_run(tmp_path, mini_benchmark):
    out = tmp_path / "out"
    done = bash("scripts/order_1.sh", "--tiny", OUTPUT=str(out), DATA_DIR=str(mini_benchmark),
                EXTRA="--galore_rank 4096")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --galore_rank: found 4096; at most 128")
    assert [path.name for path in out.rglob("*")] == ["order_1.log"]


def test_output_that_cannot_be_written(tmp_path, mini_benchmark):
    (tmp_path / "file").touch()
    done = bash("scripts/order_1.sh", "--tiny", OUTPUT=str(tmp_path / "file"), DATA_DIR=str(mini_benchmark))
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/file/order_1: cannot be written (Not a directory)\n"


def test_without_a_model_both_ways_on_are_said(checkout):
    (checkout / "requirements.txt").write_text("no-such-package==1.0\n")
    done = bash("scripts/run.sh", cwd=checkout)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: initial_model/t5-large: holds no model")
    assert "hf download google-t5/t5-large --local-dir initial_model/t5-large" in done.stderr
    assert "--tiny" in done.stderr
    assert not (checkout / ".venv").exists()
    assert "--small" in bash("scripts_llama/run_llama.sh", cwd=checkout).stderr


def test_dry_run_leaves_nothing(checkout):
    before = sorted(checkout.rglob("*"))
    assert bash("scripts/order_1.sh", cwd=checkout, DRY_RUN="1").returncode == 0
    assert [path for path in sorted(checkout.rglob("*")) if "__pycache__" not in path.parts] == before


# --- set-up ---

SET_UP = "source scripts/lib.sh; set_up requirements.txt; echo $PYTHON"


@pytest.fixture
def needs_a_package(checkout):
    """The checkout, requiring a package that no environment holds, and pip options that find it in a local folder."""
    (checkout / "requirements.txt").write_text("# a comment\ngorp-test-package==1.0  # and one here\n")
    wheels = checkout.parent / "wheels"
    wheels.mkdir()
    info = "gorp_test_package-1.0.dist-info"
    with zipfile.ZipFile(wheels / "gorp_test_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("gorp_test_package.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gorp-test-package\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return checkout, {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}


def test_set_up_installs_once_mends_what_was_interrupted_and_says_what_failed(needs_a_package):
    checkout, pip = needs_a_package
    first = bash("-c", SET_UP, cwd=checkout, **pip)
    assert first.returncode == 0, first.stderr
    assert "[gorp] setting up .venv" in first.stdout
    python = str(checkout / ".venv" / "bin" / "python")
    nothing_to_install = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    assert bash("-c", SET_UP, cwd=checkout, **nothing_to_install).stdout == f"{python}\n"
    active = bash("-c", SET_UP, cwd=checkout, VIRTUAL_ENV=str(checkout / ".venv"), **nothing_to_install)
    assert active.stdout == f"{python}\n"

    next((checkout / ".venv").rglob("gorp_test_package-1.0.dist-info/INSTALLER")).unlink()
    again = bash("-c", SET_UP, cwd=checkout, **pip)
    assert again.returncode == 0, again.stderr
    assert "[gorp] setting up .venv" in again.stdout and again.stdout.endswith(f"{python}\n")

    (checkout / "requirements.txt").write_text("gorp-test-package==2.0\n")
    done = bash("-c", SET_UP, cwd=checkout, **pip)
    assert done.returncode == 2
    assert done.stderr.endswith("error: .venv: pip could not install requirements.txt; its reason is above\n")


def test_without_a_python_that_is_new_enough(checkout, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    for name in ("python", "python3"):
        (tools / name).write_text("#!/bin/bash\nexit 1\n")
        (tools / name).chmod(0o755)
    done = order_1(checkout, PATH=str(tools))
    assert done.returncode == 2
    assert done.stderr.startswith("error: Python: found none of version 3.11 or newer") and done.stderr.count("\n") == 1


# --- the terminal ---

BARS = [f"\rtrain: {done * 25:3}%|{'█' * done:4}| {done}/4 [00:0{done}<00:01,  1.00it/s]" for done in range(5)]
OUTPUT = "".join([
    "a library's line\n", "[gorp] task begins\n", *BARS[:2], "[gorp] right behind a bar\n", BARS[2],
    "\r", " " * 40, "\r", "{'loss': 1.0}\n", *BARS[3:], "\n", "\n", "error: --flag: bad\n", "no end",
])
LOG = """a library's line
[gorp] task begins
[gorp] right behind a bar
{'loss': 1.0}
train: 100%|████| 4/4 [00:04<00:01,  1.00it/s]

error: --flag: bad
no end
"""


def filtered(pieces: list[str], *, show_bars: bool) -> tuple[str, str, str]:
    """What reaches the log, standard output and standard error."""
    log, out, errors = io.StringIO(), io.StringIO(), io.StringIO()
    terminal = Terminal(log, out, errors, show_bars=show_bars)
    for piece in pieces:
        terminal.feed(piece)
    terminal.close()
    return log.getvalue(), out.getvalue(), errors.getvalue()


@given(st.lists(st.integers(0, len(OUTPUT)), max_size=12))
def test_log_and_terminal_do_not_depend_on_where_output_is_cut(cuts):
    ends = [0, *sorted(cuts), len(OUTPUT)]
    pieces = [OUTPUT[start:end] for start, end in zip(ends, ends[1:])]
    log, out, errors = filtered(pieces, show_bars=False)
    assert log == LOG
    assert out == "[gorp] task begins\n[gorp] right behind a bar\n"
    assert errors == "error: --flag: bad\n"


def test_a_terminal_sees_the_bars(tmp_path):
    leader, follower = pty.openpty()
    subprocess.run([sys.executable, ROOT / "scripts" / "terminal.py", tmp_path / "log"], stdout=follower, check=True,
                   input=("".join(BARS) + "\n").encode(), env=os.environ | {"COLUMNS": "30"})
    os.close(follower)
    seen = os.read(leader, 65536).decode()
    os.close(leader)
    assert "train: 100%|████|" in seen and "it/s" not in seen  # cut at the width, so that it can be overwritten
    assert "\n" not in seen
    assert (tmp_path / "log").read_text() == "train: 100%|████| 4/4 [00:04<00:01,  1.00it/s]\n"


def test_a_bar_without_a_total_and_one_that_was_stopped():
    log, out, _ = filtered(["\rrows: 4 examples [00:01, 3.10 examples/s]", "\r9it [00:02,  4.1it/s]"], show_bars=True)
    assert log == "9it [00:02,  4.1it/s]\n"
    assert "4 examples" in out


def test_a_long_line_of_digits_takes_no_time():
    log, _, _ = filtered(["7" * 100_000 + "\n"], show_bars=True)
    assert len(log) == 100_001


def through_terminal(log: Path, *pieces: str, between=lambda: None) -> tuple[int, str]:
    """Exit code and output of terminal.py for pieces of input, the second of which follows what `between` does."""
    command = [sys.executable, ROOT / "scripts" / "terminal.py", log]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    run.stdin.write(pieces[0])
    run.stdin.flush()
    assert run.stdout.readline() == pieces[0]
    between()
    out, _ = run.communicate("".join(pieces[1:]))
    return run.returncode, out


def test_a_log_folder_that_is_deleted_is_made_again(tmp_path):
    log = tmp_path / "logs" / "order.log"
    status, out = through_terminal(log, "[gorp] one\n", "[gorp] two\n", between=lambda: shutil.rmtree(log.parent))
    assert (status, out, log.read_text()) == (0, "[gorp] two\n", "[gorp] two\n")


def test_a_log_that_cannot_be_written_is_said_once_and_the_run_goes_on(tmp_path):
    log = tmp_path / "logs" / "order.log"

    def replace():
        shutil.rmtree(log.parent)
        log.parent.touch()

    status, out = through_terminal(log, "[gorp] one\n", "[gorp] two\n", "[gorp] three\n", between=replace)
    assert status == 0 and "two" in out and "three" in out
    assert out.count("cannot be written (") == 1 and "; the run goes on" in out


def test_ctrl_c_in_an_order_is_one_line(checkout):
    entry = checkout / "src" / "run_order.py"
    entry.write_text("import sys, time\nprint('[gorp] begun', flush=True)\n"
                     "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    sys.exit(130)\n")
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # Tests in the background of a shell inherit that SIGINT is ignored, which no shell's trap can undo.
    run = subprocess.Popen(["bash", "scripts/order_1.sh", "--tiny"], cwd=checkout, env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while run.stdout.readline() != "[gorp] begun\n":
        assert run.poll() is None
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=50)
    assert (run.returncode, err) == (130, "[gorp] order1: interrupted; the same command goes on where it stood\n")


def test_a_process_that_was_killed_is_said_with_its_signal(checkout):
    (checkout / "src" / "run_order.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    done = order_1(checkout)
    assert done.returncode == 137
    assert "stopped with exit code 137 (a process was ended by SIGKILL) in task 1 of 4; its log:" in done.stderr
