"""ComfyUI as a library in this process, on the CPU without CUDA, and the pack in it under the name `kinoloom`."""

import importlib.util
import os
import sys
from pathlib import Path

import torch

PACK = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_DIR") or PACK / ".runtime" / "ComfyUI").resolve()


def start_comfyui(base: Path) -> None:
    """Make ComfyUI importable, its options parsed as for `main.py --base-directory base`."""
    shadowing = {str(PACK), ""}  # the pack's folder `nodes` must not pass for ComfyUI's module `nodes`
    sys.path[:] = [str(COMFYUI), *(entry for entry in sys.path if entry not in shadowing)]
    arguments = sys.argv
    sys.argv = [arguments[0], "--base-directory", str(base), *([] if torch.cuda.is_available() else ["--cpu"])]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401
    finally:
        sys.argv = arguments


def register_pack() -> None:
    """Name the repository's root `kinoloom` without running its __init__.py, which needs a server."""
    register("kinoloom", PACK)


def register(name: str, folder: Path) -> None:
    """Name a package in `folder` without running its __init__.py, unless it is named already."""
    if name in sys.modules:
        return
    path, places = folder / "__init__.py", [str(folder)]
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=places)
    sys.modules[name] = importlib.util.module_from_spec(spec)
