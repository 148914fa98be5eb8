"""The full-rank weights on disk between tasks.

A task trains some weights of the base model (`--optim_target_modules`). The base model on disk never changes; the new
values are stored in one safetensors file beside the LoRA factors.
"""

import json
from collections import UserDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from errors import InputError
from files import atomic_file, check_values, open_tensors

FILE_NAME = "full_rank_weights.safetensors"
ROUNDING_SCALE = 2.0**11
"""Kept rounding errors are multiplied by it: unscaled, those of fp16 would fall below its smallest numbers."""


def save_weights(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write weights (out, in), by module name, in float32 to `folder`.

    They are read from `weights` one at a time: safetensors' own writer needs all at once, 5.4 GiB for LLaMA-2-7B.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, weight in weights.items():
        begin, end = end, end + 4 * weight.numel()
        header[f"{name}.weight"] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with atomic_file(folder / FILE_NAME) as partial, open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            values = weight.detach().float().cpu().contiguous().numpy().astype("<f4", copy=False)
            file.write(memoryview(values).cast("B"))  # numpy's tofile would not say that the disk is full


def exact_weight(layer: nn.Linear) -> torch.Tensor:
    """The weight (out, in), with its 16-bit rounding error added back."""
    rounding = getattr(layer, "rounding", None)
    if rounding is None:
        return layer.weight
    return layer.weight.float() + rounding.to(layer.weight.device, torch.float32) / ROUNDING_SCALE


def set_weight(layer: nn.Linear, W: torch.Tensor) -> None:
    """Set a layer's weight to W (out, in), and keep the error of rounding it to 16 bits for `exact_weight`.

    Setting it to its `exact_weight`, as the next load does, changes nothing; so the second pass, as an error that is
    itself rounded to half a unit makes the sum round the other way. In 16 bits W is overwritten.
    """
    W, dtype = W.to(layer.weight.device), layer.weight.dtype
    layer.weight.copy_(W)
    for _ in range(2 if dtype != torch.float32 else 0):
        error = (W - layer.weight).mul_(ROUNDING_SCALE).to(dtype)
        layer.register_buffer("rounding", error, persistent=False)
        W.copy_(layer.weight).add_(error.float(), alpha=1 / ROUNDING_SCALE)
        layer.weight.copy_(W)


class ExactWeights(UserDict):
    """A mapping made of layers by name; reading an entry computes that layer's `exact_weight`."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return exact_weight(self.data[name])


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> dict[str, nn.Linear]:
    """Load the saved weights, if any, into the base model; returns their layers, by name.

    Raises InputError where the file is damaged, or the model lacks a layer or has it in another shape.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return {}
    modules, layers = dict(model.named_modules()), {}
    with open_tensors(path) as file:
        for key in file.keys():
            name, saved = key.removesuffix(".weight"), file.get_tensor(key)
            layer = modules.get(name)
            if not isinstance(layer, nn.Linear):
                raise InputError(f"{path}: holds {key}; the base model has no linear layer of that name")
            if layer.weight.shape != saved.shape:
                raise InputError(f"{path}: {key} is {tuple(saved.shape)}; the base model's is "
                                 f"{tuple(layer.weight.shape)}")
            check_values(key, saved, path)
            set_weight(layer, saved)
            layers[name] = layer
    return layers
