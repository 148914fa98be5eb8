"""The shell scripts: settings, overrides, what they refuse, and how an order runs and ends.

Whole orders run in a small checkout of their own whose entry is a stand-in that only leaves files; the real entry runs
behind the real scripts in the recipe tests.
"""

import contextlib
import importlib
import inspect
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import command_line
from helpers import ROOT, VARIABLES, bash, order_1, put

SCRIPTS = sorted(path.relative_to(ROOT) for path in ROOT.glob("scripts*/*.sh"))


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

# The values of the released scripts and, where these pass none, the defaults of the released code. Examples a step are
# those of 8 GPUs, here of one: T5 4 x 2 x 8 = 4 x 16, LLaMA 1 x 8 x 8 = 1 x 64.
T5 = {
    "model_name_or_path": "initial_model/t5-large", "learning_rate": "1e-3", "galore_lr": "1e-5",
    "lora_modules": ".*SelfAttention.(q|v).*", "optim_target_modules": ".*EncDecAttention.(q|v).*",
    "proj_lora_modules": ".*SelfAttention.(q|v).loranew_A.*",
    "per_device_train_batch_size": "4", "gradient_accumulation_steps": "16",
}
T5_SHORT = T5 | {"galore_rank": "8", "galore_scale": "1", "galore_update_proj_gap": "10",
                 "per_device_eval_batch_size": "64"}
T5_LONG = T5 | {"galore_rank": "32", "galore_scale": "0.25", "galore_update_proj_gap": "20",
                "per_device_eval_batch_size": "128"}
LLAMA = {
    "model_name_or_path": "initial_model/llama", "learning_rate": "2e-4", "galore_lr": "1e-6",
    "lora_modules": ".*self_attn.(q_proj|v_proj).*", "optim_target_modules": ".*mlp.gate_proj.*",
    "proj_lora_modules": ".*self_attn.(q_proj|v_proj).loranew_A.*",
    "galore_rank": "8", "galore_scale": "0.25", "galore_update_proj_gap": "20", "per_device_eval_batch_size": "4",
    "per_device_train_batch_size": "1", "gradient_accumulation_steps": "64",
}
EVERYWHERE = {
    "method": "gorp", "seed": "42", "data_dir": "CL_Benchmark", "do_train": "", "do_predict": "",
    "predict_with_generate": "", "instruction_file": "configs/instruction_config.json",
    "instruction_strategy": "single", "add_task_name": "True", "add_dataset_name": "True", "max_source_length": "512",
    "max_target_length": "50", "num_train_epochs": "1", "lr_scheduler_type": "constant",
    "warmup_steps": "0", "galore_proj_type": "std", "eval_strategy": "no", "save_strategy": "no",
    "logging_strategy": "steps", "logging_steps": "10",
}
TWO_EPOCHS = {"task_epochs": "MNLI=2"}
RELEASED = {  # script -> its values, and the weights of its penalties
    "scripts/order_1.sh": (T5_SHORT, ("0.5", "0", "0.05")),
    "scripts/order_2.sh": (T5_SHORT, ("0.5", "0", "0.05")),
    "scripts/order_3.sh": (T5_SHORT, ("0.5", "0", "0.05")),
    "scripts/order_4.sh": (T5_LONG, ("0.5", "0.1", "0")),
    "scripts/order_5.sh": (T5_LONG | TWO_EPOCHS, ("0.5", "0.1", "0")),
    "scripts/order_6.sh": (T5_LONG | TWO_EPOCHS, ("0.5", "0.1", "0")),
    "scripts_llama/order_1.sh": (LLAMA, ("0.5", "0", "0")),
    "scripts_llama/order_2.sh": (LLAMA, ("0.5", "0", "0")),
    "scripts_llama/order_3.sh": (LLAMA, ("0.5", "0", "0")),
}
PENALTIES = ("lamda_1", "lamda_2", "lamda_3")
OWN_SCRIPTS = [name for name in RELEASED if name.startswith("scripts/")]
LLAMA_SCRIPTS = [name for name in RELEASED if name not in OWN_SCRIPTS]


def order_of(script: str) -> str:
    return f"order{script[-len('1.sh')]}"


def places(script: str) -> dict[str, str]:
    """Flags that say where results go."""
    outputs = "logs_and_outputs" if script in OWN_SCRIPTS else "logs_and_outputs_llama"
    return {"output_dir": f"{outputs}/order_{order_of(script)[-1]}/outputs"}


@pytest.mark.parametrize("script", RELEASED)
def test_the_published_method_with_the_released_values(script):
    values, penalties = RELEASED[script]
    memory = {"gradient_checkpointing": "True"} if script in LLAMA_SCRIPTS else {}
    [command] = dry_run(script)
    assert command[1:3] == ["src/run_order.py", f"configs/{order_of(script)}_configs"]
    found = flags(command)
    assert found.pop("bf16", "True") == "True"  # LLaMA on a machine with a GPU
    assert found == EVERYWHERE | places(script) | values | memory | dict(zip(PENALTIES, penalties))


@pytest.mark.parametrize("script", RELEASED)
def test_what_the_released_code_computes_has_neither_penalties_nor_what_saves_memory(script):
    [command] = dry_run(script, EXTRA="--preset released")
    where = {"output_dir": places(script)["output_dir"].replace("/outputs", "-released/outputs")}
    assert flags(command) == EVERYWHERE | where | RELEASED[script][0] | {"preset": "released"}


WITH_A_GPU = "source scripts/lib.sh; has_gpu() { true; }; parse_arguments ''; run_order"  # whose GPU is made up


def with_a_gpu(**variables: str) -> dict[str, str]:
    """Flags of LLaMA's order 1 on a machine with a GPU."""
    return flags(dry_run("-c", f"{WITH_A_GPU} llama order1", **variables)[0])


def test_llama_saves_memory_unless_the_released_code_is_asked_for():
    saving = {"bf16": "True", "gradient_checkpointing": "True"}
    assert with_a_gpu().items() >= saving.items()
    for extra in ("--preset released", "--preset=released", "--preset default --seed 1 --preset released"):
        assert not with_a_gpu(EXTRA=extra).keys() & {*saving, *PENALTIES, "galore_svd"}
    assert with_a_gpu(EXTRA="--preset released --preset default").items() >= saving.items()


def test_a_flag_that_contradicts_the_preset_reaches_the_entry():
    command = flags(dry_run("scripts/order_1.sh", EXTRA="--preset released --lamda_1 0.5 --bf16")[0])
    assert command.items() >= {"preset": "released", "lamda_1": "0.5", "bf16": ""}.items()
    assert "lamda_2" not in command


@pytest.mark.parametrize("script", ["scripts/order_1.sh", "scripts/order_5.sh", "scripts_llama/order_1.sh"])
def test_penalties_reach_gorp_alone(script):
    for mode in ([], ["--tiny"]):
        assert flags(dry_run(script, *mode)[0]).keys() >= {*PENALTIES}
        for others in ({"METHOD": "sgorp"}, {"METHOD": "olora"}, {"EXTRA": "--method inclora"}):
            assert not flags(dry_run(script, *mode, **others)[0]).keys() & {*PENALTIES}
    assert flags(dry_run(script, METHOD="olora", EXTRA="--lamda_1 0.3")[0])["lamda_1"] == "0.3"
    assert flags(dry_run(script, METHOD="olora", EXTRA="--method gorp")[0])["lamda_1"] == "0.5"
    tiny = flags(dry_run(script, "--tiny")[0])
    assert [tiny[name] for name in PENALTIES] == ["0.5", "0", "0"]


def test_an_orders_values_stand_in_its_own_script():
    for script, (values, penalties) in RELEASED.items():
        text = (ROOT / script).read_text()
        for name in ("galore_rank", "galore_scale", "galore_update_proj_gap", "per_device_eval_batch_size"):
            assert text.count(f"--{name} {values[name]}") == 1, (script, name)
        for name, weight in zip(PENALTIES, penalties):
            assert f"--{name} {weight}" in text, (script, name)
    shared = (ROOT / "scripts" / "settings.sh").read_text()
    assert "order_" not in shared.replace("order_K.sh", "") and "galore_update_proj_gap" not in shared


def test_the_values_of_an_orders_script_are_read_not_run(checkout):
    """What `order.sh` and `run.sh` take is what a user writes into the order's script."""
    script = checkout / "scripts" / "order_1.sh"
    script.write_text(script.read_text().replace("--galore_rank 8", "--galore_rank 5"))
    for command in ("scripts/order_1.sh", "scripts/order.sh order1", "scripts/run.sh 1"):
        done = bash(*command.split(), cwd=checkout, DRY_RUN="1")
        assert flags(shlex.split(done.stdout))["galore_rank"] == "5", done.stderr


def test_every_flag_is_one_of_the_entry(tmp_path):
    from command_line import parse_arguments
    from run_order import parse_order

    for script in ("scripts/order_1.sh", "scripts/order_5.sh", "scripts_llama/order_1.sh"):
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


@pytest.mark.parametrize("script", RELEASED)
def test_an_order_by_its_name_or_number_is_that_of_its_script(script):
    folder, run = ("scripts", "run.sh") if script in OWN_SCRIPTS else ("scripts_llama", "run_llama.sh")
    name = order_of(script)
    alone = dry_run(script)
    assert alone == dry_run(f"{folder}/order.sh", name) == dry_run(f"{folder}/{run}", name[-1])


@pytest.mark.parametrize("family, number", [("scripts", 7), ("scripts_llama", 4)])
@pytest.mark.parametrize("name", ["mine", "order", "run", "order{number}"])
def test_an_order_of_ones_own_takes_the_values_of_order_1(family, number, name, checkout):
    name = name.format(number=number)
    shutil.copytree(checkout / "configs" / "order1_configs", checkout / "configs" / f"{name}_configs")
    done = bash(f"{family}/order.sh", name, cwd=checkout, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert f"with the published values of {family}/order_1.sh; 64 examples a step" in done.stderr
    values, penalties = RELEASED[f"{family}/order_1.sh"]
    assert flags(shlex.split(done.stdout)).items() >= (values | dict(zip(PENALTIES, penalties))).items()


def test_flags_spelt_with_dashes_are_the_same_flags():
    spelt = "--per-device-train-batch-size=16 --galore-proj-type left --seed 3"
    command = dry_run("scripts/order_1.sh", EXTRA=spelt)[0]
    assert {"--per_device_train_batch_size=16", "--galore_proj_type"} <= set(command)
    assert flags(command)["gradient_accumulation_steps"] == "4" and "seed3" in flags(command)["output_dir"]
    done = bash("scripts/order_1.sh", DRY_RUN="1", EXTRA="--output-dir elsewhere")
    assert done.returncode == 2 and "EXTRA: found --output_dir" in done.stderr


def test_a_quoted_tilde_is_the_home_folder():
    command = flags(dry_run("scripts/order_1.sh", OUTPUT="~/runs", MODEL="~/models/t5", HOME="/home/me")[0])
    assert command["output_dir"] == "/home/me/runs/order_1/outputs"
    assert command["model_name_or_path"] == "/home/me/models/t5"


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


@pytest.mark.parametrize("extra, words", [
    ("--lora_modules *\n $(touch {mark})", ["--lora_modules", "*", "$(touch", "{mark})"]),
    ("--run_name 'my run' --logging_dir \"a b\"  --a \\$HOME `id`",
     ["--run_name", "my run", "--logging_dir", "a b", "--a", "$HOME", "`id`"]),
    ("--a '' --b ''", ["--a", "", "--b", ""]),
])
def test_extra_is_words_quoted_as_in_a_shell_and_nothing_is_run(extra, words, tmp_path):
    mark = tmp_path / "made"
    command = dry_run("scripts/order_1.sh", EXTRA=extra.format(mark=mark))[0]
    assert command[-len(words):] == [word.format(mark=mark) for word in words]
    assert not mark.exists()
    assert dry_run("scripts/order_1.sh", EXTRA=" \n ") == dry_run("scripts/order_1.sh")


def test_several_ranks_use_the_launcher():
    command = dry_run("scripts/order_1.sh", NPROC="2")[0]
    assert command[:3] == ["deepspeed", "--num_accelerators", "2"]
    assert flags(command)["deepspeed"] == "configs/ds_configs/stage2.config"
    assert "use_cpu" in flags(command)
    assert "use_cpu" not in flags(dry_run("scripts/order_1.sh")[0])
    [command] = dry_run("scripts_llama/order_1.sh", NPROC="2")
    assert flags(command)["deepspeed"] == "configs/ds_configs/stage2_llama.config"


def launch_with_gpus(**variables: str) -> subprocess.CompletedProcess:
    """A dry run of order 1 on a machine whose GPUs are made up."""
    run = f"{WITH_A_GPU} t5 order1"
    return bash("-c", run if variables.get("CUDA_VISIBLE_DEVICES") else f"unset CUDA_VISIBLE_DEVICES; {run}",
                DRY_RUN="1", **variables)


def test_a_launcher_that_is_not_on_path_is_reported_before_anything_is_made(checkout, tmp_path):
    shutil.rmtree(checkout / "data" / "mini_benchmark")
    (tmp_path / "python").symlink_to(sys.executable)
    done = order_1(checkout, NPROC="2", GORP_ENV="active", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 2 and not (checkout / "logs_and_outputs").exists()
    assert not (checkout / "data" / "mini_benchmark").exists()
    assert done.stderr.splitlines()[-1] == ("error: deepspeed: its package is installed, but PATH has no such command; "
                                            "add the folder where pip put it to PATH")


@pytest.mark.parametrize("variables, launcher", [
    ({"CUDA_VISIBLE_DEVICES": "4"}, [sys.executable, "src/run_order.py"]),  # one process needs no launcher
    ({"NPROC": "2", "CUDA_VISIBLE_DEVICES": "4,5,6"}, ["deepspeed", "--include", "localhost:4,5"]),
    ({"NPROC": "2", "CUDA_VISIBLE_DEVICES": "GPU-a1,GPU-b2"}, ["torchrun", "--nnodes", "1"]),
    ({"NPROC": "2"}, ["deepspeed", "--num_accelerators", "2"]),
])
def test_the_devices_that_the_user_named(variables, launcher):
    command = shlex.split(launch_with_gpus(**variables).stdout)
    if launcher[0] == sys.executable:
        assert command[1] == launcher[1]
    else:
        assert command[: len(launcher)] == launcher and flags(command)["deepspeed"].endswith("stage2.config")


def test_fewer_devices_than_processes():
    done = launch_with_gpus(NPROC="3", CUDA_VISIBLE_DEVICES="4,5")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: NPROC=3: CUDA_VISIBLE_DEVICES=4,5 names fewer devices\n" in done.stderr
    run = ("source scripts/lib.sh; has_gpu() { gpus=2; }; unset CUDA_VISIBLE_DEVICES; parse_arguments ''; "
           "run_order t5 order1")
    assert bash("-c", run, DRY_RUN="1", NPROC="2").returncode == 0
    done = bash("-c", run, DRY_RUN="1", NPROC="3")
    assert done.returncode == 2 and "error: NPROC=3: PyTorch finds 2 GPUs; allowed: at most one" in done.stderr


def test_the_number_of_gpus_is_what_pytorch_counts(tmp_path):
    """A warning before the number is none, and neither is a PyTorch that prints something else."""
    run = "source scripts/lib.sh; compgen() { true; }; unset CUDA_VISIBLE_DEVICES; has_gpu; echo \"$gpu $gpus\""
    for said, found in (("a warning\\n4", "yes 4"), ("done", "yes ")):
        (tmp_path / "python").write_text(f"#!/bin/bash\nprintf '{said}'\n")
        (tmp_path / "python").chmod(0o755)
        assert bash("-c", f"PYTHON={tmp_path}/python; {run}").stdout == f"{found}\n"


def test_a_hostfile_with_chosen_devices(tmp_path):
    put(tmp_path / "hosts", "a slots=2\nb slots=2\n")
    done = launch_with_gpus(HOSTFILE=str(tmp_path / "hosts"), CUDA_VISIBLE_DEVICES="4,5")
    assert done.returncode == 2 and "CUDA_VISIBLE_DEVICES, which DeepSpeed's launcher replaces" in done.stderr


def test_several_machines_share_the_examples_of_a_step(tmp_path):
    nodes = {"NNODES": "2", "NPROC": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29501"}
    done = bash("scripts/order_1.sh", DRY_RUN="1", NODE_RANK="1", **nodes)
    command = shlex.split(done.stdout)
    assert command[:11] == ["torchrun", "--nnodes", "2", "--node_rank", "1", "--nproc_per_node", "4", "--master_addr",
                            "node0", "--master_port", "29501"]
    assert "; 64 examples a step = 4 x 2 micro-batches on 8 processes of 2 machines" in done.stderr
    assert flags(command)["gradient_accumulation_steps"] == "2"
    assert flags(dry_run("scripts/order_1.sh", "--fresh", NODE_RANK="1", **nodes)[0])["fresh"].endswith(".node1.log")
    put(tmp_path / "hosts", "# two machines\na slots=3\nb slots=5\n")
    done = bash("scripts/order_1.sh", DRY_RUN="1", HOSTFILE=str(tmp_path / "hosts"))
    command = shlex.split(done.stdout)
    assert command[:6] == ["deepspeed", "--hostfile", str(tmp_path / "hosts"), "--launcher_args=-N", "--master_port",
                           "29500"]
    assert "4 x 2 micro-batches on 8 processes of 2 machines" in done.stderr
    [read_there] = shlex.split(flags(command)["lora_modules"])  # a shell of the other machine reads it once more
    assert read_there == ".*SelfAttention.(q|v).*"


@pytest.mark.parametrize("extra, step", [
    ("--per_device_train_batch_size 16", "64 examples a step = 16 x 4 micro-batches on 1 process"),
    ("--per_device_train_batch_size=1", "64 examples a step = 1 x 64 micro-batches on 1 process"),
    ("--per_device_train_batch_size 8 --gradient_accumulation_steps 1", "8 examples a step = 8 x 1 micro-batch on"),
    ("--gradient_accumulation_steps 2", "8 examples a step = 4 x 2 micro-batches on 1 process"),
])
def test_a_micro_batch_of_ones_own_keeps_the_examples_of_a_step(extra, step):
    done = bash("scripts/order_1.sh", DRY_RUN="1", EXTRA=extra)
    given = flags(shlex.split(done.stdout))
    assert f"; {step}" in done.stderr and "is possible only" not in done.stderr
    size = int(given["per_device_train_batch_size"]) * int(given["gradient_accumulation_steps"])
    assert f"; {size} examples a step" in done.stderr


def test_a_gpu_that_pytorch_cannot_use_is_no_silent_cpu_run():
    said = 'import sys; sys.exit("the driver is too old")'
    run = f"""source scripts/lib.sh; compgen() {{ true; }}; python() {{ {sys.executable} -c '{said}'; }}; PYTHON=python
              unset CUDA_VISIBLE_DEVICES; mode=tiny; has_gpu || has_gpu || true"""
    reason = "PyTorch cannot use this machine's GPU: the driver is too old"
    assert bash("-c", run).stderr == f"[gorp] {reason}; training uses the CPU\n"
    refused = bash("-c", run.replace("tiny", "full"))
    assert refused.returncode == 2
    assert refused.stderr == f"error: {reason}; set CUDA_VISIBLE_DEVICES= to train on the CPU\n"
    assert bash("-c", run.replace("tiny", "full").replace("unset CUDA_VISIBLE_DEVICES", ":")).stderr == ""


def test_every_order_asks_for_the_gpu_before_it_begins(checkout):
    """Also T5 in one process, whose command is the same with and without a GPU."""
    run = "source scripts/lib.sh; has_gpu() { fail 'asked'; }; parse_arguments ''; run_order t5 order1"
    done = bash("-c", run, cwd=checkout, MODEL="x")
    assert (done.returncode, done.stderr) == (2, "error: asked\n")


def test_a_dry_run_without_pytorch_takes_the_gpu_for_usable():
    run = ("source scripts/lib.sh; compgen() { true; }; unset CUDA_VISIBLE_DEVICES; PYTHON=false; mode=full; "
           "has_gpu && echo yes")
    assert bash("-c", run, DRY_RUN="1").stdout == "yes\n"
    assert bash("-c", run).returncode == 2


def test_a_dry_run_names_the_active_interpreter_if_that_would_run(tmp_path):
    (tmp_path / "python").symlink_to("/bin/true")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert dry_run("scripts/order_1.sh", GORP_ENV="active", PATH=path)[0][0] == str(tmp_path / "python")

def test_paths_are_those_of_the_folder_in_which_a_script_is_started(tmp_path):
    (tmp_path / "my.config").write_text((ROOT / "configs/ds_configs/stage1.config").read_text())
    given = {"DRY_RUN": "1", "OUTPUT": "results", "DS_CONFIG": "my.config", "MODEL": "initial_model/tiny-t5"}
    done = subprocess.run(["bash", ROOT / "scripts" / "order_1.sh"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | given)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = flags(shlex.split(done.stdout))
    assert found["output_dir"] == f"{tmp_path}/results/order_1/outputs"
    assert found["deepspeed"] == f"{tmp_path}/my.config"
    assert found["model_name_or_path"] == "initial_model/tiny-t5"  # not in that folder, so the repository's


def test_a_users_variable_named_gpu_does_not_decide():
    found = "source scripts/lib.sh; compgen() { true; }; unset CUDA_VISIBLE_DEVICES; PYTHON=true; has_gpu && echo yes"
    assert bash("-c", found, gpu="0").stdout == "yes\n"


def test_a_file_system_without_locks_stops_nothing():
    refuse = "flock() { echo 'flock: 9: Function not implemented' >&2; return 71; }"
    run = f"source scripts/lib.sh; {refuse}; one_at_a_time echo ran"
    done = bash("-c", run)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr == "[gorp] file locks fail here: start one job before the others\n"


def test_a_blank_does_not_reach_deepspeeds_launcher_of_several_machines(tmp_path):
    put(tmp_path / "hosts", "a slots=3\nb slots=5\n")
    done = bash("scripts/order_1.sh", DRY_RUN="1", HOSTFILE=str(tmp_path / "hosts"), DATA_DIR=str(tmp_path / "my data"))
    assert done.returncode == 2 and "no such folder" in done.stderr
    (tmp_path / "my data").mkdir()
    done = bash("scripts/order_1.sh", DRY_RUN="1", HOSTFILE=str(tmp_path / "hosts"), DATA_DIR=str(tmp_path / "my data"))
    assert (done.returncode, done.stdout) == (2, "") and "error: HOSTFILE: found whitespace in '" in done.stderr


@pytest.mark.parametrize("script, batches", [
    ("scripts/order_1.sh", {1: (4, 16), 2: (4, 8), 8: (4, 2), 32: (2, 1), 3: (4, 5)}),
    ("scripts/order_4.sh", {1: (4, 16), 2: (4, 8), 8: (4, 2)}),
    ("scripts_llama/order_1.sh", {1: (1, 64), 2: (1, 32), 8: (1, 8)}),
    ("scripts_llama/order_1.sh --small", {1: (4, 1), 2: (2, 1)}),
    ("scripts/order_1.sh --tiny", {1: (16, 1), 2: (8, 1), 8: (2, 1)}),
    ("scripts_llama/order_1.sh --tiny", {1: (4, 1)}),
])
def test_examples_of_a_step_stay_the_same_on_any_number_of_processes(script, batches):
    wanted = 64 if script.endswith(".sh") else 16 if script == "scripts/order_1.sh --tiny" else 4
    for ranks, (batch, accumulation) in batches.items():
        done = bash(*script.split(), DRY_RUN="1", NPROC=str(ranks))
        command = flags(shlex.split(done.stdout))
        assert command["per_device_train_batch_size"] == str(batch), ranks
        assert command["gradient_accumulation_steps"] == str(accumulation), ranks
        size = batch * accumulation * ranks
        assert f"; {size} examples a step = {batch} x {accumulation} micro-batch" in done.stderr
        assert (size == wanted) is ("is possible only if processes x micro-batch divides it" not in done.stderr)


def test_the_first_lines_say_what_is_run():
    def said(*command, **variables):
        return bash(*command, DRY_RUN="1", **variables).stderr.splitlines()

    steps = "64 examples a step = 4 x 16 micro-batches on 1 process"
    assert said("scripts/order_1.sh") == [
        f"[gorp] order1: gorp, the published method, with the published values; {steps}"]
    assert said("scripts/order_1.sh", EXTRA="--galore_rank 16")[1:] == [
        "[gorp] order1: flags in EXTRA override these: --galore_rank 16"]
    assert said("scripts/order_1.sh", EXTRA="--preset released")[0] == (
        "[gorp] order1: gorp as its released code computes it (--preset released), with the published values; " + steps)
    assert said("scripts/order_1.sh", METHOD="olora") == [
        "[gorp] order1: olora, not the published method, with the published values, but its own defaults for "
        f"penalties; {steps}"]
    assert said("scripts/order_1.sh", METHOD="sgorp")[0].startswith(
        "[gorp] order1: sgorp, this project's variant of gorp, with the published values, but its own defaults")
    assert said("scripts/order_1.sh", "--tiny", NPROC="2") == [
        "[gorp] order1: gorp, the published method, with values for a small model (settings.sh); 16 examples a step = "
        "8 x 1 micro-batch on 2 processes"]
    gpu = f"{WITH_A_GPU} llama order1"
    assert said("-c", gpu)[1:] == [
        "[gorp] order1: bf16 with recomputation of activations, to save memory; the released runs were float32 without "
        "recomputation (27 GB of weights)"]
    cases = [(gpu, "--bf16 False", "float32"), (gpu, "--bf16 --galore_rank 4", "bf16"), ("", "", "float32"),
             (gpu, "--bf16 False --fp16", "fp16"), ("", "--bf16 yes", "bf16")]
    for words, extra, precision in cases:
        call = ("-c", words) if words else ("scripts_llama/order_1.sh",)
        assert said(*call, EXTRA=extra)[1].startswith(f"[gorp] order1: {precision} with recomputation"), extra
    assert said("scripts_llama/order_1.sh", EXTRA="--preset released")[1] == (
        "[gorp] order1: float32 without recomputation (27 GB of weights), as in the released runs")


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
    assert command["data_dir"] == "data/mini_benchmark"


def test_a_small_model_reads_the_benchmark_where_it_is_there(checkout):
    made_up = bash("scripts_llama/order_1.sh", "--small", cwd=checkout, DRY_RUN="1")
    assert flags(shlex.split(made_up.stdout))["data_dir"] == "data/mini_benchmark"
    assert "CL_Benchmark has no train.json" in made_up.stderr
    put(checkout / "CL_Benchmark" / "TC" / "dbpedia" / "train.json", [])
    found = bash("scripts_llama/order_1.sh", "--small", cwd=checkout, DRY_RUN="1")
    assert flags(shlex.split(found.stdout))["data_dir"] == "CL_Benchmark" and "train.json" not in found.stderr


@pytest.mark.parametrize("script, family", [("scripts/order_1.sh", "encoder-decoder"),
                                            ("scripts_llama/order_1.sh", "decoder-only")])
def test_another_model_gets_what_suits_its_type(script, family):
    command = flags(dry_run(script, MODEL="some/model", EXTRA="--lora_modules .*mine")[0])
    assert command["family"] == family and command["lora_modules"] == ".*mine"
    assert command["optim_target_modules"] == command["proj_lora_modules"] == "auto"


# --- refusals ---

@pytest.mark.parametrize("command, variables, said", [
    ("scripts/run.sh 7", {}, "order '7'"),
    ("scripts/run.sh 1 x", {}, "order 'x'"),
    ("scripts_llama/run_llama.sh 4", {}, "order '4'"),
    ("scripts/run.sh --small 1", {}, "--small"),
    ("scripts/run.sh --fast", {}, "--fast"),
    ("scripts/order_1.sh --tiny again", {}, "expected one order, found 2"),
    ("scripts/order.sh", {}, "expected one order, found 0"),
    ("scripts/order.sh nowhere", {}, "configs/nowhere_configs"),
    ("scripts/order.sh ../configs/order1", {}, "order '../configs/order1'"),
    ("scripts/order.sh ds", {}, "order 'ds'"),
    ("scripts/order_1.sh --tiny", {"NPROC": "two"}, "NPROC=two"),
    ("scripts/order_1.sh --tiny", {"NPROC": "0"}, "NPROC=0"),
    ("scripts/order_1.sh --tiny", {"NNODES": "2"}, "NODE_RANK=; allowed: 0 to 1 with NNODES=2"),
    ("scripts/order_1.sh --tiny", {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2; allowed: 0 to 1"),
    ("scripts/order_1.sh --tiny", {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR: missing with NNODES=2"),
    ("scripts/order_1.sh --tiny", {"HOSTFILE": "none"}, "HOSTFILE=none: no such file"),
    ("scripts/order_1.sh --tiny", {"HOSTFILE": "README.md"}, "HOSTFILE=README.md: found '"),
    ("scripts/order_1.sh --tiny", {"HOSTFILE": "none", "NPROC": "2"}, "found with NPROC or NNODES"),
    ("scripts/order_1.sh --tiny", {"SAVE_STEPS": "often"}, "SAVE_STEPS=often"),
    ("scripts/order_1.sh --tiny", {"DS_CONFIG": "none.config"}, "DS_CONFIG=none.config"),
    ("scripts/order_1.sh --tiny", {"DATA_DIR": "none"}, "DATA_DIR=none"),
    ("scripts/order_1.sh", {"EXTRA": "--preset released", "NPROC": "2"}, "--preset released: found with NPROC=2"),
    ("scripts/order_1.sh", {"EXTRA": "--preset=released", "DS_CONFIG": "configs/ds_configs/stage2.config"},
     "--preset released: found with NPROC=1 and DS_CONFIG=configs/ds_configs/stage2.config"),
    ("scripts/order_1.sh --tiny", {"EXTRA": "--run_name 'mine"}, "EXTRA=--run_name 'mine: a quotation is not closed"),
    ("scripts/order_1.sh --tiny", {"EXTRA": '--run_name "a\\"b"'}, "or holds an escaped quotation mark"),
    ("scripts/order_1.sh --tiny", {"EXTRA": "--output_dir mine"}, "EXTRA: found --output_dir; OUTPUT=FOLDER says"),
    ("scripts/order.sh order_1", {}, "no folder configs/order_1_configs; did you mean order1?"),
    ("scripts/order_1.sh --tiny", {"DRY_RUN": "0"}, "DRY_RUN=0; allowed: 1"),
    ("scripts/order_1.sh --tiny", {"GORP_ENV": "mine"}, "GORP_ENV=mine; allowed: active"),
    *(("scripts/order_1.sh --tiny", {wrong: "x"}, f"{wrong}: unknown variable; did you mean {meant}?")
      for wrong, meant in (("METOD", "METHOD"), ("METHODS", "METHOD"), ("MEHTOD", "METHOD"), ("METHID", "METHOD"),
                           ("SEEDS", "SEED"), ("seed", "SEED"), ("Output", "OUTPUT"), ("DATADIR", "DATA_DIR"),
                           ("GORPENV", "GORP_ENV"), ("EXTR", "EXTRA"))),
])
def test_bad_arguments_are_one_line(command, variables, said):
    done = bash(*command.split(), **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_variables_of_other_programs_are_left_alone():
    assert bash("scripts/order_1.sh", DRY_RUN="1", SPEED="1", MODEL_NAME="x", MY_METHOD="y").returncode == 0


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.name not in ("lib.sh", "settings.sh")],
                         ids=str)
def test_help_says_what_a_script_is_with_an_example_under_sh_too(script, tmp_path):
    done = subprocess.run(["sh", ROOT / script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    usage, purpose, *rest = done.stdout.splitlines()
    assert usage.startswith("usage: bash scripts") and purpose[0] != "#"
    assert f"bash {script.parent}/" in "\n".join([purpose, *rest])


@pytest.mark.parametrize("words", [("--tiny", "1"), ("1", "--tiny")])
def test_sh_starts_bash_and_flags_may_stand_anywhere(words):
    done = subprocess.run(["sh", "scripts/run.sh", *words], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"DRY_RUN": "1"})
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout) == dry_run("scripts/order_1.sh", "--tiny")[0]


@pytest.mark.parametrize("name", [
    "run_uie_lora", "run_order", "check", "export", "plan_memory", "compute_metrics", "report.__main__",
    "data.make_order", "data.generate_labels", "data.prepare_benchmark", "data.mini_benchmark",
])
def test_help_says_what_a_program_is_with_an_example(name, capsys, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])  # of programs whose main takes nothing
    with pytest.raises(SystemExit) as ended:
        module.main(*[["--help"]] * bool(inspect.signature(module.main).parameters))
    said = capsys.readouterr().out
    assert ended.value.code == 0 and said.startswith("usage: ")
    purpose = (module if name != "run_uie_lora" else command_line).__doc__.splitlines()[0]
    assert purpose in said
    assert re.search(r"python (src|data)/\S+", said)


def test_help_of_a_task_shows_this_projects_options_first(capsys):
    with pytest.raises(SystemExit):
        command_line.parse_arguments(["--help", "--method", "gorp"])
    said = capsys.readouterr().out
    places = [said.index(f"  --{flag} ") for flag in ("data_dir", "lora_dim", "per_device_train_batch_size")]
    assert places == sorted(places)


# --- default folders ---

@pytest.mark.parametrize("command, variables, folder", [
    ("scripts/order_1.sh", {}, "logs_and_outputs/order_1"),
    ("scripts/order_1.sh", {"METHOD": "gorp", "SEED": "42"}, "logs_and_outputs/order_1"),
    ("scripts/order_1.sh --tiny", {}, "logs_and_outputs/order_1-tiny"),
    ("scripts/order_1.sh --tiny", {"METHOD": "olora", "SEED": "1"}, "logs_and_outputs/order_1-tiny-olora-seed1"),
    ("scripts/order_1.sh", {"EXTRA": "--seed 7 --method sgorp"}, "logs_and_outputs/order_1-sgorp-seed7"),
    ("scripts/order_1.sh", {"EXTRA": "--preset released"}, "logs_and_outputs/order_1-released"),
    ("scripts/order_1.sh", {"METHOD": "../x"}, "logs_and_outputs/order_1-.._x"),
    ("scripts/order_1.sh", {"MODEL": "facebook/bart-base", "METHOD": "sgorp"},
     "logs_and_outputs/order_1-bart-base-sgorp"),
    ("scripts/order_1.sh", {"MODEL": "/hf_models/t5-large/"}, "logs_and_outputs/order_1"),
    ("scripts/order_1.sh", {"MODEL": "initial_model/../initial_model/tiny-t5/."}, "logs_and_outputs/order_1-tiny-t5"),
    ("scripts_llama/order_1.sh --small", {"MODEL": "initial_model/gemma3-270m"},
     "logs_and_outputs_llama/order_1-small-gemma3-270m"),
    ("scripts_llama/order_1.sh --small", {}, "logs_and_outputs_llama/order_1-small"),
    ("scripts/order_1.sh --tiny", {"METHOD": "olora", "OUTPUT": "mine"}, "mine/order_1"),
])
def test_the_default_folder_says_what_distinguishes_a_run(command, variables, folder):
    assert flags(dry_run(*command.split(), **variables)[0])["output_dir"] == f"{folder}/outputs"


# --- orders ---


def test_an_order_from_anywhere(checkout, tmp_path):
    done = bash(str(checkout / "scripts" / "order_1.sh"), "--tiny", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    terminal = done.stdout.splitlines()
    assert terminal[0].startswith("[gorp] order1: gorp, the published method, with values for a small model")
    assert terminal[1] == "[gorp] checking order1: data, flags and model"
    assert terminal[2].startswith("[gorp] began src/run_order.py configs/order1_configs --model_name_or_path initial_m")
    assert "table of logs_and_outputs/order_1-tiny" in terminal
    log = (checkout / "logs" / "order_1-tiny.log").read_text()
    assert log.count("a library's line") == 1 and "a library's line" not in done.stdout
    assert " src/run_order.py configs/order1_configs" in log.splitlines()[0] and "table of" in log
    assert (checkout / "logs_and_outputs" / "order_1-tiny" / "outputs" / "4-agnews" / "completed.json").exists()
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("code", [1, 0])
def test_a_task_that_fails_ends_the_order(checkout, code):
    done = order_1(checkout, FAIL_AT="amazon", FAIL_WITH=str(code))
    assert done.returncode == 1  # 0 without results is a failure too
    assert done.stderr.splitlines() == [
        "error: --flag: bad", "error: order1 stopped with exit code 1 in task 2 of 4; its log: logs/order_1-tiny.log"]
    assert "table of" not in done.stdout
    again = order_1(checkout)
    assert again.returncode == 0 and (checkout / "logs" / "order_1-tiny.log").read_text().count("began") == 2


def test_what_began_with_fresh_resumes_without_it(checkout):
    done = bash("scripts/order_1.sh", "--tiny", "--fresh", cwd=checkout, FAIL_AT="amazon", FAIL_WITH="1")
    assert done.stderr.endswith("log: logs/order_1-tiny.log. The same command without --fresh resumes\n")


def test_bad_input_is_said_once(checkout):
    done = order_1(checkout, FAIL_AT="dbpedia", FAIL_WITH="2")
    assert (done.returncode, done.stderr) == (2, "error: --flag: bad\n")
    assert "table of" not in done.stdout


def test_published_values_without_a_gpu_are_said(checkout):
    put(checkout / "initial_model" / "t5-large" / "config.json", {})
    assert "[gorp] order1: no GPU is visible; training uses the CPU" in bash(
        "scripts/order_1.sh", cwd=checkout).stdout.splitlines()
    assert "no GPU" not in order_1(checkout).stdout


def test_what_cannot_start_is_said(checkout):
    (checkout / "src" / "run_order.py").unlink()  # Python's own exit code is 2, too
    done = order_1(checkout)
    assert (done.returncode, done.stderr) == (
        2, "error: order1 could not start; its log: logs/order_1-tiny.log\n")


def test_a_lost_terminal_does_not_end_the_orders(checkout):
    shutil.copytree(checkout / "configs" / "order1_configs", checkout / "configs" / "order2_configs")
    done = bash("-c", "bash scripts/run.sh --tiny 1 2 | head -n 1; echo ${PIPESTATUS[0]}", cwd=checkout)
    assert done.stdout.endswith("\n0\n"), done.stderr
    assert (checkout / "logs_and_outputs" / "order_2-tiny" / "outputs" / "4-agnews" / "completed.json").exists()


def test_without_predictions_there_is_no_table(checkout):
    done = order_1(checkout, EXTRA="--do_predict False")
    assert (done.returncode, done.stderr) == (0, "") and "table of" not in done.stdout


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv on this machine")
def test_a_script_that_is_killed_takes_its_processes_along(checkout):
    (checkout / "src" / "run_order.py").write_text(
        "import os, time\nprint('[gorp] pid', os.getpid(), flush=True)\ntime.sleep(600)\n")
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    run = subprocess.Popen(["bash", "scripts/order_1.sh", "--tiny"], cwd=checkout, env=environment, text=True,
                           stdout=subprocess.PIPE)  # fmt: skip
    process = int(next(line for line in run.stdout if line.startswith("[gorp] pid ")).split()[-1])
    run.kill()
    for _ in range(100):
        state = "Z"  # ended, if perhaps not reaped yet
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(process, signal.SIGKILL)
        raise AssertionError("the process outlived the script")
    run.wait()


@pytest.mark.parametrize("flag", ["--hub_token hf_secret", "--hub_token=hf_secret", "--hub-token 'hf_secret'",
                                  "--use_auth_token hf_secretsecretsecretsecret"])
def test_a_secret_reaches_no_log(flag, checkout):
    done = order_1(checkout, EXTRA=flag)
    [log] = [path.read_text() for path in (checkout / "logs").glob("*.log")]
    assert "hf_secret" not in log + done.stdout + done.stderr
    assert "***" in log and "EXTRA override these" in done.stdout
    assert order_1(checkout, EXTRA="--cache_dir /data/hf_cache", DRY_RUN="1").stdout.count("/data/hf_cache ") == 1
    dry = order_1(checkout, EXTRA=flag, DRY_RUN="1")
    assert "***" in dry.stdout and "hf_secret" not in dry.stdout + dry.stderr


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
    assert done.stderr.startswith("error: --galore_rank: found 4096; allowed: at most 128")
    assert [path.name for path in out.rglob("*")] == ["order_1.log"]


def test_output_that_cannot_be_written(tmp_path, mini_benchmark):
    (tmp_path / "file").touch()
    done = bash("scripts/order_1.sh", "--tiny", OUTPUT=str(tmp_path / "file"), DATA_DIR=str(mini_benchmark))
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/file/order_1: cannot be written (Not a directory)\n"


def test_without_a_model_both_ways_on_are_said(checkout):
    (checkout / "requirements.txt").write_text("no-such-package>=1.0\n")
    done = bash("scripts/run.sh", cwd=checkout)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: initial_model/t5-large: contains no model")
    assert "hf download google-t5/t5-large --local-dir initial_model/t5-large" in done.stderr
    assert "--tiny" in done.stderr
    assert not (checkout / ".venv").exists()
    assert "--small" in bash("scripts_llama/run_llama.sh", cwd=checkout).stderr


def test_dry_run_leaves_nothing(checkout):
    def found() -> list[Path]:
        return sorted(path for path in checkout.rglob("*") if "__pycache__" not in path.parts)

    before = found()
    assert bash("scripts/order_1.sh", cwd=checkout, DRY_RUN="1").returncode == 0
    assert found() == before


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
    assert (run.returncode, err) == (130, "[gorp] order1: interrupted; the same command resumes\n")


def test_a_process_that_was_killed_is_said_with_its_signal(checkout):
    (checkout / "src" / "run_order.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    done = order_1(checkout)
    assert done.returncode == 137
    assert "stopped with exit code 137 (a process was ended by SIGKILL) in task 1 of 4; its log:" in done.stderr


@pytest.mark.parametrize("codes, said", [
    ([-15, -9, -15], "stopped with exit code 137 (a process was ended by SIGKILL)"),
    ([1, -15], "stopped with exit code 1 in task 1"),
    ([-15, 2], "error: --flag: bad\n"),  # bad input, which the entry has explained
])
def test_what_ended_a_process_of_torchrun_is_said(codes, said, checkout, tmp_path):
    lines = "".join(f"  exitcode   : {code} (pid: 7)\\n" for code in codes)
    explained = "error: --flag: bad\\n" if 2 in codes else ""
    put(tmp_path / "torchrun", f"#!/bin/sh\nprintf '{explained}{lines}'\nexit 1\n")
    (tmp_path / "torchrun").chmod(0o755)
    run = f"""source scripts/lib.sh; set_up() {{ PYTHON={sys.executable} PATH={tmp_path}:$PATH; }}
              parse_arguments '' --tiny; run_order t5 order1"""
    done = bash("-c", run, cwd=checkout, NNODES="2", NODE_RANK="0", MASTER_ADDR="here")
    assert done.returncode == (137 if "137" in said else 2 if explained else 1), done.stderr
    assert done.stderr == said if explained else said in done.stderr


# --- epochs of one task ---

def epochs_of(words: list[str], monkeypatch) -> dict[str, list[str]]:
    """Dataset -> the epochs that `run_order.py` writes into the command of its task; nothing is checked or trained."""
    import run_order

    said = {}

    def train(command: list[str]) -> int:
        dataset = Path(command[command.index("--task_config_dir") + 1]).name
        said[dataset] = [after for flag, after in zip(command, command[1:]) if flag == "--num_train_epochs"]
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(run_order, "check_flags", lambda flags: (None, None))
        patch.setattr(run_order, "check_order", lambda order, *checked: "no rows")
        patch.setattr(run_order, "data_files", lambda folder, options: {})
        patch.setattr(run_order, "find_adapter", lambda folder: folder)
        patch.setattr(run_order.run_uie_lora, "main", train)
        assert run_order.main(words) == 0
    return said


@pytest.mark.parametrize("script", ["scripts/order_5.sh", "scripts/order_6.sh"])
def test_mnli_trains_twice_in_orders_5_and_6(script, monkeypatch, tmp_path):
    [command] = dry_run(script, OUTPUT=str(tmp_path))
    said = epochs_of(command[2:], monkeypatch)
    assert len(said) == 15 and said.pop("MNLI") == ["1", "2"]  # the last one counts
    assert all(epochs == ["1"] for epochs in said.values())
    [command] = dry_run(script, OUTPUT=str(tmp_path), EXTRA="--task_epochs CB=3 COPA=0.5")
    said = epochs_of(command[2:], monkeypatch)
    assert (said["MNLI"], said["CB"], said["COPA"]) == (["1"], ["1", "3"], ["1", "0.5"])


def test_max_steps_leaves_epochs_without_effect_and_says_so_once(monkeypatch, tmp_path, capfd):
    [command] = dry_run("scripts/order_5.sh", "--tiny", OUTPUT=str(tmp_path))
    said = epochs_of(command[2:], monkeypatch)
    assert all(epochs == ["1"] for epochs in said.values())
    assert capfd.readouterr().out.count("[gorp] --task_epochs is ignored: each task trains for --max_steps 100\n") == 1
    [command] = dry_run("scripts/order_4.sh", "--tiny", OUTPUT=str(tmp_path))
    epochs_of(command[2:], monkeypatch)
    assert "--task_epochs" not in capfd.readouterr().out


@pytest.mark.parametrize("words, said", [
    (["dbpedia=2", "MNLI=2"], "found 'MNLI'; allowed: datasets of order1: dbpedia, amazon, yahoo, agnews"),
    *((["amazon=2", word], f"found {word!r}; allowed: DATASET=N, with N epochs, above 0")
      for word in ("yahoo", "yahoo=", "yahoo=two", "yahoo=0", "yahoo=-1", "yahoo=nan", "yahoo=inf", "=2")),
    (["yahoo=2", "yahoo=3"], "found yahoo twice; allowed: once"),
])
def test_bad_epochs_are_one_line_before_anything_is_checked(words, said, tmp_path, monkeypatch, capfd):
    import run_order

    monkeypatch.setattr(run_order, "check_flags", lambda flags: pytest.fail("checked"))
    out = tmp_path / "out"
    command = ["configs/order1_configs", "--model_name_or_path", "m", "--output_dir", str(out), "--task_epochs", *words]
    assert run_order.main(command) == 2
    assert capfd.readouterr().err == f"error: --task_epochs: {said}\n"
    assert not out.exists()


def test_the_last_lines_of_a_tiny_run_are_commands_that_work_next(checkout):
    said = order_1(checkout).stdout.splitlines()
    assert "tests the code, not the method" in said[-4]
    commands = [line.split(":  ")[1] for line in said[-3:]]
    assert commands[:2] == [f"METHOD={method} bash scripts/order.sh --tiny order1" for method in ("seqlora", "sgorp")]
    for command in commands:
        done = bash("-c", command, cwd=checkout)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "table of logs_and_outputs\n"
    assert "tests the code" not in bash("scripts/order_1.sh", cwd=checkout, MODEL="x").stdout
