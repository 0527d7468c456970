"""What a run's line in the list says of its history, kept up to date entry by entry."""

from dataclasses import dataclass, field
from typing import Any

from ..core.events import Plan

PACE_STEPS = 20  # the last of a phase, whose mean is the run's pace


@dataclass
class Tally:
    """plan: the last one; losses: those of the last step; seconds: of the last PACE_STEPS steps;
    aside: seconds of samples and validations since the first step.
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
        """What so many more steps take, samples and validations as often as before."""
        pace = self.seconds_per_step
        return None if pace is None else steps * (pace + self.aside / self.done)

    def add(self, entry: dict[str, Any]) -> None:
        """Take in the next entry of the history; values are replaced, never changed, for those who read meanwhile."""
        if self.done and entry["event"] in ("sample", "validation"):
            self.aside += entry["seconds"]
        if entry["event"] == "step":
            earlier = self.seconds if entry["phase"] == self.phase else []
            self.seconds = [*earlier, entry["seconds"]][-PACE_STEPS:]
            self.phase, self.done, self.losses = entry["phase"], entry["done"], entry["losses"]
        elif entry["event"] == "sample":
            self.samples += 1
        elif entry["event"] == "plan":
            self.plan = Plan(**{name: value for name, value in entry.items() if name != "event"})
