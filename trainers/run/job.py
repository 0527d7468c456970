"""One training run in a background thread."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...lora_io.file import write_text
from ..core.config import TrainConfig, make
from ..core.events import STATUS, Event, Failed, Finished, Plan, to_json
from ..core.loop import Diverged
from ..core.recipe import Recipe
from ..core.state import State
from ..host.device import environment, release, torch_device
from ..host.private import Private, load_private
from ..host.source import carried_files
from .advice import Finding, advise, look_at, of_failure
from .checkpoint import RunKey, load_state
from .claim import in_use
from .continuing import describe, require_reachable
from .line import Line
from .log import run_log
from .previews import Previews
from .record import ENDED, Kept, Spec
from .shown import Shown
from .training import Training, loaded_as

POLL_SECONDS = 0.1
KEPT_BYTES = 10**9  # largest state that a finished run keeps with keep_state auto
ADVISE_EVERY = 20  # entries of the history between checks for advice, or a twentieth of it if that is more


class Job(Shown):
    """status: one of record.GOING while the run waits in line or trains, then one of record.ENDED.

    `publish(job, event)` is called for every change. `busy(job)` is true if the run should pause because the queue has
    work. Of the jobs in a `line` one trains at a time, after `make_room()` has unloaded other models from the GPU.
    """

    def __init__(
        self,
        folder: Path,
        spec: Spec,
        recipe: type[Recipe],
        publish: Callable[["Job", dict], None],
        busy: Callable[["Job"], bool],
        line: Line | None = None,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(folder, spec)
        self.recipe_class = recipe
        self.publish, self.busy, self.line = publish, busy, line or Line()
        self.make_room = make_room
        self.config: TrainConfig = make(recipe.Config, spec.config)
        self.plan: Plan | None = None
        self.note = ""  # changed options, if the run was resumed with others
        self._stop, self._resume, self.ended = threading.Event(), threading.Event(), threading.Event()
        self._resume.set()
        self.ended.set()
        self._advised = 0  # entries of the history at the last check for advice

    def start(self, models: dict[str, Any] | None) -> None:
        """Begin, or go on from the last checkpoint. Without MODELs, by the recipe's names, their files are read.

        ValueError if another ComfyUI trains the run, OSError if its record cannot be written.
        """
        if not self.claim.take():
            raise in_use(self.spec.run_name)
        before, self.status = self.status, "waiting"
        try:
            self.write()
        except OSError:
            self.status = before
            self.claim.free()
            raise
        self._stop.clear()
        self._resume.set()
        self.error, self.ended_at, self.advice, self._advised = "", None, [], 0
        self._models = models or self.spec.sources
        self.ended.clear()
        self.line.join(self)
        threading.Thread(target=self._run, name=f"kinoloom {self.spec.run_name}", daemon=True).start()

    def reconfigure(self, config: TrainConfig, previews: Previews | None, run_key: RunKey) -> None:
        """Change options of the run: pause_when_busy at once, others at the next start.

        ValueError if the run cannot go on with them.
        """
        adjusted, name = run_key.adjusted(self.spec.run_key), self.spec.run_name
        if adjusted and not self.is_over:
            raise ValueError(
                f"run {name!r} is {self.status}: stop it before it can go on with {', '.join(adjusted)}, or choose "
                "another run name"
            )
        self.require_reachable(config)
        if self.is_over:
            self.note = describe(adjusted, self.kept_steps, config.lr_schedule)
        self.spec = replace(self.spec, config=vars(config), previews=previews, run_key=run_key)
        self.config = config
        if self.total:
            self.total = self.steps_of(config)

    @property
    def kept_steps(self) -> int:
        """The number of steps from which the run would go on."""
        return self.done if self.status == "finished" else self.checkpoint

    def restore(self, kept: Kept) -> None:
        super().restore(kept)
        self.config = make(self.recipe_class.Config, self.spec.config)

    def steps_of(self, config: TrainConfig) -> int:
        return sum(phase.steps for phase in self.recipe_class.phases(config, self.spec.data))

    def require_reachable(self, config: TrainConfig) -> None:
        """ValueError if the steps made so far do not fit the numbers of steps in `config`."""
        before, after = (self.recipe_class.phases(c, self.spec.data) for c in (self.config, config))
        require_reachable(before, after, self.kept_steps, self.spec.run_name)

    def stop(self) -> None:
        """End after the current step, with a usable LoRA and a state to resume from."""
        self._stop.set()
        self._resume.set()

    def pause(self) -> None:
        self._resume.clear()

    def resume(self) -> None:
        self._resume.set()

    @property
    def is_over(self) -> bool:
        """Whether the run has ended. Waits for a run with a final status that is still writing its record."""
        if self.status in ENDED:
            self.ended.wait()
        return self.ended.is_set()

    def _set_status(self, status: str) -> None:
        if status != self.status:
            self.status = status
            self._show_status()

    def _show_status(self) -> None:
        self.write()
        self.moved()

    def moved(self) -> None:
        """Publish the run's new status or place in line."""
        self.publish(self, {"event": STATUS, "epoch": self.epoch})

    def _emit(self, event: Event) -> None:
        placed = self._placed(event)
        self.append(event)
        if len(self.history) >= self._advised + max(ADVISE_EVERY, self._advised // 20):
            self._advise()
        self.publish(self, placed)

    def _placed(self, event: Event) -> dict:
        """The event as published: with its index in the history, of which it is the next entry."""
        return {**to_json(event), "index": len(self.history), "epoch": self.epoch}

    def _advise(self, *more: Finding) -> None:
        history = list(self.history)
        try:
            seen = look_at(self.samples_folder, history)
            found = advise(self.recipe_class, self.config, self.spec.data, history, seen)
        except Exception:  # a failed check must not end a run
            logging.exception("Kinoloom: %s: no advice", self.spec.run_name)
            found = []
        self.advice, self._advised = [finding.to_json() for finding in (*more, *found)], len(history)

    def _run(self) -> None:
        with run_log(self.log_path):
            self._work()

    def _work(self) -> None:
        trouble: list[Finding] = []
        event: Event
        taken = False
        try:
            self._show_status()
            taken = self._take_slot()
            finished = taken and self._train()
            status, event = ("finished" if finished else "stopped"), Finished(not finished, self.done)
            logging.info("Kinoloom: %s: %s after %d of %d steps", self.spec.run_name, status, self.done, self.total)
        except BaseException as error:  # the end of the thread: the error is stored on the job
            logging.exception("Kinoloom: run %s failed", self.spec.run_name)
            trouble = [finding] if (finding := of_failure(error)) else []
            self.error = _explain(error, *trouble)
            status, event = "failed", Failed(self.error)
        self._models, self.note = {}, ""
        try:
            if taken:
                release()
        finally:
            if taken:
                self.line.release()
            self.line.leave(self)
            self._end(status, event, trouble)

    def _end(self, status: str, event: Event, trouble: list[Finding]) -> None:
        """Finish the run. Publishing comes last, because a listener may start the job again at once."""
        self.status, self.ended_at = status, time.time()
        placed = self._placed(event)
        try:
            self._advise(*trouble)
            self.append(event)
            self.write()
            write_text(self.folder / "report.html", self.report())
            self.drop_state()
        except OSError:  # the full disk that ended the run
            logging.exception("Kinoloom: run %s: its end could not be written down", self.spec.run_name)
        finally:
            self.claim.free()
            self.ended.set()
            self.publish(self, placed)
            self.moved()

    def drop_state(self) -> None:
        """Delete the state of a finished run, unless `keep_state` keeps it."""
        keep, size = self.config.keep_state, self.state_bytes
        if self.status == "finished" and (keep == "never" or (keep == "auto" and size > KEPT_BYTES)):
            self.state_path.unlink(missing_ok=True)
            logging.info("Kinoloom: %s: state of %d bytes dropped (keep_state %s)", self.spec.run_name, size, keep)

    def _take_slot(self) -> bool:
        """Wait for the run's turn. False if it was stopped while waiting."""
        while not self._stop.is_set():
            if self.line.take(self):
                return True
            self._stop.wait(POLL_SECONDS)
        return False

    def _train(self) -> bool:
        self._set_status("loading")
        self.environment = environment()
        self.make_room()
        device = torch_device()
        placement = loaded_as(self.exports.values(), self.config, device)
        models = {
            name: Private(load_private(model, device, placement), carried_files(model))
            for name, model in self._models.items()
        }
        self._models = {}  # so that the shared MODELs can be freed
        training = Training(self, models, device, placement, self._emit, self._should_stop)
        self.total = self.steps_of(self.config)
        state = self._load_state()
        self._advise()
        logging.info("Kinoloom: %s: starts at step %d of %d", self.spec.run_name, self.done, self.total)
        if self.note:
            logging.info("Kinoloom: %s: %s", self.spec.run_name, self.note)
        self._set_status("running")
        return training.go(state)

    def _load_state(self) -> State:
        """The last checkpoint, or a new state. Cuts history entries after the checkpoint, which a crash may leave."""
        state = State()
        if self.state_path.is_file():
            state, run_key = load_state(self.state_path)
            self.spec.run_key.require_same(run_key, self.spec.run_name)
        self.rewind(state.phase, state.step)
        return state

    @property
    def held(self) -> bool:
        return not self._resume.is_set() or self.busy(self)

    def _should_stop(self) -> bool:
        if self.held and not self._stop.is_set():
            self._pause()
        return self._stop.is_set()

    def _pause(self) -> None:
        """Release unused memory while the run pauses."""
        release()
        self._set_status("paused")
        while not self._stop.is_set() and self.held:
            self._stop.wait(POLL_SECONDS)
        if not self._stop.is_set():
            self.make_room()
            self._set_status("running")


def _explain(error: BaseException, tip: Finding | None = None) -> str:
    """The text of the error that ended a run, with a remedy if it is known and not in the text."""
    if tip and tip.kind == "out-of-memory":
        return f"out of memory. {tip.text} ({error})"
    text = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
    return text if tip is None or isinstance(error, Diverged) else f"{text.rstrip('.')}. {tip.text}"
