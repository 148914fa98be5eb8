"""Export a finished task as a plain Hugging Face model or a plain PEFT LoRA adapter.

    python src/export.py logs_and_outputs/order_1/outputs/4-agnews --to exported
    python src/export.py logs_and_outputs/order_1/outputs/4-agnews --to exported --as adapter

The model has LoRA and full-rank weights merged into the base, and needs nothing from this project. The adapter belongs
to the base model it was trained on; it exists only where no full-rank weight has changed.
"""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer

import full_rank
from errors import InputError, entry_point
from files import atomic_folder, check_writable, read_json, write_json
from loranew import load_loranew
from loranew.adapter import CONFIG_FILE, WEIGHTS_FILE, read_config, read_factors
from model.loading import LoadedModel, cast_parameters, load_model_and_tokenizer
from prompts import PROMPTS, read_prompts


DTYPES = ("float32", "bfloat16", "float16")


@entry_point
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a task's output folder, or the adapter folder in it")
    parser.add_argument("--to", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--as", dest="form", choices=["model", "adapter"], default="model", help="what to write")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of a model's weights (float32)")
    options = parser.parse_args(arguments)
    adapter = adapter_folder(options.run)
    if options.to.exists():
        raise InputError(f"--to: {options.to} exists already; allowed: a new folder")
    check_writable(options.to.parent)
    if options.form == "adapter" and options.dtype:
        raise InputError("--dtype: an adapter keeps the precision of its factors; allowed: only with --as model")
    with atomic_folder(options.to) as partial:
        if options.form == "model":
            write_model(adapter, partial, getattr(torch, options.dtype or "float32"))
        else:
            write_adapter(adapter, partial)
        if (adapter / PROMPTS).exists():  # a method in a loop of one's own saves none
            shutil.copy(adapter / PROMPTS, partial)
    print(f"{options.form} written to {options.to}")


def adapter_folder(run: Path) -> Path:
    """The adapter folder that `run` is or contains; InputError unless there is exactly one."""
    if (run / CONFIG_FILE).is_file():
        return run
    found = sorted(path.parent for path in run.glob(f"[!.]*/{CONFIG_FILE}"))  # a leading dot marks an incomplete folder
    if len(found) != 1:
        raise InputError(f"{run}: found {len(found)} folders with {CONFIG_FILE}; allowed: exactly one")
    return found[0]


def load_finished(run: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, LoadedModel]:
    """Load what a task saved or `export.py` wrote: its folder, and base, LoRA and full-rank changes merged in float32,
    then in `dtype`.

    Raises InputError where the base model is missing, or a file is damaged or does not fit it.
    """
    folder = run if (run / "config.json").is_file() else adapter_folder(run)
    own_tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    # The run's length, as positions may have grown for it; 1 keeps their number.
    length = read_prompts(folder)["max_source_length"] if (folder / PROMPTS).exists() else 1
    loaded = load_model_and_tokenizer(str(folder), tokenizer_name=own_tokenizer, max_source_length=length)
    full_rank.load_weights(loaded.model, folder)
    if (folder / WEIGHTS_FILE).exists():
        merged = load_loranew(loaded.model, folder, trainable=False).merge_and_unload()
        loaded = dataclasses.replace(loaded, model=merged)
    cast_parameters(loaded.model, dtype)
    loaded.model.eval()
    return folder, loaded


def write_model(adapter: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write base, LoRA and full-rank changes as one model with its tokenizer. Raises as `load_finished` does."""
    _, loaded = load_finished(adapter, dtype)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def write_adapter(adapter: Path, folder: Path) -> None:
    """Write the LoRA of all tasks as one plain LoRA of their summed rank, with the same scale.

    Raises InputError where full-rank weights have changed, which a LoRA cannot hold.
    """
    if (adapter / full_rank.FILE_NAME).exists():
        raise InputError(f"--as adapter: {adapter} holds changed full-rank weights; allowed: --as model")
    config, factors = read_config(adapter), plain_factors(read_factors(adapter))
    rank = len(next(tensor for name, tensor in factors.items() if ".lora_A." in name))
    plain = LoraConfig(
        r=rank,
        lora_alpha=config.lora_alpha / config.r * rank,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    plain.save_pretrained(folder)
    stored, own = read_json(adapter / CONFIG_FILE), read_json(folder / CONFIG_FILE)
    origin = {name: stored[name] for name in ("revision", "config_name") if stored.get(name)}
    write_json(folder / CONFIG_FILE, own | origin, indent=2)
    if (adapter / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(adapter, trust_remote_code=False).save_pretrained(folder)
    save_file(factors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def plain_factors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join each layer's old and new factors along the rank: `lora_A` (rank, in) and `lora_B` (out, rank)."""
    joined = {}
    for kind, dim in (("A", 0), ("B", 1)):
        old, new = f".lora_{kind}.", f".loranew_{kind}."
        for layer in dict.fromkeys(name.replace(new, old) for name in tensors if old in name or new in name):
            parts = [tensors[name] for name in (layer, layer.replace(old, new)) if name in tensors]
            joined[layer] = torch.cat(parts, dim).contiguous()
    return joined


if __name__ == "__main__":
    sys.exit(main())
