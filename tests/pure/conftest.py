"""Tests without ComfyUI: only modules of the pack that do not import it can be imported here."""

import sys

from comfy_library import PACK, register

if "kinoloom.nodes" not in sys.modules:  # whose __init__.py imports every node
    register("kinoloom.nodes", PACK / "nodes")
