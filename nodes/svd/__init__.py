"""Nodes for Stable Video Diffusion's model files."""
