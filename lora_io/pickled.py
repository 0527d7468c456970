"""Opens torch files, as `torch.save` writes them, and reads tensors only."""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def unpickled(path: Path) -> Any:
    """What a torch file holds, on the CPU. Code in it is never run.

    ValueError says in one sentence that the file is missing, or damaged or more than tensors.
    """
    if not path.is_file():
        raise ValueError(f"file {path}: not found")
    try:  # a mapped file is read tensor by tensor; files of torch before 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:  # torch raises many types for a damaged pickle, and advises to turn off its safeguard
        raise ValueError(
            f"file {path}: not a readable torch file. It is damaged, or holds more than tensors, which is never opened"
        ) from None


class Pickled:
    """A torch file of named tensors, bare or under "state_dict". ValueError for another file, as of `unpickled`."""

    def __init__(self, path: Path) -> None:
        found = unpickled(path)
        found = found.get("state_dict", found) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            raise ValueError(f"file {path}: holds no named tensors, expected those of a model or an adapter")
        self._tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach().clone()

    def metadata(self) -> dict[str, str]:
        return {}
