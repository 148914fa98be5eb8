"""LLaMA with a training loss that computes logits only for the tokens to predict."""

from transformers import LlamaForCausalLM

from model.answer_loss import AnswerLoss


class LlamaForCausalLM_with_lossmask(AnswerLoss, LlamaForCausalLM):
    """`LlamaForCausalLM` with the same loss for less memory, see `AnswerLoss`."""
