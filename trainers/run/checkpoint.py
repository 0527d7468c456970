"""The state from which a run resumes, and the inputs that must not change for it to resume exactly."""

import json
import pickle
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from ...lora_io.file import atomic_write
from ..core.config import FIXED, NOT_TRAJECTORY, TrainConfig
from ..core.state import State
from .plain import Plain, parse, read
from .versions import VERSION, current


@dataclass(frozen=True)
class RunKey:
    """The inputs that identify a run: method, base model, data, files and the options of FIXED."""

    recipe: str
    base_model: str
    data: str
    config: dict[str, Plain]
    files: dict[str, str]

    @staticmethod
    def of(recipe: str, base_model: str, data: str, config: TrainConfig, files: dict[str, str]) -> "RunKey":
        kept = {name: value for name, value in asdict(config).items() if name not in NOT_TRAJECTORY}
        return RunKey(recipe, base_model, data, kept, files)

    def changes(self, earlier: "RunKey") -> list[str]:
        """The inputs that differ from `earlier`: their names, with both values if they are short."""
        changed = [
            label
            for label, ours, theirs in (
                ("training method", self.recipe, earlier.recipe),
                ("base model", self.base_model, earlier.base_model),
                ("training data", self.data, earlier.data),
            )
            if ours != theirs
        ]
        changed += [text for name, text in self._options(earlier).items() if name in FIXED]
        changed += [
            f"content of {name}"
            for name in sorted(self.files.keys() | earlier.files.keys())
            if self.files.get(name) != earlier.files.get(name)
        ]
        return changed

    def adjusted(self, earlier: "RunKey") -> list[str]:
        """Options that differ from `earlier`, with both values, and with which the run may still resume."""
        return [text for name, text in self._options(earlier).items() if name not in (*FIXED, *NOT_TRAJECTORY)]

    def _options(self, earlier: "RunKey") -> dict[str, str]:
        """This run's options without those that `earlier`'s version did not have: they count as unchanged."""
        pairs = {name: (then, self.config.get(name)) for name, then in sorted(earlier.config.items())}
        return {name: f"{name} (was {then!r}, now {now!r})" for name, (then, now) in pairs.items() if then != now}

    def require_same(self, earlier: "RunKey", run_name: str) -> None:
        if changed := self.changes(earlier):
            raise ValueError(
                f"run {run_name!r} cannot be resumed: changed since it was started: {', '.join(changed)}. Undo "
                "the change, or choose another run name."
            )


def save_state(path: Path, state: State, run_key: RunKey) -> None:
    """Save a checkpoint. SaveError says why it could not be written, such as a full disk."""
    content = {"version": VERSION, "state": dict(vars(state)), "run_key": json.dumps(asdict(run_key))}
    atomic_write(path, lambda temporary: write(content, temporary))


def write(content: dict[str, Any], path: str) -> None:
    """Save with torch. OSError if the disk is full, for which torch's own error is misleading."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(path: Path) -> tuple[State, RunKey]:
    """Load a checkpoint to the CPU, without running code from the file. ValueError if the file is damaged."""
    try:
        if not is_zipfile(path):
            raise EOFError("cut off")
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content.get("version", 1)
        content = current("checkpoint", content, version)
        state, run_key = content["state"], parse(content["run_key"], "run_key")
        known = {option.name: state[option.name] for option in fields(State) if option.name in state}
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: damaged; delete it to start the run again") from error
    return State(**current("state", known, version)), read(RunKey, current("run_key", run_key, version), "run_key")
