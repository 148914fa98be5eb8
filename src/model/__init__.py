"""Base models: loading, and a cheaper loss for decoder-only models."""
