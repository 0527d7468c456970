"""Totals of a run's history for its line in the list, updated with every entry."""

from dataclasses import dataclass, field
from typing import Any

from ..core.events import NAMES, Plan, Sample, Step, Validation

PACE_STEPS = 20  # a run's seconds per step are the mean of a phase's last PACE_STEPS


@dataclass
class Tally:
    """plan: the latest one. losses: of the last step. seconds: of each of the last PACE_STEPS steps.
    aside: total seconds of samples and validations since the first step.
    """

    phase: str = ""
    done: int = 0
    samples: int = 0
    losses: dict[str, float | None] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    aside: float = 0.0
    plan: Plan | None = None

    @property
    def seconds_per_step(self) -> float | None:
        return sum(self.seconds) / len(self.seconds) if self.seconds else None

    def seconds_for(self, steps: int) -> float | None:
        """The expected seconds of `steps` more steps, including samples and validations."""
        pace = self.seconds_per_step
        return None if pace is None else steps * (pace + self.aside / self.done)

    def add(self, entry: dict[str, Any]) -> None:
        """Add the next entry of the history. Values are replaced, not changed in place: other threads may read them."""
        if self.done and entry["event"] in (NAMES[Sample], NAMES[Validation]):
            self.aside += entry["seconds"]
        if entry["event"] == NAMES[Step]:
            earlier = self.seconds if entry["phase"] == self.phase else []
            self.seconds = [*earlier, entry["seconds"]][-PACE_STEPS:]
            self.phase, self.done, self.losses = entry["phase"], entry["done"], entry["losses"]
        elif entry["event"] == NAMES[Sample]:
            self.samples += 1
        elif entry["event"] == NAMES[Plan]:
            self.plan = Plan(**{name: value for name, value in entry.items() if name != "event"})
