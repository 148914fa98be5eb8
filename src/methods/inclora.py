"""IncLoRA: a new LoRA for each task, and nothing that keeps it from disturbing the old ones."""

from methods.base import Method


class Inclora(Method):
    """The base method as it stands."""
