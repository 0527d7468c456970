"""Opens torch files, as `torch.save` writes them, and reads tensors only."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


class Pickled:
    """A torch file of named tensors, bare or under "state_dict". Code in it is never run.

    ValueError says in one sentence that the file is missing, damaged or not such a file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"file {path}: not found")
        try:  # a mapped file is read tensor by tensor; files of torch before 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception:  # torch raises many types for a damaged pickle, and advises to turn off its safeguard
            raise ValueError(
                f"file {path}: not a readable torch file. It is damaged, or holds more than tensors, which is never "
                "opened"
            ) from None
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
