"""The queue of runs: only one run trains at a time."""

import threading
from typing import Protocol


class Waiting(Protocol):
    """A run in the line. `held`: whether later runs may overtake it. `moved()` is called when its place changes."""

    @property
    def held(self) -> bool: ...
    def moved(self) -> None: ...


class Line:
    """First in, first out. Two runs at once would compete for memory with their private models."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Waiting] = []
        self._taken = False

    def join(self, run: Waiting) -> None:
        with self._lock:
            self._waiting.append(run)

    def leave(self, run: Waiting) -> None:
        """Remove `run`, if it is in the line."""
        with self._lock:
            behind = self._waiting[self._waiting.index(run) + 1 :] if run in self._waiting else []
            self._waiting = [other for other in self._waiting if other is not run]
        for other in behind:
            other.moved()

    def take(self, run: Waiting) -> bool:
        """Let `run` train if no other run does and no run before it could. Returns whether it may."""
        with self._lock:
            first = next((other for other in self._waiting if not other.held), None)
            if self._taken or first is not run:
                return False
            self._taken = True
        self.leave(run)
        return True

    def release(self) -> None:
        with self._lock:
            self._taken = False

    def place(self, run: object) -> int | None:
        """The place of `run`, 1 for the next one, or None if it is not in the line."""
        with self._lock:
            return next((place for place, other in enumerate(self._waiting, 1) if other is run), None)

    def move(self, run: Waiting, by: int) -> None:
        """Move `run` one place earlier (-1) or later (1), if there is one. ValueError if it is not in the line."""
        with self._lock:
            if run not in self._waiting:
                raise ValueError("the run is not waiting in line")
            place = self._waiting.index(run)
            self._waiting.insert(max(place + by, 0), self._waiting.pop(place))
            waiting = list(self._waiting)
        for other in waiting:
            other.moved()


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number}{ending}"
