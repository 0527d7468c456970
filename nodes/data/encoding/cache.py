"""The cache of encodings on disk: its size, its limit, and the deletion of unused files."""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ....lora_io.file import write_text
from ....trainers.core.config import check, knob
from ....trainers.run.plain import require_small_file

GB = 10**9
STEM = re.compile(r"[0-9a-f]{64}")

_lock = threading.Lock()
_used: set[Path] = set()  # files used since the server started: a TRAINING_DATA value may name them


def data_folder() -> Path:
    return Path(folder_paths.get_system_user_directory("kinoloom")) / "data"


@dataclass(frozen=True)
class Limit:
    """The limit of the cache."""

    limit_gb: float = knob(50.0, "Gigabytes of encoded clips that are kept.", min=0.0, max=1_000_000.0)

    def __post_init__(self) -> None:
        check(self.__dataclass_fields__["limit_gb"], self.limit_gb)


@dataclass(frozen=True, order=True)
class File:
    last_used: float
    path: Path
    bytes: int


def use(path: Path) -> bool:
    """Whether the file exists. If so, set its access time to now and keep it as long as this server runs."""
    with _lock:
        _used.add(path)
        with suppress(OSError):
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        return path.is_file()


def limit_of(folder: Path) -> float:
    """The limit in gigabytes that the training panel has set."""
    path = _limit_path(folder)
    try:
        return Limit(**json.loads(path.read_text(encoding="utf-8"))).limit_gb if path.is_file() else Limit().limit_gb
    except (ValueError, TypeError, OSError, RecursionError) as error:
        logging.warning("Kinoloom: %s is damaged, the cache's limit is %g GB (%s)", path, Limit().limit_gb, error)
        return Limit().limit_gb


def set_limit(folder: Path, limit_gb: float) -> None:
    write_text(_limit_path(folder), json.dumps(vars(Limit(limit_gb))))


def state(folder: Path) -> dict[str, Any]:
    """Bytes on disk, bytes of unused files, and the limit."""
    files = list(_files(folder))
    free = sum(file.bytes for file in _not_needed(folder, files))
    return {"bytes": sum(file.bytes for file in files), "free_bytes": free, "limit_gb": limit_of(folder)}


def prune(folder: Path, most_bytes: float) -> int:
    """Delete the least recently used files down to `most_bytes`, except needed ones. Returns the bytes freed."""
    files = list(_files(folder))
    excess, freed = sum(file.bytes for file in files) - most_bytes, 0
    if excess <= 0:
        return 0
    for file in sorted(_not_needed(folder, files)):
        if freed >= excess:
            break
        # Windows does not delete a file that a run has open
        with _lock, suppress(OSError):
            if file.path not in _used:
                file.path.unlink()
                freed += file.bytes
    if freed:
        logging.info("Kinoloom: %.1f GB of unused encoded clips were deleted", freed / GB)
    return freed


def keep_to_limit(folder: Path) -> None:
    try:
        prune(folder, limit_of(folder) * GB)
    except OSError:
        logging.exception("Kinoloom: the cache in %s could not be kept to its limit", folder)


def _not_needed(folder: Path, files: list[File]) -> list[File]:
    """`files` without those used since this server started and those of unfinished runs of any server."""
    needed = {stem for text in _unfinished(folder.parent / "jobs") for stem in STEM.findall(text)}
    with _lock:
        used = set(_used)
    return [file for file in files if file.path not in used and file.path.name.split(".")[0] not in needed]


def _unfinished(jobs: Path) -> Iterator[str]:
    """The records of runs that may go on. An unreadable record counts: it may be such a run of another version."""
    for path in jobs.glob("*/job.json"):
        try:
            require_small_file(path)
            text = path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ValueError):  # just deleted, or not a run's record
            continue
        try:
            finished = json.loads(text)["status"] == "finished"
        except (ValueError, KeyError, TypeError, RecursionError):
            finished = False
        if not finished:
            yield text


def _files(folder: Path) -> Iterator[File]:
    for path in folder.glob("*.safetensors"):
        with suppress(FileNotFoundError):
            stat = path.stat()
            yield File(max(stat.st_atime, stat.st_mtime), path, stat.st_size)


def _limit_path(folder: Path) -> Path:
    return folder.parent / "cache.json"
