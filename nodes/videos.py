"""Videos, decoded by ffmpeg."""

from collections.abc import Generator, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import torch
from torch import Tensor

from .animations import animation, is_animated
from .sources import Source, file_digest

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .3gp .mkv .webm .avi .mts .m2ts .ts .mpg .mpeg .wmv .flv .ogv .gif .apng".split()
)


def video(path: Path) -> Source:
    if is_animated(path):
        return animation(path)
    stat = path.stat()
    fps, width, height, count = _probe_video(path, stat.st_size, stat.st_mtime_ns)
    return Source(
        path.name, file_digest(path), count, fps, width, height, False, lambda wanted: _read_video(path, wanted)
    )


@lru_cache(maxsize=1024)
def _probe_video(path: Path, size: int, mtime_ns: int) -> tuple[float, int, int, int]:
    """Frame rate, width, height and number of frames; the number is known only after decoding all of them."""
    meta, decoded = _decode(path, pix_fmt="gray", bits_per_pixel=8)
    count = sum(1 for _ in decoded)
    if not count:
        raise ValueError("holds no video frames")
    if not meta["fps"]:
        raise ValueError("does not say its frame rate")
    return meta["fps"], *meta["size"], count


def _read_video(path: Path, wanted: Iterable[int]) -> Iterator[Tensor]:
    meta, decoded = _decode(path)
    width, height = meta["size"]
    numbered, number, frame = enumerate(decoded), -1, b""
    try:
        for index in wanted:
            while number < index:
                number, frame = next(numbered, (index, b""))
            if not frame:
                raise ValueError(f"{path.name} ended before frame {index}")
            yield torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, 3).float() / 255
    finally:
        decoded.close()


def _decode(path: Path, **options: Any) -> tuple[dict[str, Any], Generator[bytes, None, None]]:
    """ffmpeg's decoder: what it says about the video, and its frames at a constant rate, upright, one at a time."""
    decoded = imageio_ffmpeg.read_frames(str(path), **options)
    frames = _readable(decoded)
    return next(frames), frames


def _readable(decoded: Iterator[Any]) -> Generator[Any, None, None]:
    try:
        yield from decoded
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"not a readable video ({reason})") from error
