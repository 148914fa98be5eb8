"""SeqLoRA: one LoRA that every task of the order trains further, the plainest way to learn in sequence."""

from methods.base import LoraMethod


class Seqlora(LoraMethod):
    """The new LoRA never joins a memory; the next task takes it over as it is and goes on training it."""

    zero_stage = 2  # what is gathered from stage 3 is a folded memory

    def lora_config(self, decoder_only: bool):
        config = super().lora_config(decoder_only)
        config.save_loranew = True
        return config
