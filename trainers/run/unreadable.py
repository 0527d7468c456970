"""A run whose folder this version cannot read. The list shows it with the reason; it can only be deleted."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from .claim import claim_of
from .plain import load_json

LONGEST_NAME = 200  # characters


class Unreadable:
    status, is_over, elsewhere, history, epoch = "unreadable", True, False, (), 0

    def __init__(self, folder: Path, reason: str) -> None:
        self.folder, self.id, self.reason, self.claim, self.stamp = folder, folder.name, reason, claim_of(folder), ()
        self.run_name, self.created, self.log_path = folder.name, 0.0, folder / "log.txt"
        with suppress(OSError):
            self.created = folder.lstat().st_mtime
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            self._guess(load_json(folder / "job.json")["spec"])

    def _guess(self, spec: dict[str, Any]) -> None:
        if isinstance(spec["run_name"], str):
            self.run_name = spec["run_name"][:LONGEST_NAME]
        if 0 <= (created := float(spec["created"])) and math.isfinite(created):
            self.created = created

    def summary(self) -> dict[str, Any]:
        """The same entries as those of a job's summary."""
        return {
            "id": self.id,
            "run_name": self.run_name,
            "recipe": "",
            "title": "",
            "created": self.created,
            "status": self.status,
            "error": f"This run cannot be read: {self.reason}. It can only be deleted.",
            "done": 0,
            "total": 0,
            "checkpoint": 0,
            "resumable": False,
            "state_bytes": 0,
            "advice": [],
            **{"phase": "", "losses": {}, "plan": None, "samples": 0},
            "pause_requested": False,
            "seconds_per_step": None,
            "seconds_left": None,
            "files": {},
            "lora_names": {},
            "main_file": None,
            "asked_as": "",
            "in_line": "",
            "elsewhere": False,
            "dead_end": "",
            "ended": self.created,
        }
