"""SeqLoRA: one LoRA that every task of the order trains further, the plainest way to learn in sequence."""

from methods.base import LoraMethod
from methods.base_options import LoraOptimizerArguments


class Seqlora(LoraMethod):
    """The new LoRA never joins a memory; the next task continues to train it."""

    Arguments = LoraOptimizerArguments
    zero_stage = 2  # at stage 3 `end_task` gathers only a folded memory

    def __init__(self, options):
        super().__init__(options)
        self.idle = {"merge_old"} if options.merge_old else set()  # no LoRA of earlier tasks beside the one that trains

    def lora_config(self, decoder_only: bool):
        config = super().lora_config(decoder_only)
        config.save_loranew = True
        return config
