"""Find the linear layers of a model that regular expressions name, and check that they suit their purpose.

All raise InputError; `where` begins its message: the flag or argument that named the layers, such as `--lora_modules`.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from errors import InputError


def match_linear(model: nn.Module, patterns: Iterable[str], where: str) -> dict[str, nn.Linear]:
    """The linear layers of `model` whose complete names match one of the regular expressions, by name.

    Each pattern must match something, only linear layers, and no weight that is shared with another module.
    """
    matched: dict[str, nn.Linear] = {}
    for pattern in patterns:
        expression = _compiled(pattern, where)
        found = {name: module for name, module in model.named_modules() if expression.fullmatch(name)}
        check_linear(model, found, f"{where}: '{pattern}'")
        matched.update(found)
    check_unshared(model, matched, where)
    return matched


def match_names(names: Iterable[str], pattern: str | None, where: str, ending: str = "") -> list[str]:
    """The names of LoRA factors that a regular expression matches completely; none without a pattern.

    It must match something, and only names with the `ending`.
    """
    if not pattern:
        return []
    names = list(names)
    matched = list(filter(_compiled(pattern, where).fullmatch, names))
    if not matched:
        raise InputError(f"{where}: '{pattern}' matches no factor; factors are called {names[0]} ...")
    if others := [name for name in matched if not name.endswith(ending)]:
        kind = ending.removeprefix(".").removesuffix(".weight")
        raise InputError(f"{where}: '{pattern}' matches {others[0]}; with --space_from inputs, or --protect "
                         f"structural or step, only {kind} factors can be protected")  # fmt: skip
    return matched


def _compiled(pattern: str, where: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{where}: '{pattern}' is not a regular expression ({error})") from None


def check_linear(model: nn.Module, matched: Mapping[str, nn.Module], where: str) -> None:
    """Reject an empty match, and a module that is not linear."""
    if not matched:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        known = f"linear layers are called {names[0]} ... {names[-1]}" if names else "the model has no linear layer"
        raise InputError(f"{where} matches no module; {known}")
    for name, module in matched.items():
        if not isinstance(module, nn.Linear):
            raise InputError(f"{where} matches {name}, a {type(module).__name__}; allowed: only linear layers")


def check_unshared(model: nn.Module, layers: Mapping[str, nn.Linear], where: str) -> None:
    """Reject a weight shared with another module, which would train as well."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        names = owners[id(layer.weight)]
        if len(names) > 1:
            raise InputError(f"{where}: the weight of {name} is shared ({', '.join(names)}); allowed: unshared weights")


def holds_small_changes(layer: nn.Linear) -> bool:
    """Whether the weight has 32 bits or more; in 16, most of a small change would be lost."""
    return layer.weight.dtype in (torch.float32, torch.float64)


def check_float32(layers: Mapping[str, nn.Linear], where: str) -> None:
    """Reject weights in fewer than 32 bits."""
    for name, layer in layers.items():
        if not holds_small_changes(layer):
            raise InputError(f"{where}: the weight of {name} changes and is in {layer.weight.dtype}; allowed: float32, "
                             "as when the model is loaded with dtype=\"float32\"")


def check_rank(layers: Mapping[str, nn.Linear], rank: int, where: str) -> None:
    """Reject a rank above the smaller side of a weight."""
    for name, layer in layers.items():
        out, inp = layer.out_features, layer.in_features  # a weight in 4 bits has another shape
        if rank > min(out, inp):
            raise InputError(f"{where}: found {rank}; allowed: at most {min(out, inp)} for {name}, a {out} x {inp} "
                             "matrix")
