"""No test here needs ComfyUI: of the pack only what does not import it can be imported."""

import sys

from comfy_library import PACK, register

if "kinoloom.nodes" not in sys.modules:  # whose __init__.py imports every node
    register("kinoloom.nodes", PACK / "nodes")
