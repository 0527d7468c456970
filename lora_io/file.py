"""Atomic file writes: each file is written under a temporary name and then renamed, so it is complete or absent."""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.part")
ABANDONED = 3600  # seconds without a write: a save that is still running writes more often


class SaveError(OSError):
    """A file could not be written; the previous version, if there was one, is untouched."""


def atomic_write(path: Path, write: Callable[[str], object]) -> None:
    """Run `write(temporary_path)`, flush it to disk and rename it to `path`.

    Raises SaveError (disk full, no permission, ...), leaving an earlier file at `path` as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(str(temporary))
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    # safetensors and torch report a failed write with their own exception types
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise SaveError(f"cannot write {path}: {error}. The previous version, if any, is kept.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def sweep(folder: Path) -> None:
    """Delete the temporary files of killed saves in a folder and its subfolders: those not written to for an hour."""
    for path in folder.rglob(".*.part"):
        with suppress(OSError):
            stat = path.lstat()
            if TEMPORARY.fullmatch(path.name) and S_ISREG(stat.st_mode) and time.time() - stat.st_mtime > ABANDONED:
                path.unlink()
                logging.info("Kinoloom: %s of a killed save was deleted, %d bytes", path, stat.st_size)


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; tensors are made contiguous and moved to the CPU."""
    cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    atomic_write(path, lambda temporary: safetensors.torch.save_file(cpu, temporary, metadata=metadata))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; ValueError names a file that is missing or damaged."""
    with open_tensors(path) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}


def load_names(path: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors, and metadata, of a safetensors file; ValueError as in `load`."""
    with open_tensors(path) as opened:
        return list(opened.keys()), opened.metadata() or {}


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """An open safetensors file, of which tensors are read one by one; ValueError as in `load`."""
    if not path.is_file():
        raise ValueError(f"file {path}: not found")
    try:
        with safetensors.safe_open(str(path), framework="pt") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise ValueError(f"file {path}: not a readable safetensors file ({error})") from error


def copy_renamed(source: Path, path: Path, names: dict[str, str], metadata: dict[str, str]) -> None:
    """Copy the safetensors file `source` atomically, each tensor `name` renamed to `names[name]`, bytes unchanged.

    Only the header is read into memory. https://huggingface.co/docs/safetensors/index#format
    """
    with open(source, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        entries = {names[name]: entry for name, entry in header.items() if name != "__metadata__"}
        text = json.dumps({"__metadata__": metadata, **entries}).encode()
        text += b" " * (-len(text) % 8)

        def write(temporary: str) -> None:
            with open(temporary, "wb") as target:
                target.write(len(text).to_bytes(8, "little") + text)
                shutil.copyfileobj(opened, target, 1 << 22)

        atomic_write(path, write)


def free_path(folder: Path, name: str) -> Path:
    """folder/name.safetensors, or name-2, name-3, ... if that file exists."""
    names = (f"{name}.safetensors", *(f"{name}-{number}.safetensors" for number in range(2, 1000)))
    return next(folder / file for file in names if not (folder / file).exists())


def sha256(path: Path, each_block: Callable[[], None] = lambda: None) -> str:
    """The file's SHA-256. `each_block` is called before each 4 MiB and may raise to stop."""
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 22):
            each_block()
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """A hash of a large model file's size and of 64 evenly spaced MiB, the first and last included."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as opened:
        for i in range(64):
            opened.seek(max(size - (1 << 20), 0) * i // 63)
            digest.update(opened.read(1 << 20))
    return digest.hexdigest()
