"""IncLoRA: a new LoRA for each task, and nothing that keeps it from disturbing the old ones."""

from dataclasses import dataclass

from methods.base import LoraMethod
from methods.base_options import LoraArguments, OptimizerArguments


@dataclass
class IncloraArguments(OptimizerArguments, LoraArguments):
    pass


class Inclora(LoraMethod):
    """The base method as it stands."""

    Arguments = IncloraArguments
