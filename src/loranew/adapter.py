"""LoRA with memory on a model: add it, fold what a task has learned into it, load what earlier tasks saved."""

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from torch import nn

from errors import InputError
from files import check_values, read_object, read_tensors
from loranew.layer import LoraNewConfig, LoraNewLinear
from module_matching import check_linear, check_rank

# The `peft_type` of adapters that PEFT would otherwise load in part without noticing: PEFT stops and prints it.
PEFT_TYPE = "LORA that PEFT cannot load completely, see README.md"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def add_loranew(model: nn.Module, config: LoraNewConfig) -> PeftModel:
    """Add the four factors to each module that `config.target_modules` matches; only `loranew_` factors train.

    Raises InputError where the pattern matches nothing or a module that is not linear, or r is above a matrix's rank.
    """
    try:
        targets = {name: module for name, module in model.named_modules()
                   if name and check_target_module_exists(config, name)}  # fmt: skip
    except (re.error, TypeError) as error:
        raise InputError(f"target_modules: {config.target_modules!r} is not a regular expression ({error})") from None
    check_linear(model, targets, f"target_modules: {config.target_modules!r}")
    check_rank(targets, config.r, "r")
    # By name, as PEFT widens an expression to all layers of a mixture of experts, and renames what is an expert's.
    expression, config.target_modules = config.target_modules, list(targets)
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:  # a part of an expert's weights
        raise InputError(f"target_modules: {expression!r}: {error}") from None
    if found := loranew_layers(peft_model).keys() ^ targets.keys():
        raise InputError(f"target_modules: {expression!r} matches {min(found)}, which PEFT takes for an expert; "
                         "allowed: layers outside the experts")
    peft_model.peft_config[peft_model.active_adapter].target_modules = expression
    return peft_model


def load_loranew(model: nn.Module, folder: str | Path, *, trainable: bool = True) -> PeftModel:
    """Add the adapter in `folder` to `model`: ours, O-LoRA's (with `r_sum`), or a plain LoRA (all of it is memory).

    Stored `lora_` factors become the frozen memory, in float32. `loranew_` factors are loaded if they are stored and
    fresh otherwise. With `trainable` false nothing requires gradients. Raises InputError as `read_config` and
    `read_factors` do, and where the tensors do not fit `adapter_config.json` and the model.
    """
    folder = Path(folder)
    config, tensors, path = read_config(folder), read_factors(folder), folder / WEIGHTS_FILE
    for name, tensor in tensors.items():  # before factors of r_sum rows are allocated
        found, needed = tuple(tensor.shape), (config.r_sum, *tensor.shape[1:])
        if name.endswith(".lora_A.weight") and found != needed:
            raise InputError(f"{path}: {name} is {found}, {needed} is needed by r_sum in {CONFIG_FILE}")
    config.inference_mode = not trainable
    # The name in the file may be outdated: the base may have moved since.
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    try:
        peft_model = add_loranew(model, config)
    except (InputError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # PEFT's, PyTorch's
        raise InputError(f"{folder / CONFIG_FILE}: does not fit the base model: {error}") from None
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    # PEFT also stores embeddings that have grown.
    expected |= {name: tensor for name, tensor in peft_model.state_dict().items() if name in tensors}
    _check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in expected.items()}, path)
    set_peft_model_state_dict(peft_model, tensors)
    return peft_model


def fold_loranew(peft_model: PeftModel) -> None:
    """Fold the new factors into the memory: r_sum grows by r, and the model computes the same function.

    The layers then have no new factors until `renew` is called, and `save_pretrained` writes the memory alone
    (`lora_A`, `lora_B`), as in published adapters. With `save_loranew` in the config the two pairs stay separate.
    """
    name = peft_model.active_adapter
    config = peft_model.peft_config[name]
    if config.save_loranew:
        return
    for layer in loranew_layers(peft_model).values():
        layer.fold(name)
    config.r_sum += config.r


@torch.no_grad()
def folded_factors(
    peft_model: PeftModel, read: Callable[[nn.Parameter], torch.Tensor] = lambda factor: factor
) -> dict[str, torch.Tensor]:
    """The factors that would be saved after `fold_loranew`, on the CPU; the model does not change.

    `read` gives a factor's complete value, for models that do not hold it (ZeRO) or hold it only in 16 bits.
    """
    adapter, tensors = peft_model.active_adapter, {}
    for name, layer in loranew_layers(peft_model).items():
        for key, factor in zip(("lora_A", "lora_B"), layer.folded(adapter, read)):
            tensors[f"base_model.model.{name}.{key}.weight"] = factor.to("cpu", copy=True)
    return tensors


def save_folded(peft_model: PeftModel, factors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `folded_factors` as `save_pretrained` would write them after folding."""
    config = copy.copy(peft_model.peft_config[peft_model.active_adapter])
    config.r_sum += config.r
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(factors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def set_input_space(peft_model: PeftModel, spaces: Mapping[str, torch.Tensor | None]) -> None:
    """Keep the new pair's change of W orthogonal to S (in, c), for layers named as in `loranew_layers`.

    S has orthonormal columns and is not saved with the adapter; None removes it.
    """
    layers = loranew_layers(peft_model)
    for name, S in spaces.items():
        layers[name].loranew_A[peft_model.active_adapter].space = None if S is None else S.float()


def loranew_layers(peft_model: PeftModel) -> dict[str, LoraNewLinear]:
    """The layers that the active adapter changes, by their names in the base model."""
    base, adapter = peft_model.get_base_model(), peft_model.active_adapter
    return {name: module for name, module in base.named_modules()
            if isinstance(module, LoraNewLinear) and adapter in module.scaling}  # fmt: skip


def read_config(folder: Path) -> LoraNewConfig:
    """The configuration in an adapter folder; InputError where it is missing or describes no supported adapter."""
    path = folder / CONFIG_FILE
    content = read_object(path)
    if str(kind := content.get("peft_type")).partition(" ")[0] != "LORA":
        raise InputError(f"{path}: found peft_type {kind}; allowed: LORA")
    if missing := {"r", "target_modules"} - content.keys():
        raise InputError(f"{path}: has no {min(missing)!r}")
    try:
        return LoraNewConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def read_factors(folder: Path) -> dict[str, torch.Tensor]:
    """The factors in an adapter folder, by name; InputError where the file is missing, damaged or a pickle."""
    path, pickle = folder / WEIGHTS_FILE, folder / "adapter_model.bin"
    if pickle.is_file() and not path.is_file():
        raise InputError(
            f"{pickle}: a pickle, which is not loaded; convert it once, if you trust its source: "
            'python -c "import torch, safetensors.torch as s; s.save_file('
            f"torch.load('{pickle}', map_location='cpu', weights_only=True), '{path}')\""
        )
    tensors, _ = read_tensors(path)
    # O-LoRA may store empty factors for its first memory (r_sum = 0); here such a layer has none.
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


def _check_tensors(found: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]], path: Path) -> None:
    """Check that exactly the expected tensors are found, in their shapes; all new factors may be absent."""
    if not any(".loranew_" in name for name in found):
        expected = {name: shape for name, shape in expected.items() if ".loranew_" not in name}
    hint = f"{CONFIG_FILE} (r, r_sum, target_modules) and the base model must be those it was trained with"
    for name in sorted(expected.keys() - found.keys()):
        raise InputError(f"{path}: {name} is missing, {expected[name]} is needed; {hint}")
    for name in sorted(found.keys() - expected.keys()):
        raise InputError(f"{path}: found {name}, which the model does not have; {hint}")
    for name, tensor in found.items():
        if tuple(tensor.shape) != expected[name]:
            raise InputError(f"{path}: {name} is {tuple(tensor.shape)}, {expected[name]} is needed; {hint}")
        check_values(name, tensor, path)
