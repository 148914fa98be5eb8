"""The full-rank weights: which linear layers a regular expression names, and their values on disk between tasks.

A task trains some weights of the base model themselves (`--optim_target_modules`). The base model on disk
never changes, so their new values travel from task to task in one safetensors file beside the LoRA factors.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from errors import InputError
from files import whole_file

FILE_NAME = "full_rank_weights.safetensors"


def match_linear(model: nn.Module, patterns: Iterable[str], flag: str) -> dict[str, nn.Linear]:
    """Linear layers of `model` whose whole name one of the regular expressions matches, by name.

    Raises:
        InputError: a pattern is no regular expression or matches nothing, a matched module is not linear, or its
            weight is shared with another module (training it would change both).
    """
    matched: dict[str, nn.Linear] = {}
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise InputError(f"--{flag}: '{pattern}' is no regular expression ({error})") from None
        found = {name: module for name, module in model.named_modules() if expression.fullmatch(name)}
        if not found:
            raise InputError(f"--{flag}: '{pattern}' matches no module; {_linear_examples(model)}")
        for name, module in found.items():
            if not isinstance(module, nn.Linear):
                raise InputError(f"--{flag}: '{pattern}' matches {name}, a {type(module).__name__}; only linear layers")
        matched.update(found)
    refuse_shared(model, matched, flag)
    return matched


def check_rank(targets: dict[str, nn.Linear], rank: int, flag: str) -> None:
    """Refuse a rank above the smaller side of a matched weight.

    Raises:
        InputError: naming the first such layer, its shape and the largest rank.
    """
    for name, module in targets.items():
        if rank > min(module.weight.shape):
            out, inp = module.weight.shape
            raise InputError(f"--{flag}: found {rank}; at most {min(out, inp)} for {name}, a {out} x {inp} matrix")


def save_weights(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write weights (each (out, in), in the precision they train in), by module name, to `folder`."""
    tensors = {f"{name}.weight": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    with whole_file(folder / FILE_NAME) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> dict[str, nn.Linear]:
    """Put the saved values into the base model; returns the layers that have changed since the base, by name.

    Raises:
        InputError: the file is damaged, or a layer is absent from the model or has another shape there.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return {}
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged safetensors file ({error})") from None
    modules = dict(model.named_modules())
    layers = {}
    for key, saved in tensors.items():
        name = key.removesuffix(".weight")
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise InputError(f"{path}: holds {key}; the base model has no linear layer of that name")
        if layer.weight.shape != saved.shape:
            raise InputError(
                f"{path}: {key} is {tuple(saved.shape)}; the base model's is {tuple(layer.weight.shape)}"
            )
        check_values(key, saved, path)
        layer.weight.copy_(saved)
        layers[name] = layer
    return layers


def check_values(key: str, tensor: torch.Tensor, path: Path) -> None:
    """Refuse stored values from which nothing can be trained.

    Raises:
        InputError: integers, or values that are not finite.
    """
    if not tensor.is_floating_point():
        raise InputError(f"{path}: {key} holds {tensor.dtype}; floating-point values are needed")
    if not tensor.isfinite().all():
        raise InputError(f"{path}: {key} holds values that are not finite; the task that left it has failed")


def refuse_shared(model: nn.Module, matched: dict[str, nn.Linear], flag: str) -> None:
    """Refuse a weight that another module shares, and that would change with it.

    Raises:
        InputError: naming the weight and all its names.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in matched.items():
        names = owners[id(module.weight)]
        if len(names) > 1:
            raise InputError(f"--{flag}: the weight of {name} is shared ({', '.join(names)}); one module's only")


def _linear_examples(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return f"linear layers are called {names[0]} ... {names[-1]}" if names else "the model has no linear layer"
