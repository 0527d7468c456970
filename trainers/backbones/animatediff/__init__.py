"""Stable Diffusion 1.5 with AnimateDiff's motion modules."""
