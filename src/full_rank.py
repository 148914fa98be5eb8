"""The full-rank weights on disk between tasks.

A task trains some weights of the base model (`--optim_target_modules`). The base model on disk never changes; the new
values are stored in one safetensors file beside the LoRA factors.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from errors import InputError
from files import check_values, read_tensors, whole_file

FILE_NAME = "full_rank_weights.safetensors"
PEFT_TYPE = "LORA with full-rank weights, which README.md explains"
"""Of a LoRA that belongs to these weights: PEFT, which would load it without them, stops with this as the reason."""


def save_weights(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write weights (out, in), by module name and in their training precision, to `folder`."""
    tensors = {f"{name}.weight": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    with whole_file(folder / FILE_NAME) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def exact(layer: nn.Linear) -> torch.Tensor:
    """The weight (out, in), with what 16-bit rounding left out when it was loaded."""
    rounding = getattr(layer, "rounding", None)
    return layer.weight if rounding is None else layer.weight.float() + rounding.to(layer.weight.device)


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> dict[str, nn.Linear]:
    """Load the saved weights, if any, into the base model; returns their layers, by name.

    Raises InputError where the file is damaged, or the model lacks a layer or has it in another shape.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return {}
    modules = dict(model.named_modules())
    layers = {}
    for key, saved in read_tensors(path)[0].items():
        name = key.removesuffix(".weight")
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise InputError(f"{path}: holds {key}; the base model has no linear layer of that name")
        if layer.weight.shape != saved.shape:
            raise InputError(f"{path}: {key} is {tuple(saved.shape)}; the base model's is {tuple(layer.weight.shape)}")
        check_values(key, saved, path)
        layer.weight.copy_(saved)
        if layer.weight.dtype != torch.float32:
            layer.register_buffer("rounding", (saved - layer.weight.float()).to(layer.weight.dtype), persistent=False)
        layers[name] = layer
    return layers
