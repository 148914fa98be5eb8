"""Published results to set beside one's own. They were read in secondary summaries, not in the papers' own tables."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Average performance and, where given, backward transfer: means over some orders."""

    model: str
    orders: str
    method: str
    average_performance: float
    backward_transfer: float | None = None


RESULTS = (
    Published("T5-large", "1-3", "O-LoRA", 75.8),
    Published("T5-large", "1-3", "MIGU", 76.6),
    Published("T5-large", "1-3", "N-LoRA", 78.8),
    Published("T5-large", "1-3", "GORP", 79.8),
    Published("T5-large", "1-3", "multi-task", 80.0),
    Published("T5-large", "4-6", "O-LoRA", 69.6),
    Published("T5-large", "4-6", "MIGU", 70.0),
    Published("T5-large", "4-6", "N-LoRA", 72.4),
    Published("T5-large", "4-6", "GORP", 76.0),
    Published("LLaMA-2-7B", "1-3", "O-LoRA", 76.1, -7.8),
    Published("LLaMA-2-7B", "1-3", "N-LoRA", 77.6, -4.9),
    Published("LLaMA-2-7B", "1-3", "GORP", 78.6, -0.8),
)
