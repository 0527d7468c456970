"""A clip's frames, read in order from a file or from memory."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import torch
from torch import Tensor

from ....lora_io.file import sha256

ON_WHITE = "its transparent parts are shown white"


@dataclass(frozen=True)
class Source:
    """Frames of one size. `frames(indices)` yields [H, W, 3] in 0..1 for ascending indices, which may repeat.

    notes: remarks for the user about how the file is read.
    """

    name: str
    digest: str
    count: int
    fps: float
    width: int
    height: int
    photo: bool
    frames: Callable[[Iterable[int]], Iterator[Tensor]]
    times: tuple[float, ...] = ()  # each frame's seconds after the first, if frames are not `1 / fps` apart
    notes: tuple[str, ...] = ()


def pace(times: Sequence[float], rates: Iterable[float] = (), *, tick: float) -> tuple[float, tuple[float, ...]]:
    """The frame rate, and the times if they are uneven. `tick` is their resolution in seconds.

    The first of `rates` that fits the times is used. Uneven times get their average rate.
    """
    own = (len(times) - 1) / times[-1] if len(times) > 1 else 0.0
    for rate in (*rates, own):
        if rate > 0 and all(abs(time - index / rate) <= tick for index, time in enumerate(times)):
            return rate, ()
    return (own, tuple(times)) if own else (1.0, ())


def mirrored(source: Source) -> Source:
    """The same frames, each mirrored left to right."""
    return replace(
        source,
        name=f"{source.name} (mirrored)",
        digest=f"{source.digest} mirrored",
        frames=lambda wanted: (frame.flip(1) for frame in source.frames(wanted)),
    )


def over_white(pixels: Tensor) -> Tensor:
    """RGBA [..., 4] over a white background as RGB [..., 3]. Opaque pixels are unchanged to the bit."""
    return torch.lerp(torch.ones(()), pixels[..., :3], pixels[..., 3:])


def from_tensor(name: str, images: Tensor, fps: float) -> Source:
    """Frames in memory, [F, H, W, C] in 0..1. A mask [F, H, W] is read as grey frames."""
    clear = images.ndim == 4 and images.shape[-1] == 4 and bool((images[..., 3] < 1).any())
    if images.ndim == 3:
        images = images.unsqueeze(-1).expand(*images.shape, 3)
    elif images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(f"frames have shape {tuple(images.shape)}: expected frames, height, width, colours")
    images = images.float().cpu()
    images = over_white(images) if clear else images[..., :3].expand(*images.shape[:3], 3).contiguous()
    count, height, width, _ = images.shape
    digest = hashlib.sha256(repr(tuple(images.shape)).encode() + images.numpy().tobytes()).hexdigest()
    notes = (ON_WHITE,) if clear else ()
    return Source(
        name, digest, count, fps, width, height, count == 1, lambda wanted: (images[i] for i in wanted), notes=notes
    )


def natural_key(path: Path) -> list[int | str]:
    """A sort key that puts 2.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name.casefold())]


def file_digest(path: Path) -> str:
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    return sha256(path, comfy.model_management.throw_exception_if_processing_interrupted)
