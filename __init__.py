"""Kinoloom: train video personalisation inside ComfyUI."""

if __package__:
    from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
