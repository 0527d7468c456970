"""Models kept as their small differences from others: six bits for each weight, in a compressed file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LEVELS = 31  # of a difference's size, in parts of the largest in its row


def write(target: Path, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """What `unpack` needs to make `after` of `before`, to a few percent of their differences."""
    kept = {}
    for name, value in after.items():
        difference = (value - before[name]).detach().float().cpu().reshape(len(value), -1)
        largest = difference.abs().amax(1, keepdim=True).clamp(min=1e-12)
        kept[f"{name}:steps"] = (difference / largest * LEVELS).round().to(torch.int8).numpy()
        kept[f"{name}:largest"] = largest.numpy()
    np.savez_compressed(target, **kept)


def unpack(source: Path, part: str, base: Path, target: Path) -> None:
    """Write the model, in half precision, whose differences from the file `base` are in `source` under `part`."""
    with np.load(source) as kept:
        made = {
            name: (value.float() + _difference(kept, f"{part}.{name}").view_as(value)).half()
            for name, value in load_file(base).items()
        }
    save_file(made, target)


def _difference(kept: Mapping[str, np.ndarray], name: str) -> Tensor:
    steps, largest = (torch.from_numpy(kept[f"{name}:{kind}"]).float() for kind in ("steps", "largest"))
    return steps / LEVELS * largest
