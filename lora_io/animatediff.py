"""LoRA files of MotionDirector runs, by the paths of AnimateDiff's modules: `unet.` and `motion.`."""

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from .file import load
from .fitting import require_base
from .keys import MOTION, from_kohya, from_motion_lora


def read_spatial_lora(path: Path, layers: Collection[str], bases: Collection[str]) -> dict[str, Tensor]:
    """A LoRA on some of `layers` of the image model; ValueError for others, or one trained on none of `bases`."""
    tensors, metadata = load(path)
    require_base(metadata, bases)
    return from_kohya(tensors, layers)


def read_temporal_lora(path: Path, layers: Collection[str], bases: Collection[str]) -> dict[str, Tensor]:
    """A motion LoRA of whatever layers; ValueError for other files, or one trained on none of `bases`."""
    tensors, metadata = load(path)
    require_base(metadata, bases)
    return {MOTION + key: tensor for key, tensor in from_motion_lora(tensors).items()}
