"""What the training scripts share: ComfyUI as a library, the device, progress on stderr."""

import os
import sys

import torch


def start_comfyui() -> None:
    """Make ComfyUI importable from COMFYUI_DIR, without its server."""
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    arguments = sys.argv
    sys.argv = [arguments[0]] if torch.cuda.is_available() else [arguments[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401

    sys.argv = arguments


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def log(text: str) -> None:
    sys.stderr.write(f"{text}\n")
