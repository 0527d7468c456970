"""Stable Video Diffusion: model files."""
