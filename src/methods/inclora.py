"""IncLoRA: a new LoRA for each task, and nothing that keeps it from disturbing the old ones."""

from methods.base import LoraMethod
from methods.base_options import LoraOptimizerArguments


class Inclora(LoraMethod):
    """The base method as it stands."""

    Arguments = LoraOptimizerArguments
