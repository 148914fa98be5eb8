"""Published results to compare with, read in secondary summaries, not in the papers' own tables."""

RESULTS = (
    ("T5-large", "1-3", "O-LoRA", 75.8, None),
    ("T5-large", "1-3", "MIGU", 76.6, None),
    ("T5-large", "1-3", "N-LoRA", 78.8, None),
    ("T5-large", "1-3", "GORP", 79.8, None),
    ("T5-large", "1-3", "multi-task", 80.0, None),
    ("T5-large", "4-6", "O-LoRA", 69.6, None),
    ("T5-large", "4-6", "MIGU", 70.0, None),
    ("T5-large", "4-6", "N-LoRA", 72.4, None),
    ("T5-large", "4-6", "GORP", 76.0, None),
    ("LLaMA-2-7B", "1-3", "O-LoRA", 76.1, -7.8),
    ("LLaMA-2-7B", "1-3", "N-LoRA", 77.6, -4.9),
    ("LLaMA-2-7B", "1-3", "GORP", 78.6, -0.8),
)
"""Model, orders, method, average performance and, where given, backward transfer: means over the orders."""

SIZES = {"T5-large": 737.7e6, "LLaMA-2-7B": 6738.4e6}
"""Their parameters."""
