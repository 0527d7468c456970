"""Stable Diffusion 1.5 with the motion modules of AnimateDiff."""
