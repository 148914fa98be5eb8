"""Whole orders through the real scripts: the embedded models on the mini benchmark, and real text."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, REAL_BENCHMARK, ROOT


pytestmark = pytest.mark.recipe


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
    assert all(score >= 80 for score in learned.values()), learned
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
