"""Metrics beyond exact match and ROUGE, each belonging to a task."""
