"""What a running job tells the outside: frozen records of plain values, ready for JSON. A number that JSON cannot hold
is None there.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, get_args


@dataclass(frozen=True)
class Plan:
    """Sent before the first step and again after the measured warm-up steps. Memory in bytes, times in seconds.

    note: what changed, if the run goes on under other options.
    """

    checkpointing: bool
    memory_needed: int
    memory_available: int
    seconds_per_step: float | None
    seconds_total: float | None
    reason: str
    note: str = ""

    def __str__(self) -> str:
        time = ""
        if self.seconds_per_step is not None and self.seconds_total is not None:
            time = f"{self.seconds_per_step:.2f} s per step, {self.seconds_total / 60:.0f} min for this phase. "
        needed, available = self.memory_needed / 2**30, self.memory_available / 2**30
        state = "on" if self.checkpointing else "off"
        memory = f"Memory {needed:.1f} of {available:.1f} GiB free. Checkpointing {state}: {self.reason}."
        return f"{self.note} {time}{memory}".lstrip()


@dataclass(frozen=True)
class Step:
    """One optimizer step; `losses` are means over its micro-batches, `grad_norm` is taken before clipping."""

    phase: str
    step: int
    steps: int
    done: int
    total: int
    losses: dict[str, float | None]
    learning_rate: float | None
    grad_norm: float | None
    seconds: float


@dataclass(frozen=True)
class Validation:
    """Loss on fixed noise and timesteps, and what it took; `held_out`: whether on data that is never trained on."""

    phase: str
    step: int
    loss: float | None
    best: bool
    held_out: bool
    seconds: float


@dataclass(frozen=True)
class Sample:
    """Videos made after `step` of a phase: names of files in the job's folder `samples`, one for each prompt."""

    phase: str
    step: int
    done: int
    files: list[str]
    prompts: list[str]
    seconds: float


@dataclass(frozen=True)
class SampleFailed:
    """No more samples until the run is started again; it goes on without."""

    phase: str
    step: int
    done: int
    error: str


@dataclass(frozen=True)
class Saved:
    export: str
    path: str
    step: int
    best: bool = False


@dataclass(frozen=True)
class Finished:
    """The run ended by itself (`stopped` false) or was asked to stop; `done` optimizer steps were made."""

    stopped: bool
    done: int


@dataclass(frozen=True)
class Failed:
    error: str


Event = Plan | Step | Validation | Sample | SampleFailed | Saved | Finished | Failed
KINDS = {kind.__name__.lower(): kind for kind in get_args(Event)}


def to_json(event: Event) -> dict:
    """Plain values under the event's lower-case name; numbers that JSON cannot hold become None."""
    return {"event": type(event).__name__.lower(), **_finite(asdict(event))}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
