"""Which ComfyUI a run belongs to, where several use one folder."""

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


class Claim:
    """A lock that the system frees when the process that holds it ends, however that happens.

    Where the file system has no locks, the file names its process and host instead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(str(path), thread_local=False)

    def take(self, seconds: float = 1.0) -> bool:
        """False if another process still holds it after that time."""
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
        """Whether another process holds it."""
        if self._lock.is_locked or not self.path.exists():
            return False
        if self.take(0):
            self.free()
            return False
        return True

    def remove(self) -> None:
        """Free it for good."""
        self.free()
        with suppress(OSError):
            self.path.unlink()


def claim_of(folder: Path) -> Claim:
    """A run's, beside its folder, which may go."""
    return Claim(folder.with_name(f"{folder.name}.lock"))


def in_use(run_name: str) -> ValueError:
    return ValueError(
        f"run {run_name!r} is in use by another ComfyUI with the same base directory: stop it there, wait until it "
        "ends, or choose another run name"
    )
