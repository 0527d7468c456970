"""A run's folder: the run's inputs, its progress and its history."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...lora_io.file import write_text
from ..core.data import TrainingData
from ..core.events import EVENTS, NAMES, Event, Sample, Saved, Step, Validation, entries, to_json
from ..host.source import ModelSource
from .checkpoint import RunKey
from .claim import claim_of
from .plain import Plain, load_json, parse, read, require_small_file
from .previews import Previews
from .tally import Tally
from .versions import VERSION, current

GOING = ("waiting", "loading", "running", "paused")  # statuses of a run
ENDED = ("finished", "stopped", "failed", "interrupted")
LATEST = 1e11  # largest time in seconds since 1970 that is accepted


@dataclass(frozen=True)
class Spec:
    """The inputs of a run, as plain values that survive a restart.

    sources: the MODELs that it trains on, and a CLIP if it uses one, by the recipe's name of each. outputs: the folders
    of its files, by ComfyUI's name of the model folder. previews: what it samples on the way, which is no part of the
    run key. asked_as: the name that was asked for, where run_name may have got a number; not known ("") of runs of
    earlier versions.
    """

    id: str
    run_name: str
    recipe: str
    config: dict[str, Plain]
    data: TrainingData
    sources: dict[str, ModelSource]
    run_key: RunKey
    outputs: dict[str, str]
    created: float
    previews: Previews | None = None
    asked_as: str = ""

    @property
    def base_name(self) -> str:
        """The file of the first MODEL."""
        return Path(next(iter(self.sources.values())).path).name


@dataclass(frozen=True)
class Kept:
    """The content of job.json. checkpoint: optimizer steps made before the checkpoint."""

    spec: Spec
    status: str
    tally: Tally
    error: str = ""
    files: dict[str, str] = field(default_factory=dict)
    total: int = 0
    checkpoint: int = 0
    ended_at: float | None = None
    environment: dict[str, str] = field(default_factory=dict)
    advice: list[dict[str, str]] = field(default_factory=list)


def read_record(folder: Path) -> Kept:
    """The content of a run's job.json. ValueError or OSError says what is wrong with it."""
    if folder.is_symlink():
        raise ValueError(f"{folder.name}: expected a folder, not a link to one")
    content = load_json(folder / "job.json")
    kept = read(Kept, current("record", content, content.get("version", 1)), "job.json")
    spec = kept.spec
    if spec.id != folder.name:
        raise ValueError(f"job.json.spec.id={spec.id[:60]!r}: expected the name of its folder, {folder.name!r}")
    if not spec.sources:
        raise ValueError("job.json.spec.sources={}: expected the MODEL that the run trains on")
    if Path(spec.run_name).name != spec.run_name:
        raise ValueError(f"job.json.spec.run_name={spec.run_name[:60]!r}: expected the name of a folder")
    if not all(0 <= moment <= LATEST for moment in (spec.created, kept.ended_at or 0)):
        raise ValueError(f"job.json: created={spec.created}, ended_at={kept.ended_at}: expected seconds since 1970")
    if (history := folder / "history.jsonl").exists():
        require_small_file(history)
    return kept


def stamp_of(folder: Path) -> tuple[int, ...]:
    """A value that changes whenever job.json is written; () if there is none."""
    try:
        found = (folder / "job.json").lstat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ino, found.st_size


class Record:
    """`folder` holds job.json (spec, status), history.jsonl (one event per line), state.pt (the last checkpoint),
    log.txt, samples/ and report.html.

    `claim` is held while the run is active; `elsewhere` is true if another ComfyUI holds it. `stamp` is that of the
    last job.json read. `epoch` changes when the history is cut, so that readers notice. `tally` holds totals.
    """

    status: str
    tally: Tally
    error: str
    files: dict[str, str]
    total: int
    checkpoint: int
    ended_at: float | None
    environment: dict[str, str]
    advice: list[dict[str, str]]
    stamp: tuple[int, ...]
    _history: list[dict] | None

    def __init__(self, folder: Path, spec: Spec) -> None:
        self.folder, self.spec = folder, spec
        self.epoch, self._reading = 0, threading.Lock()
        self.claim, self.elsewhere, self.stamp = claim_of(folder), False, ()
        self._take(Kept(spec, "created", Tally()))
        self._set_history([])

    @property
    def history(self) -> list[dict]:
        """All events so far. The history of a run that ended before this server started is read on first use."""
        with self._reading:
            if self._history is None:
                self._history = list(self._read_history())
            return self._history

    @property
    def done(self) -> int:
        return self.tally.done

    @property
    def state_path(self) -> Path:
        return self.folder / "state.pt"

    @property
    def state_bytes(self) -> int:
        """Size of the state, with which the run can go on; 0 if there is none."""
        try:
            return self.state_path.stat().st_size
        except OSError:
            return 0

    @property
    def resumable(self) -> bool:
        return self.state_path.is_file() and self.status != "finished"

    def losses(self) -> list[float]:
        """The total loss of each step."""
        steps = entries(self.history, Step)
        return [sum(loss for loss in entry["losses"].values() if loss is not None) for entry in steps]

    def write(self) -> None:
        kept = Kept(**{option.name: getattr(self, option.name) for option in fields(Kept)})
        write_text(self.folder / "job.json", json.dumps({"version": VERSION, **asdict(kept)}))
        self.stamp = stamp_of(self.folder)

    def restore(self, kept: Kept) -> None:
        """Load what `write` saved. A run that was active is now "interrupted", or another ComfyUI trains it."""
        self._take(kept)
        self.elsewhere = kept.status not in ENDED and self.claim.elsewhere
        if kept.status in ENDED:
            self._history = None
        else:
            self.status = kept.status if self.elsewhere else "interrupted"
            self._set_history(list(self._read_history()))

    def _take(self, kept: Kept) -> None:
        for option in fields(Kept):
            setattr(self, option.name, getattr(kept, option.name))

    def append(self, event: Event) -> None:
        """Add an event to the history, in memory and on disk."""
        entry = to_json(event)
        self.history.append(entry)
        self.tally.add(entry)
        with open(self.folder / "history.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def rewind(self, phase: int, step: int) -> None:
        """Cut the history after `step` of phase number `phase`, from where the run resumes."""
        kept, begun = [NAMES[kind] for kind in (Step, Validation, Sample)], (phase, step) > (0, 0)
        phases = list(dict.fromkeys(e["phase"] for e in self.history if e["event"] in kept))

        def made(entry: dict) -> bool:
            return begun and entry["event"] in kept and (phases.index(entry["phase"]), entry["step"]) <= (phase, step)

        done = max((entry["done"] for entry in entries(self.history, Step) if made(entry)), default=0)
        saved = [entry for entry in entries(self.history, Saved) if entry["step"] <= done]
        self._set_history([entry for entry in self.history if made(entry) or entry in saved])
        write_text(self.folder / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.history))

    def _set_history(self, history: list[dict]) -> None:
        """Set history before epoch: a reader in between gets the old epoch and asks again."""
        tally = Tally()
        for entry in history:
            tally.add(entry)
        self._history = history
        self.tally, self.epoch = tally, max(self.epoch + 1, time.time_ns() // 1_000_000)

    def _read_history(self) -> Iterator[dict]:
        """The readable lines of the history. A crash may have cut off the last one."""
        path, lost = self.folder / "history.jsonl", 0
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            try:
                yield to_json(from_json(current("event", parse(line, path.name))))
            except ValueError:
                lost += 1
        if lost:
            logging.warning("Kinoloom: %s: %d lines are not readable and left out", path, lost)


def from_json(entry: dict[str, Any]) -> Event:
    """The inverse of `to_json`. ValueError says what does not fit."""
    name = entry.get("event")
    if not isinstance(name, str) or name not in EVENTS:
        raise ValueError(f"event={str(name)[:60]!r}: expected one of {', '.join(EVENTS)}")
    return read(EVENTS[name], entry, name)
