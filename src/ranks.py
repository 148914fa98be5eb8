"""What the ranks of a run agree on before they train, on one machine or several: the first one decides."""

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object

from errors import InputError


def is_first() -> bool:
    """Whether this is the first rank, or the only process."""
    # A launcher sets both; RANK alone is left over from something else.
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def of_first_rank(decide: Callable[[], Any]) -> Any:
    """What `decide` returns on the first rank, which alone calls it; collective, after the ranks are connected.

    If it raises InputError, the first rank raises it too and the others exit with code 2, so it is printed only once.
    """
    result, fault = None, None
    if is_first():
        try:
            result = decide()
        except InputError as error:
            fault = error
    result, failed = broadcast_object_list([result, fault is not None])
    if failed:
        disconnect()
    if fault is not None:
        raise fault
    if failed:
        sys.exit(2)
    return result


def sum_over_ranks(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its sum over the ranks, the same on all of them; collective."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


def disconnect() -> None:
    """End the connection of the ranks, if there is one; the last thing that a process does.

    A thread of gloo that still holds a tensor of the last collective while Python exits would abort the process
    (pytorch/pytorch 190489), so its threads end first.
    """
    if not dist.is_initialized():
        return
    deepspeed = sys.modules.get("deepspeed.comm")
    if deepspeed is not None and deepspeed.is_initialized():
        deepspeed.destroy_process_group()  # lets go of DeepSpeed's own references to the groups, too
    else:
        dist.destroy_process_group()


def check_shared(folder: Path) -> None:
    """Reject a folder that is not the same one on every machine: all ranks read what the first one writes; collective.

    Raises InputError where a machine does not see a file that the first rank has just written there.
    """

    def write_mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".partial", delete=False) as file:
            return Path(file.name).name

    mark = folder / of_first_rank(write_mark)
    node = f"node {os.environ.get('GROUP_RANK', os.environ.get('CROSS_RANK', '0'))} ({socket.gethostname()})"
    blind = sorted(set(gather_object([] if mark.exists() else [node])))

    def judge() -> None:
        mark.unlink()
        if blind:
            raise InputError(f"--output_dir: {folder} is not the folder of the first node on {', '.join(blind)}; "
                             "allowed: one that all nodes share, such as a network file system")  # fmt: skip

    of_first_rank(judge)
