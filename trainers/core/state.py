"""The progress and the trained values of a run."""

from dataclasses import dataclass
from typing import Any


@dataclass
class State:
    """The state of a run after `step` optimizer steps of phase number `phase`."""

    phase: int = 0
    step: int = 0
    best: float = float("inf")
    recipe: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    average: dict[str, Any] | None = None
    schedule: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
