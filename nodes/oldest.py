"""Raises on import if ComfyUI is too old for the pack. It imports only modules that an old ComfyUI has too."""

import re

OLDEST = "0.30"


def is_older(version: str) -> bool:
    """Whether a version is below the oldest one that works. False for a version without numbers, as of some forks."""
    found, needed = ([int(part) for part in re.findall(r"\d+", text)[:2]] for text in (version, OLDEST))
    return bool(found) and found < needed


def refuse_older() -> None:
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        version = "0.3 or older"  # these versions do not have the module
    if is_older(version):
        raise ImportError(f"Kinoloom needs ComfyUI {OLDEST} or newer, but this is ComfyUI {version}: update ComfyUI.")


refuse_older()
