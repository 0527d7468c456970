"""The registry of runs, which is the pack's only module-level state, and its websocket events."""

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
from server import PromptServer

from ...lora_io.file import sweep
from ...trainers import recipes
from ...trainers.core.config import TrainConfig
from ...trainers.core.data import TrainingData
from ...trainers.core.events import DELETED
from ...trainers.core.recipe import Export
from ...trainers.host.device import holds_models
from ...trainers.host.source import ModelSource, base_key, text_keys
from ...trainers.run.checkpoint import RunKey
from ...trainers.run.claim import in_use
from ...trainers.run.job import Job
from ...trainers.run.line import Line
from ...trainers.run.previews import Previews
from ...trainers.run.record import Spec
from ...trainers.run.unreadable import Unreadable
from ..folders import WRITTEN, output_folder
from ..widgets import require_name
from .ending import before_the_end
from .naming import asked_as, goes_on, may_be_meant, same_name
from .shelf import Shelf, remove, require_here

POLL_SECONDS = 0.2
SHUTDOWN_SECONDS = 60
ROOM_SECONDS = 10
MADE_AGAIN = "Put it back, or train it again: delete the run on the Training tab, or choose another run name"


def output_folders(run_name: str, exports: dict[str, Export]) -> dict[str, str]:
    """The folder into which a run writes its exports, by model folder."""
    return {export.folder: str(output_folder(export.folder) / run_name) for export in exports.values()}


class Registry(Shelf):
    """All jobs in this ComfyUI's folder, including those of earlier servers and of other ComfyUIs with this folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.voided: list[Spec] = []  # runs that were deleted or started from the panel
        self.waiters = 0  # queued nodes that wait for a run
        self.line = Line()
        self.room_wanted = threading.Event()
        self.look(now=True)

    def change(self, job: Job | Unreadable, act: Callable[[Any], None]) -> None:
        """Run `act` on a run. ValueError if another ComfyUI is training it."""
        self.look(now=True)
        require_here(job)
        act(job)

    def _job(self, spec: Spec) -> Job:
        if spec.recipe not in recipes():
            raise ValueError(f"training method {spec.recipe[:60]!r}: unknown")
        recipe = recipes()[spec.recipe]
        job = Job(self.folder / spec.id, spec, recipe, publish, self.busy, self.line, self.make_room)
        if list(spec.sources) != (names := [model.name for model in recipe.used(job.config)]):
            raise ValueError(f"job.json.spec.sources: holds {', '.join(spec.sources)}, expected {', '.join(names)}")
        return job

    def get(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise ValueError(f"training job {job_id!r}: not found")
        return self.jobs[job_id]

    def newest(self, run_name: str) -> Job | None:
        """The last job that was requested as `run_name`, perhaps with a number added, or that has this name."""
        jobs = list(self.jobs.values())
        asked = [job for job in jobs if same_name(asked_as(job.spec), run_name)]
        return self._last(asked or [job for job in jobs if same_name(job.spec.run_name, run_name)])

    def called(self, name: str) -> Job | None:
        return self._last(job for job in list(self.jobs.values()) if same_name(job.spec.run_name, name))

    def _last(self, jobs: Iterable[Job]) -> Job | None:
        return max(jobs, key=lambda job: job.spec.created, default=None)

    def _now(self) -> float:
        """The time, but later than every run's start, so that the newest run is last even if the clock goes back."""
        return max([time.time(), *(job.spec.created + 1e-3 for job in self.jobs.values())])

    def start(
        self,
        models: dict[str, Any],
        recipe: str,
        config: TrainConfig,
        data: TrainingData,
        files: dict[str, str],
        run_name: str,
        previews: Previews | None = None,
    ) -> Job:
        """The job for these inputs: a new one, an earlier one that resumes, or a finished one.

        ValueError if a run of this name cannot resume: it names the changed inputs, or the options that do not fit.
        """
        run_name = require_name("run_name", run_name)
        sources = {name: ModelSource.of(model) for name, model in models.items()}
        run_key = RunKey.of(recipe, base_key(sources), data.digest, config, {**files, **text_keys(sources)})
        with self.alone():
            name, job = self._claim(run_name, run_key, config)
            if job is not None and not job.spec.asked_as:
                job.spec = replace(job.spec, asked_as=run_name)
            over = job is not None and job.is_over  # read once: a run that ends in between is not started again
            if job is not None and (job.status != "finished" or job.steps_of(config) > job.kept_steps):
                job.reconfigure(config, previews, run_key)
                if over:
                    job.start(models)
            elif job is None:
                outputs = output_folders(name, recipes()[recipe].exports(config, data))
                names = {"id": uuid.uuid4().hex[:12], "run_name": name, "asked_as": run_name, "created": self._now()}
                method = {"recipe": recipe, "config": vars(config), "run_key": run_key, "previews": previews}
                job = self._job(Spec(**names, **method, data=data, sources=sources, outputs=outputs))
                job.start(models)
                self.jobs[job.spec.id] = job
        return job

    def _claim(self, run_name: str, run_key: RunKey, config: TrainConfig) -> tuple[str, Job | None]:
        """The job to resume, or None and an unused name: `run_name`, with a number if it is taken."""
        name, number = run_name, 1
        while True:
            earlier = self.called(name)
            if earlier is None:
                if not any((output_folder(folder) / name).exists() for folder in WRITTEN):
                    return name, None
            elif not may_be_meant(earlier, run_name, run_key):
                pass
            elif earlier.elsewhere:
                raise in_use(earlier.spec.run_name)
            elif earlier.status == "finished":
                if goes_on(earlier, run_key, config):
                    return name, earlier
            elif earlier.resumable or not earlier.is_over:
                run_key.require_same(earlier.spec.run_key, name)
                return name, earlier
            elif not earlier.files:
                return name, None
            number += 1
            name = f"{run_name}-{number}"

    def resume(self, job: Job) -> None:
        """Resume a paused job, or an ended one from its checkpoint."""
        with self.alone():
            require_here(job)
            if not job.is_over:
                job.resume()
            elif job.resumable:
                self._start_alone(job)
            else:
                more = job.dead_end or "Run its workflow with more steps to go on."
                raise ValueError(f"run {job.spec.run_name!r} is {job.status}. {more}")

    def restart(self, job: Job) -> None:
        """Start a run again that ended before it saved anything."""
        with self.alone():
            require_here(job)
            if not job.is_over or not job.dead_end or job.files:
                name, status = job.spec.run_name, job.status
                raise ValueError(f"run {name!r} is {status}: only a run that ended and saved nothing starts again")
            job.checkpoint = 0
            self._start_alone(job)

    def free(self, job: Job) -> None:
        """Delete an ended run's state, so that it cannot go on. ValueError while it runs."""
        with self.alone():
            require_here(job)
            if not job.is_over:
                raise ValueError(f"run {job.spec.run_name!r} is {job.status}: stop it before its state is freed")
            job.state_path.unlink(missing_ok=True)
        job.moved()

    def _start_alone(self, job: Job) -> None:
        """Start a job from the panel, without its nodes. Their cached outputs are stale then."""
        for source in job.spec.sources.values():
            source.require_reloadable()
        job.start(None)
        self.voided.append(job.spec)

    def move(self, job: Job, by: int) -> None:
        """Move a job one place earlier (-1) or later (1) in line. ValueError if it is not waiting."""
        try:
            self.line.move(job, by)
        except ValueError as error:
            raise ValueError(f"run {job.spec.run_name!r} is {job.status}: {error}") from error

    def delete(self, job: Job | Unreadable) -> None:
        """Delete the record, the checkpoint and the samples, but no exports. ValueError while the run is active."""
        with self.alone():
            require_here(job)
            if not job.is_over:
                raise ValueError(f"run {job.spec.run_name!r} is {job.status}: stop it before it is deleted")
            if self.find(job.folder.name) is not job:
                return
            if not job.claim.take():
                raise in_use(job.run_name if isinstance(job, Unreadable) else job.spec.run_name)
            try:
                remove(job.folder)
            except OSError:
                job.claim.free()
                raise
            job.claim.remove()
            self.forget(job.folder.name)
            if isinstance(job, Job):
                self.voided.append(job.spec)
        announce({"job": {"id": job.folder.name}, "event": DELETED})

    def times_voided(self, run_name: str) -> int:
        """A number that changes when cached outputs of this run's nodes become stale."""
        return sum(any(same_name(run_name, name) for name in (asked_as(spec), spec.run_name)) for spec in self.voided)

    def busy(self, job: Job) -> bool:
        """Whether `job` should pause: `pause_when_busy` is on, and the queue has work other than waiting for a run."""
        working = PromptServer.instance.prompt_queue.get_tasks_remaining() > 0
        return job.config.pause_when_busy and working and not self.waiters

    def make_room(self) -> None:
        """Let the queue's thread, the only one that may, unload ComfyUI's models. Gives up if that thread is busy."""
        self.room_wanted.set()
        if not self.waiters:
            PromptServer.instance.prompt_queue.set_flag("unload_models", True)
        deadline = time.monotonic() + ROOM_SECONDS
        while holds_models() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self.room_wanted.clear()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        with self.lock:
            self.waiters += 1
        try:
            yield
        finally:
            with self.lock:
                self.waiters -= 1

    def shutdown(self) -> None:
        """Stop every running job and give it time to save."""
        running = [job for job in list(self.jobs.values()) if not job.ended.is_set()]
        for job in running:
            job.stop()
        for job in running:
            job.ended.wait(SHUTDOWN_SECONDS)


_registry: Registry | None = None


def registry() -> Registry:
    assert _registry is not None, "ComfyUI calls start_registry when it loads the pack"
    return _registry


def start_registry() -> None:
    global _registry
    own = Path(folder_paths.get_system_user_directory("kinoloom"))
    for folder in (own, *map(output_folder, WRITTEN)):
        sweep(folder)
    _registry = Registry(own / "jobs")
    before_the_end(_registry.shutdown)


def publish(job: Job, event: dict) -> None:
    announce({"job": job.summary(), **event})


def announce(message: dict) -> None:
    PromptServer.instance.send_sync("kinoloom.job", message)


def trained_file(path: str) -> str:
    """`path`. ValueError unless it is an existing export of a run."""
    known = {file for job in registry().jobs.copy().values() for file in job.files.copy().values()}
    if path not in known:
        raise ValueError(f"path={path!r}: expected the file of a training run, from Training Result")
    if not Path(path).is_file():
        raise ValueError(f"path={path!r}: not found; it was moved or deleted. {MADE_AGAIN}")
    return path
