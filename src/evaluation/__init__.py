"""Evaluation: how answers are generated (`generate.py`), and the metrics that belong to a task (`evaluator.py`)."""
