"""Base models: loading, and LLaMA with a cheaper loss."""
