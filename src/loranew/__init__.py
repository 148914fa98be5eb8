"""LoRA with memory: a PEFT extension whose layers hold a frozen `lora_` pair of factors and a trained `loranew_` pair.

model = add_loranew(model, LoraNewConfig(r=8, lora_alpha=32, target_modules=r".*SelfAttention.(q|v).*"))
...                                # train: only loranew_A and loranew_B require gradients
fold_loranew(model)                # the trained pair joins the frozen one, r_sum grows by r
model.save_pretrained(folder)      # lora_A, lora_B and adapter_config.json
model = load_loranew(base, folder) # the next task: what was folded is frozen, a fresh pair trains
"""

from loranew.adapter import (
    add_loranew, fold_loranew, folded_factors, load_loranew, loranew_layers, save_folded, set_input_space,
)  # fmt: skip
from loranew.layer import LoraNewConfig, LoraNewLinear

__all__ = [
    "LoraNewConfig", "LoraNewLinear", "add_loranew", "fold_loranew", "folded_factors", "load_loranew", "loranew_layers",
    "save_folded", "set_input_space",
]  # fmt: skip
