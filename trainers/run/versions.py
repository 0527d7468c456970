"""The version of a run's files, and the only place that converts files of earlier versions."""

from collections.abc import Callable
from typing import Any

VERSION = 1  # files without a number are of version 1

# STEPS[n - 1] converts content of version n to version n + 1, in place. `kind` is "record" (job.json, with the options
# at spec.config and spec.identity.config), "identity" (the same in state.pt), "state" or "event" (a line of the
# history). Lines of the history have no version: every step is applied to them, so it must not change new content.
STEPS: list[Callable[[str, dict[str, Any]], None]] = []


def current(kind: str, content: dict[str, Any], version: Any = 1) -> dict[str, Any]:
    """`content` converted to this version. ValueError if it is of a later version."""
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"version={str(version)[:20]}: expected 1 to {VERSION}; a newer Kinoloom reads later ones")
    for step in STEPS[version - 1 :]:
        step(kind, content)
    return content
