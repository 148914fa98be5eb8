"""Evaluation: how answers are generated. Their metrics are in `compute_metrics.py`."""
