"""Locks a run for one ComfyUI process, because several may use the same folder."""

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


class Claim:
    """A file lock, which the operating system releases when its process ends in any way.

    On file systems without locks the file names the process and host that hold it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(str(path), thread_local=False)

    def take(self, seconds: float = 1.0) -> bool:
        """Take the lock. Returns False if another process still holds it after `seconds`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=seconds, poll_interval=0.02)
        except Timeout:
            return False
        return True

    def free(self) -> None:
        self._lock.release()

    @property
    def elsewhere(self) -> bool:
        """Whether another process holds the lock."""
        if self._lock.is_locked or not self.path.exists():
            return False
        if self.take(0):
            self.free()
            return False
        return True

    def remove(self) -> None:
        """Release the lock and delete its file."""
        self.free()
        with suppress(OSError):
            self.path.unlink()


def claim_of(folder: Path) -> Claim:
    """The lock of a run. Its file is beside the run's folder, so that the folder can be deleted."""
    return Claim(folder.with_name(f"{folder.name}.lock"))


def in_use(run_name: str) -> ValueError:
    return ValueError(
        f"run {run_name!r} is in use by another ComfyUI with the same base directory: stop it there, wait until it "
        "ends, or choose another run name"
    )
