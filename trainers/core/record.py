"""A run's folder: what the run is made of, how far it is, what happened."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...lora_io.file import write_text
from .checkpoint import Identity
from .data import TrainingData
from .events import Event, to_json
from .host import ModelSource
from .sampling import Samples
from .tally import Tally

ENDED = ("finished", "stopped", "failed", "interrupted")
KEPT = ("error", "files", "total", "checkpoint", "ended_at", "environment", "advice")


@dataclass(frozen=True)
class Spec:
    """Everything a run is made of, as plain values that survive a restart.

    outputs: where its files go, by ComfyUI's name of the model folder they are for. samples: what it shows on the way,
    which is no part of its identity. asked_as: the name that was asked for, where run_name may have got a number; not
    known ("") of runs that an earlier version started.
    """

    id: str
    run_name: str
    recipe: str
    config: dict[str, Any]
    data: TrainingData
    source: ModelSource
    identity: Identity
    outputs: dict[str, str]
    created: float
    samples: Samples | None = None
    asked_as: str = ""

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Spec":
        data, source = TrainingData.from_json(value["data"]), ModelSource(**value["source"])
        samples = Samples.from_json(value["samples"]) if value.get("samples") else None
        identity = Identity(**value["identity"])
        return Spec(**{**value, "data": data, "source": source, "identity": identity, "samples": samples})


class Record:
    """`folder` holds job.json (spec, status), history.jsonl (one event a line), state.pt (the last checkpoint), log.txt
    (what the run logged), samples/ and report.html.

    `epoch` changes whenever the history was cut, so that who holds a part of it knows; `tally` follows the history.
    """

    def __init__(self, folder: Path, spec: Spec) -> None:
        self.folder, self.spec = folder, spec
        self.status, self.error = "created", ""
        self.files: dict[str, str] = {}
        self.total, self.ended_at = 0, None
        self.checkpoint = 0  # optimizer steps made before the checkpoint
        self.environment: dict[str, str] = {}
        self.advice: list[dict[str, str]] = []
        self.epoch, self._reading = 0, threading.Lock()
        self._set_history([])

    @property
    def history(self) -> list[dict]:
        """Every event so far; that of a run which an earlier server ended is read when first asked for."""
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
    def resumable(self) -> bool:
        return self.state_path.is_file() and self.status != "finished"

    def losses(self) -> list[float]:
        """The total loss of every step so far."""
        return [sum(entry["losses"].values()) for entry in self.history if entry["event"] == "step"]

    def write(self) -> None:
        kept = {name: getattr(self, name) for name in ("status", *KEPT)}
        kept |= {"spec": asdict(self.spec), "tally": vars(self.tally)}
        write_text(self.folder / "job.json", json.dumps(kept))

    def restore(self, kept: dict[str, Any]) -> None:
        """Take over what `write` left behind; a run that was going on is "interrupted"."""
        self.status = kept["status"] if kept["status"] in ENDED else "interrupted"
        for name in KEPT:
            setattr(self, name, kept[name])
        if kept["status"] in ENDED:
            self._history, self.tally = None, Tally(**kept["tally"])
        else:
            self._set_history(list(self._read_history()))

    def append(self, event: Event) -> None:
        """Add an event to the history, in memory and on disk."""
        entry = to_json(event)
        self.history.append(entry)
        self.tally.add(entry)
        with open(self.folder / "history.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def rewind(self, phase: int, step: int) -> None:
        """Forget what happened after `step` of phase number `phase`: the run goes on from there."""
        kept, begun = ("step", "validation", "sample"), (phase, step) > (0, 0)
        phases = list(dict.fromkeys(e["phase"] for e in self.history if e["event"] in kept))

        def made(entry: dict) -> bool:
            return begun and entry["event"] in kept and (phases.index(entry["phase"]), entry["step"]) <= (phase, step)

        done = max((entry["done"] for entry in self.history if entry["event"] == "step" and made(entry)), default=0)
        saved = [entry for entry in self.history if entry["event"] == "saved" and entry["step"] <= done]
        self._set_history([entry for entry in self.history if made(entry) or entry in saved])
        write_text(self.folder / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.history))

    def _set_history(self, history: list[dict]) -> None:
        """The history first: who reads a new one under the old epoch will hear of the new epoch."""
        tally = Tally()
        for entry in history:
            tally.add(entry)
        self._history: list[dict] | None = history
        self.tally, self.epoch = tally, max(self.epoch + 1, time.time_ns() // 1_000_000)

    def _read_history(self) -> Iterator[dict]:
        path = self.folder / "history.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                yield json.loads(line)
            except ValueError:
                return  # a crash cut the last line off
