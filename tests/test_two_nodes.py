"""Two machines, here two launchers that reach each other by loopback: one folder, or one each; a node killed."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers import ENVIRONMENT, ROOT, T5, T5_MODULES, arguments, bash, free_port, predictions, put
from order_config import write_order

pytestmark = pytest.mark.recipe
TASKS = [("TC", "dbpedia"), ("SC", "amazon")]


@pytest.fixture
def start(mini_benchmark, tmp_path):
    """A function that starts an order of two tasks on two nodes of one process each, ZeRO-2, 8 examples a step."""
    write_order(tmp_path / "two_configs", TASKS)
    started = []

    def launch(*outputs: Path) -> list[subprocess.Popen]:
        port = str(free_port())
        for node, folder in enumerate(outputs):
            words = arguments(mini_benchmark, folder, "dbpedia", T5, T5_MODULES, "--max_steps", "6",
                              "--save_strategy", "steps", "--save_steps", "2", "--max_predict_samples", "4",
                              "--deepspeed", "configs/ds_configs/stage2.config", "--per_device_train_batch_size", "4")
            place = words.index("--task_config_dir")
            del words[place : place + 2]  # the order's own
            torchrun = ["torchrun", "--nnodes", "2", "--node_rank", str(node), "--master_addr", "127.0.0.1",
                        "--master_port", port]
            started.append(subprocess.Popen(
                [*torchrun, "src/run_order.py", str(tmp_path / "two_configs"), *words], cwd=ROOT, env=ENVIRONMENT,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))  # fmt: skip
        return started[-len(outputs) :]

    yield launch
    for node in started:
        kill(node)


def kill(node: subprocess.Popen) -> None:
    """End a launcher and its processes, which are in sessions of their own, as a machine without power does."""
    if node.poll() is None:
        for process in (psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)):
            process.kill()
    node.wait()


def said(nodes: list[subprocess.Popen]) -> list[str]:
    return [node.communicate(timeout=300)[0] for node in nodes]


def test_a_folder_of_its_own_is_rejected_and_the_node_named(start, tmp_path):
    nodes = start(tmp_path / "zero", tmp_path / "one")
    text = said(nodes)
    assert all(node.returncode for node in nodes), "\n=====\n".join(text)
    [line] = [line for line in "".join(text).splitlines() if line.startswith("error: ")]
    folder = tmp_path / "zero" / "1-dbpedia"
    assert line.startswith(f"error: --output_dir: {folder} is not the folder of the first node on node 1 (")
    assert not list(tmp_path.glob("*/*/run_record.json")) and not list(tmp_path.rglob("*.partial"))


def test_a_node_is_killed_and_both_resume(start, tmp_path):
    """The run ends on both nodes; the same commands end with what an uninterrupted run predicts."""
    shared, whole = tmp_path / "shared", tmp_path / "whole"
    nodes = start(shared, shared)
    deadline = time.monotonic() + 300
    while not (shared / "2-amazon" / "checkpoint-2" / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert time.monotonic() < deadline, "the second task has no checkpoint after 5 minutes"
    kill(nodes[1])
    nodes[0].communicate(timeout=300)
    assert nodes[0].returncode != 0 and not (shared / "2-amazon" / "completed.json").exists()
    again = start(shared, shared)
    text = said(again)
    assert [node.returncode for node in again] == [0, 0], text
    assert "1-dbpedia: finished before" in text[0] and "resuming from" in text[0]
    assert "[gorp]" not in text[1]  # the first rank alone reports
    uninterrupted = start(whole, whole)
    assert not any(node.returncode for node in uninterrupted) and said(uninterrupted)
    for folder in ("1-dbpedia", "2-amazon"):
        assert predictions(shared / folder) == predictions(whole / folder)


def test_deepspeeds_launcher_reaches_the_hosts_of_a_file(mini_benchmark, tmp_path):
    """`ssh` and `pdsh` are stand-ins that run a host's command, read by a shell as theirs is, on this machine."""
    write_order(ROOT / "configs" / "two_nodes_of_a_test_configs", TASKS)
    put(tmp_path / "bin" / "ssh", "#!/bin/sh\nexit 0\n")
    put(tmp_path / "bin" / "pdsh", f"#!{sys.executable}\n" + """
import subprocess, sys
_, hosts, option, *words = sys.argv[sys.argv.index("-w") :]
assert option == "-N", "pdsh would begin each line with the name of its host"
hosts, command = hosts.split(","), " ".join(words)
nodes = [subprocess.Popen(["bash", "-c", command.replace("%n", str(n))]) for n in range(len(hosts))]
sys.exit(max(node.wait() for node in nodes))
""")
    for program in ("ssh", "pdsh"):
        (tmp_path / "bin" / program).chmod(0o755)
    put(tmp_path / "hosts", "a slots=1\nb slots=1  \n# c slots=1\n")
    port = free_port()
    try:
        done = bash("scripts/order.sh", "two_nodes_of_a_test", "--tiny", HOSTFILE=str(tmp_path / "hosts"),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OUTPUT=str(tmp_path / "out"),
                    DATA_DIR=str(mini_benchmark), EXTRA="--max_steps 2 --max_predict_samples 2",
                    PATH=f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}", OMP_NUM_THREADS="1")  # fmt: skip
    finally:
        for path in sorted((ROOT / "configs" / "two_nodes_of_a_test_configs").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (ROOT / "configs" / "two_nodes_of_a_test_configs").rmdir()
    assert done.returncode == 0, done.stdout + done.stderr
    assert " on 2 processes of 2 machines" in done.stdout
    assert "[gorp] after 2-amazon" in done.stdout
    assert not [*Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")], "memory is left behind"
