"""The runs in a folder, which other ComfyUIs may use too."""

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...trainers.run.claim import Claim, in_use
from ...trainers.run.job import Job
from ...trainers.run.record import Spec, read_record, stamp_of
from ...trainers.run.unreadable import Unreadable

NAMES_SECONDS = 10
LOOK_SECONDS = 2  # seconds between two scans of the folder


class Shelf:
    """jobs and unreadable: by id, the name of a run's folder. names: a lock, held while a run starts or is deleted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock, self.look_again = threading.RLock(), 0.0
        self.jobs: dict[str, Job] = {}
        self.unreadable: dict[str, Unreadable] = {}
        self.names = Claim(folder / "names.lock")

    def _job(self, spec: Spec) -> Job:
        """A job from its spec. ValueError if the spec is wrong."""
        raise NotImplementedError

    def find(self, job_id: str) -> Job | Unreadable | None:
        return self.jobs.get(job_id) or self.unreadable.get(job_id)

    def newest_first(self) -> list[Job | Unreadable]:
        found = [*self.jobs.copy().values(), *self.unreadable.copy().values()]
        return sorted(found, key=lambda job: -(job.created if isinstance(job, Unreadable) else job.spec.created))

    def look(self, now: bool = False) -> None:
        """Read changes to runs that are not active here, made by another ComfyUI or by hand."""
        with self.lock:
            if not now and time.monotonic() < self.look_again:
                return
            found = {path.parent.name: path.parent for path in sorted(self.folder.glob("*/job.json"))}
            for job in self.newest_first():
                if job.folder.name not in found and (isinstance(job, Unreadable) or job.ended.is_set()):
                    self.forget(job.folder.name)
            for folder in found.values():
                self._read(folder)
            self.look_again = time.monotonic() + LOOK_SECONDS

    def _read(self, folder: Path) -> None:
        known, stamp = self.find(folder.name), stamp_of(folder)
        if isinstance(known, Job) and not known.ended.is_set():
            return
        if known and known.stamp == stamp and not known.elsewhere:
            return
        try:
            kept = read_record(folder)
            job = known if isinstance(known, Job) else self._job(kept.spec)
            job.restore(kept)
            self.forget(folder.name)
            self.jobs[folder.name] = job
        except (ValueError, OSError) as error:
            logging.warning("Kinoloom: run %s cannot be read: %s", folder, error)
            self.forget(folder.name)
            job = self.unreadable[folder.name] = Unreadable(folder, str(error))
        job.stamp = stamp

    def forget(self, job_id: str) -> None:
        self.jobs.pop(job_id, None)
        self.unreadable.pop(job_id, None)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside the `with` block no other ComfyUI starts or deletes a run, and its earlier changes are read."""
        with self.lock:
            if not self.names.take(NAMES_SECONDS):
                raise ValueError("another ComfyUI with the same base directory is starting a run: try again")
            try:
                self.look(now=True)
                yield
            finally:
                self.names.free()


def require_here(job: Job | Unreadable) -> None:
    if job.elsewhere:
        raise in_use(job.spec.run_name)


def remove(folder: Path) -> None:
    """Delete a folder, or a link without its target."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
