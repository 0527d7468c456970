"""The events of a run: frozen records of plain values for JSON, where NaN and infinity become None."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""


@dataclass(frozen=True)
class Plan(Event):
    """Sent before the first step and again after the measured warm-up steps. Memory in bytes, times in seconds.

    note: changed options, if the run was resumed with others.
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
class Step(Event):
    """One optimizer step. `losses` are means over micro-batches, `grad_norm` is the gradient norm before clipping."""

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
class Validation(Event):
    """The loss on fixed noise and timesteps, and its duration. `held_out`: whether on data that is not trained on."""

    phase: str
    step: int
    loss: float | None
    best: bool
    held_out: bool
    seconds: float


@dataclass(frozen=True)
class Sample(Event):
    """Samples after `step` of a phase: file names in the job's folder `samples`, one for each prompt."""

    phase: str
    step: int
    done: int
    files: list[str]
    prompts: list[str]
    seconds: float


@dataclass(frozen=True)
class SampleFailed(Event):
    """Sampling failed: the run goes on without samples until it is started again."""

    phase: str
    step: int
    done: int
    error: str


@dataclass(frozen=True)
class Saved(Event):
    export: str
    path: str
    step: int
    best: bool = False


@dataclass(frozen=True)
class Finished(Event):
    """The run ended by itself (`stopped` false) or was stopped, after `done` optimizer steps."""

    stopped: bool
    done: int


@dataclass(frozen=True)
class Failed(Event):
    error: str


# Names of events in histories, also in files of old runs, in websocket messages and on the page.
EVENTS: dict[str, type[Event]] = {
    "plan": Plan,
    "step": Step,
    "validation": Validation,
    "sample": Sample,
    "samplefailed": SampleFailed,
    "saved": Saved,
    "finished": Finished,
    "failed": Failed,
}
NAMES = {kind: name for name, kind in EVENTS.items()}
# Messages that are in no history: the run's status or place in line changed; the run was deleted.
STATUS, DELETED = "status", "deleted"


def to_json(event: Event) -> dict:
    """An event as plain values, with its name as `event`. NaN and infinity become None."""
    return {"event": NAMES[type(event)], **_finite(asdict(event))}


def entries(history: Sequence[dict[str, Any]], *kinds: type[Event]) -> list[dict[str, Any]]:
    """The entries of a history that are events of these kinds."""
    names = [NAMES[kind] for kind in kinds]
    return [entry for entry in history if entry["event"] in names]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
