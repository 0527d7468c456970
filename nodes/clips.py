"""Frames read one after the other, from a video file, a folder of frames, a photo or a tensor."""

import hashlib
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..lora_io.file import sha256

VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"))
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"))


@dataclass(frozen=True)
class Source:
    """Frames of one size. `frames(indices)` takes ascending indices (an index may repeat), gives [H, W, 3] in 0..1."""

    name: str
    digest: str
    count: int
    fps: float
    width: int
    height: int
    photo: bool
    frames: Callable[[Iterable[int]], Iterator[Tensor]]


def open_source(path: Path, frames_fps: float) -> Source:
    """A video, a photo, or a folder of frames shown at `frames_fps`. ValueError says why a file cannot be read."""
    if path.is_dir():
        return frames_folder(path, frames_fps)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return photo(path)
    return video(path)


def video(path: Path) -> Source:
    stat = path.stat()
    fps, width, height, count = _probe_video(path, stat.st_size, stat.st_mtime_ns)
    return Source(
        path.name, file_digest(path), count, fps, width, height, False, lambda wanted: _read_video(path, wanted)
    )


def frames_folder(path: Path, fps: float) -> Source:
    files = images_in(path)
    if not files:
        raise ValueError("holds no images")
    sizes = [image_size(file) for file in files]
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise ValueError(
                f"{file.name} is {size[0]}x{size[1]}, but {files[0].name} is {sizes[0][0]}x{sizes[0][1]}: "
                "frames of a clip must have one size"
            )
    digest = hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()
    return Source(
        path.name,
        digest,
        len(files),
        fps,
        *sizes[0],
        False,
        lambda wanted: (read_image(files[index]) for index in wanted),
    )


def photo(path: Path) -> Source:
    height, width = read_image(path).shape[:2]
    return Source(
        path.name, file_digest(path), 1, 1.0, width, height, True, lambda wanted: (read_image(path) for _ in wanted)
    )


def from_tensor(name: str, images: Tensor, fps: float) -> Source:
    """Frames in memory, [F, H, W, C] in 0..1; a mask [F, H, W] counts as grey."""
    if images.ndim == 3:
        images = images.unsqueeze(-1).expand(*images.shape, 3)
    elif images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(f"frames have shape {tuple(images.shape)}: expected frames, height, width, colours")
    images = images[..., :3].expand(*images.shape[:3], 3).float().cpu().contiguous()
    count, height, width, _ = images.shape
    digest = hashlib.sha256(repr(tuple(images.shape)).encode() + images.numpy().tobytes()).hexdigest()
    return Source(name, digest, count, fps, width, height, count == 1, lambda wanted: (images[i] for i in wanted))


def natural_key(path: Path) -> list[int | str]:
    """Sorts 2.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name.casefold())]


def images_in(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted((file for file in files if file.suffix.lower() in IMAGE_SUFFIXES), key=natural_key)


def read_image(path: Path) -> Tensor:
    """[H, W, 3] in 0..1, turned upright as its EXIF data says."""
    try:
        with Image.open(path) as opened:
            pixels = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    # PIL reports a damaged file with whatever its decoder ran into
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name} is not a readable image ({error})") from error
    return torch.from_numpy(pixels).float() / 255


def image_size(path: Path) -> tuple[int, int]:
    """Width and height without decoding the image."""
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            return (height, width) if opened.getexif().get(0x0112, 1) >= 5 else (width, height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name} is not a readable image ({error})") from error


def file_digest(path: Path) -> str:
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    return sha256(path)


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
