"""Kinoloom: train video personalisation inside ComfyUI."""

if __package__:
    from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
