"""One training run in a background thread, and its folder: spec, history, resumable state."""

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...lora_io import keys
from ...lora_io.file import save, write_text
from ...lora_io.metadata import describe
from . import host
from .checkpoint import Identity, State, load_state, save_state
from .config import TrainConfig
from .data import PhaseData, TrainingData
from .events import Event, Failed, Finished, Plan, Saved, Step, to_json
from .loop import Session, train
from .memory import checkpointed_blocks, count_trainable, make_plan
from .noise import Rng
from .recipe import Phase, Recipe

WARM_UP_STEPS = 3  # the first is slower than the rest; the plan's times come from the others
ENDED = ("finished", "stopped", "failed", "interrupted")


@dataclass(frozen=True)
class Spec:
    """Everything a run is made of, as plain values that survive a restart. `output` is where its LoRA files go."""

    id: str
    run_name: str
    recipe: str
    config: dict[str, Any]
    data: TrainingData
    source: host.ModelSource
    identity: Identity
    output: str
    created: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Spec":
        data, source = TrainingData.from_json(value["data"]), host.ModelSource(**value["source"])
        return Spec(**{**value, "data": data, "source": source, "identity": Identity(**value["identity"])})


class Job:
    """`folder` holds job.json (spec and status), history.jsonl (one event a line) and state.pt (the last checkpoint).

    status: "waiting" to start, "loading", "running", "paused", then one of ENDED; "interrupted" means that the server
    went away. `busy()` says whether the run should wait because the queue has work.
    """

    def __init__(
        self,
        folder: Path,
        spec: Spec,
        recipe: type[Recipe],
        backbone: Any,
        publish: Callable[["Job", dict], None],
        busy: Callable[["Job"], bool],
    ) -> None:
        self.folder, self.spec, self.recipe_class, self.backbone = folder, spec, recipe, backbone
        self.publish, self.busy = publish, busy
        self.config: TrainConfig = recipe.Config(**spec.config)
        self.status, self.error = "waiting", ""
        self.history: list[dict] = []
        self.files: dict[str, str] = {}
        self.done = self.total = 0
        self._stop, self._resume, self.ended = threading.Event(), threading.Event(), threading.Event()
        self._resume.set()
        self._warm_up: list[float] = []
        self._plan: Plan | None = None

    # -- what others ask of a job ------------------------------------------------------------------------------------

    def start(self, model: Any) -> None:
        """Begin, or go on from the last checkpoint. `model` is the MODEL to copy."""
        self._stop.clear()
        self._resume.set()
        self.ended.clear()
        self.error = ""
        self._set_status("loading")
        threading.Thread(target=self._run, args=(model,), name=f"kinoloom {self.spec.run_name}", daemon=True).start()

    def stop(self) -> None:
        """End after the current step, keeping a usable LoRA and a resumable state."""
        self._stop.set()
        self._resume.set()

    def pause(self) -> None:
        self._resume.clear()

    def resume(self) -> None:
        self._resume.set()

    @property
    def resumable(self) -> bool:
        return (self.folder / "state.pt").is_file() and self.status != "finished"

    def summary(self) -> dict[str, Any]:
        return {
            "id": self.spec.id,
            "run_name": self.spec.run_name,
            "recipe": self.spec.recipe,
            "status": self.status,
            "error": self.error,
            "done": self.done,
            "total": self.total,
            "files": self.files,
            "created": self.spec.created,
            "resumable": self.resumable,
            "pause_requested": not self._resume.is_set(),
        }

    @property
    def main_file(self) -> str:
        """The last of the recipe's exports that exists: the whole result, or what a stopped run got to."""
        made = [self.files[name] for name in self.recipe_class.exports(self.config) if name in self.files]
        return made[-1] if made else ""

    def losses(self) -> list[float]:
        """The total loss of every step so far."""
        return [sum(e["losses"].values()) for e in self.history if e["event"] == "step"]

    # -- persistence -------------------------------------------------------------------------------------------------

    def write(self) -> None:
        kept = {
            "spec": self.spec.to_json(),
            "status": self.status,
            "error": self.error,
            "files": self.files,
            "total": self.total,
        }
        write_text(self.folder / "job.json", json.dumps(kept))

    def restore(self, kept: dict[str, Any]) -> None:
        """Take over what `write` left behind; a run that was going on is "interrupted"."""
        self.status = kept["status"] if kept["status"] in ENDED else "interrupted"
        self.error, self.files, self.total = kept["error"], kept["files"], kept["total"]
        path = self.folder / "history.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.history = [json.loads(line) for line in lines if line.endswith("}")]
        self.done = max((e["done"] for e in self.history if e["event"] == "step"), default=0)
        self.ended.set()

    def _set_status(self, status: str) -> None:
        if status != self.status:
            self.status = status
            self.write()
            self.publish(self, {"event": "status"})

    def _emit(self, event: Event) -> None:
        entry = to_json(event)
        self.history.append(entry)
        with open(self.folder / "history.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if isinstance(event, Step):
            self.done = event.done
            self._time(event)
        self.publish(self, entry)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self, model: Any) -> None:
        try:
            finished = self._train(model)
            self._emit(Finished(not finished, self.done))
            self._set_status("finished" if finished else "stopped")
        except (
            BaseException
        ) as error:  # the thread boundary: whatever happened belongs on the job, not in a lost traceback
            logging.exception("Kinoloom: run %s failed", self.spec.run_name)
            self.error = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
            self.status = "failed"
            self.write()
            self._emit(Failed(self.error))
        finally:
            self.ended.set()

    def _train(self, model: Any) -> bool:
        device = host.device()
        private = host.load_private(model, device)
        del model
        dtype = host.compute_dtype(self.config.precision, device)
        backbone = self.backbone.load(private, device, dtype, host.TRANSFORMER_OPTIONS)
        checkpointed_blocks(backbone)
        recipe = self.recipe_class(backbone, self.config)
        self.total = sum(phase.steps for phase in recipe.phases(self.config))
        state = self._load_state()
        self._set_status("running")

        def phase_data(phase: Phase) -> PhaseData:
            c = self.config
            return PhaseData(self.spec.data, phase.split, recipe.columns, c.batch_size, c.seed, backbone.prepare)

        def plan(phase: Phase, batches: PhaseData) -> None:
            rng = Rng(self.config.seed, f"{phase.name}/plan", 0)
            trainable = count_trainable(backbone.module)
            with host.training():
                self._plan = make_plan(
                    backbone,
                    self.config.checkpointing,
                    lambda: next(recipe.losses(batches.largest(), rng)),
                    trainable,
                    host.free_memory(device),
                )
            self._warm_up = []
            self._emit(self._plan)

        def save_files(phase: Phase, state: State, why: str) -> None:
            if why not in ("best", "diverged"):
                save_state(self.folder / "state.pt", state, self.spec.identity)
            if why != "checkpoint":
                self._export(recipe, phase, best=why == "best")

        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        session = Session(self._emit, self._should_stop, save_files, plan)
        return train(recipe, phase_data, self.config, state, session, scaler)

    def _load_state(self) -> State:
        """The last checkpoint, or the beginning; history that a crash left ahead of the checkpoint is cut off."""
        if not (self.folder / "state.pt").is_file():
            self._rewrite_history(0, 0)
            return State()
        state, identity = load_state(self.folder / "state.pt")
        self.spec.identity.require_same(identity, self.spec.run_name)
        self._rewrite_history(state.phase, state.step)
        return state

    def _rewrite_history(self, phase: int, step: int) -> None:
        phases = list(dict.fromkeys(e["phase"] for e in self.history if e["event"] in ("step", "validation")))

        def kept(entry: dict) -> bool:
            if entry["event"] not in ("step", "validation"):
                return entry["event"] == "saved"
            return (phases.index(entry["phase"]), entry["step"]) <= (phase, step)

        self.history = [entry for entry in self.history if kept(entry)]
        self.done = max((e["done"] for e in self.history if e["event"] == "step"), default=0)
        write_text(self.folder / "history.jsonl", "".join(json.dumps(e) + "\n" for e in self.history))

    def _should_stop(self) -> bool:
        while not self._stop.is_set() and (not self._resume.is_set() or self.busy(self)):
            self._set_status("paused")
            self._stop.wait(0.1)
        if not self._stop.is_set():
            self._set_status("running")
        return self._stop.is_set()

    def _time(self, event: Step) -> None:
        """After the warm-up steps send the plan again, with what a step takes."""
        self._warm_up.append(event.seconds)
        if len(self._warm_up) == WARM_UP_STEPS and self._plan:
            seconds = sum(self._warm_up[1:]) / (WARM_UP_STEPS - 1)
            self._emit(replace(self._plan, seconds_per_step=seconds, seconds_total=seconds * event.steps))

    def _export(self, recipe: Recipe, phase: Phase, best: bool) -> None:
        spec, config = self.spec, self.config
        for name, export in recipe.exports(self.config).items():
            if export.phase != phase.name:
                continue
            label = f"{name}-best" if best else name
            path = Path(spec.output) / f"{spec.run_name}-{label}-{self.done:06d}.safetensors"
            dtype = {"fp16": torch.float16, "fp32": torch.float32}[config.save_precision]
            tensors = {key: tensor.to(dtype) for key, tensor in keys.FORMATS[export.keys](recipe.export(name)).items()}
            words = [word.strip() for word in config.trigger_words.split(",") if word.strip()]
            save(
                path,
                tensors,
                describe(
                    recipe=spec.recipe,
                    export=name,
                    config=spec.config,
                    step=self.done,
                    steps=self.total,
                    base_model=spec.source.identity,
                    base_model_name=Path(spec.source.path).name,
                    rank=config.rank,
                    alpha=config.alpha or config.rank,
                    trigger_words=words,
                    extra=recipe.metadata(name),
                ),
            )
            earlier, self.files[label] = self.files.get(label), str(path)
            if best and earlier and earlier != str(path):
                Path(earlier).unlink(missing_ok=True)
            self.write()
            self._emit(Saved(name, str(path), self.done, best))


def new_spec(**values: Any) -> Spec:
    return Spec(created=time.time(), **values)
