"""The texts and numbers of a run that lists, pages and nodes show."""

import os
import threading
from pathlib import Path
from typing import Any

from ..core.config import TrainConfig
from ..core.events import Plan
from ..core.recipe import Export, Phase, Recipe
from .line import Line, ordinal
from .plain import public_config
from .record import Record
from .report import Report


class Shown(Record):
    """A record with its method, options and place in line.

    plan: the plan of the current phase. note: changed options, if the run was resumed with others.
    """

    recipe_class: type[Recipe]
    config: TrainConfig
    plan: Plan | None
    note: str
    line: Line
    ended: threading.Event
    _resume: threading.Event

    @property
    def phases(self) -> list[Phase]:
        return self.recipe_class.phases(self.config, self.spec.data)

    @property
    def exports(self) -> dict[str, Export]:
        """What the run makes, by name."""
        return self.recipe_class.exports(self.config, self.spec.data)

    @property
    def result_files(self) -> list[str]:
        """The existing files of the exports. The last one is the main result so far."""
        return [self.files[name] for name in self.exports if name in self.files]

    @property
    def in_line(self) -> str:
        """ "2nd in line" for a waiting run, else ""."""
        place = self.line.place(self)
        return f"{ordinal(place)} in line" if place else ""

    @property
    def headline(self) -> str:
        """The run's name with its plan or status."""
        text = f"waiting, {self.in_line}" if self.in_line else str(self.plan or self.status)
        return f"{self.spec.run_name}: {text}"

    @property
    def dead_end(self) -> str:
        """Why a run that ended early cannot go on, else ""."""
        if self.status == "finished" or self.resumable or self.elsewhere or not self.ended.is_set():
            return ""
        if self.checkpoint:
            return "Its state is gone, so it cannot go on. Train again, or start from its LoRA with start_from."
        return "It ended before its first checkpoint, so it cannot go on. Run its workflow again."

    @property
    def log_path(self) -> Path:
        return self.folder / "log.txt"

    @property
    def samples_folder(self) -> Path:
        return self.folder / "samples"

    def summary(self) -> dict[str, Any]:
        """The run's entry in a list. It does not read the history, which may be long."""
        tally, pace = self.tally, self.tally.seconds_per_step
        files = {label: path for label, path in self.files.copy().items() if os.path.isfile(path)}
        going = self.total and (self.elsewhere or not self.ended.is_set())
        own = ("status", "error", "done", "total", "checkpoint", "resumable", "advice", "state_bytes", "elsewhere")
        return {
            **{name: getattr(self.spec, name) for name in ("id", "run_name", "recipe", "created")},
            **{name: getattr(self, name) for name in own},
            **{name: getattr(tally, name) for name in ("phase", "losses", "samples")},
            "plan": tally.plan and {**vars(tally.plan), "text": str(tally.plan)},
            "title": self.recipe_class.title,
            "asked_as": self.spec.asked_as or self.spec.run_name,
            "in_line": self.in_line,
            "dead_end": self.dead_end,
            "pause_requested": not self._resume.is_set(),
            "seconds_per_step": pace,
            "seconds_left": tally.seconds_for(self.total - tally.done) if going else None,
            "files": files,
            "lora_names": {label: loader_name(Path(path)) for label, path in files.items()},
            "main_file": self._main_file(files),
            "ended": self.ended_at,
        }

    def _main_file(self, files: dict[str, str]) -> str | None:
        """The name by which loaders list the main result, or its best so far, or another export. None without files."""
        labels = (label for name in self.exports for label in (f"{name}-best", name))
        made = [files[label] for label in labels if label in files]
        return loader_name(Path(made[-1])) if made else None

    def report(self) -> str:
        """The report of the run, as one HTML page."""
        files = [Path(path) for path in self.files.copy().values()]
        return Report(
            self.summary(),
            public_config(self.config),
            list(self.history),
            self.spec.data.rows,
            self.spec.base_name,
            {loader_name(path): path.stat().st_size for path in files if os.path.isfile(path)},
            self.environment,
            self.samples_folder,
        ).html()


def loader_name(path: Path) -> str:
    """The name by which ComfyUI's loaders list a run's file: kinoloom/<run name>/<file>."""
    return str(Path(*path.parts[-3:]))
