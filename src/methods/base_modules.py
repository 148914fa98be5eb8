"""Where LoRA and full-rank training go in each type of model, for `--lora_modules auto` and similar flags.

LoRA goes to the queries and values of self-attention, as published. The full-rank weights are those of the published
scripts where a model has them: the queries and values of cross-attention, or the gates of the MLP.
"""

import logging
from collections import Counter

from torch import nn
from transformers.pytorch_utils import Conv1D

from errors import InputError

AUTO = "auto"
ORDINARY = (".*self_attn.(q_proj|v_proj).*", ".*mlp.gate_proj.*")
CHOICES = {  # types of model -> --lora_modules, --optim_target_modules
    "t5 mt5 umt5": (".*SelfAttention.(q|v).*", ".*EncDecAttention.(q|v).*"),
    "bart mbart m2m_100 pegasus": (".*self_attn.(q_proj|v_proj).*", ".*encoder_attn.(q_proj|v_proj).*"),
    "llama qwen2 qwen3 mistral gemma gemma2 gemma3_text olmo2 smollm3 granite": ORDINARY,
    # Queries, keys and values are one matrix, so LoRA trains keys too. The gate and what it multiplies are also one.
    "phi3": (".*self_attn.qkv_proj.*", ".*mlp.gate_up_proj.*"),
    # The experts are one tensor of three dimensions, not linear layers.
    "mixtral qwen3_moe": (ORDINARY[0], ".*self_attn.o_proj.*"),
}
BY_TYPE = {kind: choice for kinds, choice in CHOICES.items() for kind in kinds.split()}

logger = logging.getLogger("gorp")


def choose_modules(options, model: nn.Module) -> None:
    """Replace `auto` in a method's options by what suits the type of `model`, and log what was chosen.

    Raises:
        InputError: `auto` for a type that is not listed; the message lists the model's linear layers.
    """
    kind, lora = model.config.model_type, f"{getattr(options, 'lora_modules', None)}"
    targets = getattr(options, "optim_target_modules", None) or []
    if AUTO in (lora, *targets) and kind not in BY_TYPE:
        names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        counts = Counter(".".join(part for part in name.split(".")[-3:] if not part.isdigit()) for name in names)
        layers = ", ".join(f"{count} x {ending}" for ending, count in counts.items()) or "none"
        if any(isinstance(module, Conv1D) for module in model.modules()):
            layers += " (its other layers are Conv1D, which no method trains)"
        raise InputError("--lora_modules, --optim_target_modules: found auto, which does not know model_type "
                         f"{kind!r}; allowed: regular expressions for complete names of its linear layers, such as "
                         f"'.*ENDING'; their endings: {layers}")
    chosen = {}
    if lora == AUTO:
        chosen["lora_modules"] = BY_TYPE[kind][0]
    if AUTO in targets:
        chosen["optim_target_modules"] = [BY_TYPE[kind][1] if each == AUTO else each for each in targets]
    if getattr(options, "proj_lora_modules", None) == AUTO:
        chosen["proj_lora_modules"] = ".*loranew_A.*"
    vars(options).update(chosen)
    if chosen:
        given = (f"--{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in chosen.items())
        logger.info("chosen for model_type %s: %s", kind, ", ".join(given))
