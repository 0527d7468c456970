"""The version of what a run keeps on disk, and the one place that brings up to date what an earlier one wrote."""

from collections.abc import Callable
from typing import Any

VERSION = 1  # files without a number are of version 1

# STEPS[n - 1] makes content of version n into one of version n + 1, in place. `kind` is "record" (job.json, with the
# options at spec.config and spec.identity.config), "identity" (the same in state.pt), "state" or "event" (a line of the
# history). Lines bear no number and take every step, so a step leaves alone what is already new.
STEPS: list[Callable[[str, dict[str, Any]], None]] = []


def current(kind: str, content: dict[str, Any], version: Any = 1) -> dict[str, Any]:
    """`content` as this version would have written it. ValueError for one of a later version."""
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"version={str(version)[:20]}: expected 1 to {VERSION}; a newer Kinoloom reads later ones")
    for step in STEPS[version - 1 :]:
        step(kind, content)
    return content
