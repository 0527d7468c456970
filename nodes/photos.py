"""Photos and folders of frames."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .sources import Source, file_digest, natural_key

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"))


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
