"""Raises when it is imported into a ComfyUI that is too old for the pack. Imports nothing that such a one lacks."""

import re

OLDEST = "0.30"


def is_older(version: str) -> bool:
    """Whether a version is under the oldest one that works; one without numbers, as forks may have, is not."""
    found, needed = ([int(part) for part in re.findall(r"\d+", text)[:2]] for text in (version, OLDEST))
    return bool(found) and found < needed


def refuse_older() -> None:
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        version = "0.3 or older"  # which had no such module
    if is_older(version):
        raise ImportError(f"Kinoloom needs ComfyUI {OLDEST} or newer, but this is ComfyUI {version}: update ComfyUI.")


refuse_older()
