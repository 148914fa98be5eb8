"""Checkpoints within a task: safetensors and JSON, one format for every engine, with and without DeepSpeed.

A folder `checkpoint-<step>` holds

* `training_state.safetensors`: the trainable parameters and the optimizer's state by name (`Method.training_state`);
* `schedule.json`: the learning-rate schedule, and the loss scaler of fp16;
* `random_state_<rank>.json`: the random number generators of each rank;
* `trainer_state.json`: Hugging Face's record of steps, losses and the best step;
* `manifest.json`: digests of the others. It is written last, for a process can be killed at any moment: a folder
  without it, or with a file that differs from it, is incomplete, and no run resumes from it.
"""

import logging
import random
import re
from collections.abc import Mapping
from pathlib import Path

import numpy
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from errors import InputError
from files import digest, read_json, sync, whole_file, write_json

log = logging.getLogger("gorp")

TENSORS = "training_state.safetensors"
SCHEDULE = "schedule.json"
MANIFEST = "manifest.json"


# Complete or not


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, latest first, complete or not."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def write_manifest(folder: Path) -> None:
    """Have a checkpoint's files on the disk, then mark it as complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        sync(path)
    write_json(folder / MANIFEST, {str(path.relative_to(folder)): digest(path) for path in paths})


def is_complete(folder: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        return all(digest(folder / name) == wanted for name, wanted in read_json(folder / MANIFEST).items())
    except (InputError, AttributeError):
        return False


def latest_complete(output_dir: Path) -> Path | None:
    """The latest checkpoint to resume from, None where there is none; warns of later ones that are incomplete."""
    for folder in checkpoint_folders(output_dir):
        if is_complete(folder):
            return folder
        log.warning("%s: incomplete, not used", folder)
    return None


# Parameters and optimizer state


def training_state(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters and their optimizer state as CPU tensors: `<name>` and `<name>.<key>`, a count as an int64 scalar."""
    state = dict(parameters)
    for name, parameter in parameters.items():
        entries = optimizer.state.get(parameter, {})
        state |= {f"{name}.{key}": torch.as_tensor(value) for key, value in entries.items()}
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


@torch.no_grad()
def load_training_state(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, saved: Mapping[str, Tensor]
) -> None:
    """Set parameters and optimizer state to what `training_state` returned.

    Raises:
        InputError: `saved` is of other parameters; nothing has changed then.
    """
    state = {name: {} for name in parameters}
    for key, value in saved.items():
        name, _, entry = key.rpartition(".")
        if key not in parameters and name not in parameters:
            raise InputError(f"{key} is not trainable in this run")
        if key not in parameters:
            is_count = value.dtype == torch.int64 and not value.ndim
            device = value.device if entry == "step" else parameters[name].device  # AdamW counts steps on the CPU
            state[name][entry] = value.item() if is_count else value.to(device)
    for name, parameter in parameters.items():
        found = tuple(saved[name].shape) if name in saved else "nothing"
        if found != tuple(parameter.shape):
            raise InputError(f"{name}: found {found}; allowed is {tuple(parameter.shape)}")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
        optimizer.state[parameter] = state[name]


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint's tensors."""
    with whole_file(folder / TENSORS) as partial:
        safetensors.torch.save_file(dict(tensors), partial, metadata={"format": "pt"})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return safetensors.torch.load_file(folder / TENSORS)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder / TENSORS}: no readable checkpoint ({error})") from None


# Random numbers


def write_random_state(folder: Path, rank: int) -> None:
    """Write the state of this process's generators: Python's, NumPy's, PyTorch's on the CPU and on each GPU."""
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
    """Set the generators as `write_random_state` found them; a rank that the checkpoint did not have keeps its own."""
    path = folder / f"random_state_{rank}.json"
    if not path.exists():
        log.warning("%s: missing, as the checkpoint is of fewer ranks; its random numbers differ", path)
        return
    state = read_json(path)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["cpu"], dtype=torch.uint8))
    for device, values in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(torch.tensor(values, dtype=torch.uint8), device)
