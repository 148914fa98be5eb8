"""Checkpoints within a task: safetensors and JSON, one format for every engine, with and without DeepSpeed.

A folder `checkpoint-<step>` holds

* `training_state.safetensors`: the trainable parameters and the optimizer's state by name (`Method.training_state`);
* `schedule.json`: the learning-rate schedule, and the loss scaler of fp16;
* `random_state_<rank>.json`: the random number generators of each rank;
* `trainer_state.json`: Hugging Face's record of steps, losses and the best step;
* `manifest.json`: digests of the others, written last. A folder without it, or with a file that differs from it, is
  incomplete (its process was killed), and no run resumes from it.
"""

import logging
import random
import re
from collections.abc import Mapping
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from errors import InputError
from files import digest, read_json, sync, write_json

logger = logging.getLogger("gorp")

TENSORS = "training_state.safetensors"
SCHEDULE = "schedule.json"
MANIFEST = "manifest.json"


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, latest first, including incomplete ones."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def write_manifest(folder: Path) -> None:
    """Sync a checkpoint's files to disk, then mark it as complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        sync(path)
    write_json(folder / MANIFEST, {str(path.relative_to(folder)): digest(path) for path in paths})


def is_complete(folder: Path) -> bool:
    """Whether every file is present and unchanged."""
    try:
        return all(digest(folder / name) == wanted for name, wanted in read_json(folder / MANIFEST).items())
    except (InputError, AttributeError):
        return False


def latest_complete(output_dir: Path) -> Path | None:
    """The latest complete checkpoint, None if there is none; warns of later incomplete ones."""
    for folder in checkpoint_folders(output_dir):
        if is_complete(folder):
            return folder
        logger.warning("%s: incomplete; ignored", folder)
    return None


def training_state(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters and their optimizer state as CPU tensors `<name>` and `<name>.<key>`; counts are int64 scalars."""
    state = dict(parameters)
    for name, parameter in parameters.items():
        entries = optimizer.state.get(parameter, {})
        state |= {f"{name}.{key}": torch.as_tensor(value) for key, value in entries.items()}
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


@torch.no_grad()
def load_training_state(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, saved: Mapping[str, Tensor]
) -> None:
    """Set parameters and optimizer state to what `training_state` returned; InputError unless it fits them."""
    state = {name: {} for name in parameters}
    for key, value in saved.items():
        if key in parameters:
            continue
        name, _, entry = key.rpartition(".")
        if name not in parameters:
            raise InputError(f"{key} is not trainable in this run")
        is_count = value.dtype == torch.int64 and not value.ndim
        device = value.device if entry == "step" else parameters[name].device  # AdamW counts steps on the CPU
        state[name][entry] = value.item() if is_count else value.to(device)
    for name, parameter in parameters.items():
        found = tuple(saved[name].shape) if name in saved else "nothing"
        if found != tuple(parameter.shape):
            raise InputError(f"{name}: found {found}; allowed: {tuple(parameter.shape)}")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
        optimizer.state[parameter] = state[name]


def write_random_state(folder: Path, rank: int) -> None:
    """Write the state of this process's generators: Python, NumPy, PyTorch on the CPU and on each GPU."""
    name, keys, *rest = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    state = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "cpu": torch.get_rng_state().tolist(),
        "cuda": [device.tolist() for device in cuda],
    }
    write_json(folder / f"random_state_{rank}.json", state, indent=None)


def load_random_state(folder: Path, rank: int) -> None:
    """Restore the generators that `write_random_state` saved; a rank that did not exist then keeps its own."""
    path = folder / f"random_state_{rank}.json"
    if not path.exists():
        logger.warning("%s: missing, as the checkpoint has fewer ranks; this rank's random numbers differ", path)
        return
    state = read_json(path)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["cpu"], dtype=torch.uint8))
    for device, values in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(torch.tensor(values, dtype=torch.uint8), device)
