"""What a GPU would reject, and what it would wait for, seen on a machine without one (`simulated_gpu.py`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arguments import UIETrainingArguments
from helpers import ENVIRONMENT, LLAMA, LLAMA_MODULES, ROOT, T5, T5_MODULES, arguments, free_port, put
from order_config import write_order
from simulated_gpu import FAULTS

FAMILIES = {"t5": (T5, T5_MODULES), "llama": (LLAMA, LLAMA_MODULES)}
ZERO = {stage: ["--deepspeed", f"configs/ds_configs/stage{stage}.config"] for stage in (1, 2, 3)}
OFFLOAD = ["--deepspeed", "configs/ds_configs/stage2_offload.config"]
BF16 = ["--bf16", "True", "--gradient_checkpointing", "True"]
CORES = ["--galore_engine", "cores", "--galore_svd", "sketch"]
INPUTS = ["--method", "sgorp"]
RUNS = {  # name -> family, flags, ranks
    "dense": ("t5", [], 1),
    "dense, LLaMA": ("llama", ["--gradient_accumulation_steps", "2"], 1),
    "cores": ("t5", CORES, 1),
    "cores, bf16, recomputation": ("llama", [*CORES, *BF16], 1),
    "sgorp, bf16": ("llama", [*INPUTS, *BF16], 1),
    "sgorp": ("t5", INPUTS, 1),
    "stage 1": ("t5", ZERO[1], 1),
    "stage 2": ("llama", ZERO[2], 1),
    "stage 2, bf16, recomputation": ("llama", [*ZERO[2], *BF16], 1),
    "stage 2, offload": ("t5", OFFLOAD, 1),
    "stage 2, two ranks": ("t5", ZERO[2], 2),
    "stage 3": ("llama", ZERO[3], 1),
    "stage 3, two ranks": ("t5", ZERO[3], 2),
    "resumed": ("t5", ["--save_strategy", "steps", "--save_steps", "2"], 1),
    "resumed, stage 2": ("llama", [*ZERO[2], "--save_strategy", "steps", "--save_steps", "2"], 1),
}
OWN_WAITS = 1  # reads of a value, in this project's lines, in a step without a new basis


def events(record: Path, command: list[str], ranks: int = 1) -> list[list]:
    """Run `command` on a simulated GPU: [phase, kind, place, times, bytes] of each event, of all ranks."""
    launch = [sys.executable]
    if "--deepspeed" in command:
        launch = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    done = subprocess.run([*launch, "tests/simulated_gpu.py", str(record), *command], cwd=ROOT, text=True,
                          capture_output=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return [event for path in record.parent.glob(f"{record.name}*") for event in json.loads(path.read_text())]


def order_command(family: str, benchmark: Path, folder: Path, *extra: str) -> list[str]:
    """Two tasks of five steps, with a new basis at the first and the last. `--use_cpu` passes Transformers' checks."""
    model, modules = FAMILIES[family]
    write_order(folder / "two_configs", [("TC", "dbpedia"), ("SC", "amazon")])
    words = arguments(benchmark, folder / "out", "dbpedia", model, modules, "--max_steps", "5", "--lamda_1", "0",
                      "--max_predict_samples", "2", "--per_device_train_batch_size", "4", *extra)  # fmt: skip
    place = words.index("--task_config_dir")
    del words[place : place + 2]
    return ["src/run_order.py", str(folder / "two_configs"), *words]


@pytest.mark.parametrize("name", [name if name == "dense" else pytest.param(name, marks=pytest.mark.recipe)
                                  for name in RUNS])  # fmt: skip
def test_no_operation_mixes_places_and_no_collective_is_of_a_cpu_tensor(name, mini_benchmark, tmp_path):
    family, flags, ranks = RUNS[name]
    command = order_command(family, mini_benchmark, tmp_path, *flags)
    found = events(tmp_path / "record", command, ranks)
    if name.startswith("resumed"):
        for path in [*tmp_path.glob("out/2-amazon/*.json*"), *tmp_path.glob("out/2-amazon/checkpoint-5")]:
            if path.is_dir() or path.name != "run_record.json":
                subprocess.run(["rm", "-r", str(path)], check=True)
        subprocess.run(["rm", "-r", *map(str, tmp_path.glob("out/2-amazon/*_adapter"))], check=True)
        found += events(tmp_path / "record", command, ranks)
    assert {event[0] for event in found} >= {"set-up", "step 0", "step 4", "the task's end", "evaluation"}
    assert [event for event in found if event[1] in FAULTS] == []
    waits = [event for event in found if event[:2] == ["step 2", "wait"] and event[2].startswith("src/")]
    own = [event for event in waits if " via " not in event[2]]
    assert sum(event[3] for event in own) <= OWN_WAITS * 2 * ranks, own  # two tasks
    copies = [event for event in found if event[:2] == ["step 2", "copy"] and " via " not in event[2]]
    assert copies == [], "what a step needs, spaces and bases among it, has moved before"


def test_one_process_uses_one_of_several_gpus(monkeypatch, tmp_path):
    """Hugging Face would train by DataParallel, with twice the examples a step."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = UIETrainingArguments(output_dir=str(tmp_path), do_train=True, per_device_train_batch_size=8)
    assert (args.n_gpu, args.train_batch_size, args.idle_gpus()) == (1, 8, 1)
    assert UIETrainingArguments(output_dir=str(tmp_path), do_train=True, use_cpu=True).idle_gpus() == 0


PLANTED = """\
import torch
import torch.distributed as dist
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=0, world_size=1)
here, there = torch.ones(2, 2), torch.ones(2, 2, device="cuda", requires_grad=True)
assert (here.device.type, there.device.type, there.is_cuda) == ("cpu", "cuda", True)
assert (there * 2).device == (there @ there).device == there.device and (there * 2).cpu().device == here.device
there * torch.tensor(2.0), torch.zeros_like(there) + there, dist.all_reduce(there.detach())  # all allowed
"""
FAULTY = {  # line -> kind and beginning of what is said
    "there + here": ("mixed", "add"),
    "there.register_hook(lambda g: g * here); (there * there).sum().backward()": ("mixed", "mul"),
    "dist.all_reduce(here)": ("collective", "all_reduce"),
    "there.detach().numpy()": ("host", "numpy"),
    "there.sum().item()": ("wait", "_local_scalar_dense"),
    "there[there > 0]": ("wait", "index"),
    "there.detach() + here.to(there.device)": ("copy", "to cuda"),
}


def test_planted_faults_are_found(tmp_path):
    put(tmp_path / "planted.py", PLANTED.format(port=free_port()) + "\n".join(FAULTY))
    found = events(tmp_path / "record", [str(tmp_path / "planted.py")])
    faulty = set()
    for number, (kind, what) in enumerate(FAULTY.values(), start=1 + PLANTED.count("\n")):
        here = [event for event in found if f"planted.py:{number} " in event[2]]
        assert any(event[1] == kind and f" {what}" in event[2] for event in here), (number, here)
        faulty |= {event[2] for event in here}
    assert not [event for event in found if event[1] in FAULTS and event[2] not in faulty]
