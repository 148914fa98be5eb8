"""Whole runs through the real scripts: the embedded models on the mini benchmark, real text, and two ranks."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import REAL_BENCHMARK, ROOT
from test_run import PREFIX, arguments, predictions

pytestmark = pytest.mark.recipe
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "VIRTUAL_ENV": sys.prefix,
}


def start(script: str, *words: str, **variables: str) -> subprocess.Popen:
    command = ["bash", script, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | variables, **pipes)


@pytest.fixture(scope="module")
def first_orders(tmp_path_factory):
    """Order 1 with the tiny T5 and the tiny LLaMA, side by side: family -> (folder, what the terminal showed)."""
    root = tmp_path_factory.mktemp("orders")
    runs = {
        family: start(script, "--tiny", "1", OUTPUT=str(root / family))
        for family, script in (("t5", "scripts/run.sh"), ("llama", "scripts_llama/run_llama.sh"))
    }
    shown = {family: run.communicate()[0] for family, run in runs.items()}
    assert {family: run.returncode for family, run in runs.items()} == {"t5": 0, "llama": 0}, shown
    return {family: (root / family / "order_1", text) for family, text in shown.items()}


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_every_task_of_order_1_is_learned(first_orders, family):
    folder, shown = first_orders[family]
    learned = {}
    for number, dataset in enumerate(("dbpedia", "amazon", "yahoo", "agnews"), start=1):
        results = json.loads((folder / "outputs" / f"{number}-{dataset}" / "predict_results.json").read_text())
        learned[dataset] = results[f"predict_exact_match_for_{dataset}"]
    assert all(score >= 85 for score in learned.values()), learned
    order = json.loads((folder / "order_results.json").read_text())
    assert f"{order['average_performance']:.2f}" in shown


@pytest.mark.skipif(not REAL_BENCHMARK.exists(), reason="the real text is not beside this checkout")
def test_an_order_of_ones_own_over_real_text(tmp_path):
    tasks = ["TC/agnews", "NLI/CB", "COPA/COPA"]
    name = "pytest_real_text"
    make = [sys.executable, "data/make_order.py", "--name", name, "--data_dir", str(REAL_BENCHMARK), "--tasks", *tasks]
    try:
        subprocess.run(make, cwd=ROOT, check=True)
        settings = {"OUTPUT": str(tmp_path), "DATA_DIR": str(REAL_BENCHMARK)}
        run = start("scripts/order.sh", "--tiny", name, EXTRA="--max_steps 5 --max_predict_samples 8", **settings)
        shown = run.communicate()[0]
    finally:
        shutil.rmtree(ROOT / "configs" / f"{name}_configs", ignore_errors=True)
    assert run.returncode == 0, shown
    results = json.loads((tmp_path / name / "outputs" / "3-COPA" / "predict_results.json").read_text())
    assert results["predict_samples"] == 24


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("adapter_name", ["t5_adapter", "llama_adapter"])
def test_two_ranks_under_zero_train_what_one_process_trains(adapter_name, stage, mini_benchmark, tmp_path):
    """The losses agree, the factors agree, and the full-rank weights move as far.

    They need not agree entry by entry: moments stay when a basis is renewed, and the sign of a singular vector, which
    may turn with the last digits of a gradient, then decides the direction of the next steps.
    """
    model, modules = PREFIX[adapter_name]
    exact = ["--lora_dropout", "0", "--learning_rate", "1e-4", "--galore_lr", "1e-4", "--max_grad_norm", "0",
             "--lamda_1", "0", "--adam_epsilon", "1e-4", "--logging_steps", "1"]  # fmt: skip

    def command(folder: str, *extra: str) -> list[str]:
        return ["src/run_uie_lora.py", *arguments(mini_benchmark, tmp_path / folder, "dbpedia", model, modules, *exact,
                                                  *extra)]  # fmt: skip

    subprocess.run([sys.executable, *command("one")], cwd=ROOT, env=ENVIRONMENT, check=True)
    sharded = ["--deepspeed", f"configs/ds_configs/stage{stage}.config", "--per_device_train_batch_size", "4"]
    launched = ["deepspeed", "--num_accelerators", "2", "--master_port", "29571", *command("two", *sharded)]
    done = subprocess.run(launched, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "engine: trainable cores under DeepSpeed" in done.stdout
    one, two = tmp_path / "one", tmp_path / "two"
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    assert len(predictions(two)) == len(predictions(one))
    factors = [load_file(folder / adapter_name / "adapter_model.safetensors") for folder in (one, two)]
    assert factors[0].keys() == factors[1].keys()
    for name, factor in factors[0].items():
        assert (factors[1][name] - factor).norm() < 1e-2 * factor.norm(), name
    base = load_file(model / "model.safetensors")
    weights = [load_file(folder / adapter_name / "full_rank_weights.safetensors") for folder in (one, two)]
    for name, weight in weights[0].items():
        moved = (weight - base[name].float()).norm().item()
        moved_sharded = (weights[1][name] - base[name].float()).norm().item()
        assert moved > 0 and moved_sharded == pytest.approx(moved, rel=0.1), name


@pytest.mark.parametrize("method", ["nlora", "replay"])
def test_two_ranks_train_other_methods_too(method, mini_benchmark, tmp_path):
    model, modules = PREFIX["t5_adapter"]
    short = ["--method", method, "--max_steps", "4", "--max_predict_samples", "4"]
    sharded = ["--deepspeed", "configs/ds_configs/stage2.config", "--per_device_train_batch_size", "4"]
    for dataset in ("dbpedia", "amazon"):
        command = arguments(mini_benchmark, tmp_path / dataset, dataset, model, modules, *short, *sharded)
        launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", free_port()]
        launched = [*launcher, "src/run_uie_lora.py", *command]
        done = subprocess.run(launched, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        model = tmp_path / dataset / "t5_adapter"
    again = arguments(mini_benchmark, tmp_path / "again", "amazon", model, modules, *short)
    again.remove("--do_train")
    subprocess.run([sys.executable, "src/run_uie_lora.py", *again], cwd=ROOT, env=ENVIRONMENT, check=True)
    assert predictions(tmp_path / "again") == predictions(tmp_path / "amazon")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
