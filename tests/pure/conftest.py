"""Tests without ComfyUI: only modules of the pack that do not import it can be imported here."""

from comfy_library import PACK, register

register("kinoloom.nodes", PACK / "nodes")  # whose __init__.py imports every node
