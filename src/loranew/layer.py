"""The configuration and the linear layer of LoRA with memory (O-LoRA, Wang et al., EMNLP Findings 2023, section 3).

    y = W x + s B_old A_old x + s B_new (A_new - A_new S S^T) dropout(x),      s = lora_alpha / r

`lora_A` (r_sum, in) and `lora_B` (out, r_sum) stack the factors of all earlier tasks and are frozen; `loranew_A`
(r, in) and `loranew_B` (out, r) train. A layer without earlier tasks (r_sum = 0) has no `lora_` factors. With an input
space S (in, c) the new pair's change of W is orthogonal to S.

`merge_old` adds s B_old A_old to W, so that a pass costs the same after any number of tasks. The factors stay: they are
saved, and penalties compare the new ones with them.
"""

import dataclasses
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn.functional import linear
from transformers.hf_argparser import HfArg

logger = logging.getLogger("gorp")

# LoRA's options that LoraNewLinear does not support.
_FIXED_OPTIONS = (
    "alpha_pattern", "bias", "layer_replication", "lora_bias", "megatron_config", "modules_to_save", "rank_pattern",
    "target_parameters", "trainable_token_indices", "use_qalora", "use_rslora",
)  # fmt: skip


@dataclass
class LoraNewConfig(LoraConfig):
    """A `LoraConfig` with the total rank of earlier tasks; ValueError for unsupported options such as DoRA."""

    r_sum: int = HfArg(default=0, help="Rows of lora_A: the ranks of all folded tasks together.")
    save_loranew: bool = HfArg(default=False, help="Keep new and old factors separate: fold_loranew does nothing.")

    def __post_init__(self):
        super().__post_init__()
        for name, kinds, least in (("r", int, 1), ("r_sum", int, 0), ("lora_alpha", (int, float), 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
                raise ValueError(f"{name}: found {value!r}; allowed: a number of at least {least}")
        plain, options = LoraConfig(), dataclasses.fields(LoraConfig)
        variants = [option.name for option in options if option.metadata.get("is_lora_variant")]
        for name in (*_FIXED_OPTIONS, *variants):
            if getattr(self, name) not in (getattr(plain, name), None, []):  # PEFT sets one to [] for experts
                raise ValueError(f"{name}: found {getattr(self, name)!r}; allowed: only {getattr(plain, name)!r}")
        # Other initialisations also change W, which is not part of an adapter.
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(f"init_lora_weights: found {self.init_lora_weights!r}; allowed: only true")
        self._register_custom_module({nn.Linear: LoraNewLinear})

    @classmethod
    def from_peft_type(cls, **kwargs) -> "LoraNewConfig":
        """The configuration that `adapter_config.json` describes; `from_pretrained` calls this with its content.

        A file without `r_sum` comes from plain LoRA: all its ranks are memory. Unknown keys are ignored.
        """
        known = inspect.signature(cls).parameters
        unknown = sorted(key for key, value in kwargs.items() if key not in known and value)
        if unknown:
            logger.warning("adapter_config.json: unknown options are ignored: %s", ", ".join(unknown))
        return cls(**{"r_sum": kwargs.get("r", cls.r)} | {key: kwargs[key] for key in kwargs if key in known})


class LoraNewLinear(nn.Module, LoraLayer):
    """A linear layer with the four factors; PEFT creates one wherever `LoraNewConfig.target_modules` matches."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "loranew_A", "loranew_B")

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: LoraNewConfig, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.loranew_A = nn.ModuleDict()
        self.loranew_B = nn.ModuleDict()
        self.shared_dropout = False  # whether dropout also acts on the old pair, with the new one's mask, as in O-LoRA
        self.ranks_in_weight: dict[str, int] = {}  # by adapter: how many leading ranks of the old pair W contains
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, kwargs["r"], kwargs["lora_alpha"], config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraNewConfig, **kwargs) -> None:
        """Add an adapter: empty memory of rank `config.r_sum` (filled by loading), and a fresh new pair of rank r."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: ("lora_A", "lora_B")}
        if config.r_sum:
            self.lora_A[adapter_name] = _linear(torch.zeros(config.r_sum, self.in_features))
            self.lora_B[adapter_name] = _linear(torch.zeros(self.out_features, config.r_sum))
        self.renew(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """x (..., in) to y (..., out), by the equation at the head of this file."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        change = 0
        for adapter in self.active_adapters:
            if adapter not in self.scaling:  # an adapter of other layers
                continue
            seen = x.to((self.loranew_A if adapter in self.loranew_A else self.lora_A)[adapter].weight.dtype)
            dropped = self.lora_dropout[adapter](seen)
            if self.has_old_branch(adapter):
                # Without dropout by default: it would only add noise to what earlier tasks have learned.
                old = self._old_change(adapter, dropped if self.shared_dropout else seen)
                change = change + self.scaling[adapter] * old
            if adapter in self.loranew_A:
                change = change + self.scaling[adapter] * self.loranew_B[adapter](self.loranew_A[adapter](dropped))
        return (result + change).to(result.dtype)

    @torch.no_grad()
    def merge_old(self, adapter: str) -> None:
        """Add the part of the old pair that W does not contain yet to W; the function stays the same up to rounding.

        W must be complete and in float32, as in 16 bits most of the small change would be lost.
        """
        if self.has_old_branch(adapter):
            A, B = self._old_branch(adapter)
            weight = self.get_base_layer().weight
            weight += self.scaling[adapter] * (B @ A)
            self.ranks_in_weight[adapter] = len(self.lora_A[adapter].weight)

    def has_old_branch(self, adapter: str) -> bool:
        """Whether earlier tasks have ranks that W does not contain."""
        return adapter in self.lora_A and self.lora_A[adapter].out_features > self.ranks_in_weight.get(adapter, 0)

    def _old_change(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """B A x over the ranks of earlier tasks that W does not contain."""
        if adapter not in self.ranks_in_weight:
            return self.lora_B[adapter](self.lora_A[adapter](x))  # as modules, whose weights ZeRO-3 gathers
        A, B = self._old_branch(adapter)
        return linear(linear(x, A), B)

    def _old_branch(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (ranks, in) and B (out, ranks) of the earlier tasks that W does not contain."""
        first = self.ranks_in_weight.get(adapter, 0)
        return self.lora_A[adapter].weight[first:], self.lora_B[adapter].weight[:, first:]

    @torch.no_grad()
    def fold(self, adapter: str) -> None:
        """Append the new pair to the old one, as `folded` does; after that there is no new pair until `renew`."""
        if self.merged:
            raise ValueError("the adapter is merged into the weight; unmerge it before folding")
        A, B = self.folded(adapter)
        self.lora_A[adapter], self.lora_B[adapter] = _linear(A), _linear(B)
        del self.loranew_A[adapter], self.loranew_B[adapter]

    def folded(self, adapter: str, read: Callable[[nn.Parameter], torch.Tensor] = lambda factor: factor):
        """A = [A_old; A_new - A_new S S^T] (r_sum + r, in), B = [B_old, B_new] (out, r_sum + r), read by `read`."""
        new_A = self.loranew_A[adapter]
        rows, columns = [new_A.effective(read(new_A.weight))], [read(self.loranew_B[adapter].weight)]
        if adapter in self.lora_A:
            rows.insert(0, read(self.lora_A[adapter].weight))
            columns.insert(0, read(self.lora_B[adapter].weight))
        return torch.cat(rows), torch.cat(columns, dim=1)

    def renew(self, adapter: str) -> None:
        """Make a fresh pair: A is Kaiming-uniform, as in nn.Linear, and B is zero."""
        like = self.lora_A[adapter].weight if adapter in self.lora_A else torch.empty(0)
        A = nn.init.kaiming_uniform_(like.new_empty(self.r[adapter], self.in_features), a=math.sqrt(5))
        self.loranew_A[adapter] = _linear(A, trainable=True, kind=InputProjected)
        self.loranew_B[adapter] = _linear(like.new_zeros(self.out_features, self.r[adapter]), trainable=True)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The adapter's change of W (out, in), both branches together."""
        delta = torch.zeros_like(self.get_base_layer().weight, dtype=torch.float32)
        if self.has_old_branch(adapter):
            A, B = self._old_branch(adapter)
            delta += B.float() @ A.float()
        if adapter in self.loranew_A:
            delta += self.loranew_B[adapter].weight.float() @ self.loranew_A[adapter].effective().float()
        return self.scaling[adapter] * delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change of the named adapters (by default the active ones) to W; with `safe_merge` only if finite."""
        weight = self.get_base_layer().weight
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.scaling:
                continue
            merged = weight + self.get_delta_weight(adapter).to(weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"merging adapter {adapter} would make weights that are not finite")
            weight.copy_(merged)
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged adapters from W."""
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            weight -= self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)


class InputProjected(nn.Linear):
    """`loranew_A`: maps x (..., in) to (A - A S S^T) x (..., r) with an input space S (in, c), to A x without one.

    S acts on A, not on x, so that its cost does not grow with the number of tokens, and in float32 whatever the
    model's precision.
    """

    # A plain attribute: a buffer would be cast with the model.
    space: torch.Tensor | None = None

    def effective(self, A: torch.Tensor | None = None) -> torch.Tensor:
        """A - A S S^T (r, in), in float32 where there is an S; A is the weight by default."""
        A = self.weight if A is None else A
        if self.space is None:
            return A
        self.space = self.space.to(A.device)  # copies only once, when the layer has moved
        with torch.autocast(A.device.type, enabled=False):
            A = A.float()
            if self.space.shape[0] == self.space.shape[1]:  # Adam would turn rounding noise into full steps
                return A * 0
            return A - (A @ self.space) @ self.space.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) to (A - A S S^T) x (..., r), multiplied in x's dtype."""
        return linear(x, self.effective().to(x.dtype))


def _linear(weight: torch.Tensor, trainable: bool = False, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A bias-free linear layer (as PEFT keeps factors) around `weight` (out, in)."""
    layer = kind(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=trainable)
    return layer
