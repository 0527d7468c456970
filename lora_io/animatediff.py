"""Reads MotionDirector's LoRA files. Keys become AnimateDiff's module paths, which start with `unet.` or `motion.`."""

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from .file import load
from .fitting import require_base
from .keys import MOTION, from_kohya, from_motion_lora


def read_spatial_lora(path: Path, layers: Collection[str], bases: Collection[str]) -> dict[str, Tensor]:
    """An image model's LoRA. ValueError if it has layers outside `layers` or was trained on a base not in `bases`."""
    tensors, metadata = load(path)
    require_base(metadata, bases)
    return from_kohya(tensors, layers)


def read_temporal_lora(path: Path, layers: Collection[str], bases: Collection[str]) -> dict[str, Tensor]:
    """A motion LoRA with any layers. ValueError for other files, or if it was trained on a base not in `bases`."""
    tensors, metadata = load(path)
    require_base(metadata, bases)
    return {MOTION + key: tensor for key, tensor in from_motion_lora(tensors).items()}
