"""Run a program of this repository as if on a GPU, on a machine without one, and record what a GPU would object to.

    python tests/simulated_gpu.py RECORD.json src/run_order.py ARGUMENT ...

Every tensor stays in the CPU's memory. A table holds the storages that would be on the GPU; `tensor.device` is answered
from it, `.to("cuda")` copies and adds to it, and what an operation makes of its tensors is added too. RECORD.json gets
a list of [phase, kind, place in the code, times, bytes]. Kinds:

* mixed: an operation on tensors of both places, an error on a GPU; host: `.numpy()` of a GPU tensor, an error too.
* collective: of a CPU tensor, for which NCCL has nothing.
* wait: the host reads a value of the GPU's and waits for it (`item`, `tolist`, `nonzero`, an index of booleans).
* copy: between the two memories.

Phases are "set-up", "step N" (counted from 0), "evaluation" and "the task's end". Under a launcher each rank writes its
own record, RECORD.json.1 and so on.
"""

import collections
import contextlib
import functools
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), torch.device("cpu")
FAULTS = ("mixed", "host", "collective")
COPIES = ("copy_", "_foreach_copy_")
MAY_MIX = (*COPIES, "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "set_")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave")
MOVES = ("to", "cuda", "cpu")
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter",
               "reduce_scatter_tensor", "gather", "scatter", "send", "recv")  # fmt: skip

times: collections.Counter = collections.Counter()
size: collections.Counter = collections.Counter()
phase = "set-up"
moving: str | None = None  # where the copy that is being made goes


class Memory:
    """The storages on the GPU, by identity, as weak references."""

    def __init__(self):
        self.storages: dict[int, StorageWeakRef] = {}
        self.limit = 20_000

    def holds(self, tensor: torch.Tensor) -> bool:
        try:
            return tensor.untyped_storage()._cdata in self.storages
        except (NotImplementedError, RuntimeError):  # no storage: meta, sparse, a functional wrapper
            return False

    def add(self, tree) -> None:
        for tensor in tensors_in(tree):
            with contextlib.suppress(NotImplementedError, RuntimeError):
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage._cdata, StorageWeakRef(storage))
        if len(self.storages) > self.limit:
            self.storages = {key: ref for key, ref in self.storages.items() if not ref.expired()}
            self.limit = max(20_000, 2 * len(self.storages))

    def remove(self, tensor: torch.Tensor) -> None:
        self.storages.pop(tensor.untyped_storage()._cdata, None)


gpu = Memory()


def tensors_in(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def real_device(tensor: torch.Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        return tensor.device


def is_on(device) -> str | None:
    """The kind of place that a `device` argument names."""
    return None if device is None else "cuda" if isinstance(device, int) else torch.device(device).type


def record(kind: str, what: str, count: int = 0) -> None:
    """Count an event at the innermost line of src/, or else at the innermost one outside PyTorch."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    own = [frame for frame in frames if "/src/" in frame.filename and "site-packages" not in frame.filename]
    last = next((frame for frame in reversed(frames) if "/torch/" not in frame.filename), frames[-1])
    frame = own[-1] if own else last
    place = "src/" + frame.filename.split("/src/")[-1] if own else frame.filename.split("site-packages/")[-1]
    via = "" if last is frame or not own else f" via {last.filename.split('site-packages/')[-1]}:{last.lineno}"
    key = (phase, kind, f"{place}:{frame.lineno} {what}{via}")
    times[key] += 1
    size[key] += count


class Operations(TorchDispatchMode):
    """Adds what operations on GPU tensors make to the GPU's memory, and records operations that mix or wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, tensors = func._schema.name.partition("::")[2], tensors_in((args, kwargs))
        there = any(map(gpu.holds, tensors))
        if there:
            # Operations take a number that the CPU holds; meta tensors have no place.
            here = [x for x in tensors if x.dim() and x.numel() and not gpu.holds(x) and real_device(x) == CPU]
            self.judge(name, args, here)
        result = func(*args, **kwargs or {})
        if moving != "cpu" and (there or moving == "cuda") and name not in (*COPIES, "set_"):
            gpu.add(result)
        return result

    def judge(self, name: str, args: tuple, here: list[torch.Tensor]) -> None:
        if here and moving is None and name not in MAY_MIX:
            record("mixed", f"{name} of {[tuple(x.shape) for x in here]} on the CPU")
        elif here and moving is None and name != "set_":
            record("copy", name, sum(x.nbytes for x in here))
        if name in WAITS or name == "index" and any(x.dtype in (torch.bool, torch.uint8) for x in tensors_in(args[1])):
            record("wait", name)


class Calls(TorchFunctionMode):
    """Answers `device`, makes tensors on the GPU where one is asked for, and moves them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__":
            return self.attribute(func, args[0])
        if func is torch.Tensor.backward:  # in which this mode would be off, hooks and backward functions included
            given = dict(zip(("gradient", "retain_graph", "create_graph", "inputs"), args[1:])) | kwargs
            with self:
                return torch.autograd.backward(args[0], grad_tensors=given.pop("gradient", None), **given)
        if args and isinstance(args[0], torch.Tensor):
            if name in MOVES:
                return self.move(func, args, kwargs)
            if name in ("numpy", "tolist") and gpu.holds(args[0]):
                record("host" if name == "numpy" else "wait", name)
        place = is_on(kwargs.get("device"))
        if place != "cuda":
            result = func(*args, **kwargs)
            if place == "cpu" and isinstance(result, torch.Tensor) and not any(result is x for x in args):
                gpu.remove(result)  # made like a tensor of the GPU, but here
            return result
        if args and isinstance(args[0], torch.Tensor) and name in ("tensor", "as_tensor", "asarray"):
            return self.move(torch.Tensor.to, (args[0], GPU), {"dtype": kwargs.get("dtype")})
        kwargs["device"] = CPU
        result = func(*args, **kwargs)
        if name in ("tensor", "as_tensor", "asarray"):
            record("copy", name, result.nbytes)
        gpu.add(result)
        return result

    def attribute(self, func, tensor: torch.Tensor):
        if func.__self__ is torch.Tensor.is_cuda:
            return gpu.holds(tensor)
        if func.__self__ is torch.Tensor.device and real_device(tensor) == CPU:
            return GPU if gpu.holds(tensor) else CPU
        return func(tensor)

    def move(self, func, args: tuple, kwargs: dict) -> torch.Tensor:
        """`to`, `cuda` and `cpu`, with a copy where the place differs."""
        global moving
        tensor, place, dtype = args[0], {"cuda": "cuda", "cpu": "cpu"}.get(func.__name__), kwargs.get("dtype")
        for given in (*args[1:], kwargs.get("device"), kwargs.get("other")):
            if isinstance(given, torch.Tensor):
                place, dtype = ("cuda" if gpu.holds(given) else is_on(real_device(given))), given.dtype
            elif isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, (str, torch.device)) or type(given) is int:
                place = is_on(given)
        if place not in ("cuda", "cpu") or real_device(tensor) != CPU:
            return func(*args, **kwargs)
        dtype, before = dtype or tensor.dtype, "cuda" if gpu.holds(tensor) else "cpu"
        if place == before:
            return torch.Tensor.to(tensor, dtype, copy=kwargs.get("copy", False))
        record("copy", f"to {place}", tensor.nbytes)
        moving = place
        try:
            result = torch.Tensor.to(tensor, dtype, copy=True)
        finally:
            moving = None
        (gpu.add if place == "cuda" else gpu.remove)(result)
        return result


def also_in_backward() -> None:
    """Have hooks and backward functions run under `Calls`, which autograd's own thread state leaves out."""

    def under_calls(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            with contextlib.nullcontext() if torch.overrides._get_current_function_mode() else Calls():
                return function(*args, **kwargs)

        return run

    backward = torch.autograd.function.BackwardCFunction
    backward.apply = under_calls(backward.apply)
    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        register = getattr(torch.Tensor, name)
        setattr(torch.Tensor, name, lambda self, hook, register=register: register(self, under_calls(hook)))
    hooks = torch.autograd.graph.saved_tensors_hooks
    init = hooks.__init__
    hooks.__init__ = lambda self, pack, unpack: init(self, under_calls(pack), under_calls(unpack))


def watch_collectives() -> None:
    def watched(name: str, collective):
        @functools.wraps(collective)
        def run(*args, **kwargs):
            for tensor in tensors_in((args, kwargs)):
                if not gpu.holds(tensor):
                    record("collective", f"{name} of a CPU tensor {tuple(tensor.shape)}")
            return collective(*args, **kwargs)

        return run

    for name in COLLECTIVES:
        setattr(torch.distributed, name, watched(name, getattr(torch.distributed, name)))


def pretend() -> None:
    """Have Transformers, Accelerate and DeepSpeed find one GPU."""
    from accelerate.state import PartialState
    from deepspeed.accelerator import get_accelerator
    from transformers import TrainingArguments

    find = TrainingArguments.__dict__["_setup_devices"].func

    def found(self) -> torch.device:
        find(self)
        PartialState._shared_state["device"] = GPU
        return GPU

    TrainingArguments._setup_devices = property(found)
    accelerator = type(get_accelerator())
    accelerator.device_name = lambda self, index=None: "cuda" if index is None else f"cuda:{index}"
    accelerator.current_device_name = lambda self: str(GPU)
    accelerator.device = lambda self, index=None: contextlib.nullcontext()
    accelerator.on_accelerator = lambda self, tensor: gpu.holds(tensor)
    for kind, dtype in (("Float", torch.float), ("Double", torch.double), ("BFloat16", torch.bfloat16)):
        make = functools.partial(torch.tensor, dtype=dtype, device=GPU)
        setattr(accelerator, f"{kind}Tensor", property(lambda self, make=make: make))
    torch.cuda.get_device_name = lambda *_: "simulated GPU"
    start = torch.autocast.__init__
    torch.autocast.__init__ = lambda self, device_type, *args, **kwargs: start(self, "cpu", *args, **kwargs)


def name_phases() -> None:
    import run_uie_lora
    from uie_trainer_lora import UIETrainer

    def announce(owner, method: str, name) -> None:
        function = getattr(owner, method)

        @functools.wraps(function)
        def run(*args, **kwargs):
            global phase
            phase = name(*args)
            return function(*args, **kwargs)

        setattr(owner, method, run)

    announce(UIETrainer, "training_step", lambda trainer, *_: f"step {trainer.state.global_step}")
    announce(UIETrainer, "evaluation_loop", lambda *_: "evaluation")
    announce(run_uie_lora, "save_task", lambda *_: "the task's end")
    announce(run_uie_lora, "run", lambda *_: "set-up")


def main() -> int:
    path, script, *words = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
    pretend()
    name_phases()
    watch_collectives()
    also_in_backward()
    status = 0
    try:
        with Operations(), Calls():
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    rank = int(os.environ.get("RANK", 0))
    events = [[*key, count, size[key]] for key, count in times.items()]
    Path(f"{path}.{rank}" if rank else path).write_text(json.dumps(events, indent=0))
    return status


if __name__ == "__main__":
    sys.exit(main())
