"""Flow-matching video models."""
