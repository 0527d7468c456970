"""Animated pictures (GIF, PNG, WebP, AVIF), decoded by Pillow."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from PIL import Image
from torch import Tensor

from .images import DAMAGE
from .sources import ON_WHITE, Source, file_digest, pace

ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")
BLINK, SLOW = 20, 100  # milliseconds: frames shorter than BLINK are shown for SLOW, as in web browsers


def is_animated(path: Path) -> bool:
    """Whether the file is an animated picture; also False for a file that is not a picture."""
    try:
        with _opened(path) as opened:
            return getattr(opened, "is_animated", False)
    except DAMAGE:
        return False


def animation(path: Path) -> Source:
    stat = path.stat()
    times, width, height, clear = _probe(path, stat.st_size, stat.st_mtime_ns)
    fps, uneven = pace(times, tick=0.001)
    return Source(
        path.name,
        file_digest(path),
        len(times),
        fps,
        width,
        height,
        False,
        lambda wanted: _read(path, wanted),
        uneven,
        (ON_WHITE,) if clear else (),
    )


def _opened(path: Path) -> Image.Image:
    Image.init()
    return Image.open(path, formats=[name for name in ANIMATED_FORMATS if name in Image.OPEN])


@lru_cache(maxsize=1024)
def _probe(path: Path, size: int, mtime_ns: int) -> tuple[tuple[float, ...], int, int, bool]:
    """The frames' times in milliseconds, width, height, and whether any pixel is transparent."""
    shown, clear = [], False
    for frame in _frames(path):
        shown.append(max(frame.info.get("duration") or 0, 0))
        clear = clear or frame.convert("RGBA").getextrema()[3][0] < 255
    starts = accumulate((SLOW if length < BLINK else length for length in shown[:-1]), initial=0)
    with _opened(path) as opened:
        return tuple(start / 1000 for start in starts), *opened.size, clear


def _read(path: Path, wanted: Iterable[int]) -> Iterator[Tensor]:
    numbered, number, picture = enumerate(_frames(path)), -1, None
    for index in wanted:
        while number < index:
            number, frame = next(numbered)
            picture = frame.convert("RGBA") if number == index else None
        over = Image.new("RGBA", picture.size, "white")
        over.alpha_composite(picture)
        yield torch.from_numpy(np.array(over.convert("RGB"))).float() / 255


def _frames(path: Path) -> Iterator[Image.Image]:
    try:
        with _opened(path) as opened:
            still = getattr(opened, "default_image", False)  # shown only by programs that cannot play animations
            for number in range(1 if still else 0, opened.n_frames):
                throw_exception_if_processing_interrupted()
                opened.seek(number)
                opened.load()
                yield opened
    except DAMAGE as error:
        raise ValueError(f"not a readable animation ({error})") from error
