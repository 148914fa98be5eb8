"""MagMax (Marczak et al., ECCV 2024, https://arxiv.org/abs/2407.06322): tasks train one after the other, changes merge.

One LoRA trains through all tasks. tau_t = s B_t A_t (out, in) is its total change when task t ends, not that task's
share of it. What is evaluated is W + lambda tau, with tau merged from tau_1 ... tau_t entry by entry:

* `--magmax_merge max`: the value of largest magnitude.
* `--magmax_merge ties` (TIES, Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708): each tau_t keeps the
  largest 20 % of its entries over all layers; the sign of their sum is elected; those that have it are averaged.

Training continues from W and (A_t, B_t). Merging is not linear, so the merged change is not a LoRA: the folder holds
the merged weight as a full-rank weight, beside a LoRA that adds nothing. The factors of all tasks, which give every
tau_t, take less space than the tau_t themselves.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

import full_rank
from errors import check_number
from files import read_tensors
from loranew import loranew_layers
from methods.base_options import LoraArguments
from module_matching import check_float32
from methods.seqlora import Seqlora

TASKS_FILE = "task_factors.safetensors"
TIES_SHARE = 0.2


@dataclass
class MagmaxArguments(LoraArguments):
    magmax_scale: float = HfArg(default=0.5, help="Factor lambda on the merged change.")
    magmax_merge: Literal["max", "ties"] = HfArg(
        default="max", help="Of each entry: its largest value over tasks (max), or TIES."
    )

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "magmax_scale", least=0)

    def changed_base(self):
        return [self.lora_modules]


class Magmax(Seqlora):
    Arguments = MagmaxArguments
    float32_base = True

    def prepare(self, model, previous: Path | None, **kind):
        self.tasks: dict[str, Tensor] = {}  # of each factor, all tasks' (t, rows, columns)
        self.sharded = kind.get("sharded", False)
        self.base: dict[str, Tensor] = {}  # weights before merging; DeepSpeed may train on them in 16 bits
        if previous is not None:
            self.tasks, _ = read_tensors(previous / TASKS_FILE)
        merged = {name.partition(".loranew_")[0] for name in self.tasks}
        for name, module in model.named_modules() if self.trains else ():
            if name in merged and isinstance(module, nn.Linear):
                self.base[name] = module.weight.detach().clone()
        model = super().prepare(model, previous, **kind)
        check_float32({name: layer.get_base_layer() for name, layer in loranew_layers(model).items()},
                      "--method magmax")
        if previous is not None:
            self.check_like_factors(self.tasks, previous / TASKS_FILE)
        return model

    @torch.no_grad()
    def begin_task(self, model, batches):
        for name, layer in loranew_layers(self.model).items():
            weight = layer.get_base_layer().weight
            if name in self.base:
                weight.copy_(self.base.pop(name))
            if self.sharded:
                self.base[name] = weight.to("cpu", copy=True)
        for name, factor in self.factors() if self.tasks else ():
            factor.copy_(self.tasks[name][-1])

    @torch.no_grad()
    def end_task(self):
        super().end_task()
        for name, factor in self.factors():
            kept = self.tasks.get(name, torch.empty(0, *factor.shape))
            self.tasks[name] = torch.cat([kept, factor.float().cpu()[None]])
        layers, adapter = loranew_layers(self.model), self.model.active_adapter
        pairs = {name: list(zip(*(self.tasks[f"{name}.loranew_{kind}.weight"].to(layer.get_base_layer().weight.device)
                                  for kind in "AB"))) for name, layer in layers.items()}  # fmt: skip
        limits = [limit(of_task) for of_task in zip(*pairs.values())] if self.options.magmax_merge == "ties" else None
        for name, layer in layers.items():
            target, scale = layer.get_base_layer(), self.options.magmax_scale * layer.scaling[adapter]
            weight = self.base.pop(name, target.weight).to(target.weight.device)
            merged = largest(pairs[name]) if limits is None else ties(pairs[name], limits)
            full_rank.set_weight(target, weight + scale * merged)
            layer.loranew_B[adapter].weight.zero_()
            self.changed[name] = target

    def save(self, folder: Path):
        super().save(folder)
        save_file(self.tasks, folder / TASKS_FILE)

    def describe(self):
        tasks = len(next(iter(self.tasks.values()), ()))
        return f"{super().describe()}; {tasks} earlier tasks merged so far, by {self.options.magmax_merge}"


def largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """For each entry, the value of largest magnitude in B A (out, in) over the pairs A (r, in), B (out, r)."""
    merged = None
    for A, B in pairs:
        change = B @ A
        merged = change if merged is None else torch.where(change.abs() > merged.abs(), change, merged)
    return merged


def limit(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """A task's limit: a share `TIES_SHARE` of the entries of all its B A has a larger magnitude.

    The pairs are A (r, in) and B (out, r), one for each layer. By bisection, as all B A of a large model at once would
    not fit beside it.
    """
    wanted = TIES_SHARE * sum(len(B) * A.shape[1] for A, B in pairs)
    low, high = 0.0, max((B @ A).abs().max().item() for A, B in pairs)
    for _ in range(30):  # to a billionth of the largest entry
        middle = (low + high) / 2
        if sum(((B @ A).abs() > middle).sum().item() for A, B in pairs) > wanted:
            low = middle
        else:
            high = middle
    return high


def ties(pairs: Sequence[tuple[Tensor, Tensor]], limits: Sequence[float]) -> Tensor:
    """For each entry, the mean over tasks of the B A above the task's limit that have the elected sign, or else 0."""
    def trimmed() -> Iterator[Tensor]:
        for (A, B), least in zip(pairs, limits):
            change = B @ A
            yield change * (change.abs() > least)

    total = sum(trimmed())
    agreeing, count = torch.zeros_like(total), torch.zeros_like(total)
    for change in trimmed():
        agrees = change * total > 0
        agreeing += change * agrees
        count += agrees
    return agreeing / count.clamp_min(1)
