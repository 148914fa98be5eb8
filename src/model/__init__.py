"""The base models: which class a checkpoint gets, and LLaMA's with the cheaper loss."""

from model.llama import LlamaForCausalLM_with_lossmask
from model.loading import LoadedModel, load_model_and_tokenizer

__all__ = ["LlamaForCausalLM_with_lossmask", "LoadedModel", "load_model_and_tokenizer"]
