"""Reads photos and folders of frames."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .animations import is_animated
from .images import IMAGE_SUFFIXES, Header, read_alpha, read_header, read_image
from .sources import ON_WHITE, Source, file_digest, natural_key

# Part of the cache key of images with `Header.converted`: raise it when their pixels change.
VERSION = 1
MOST_COLOUR = 0.2  # largest difference between two colour channels of a mask


def open_images(path: Path, fps: float, read: Callable[[Path], Tensor] = read_image) -> Source:
    """A photo, or a folder of frames at `fps`. `read` decodes each file."""
    is_photo, files = not path.is_dir(), images_in(path) if path.is_dir() else [path]
    if not files:
        raise ValueError("holds no images")
    headers = [read_header(file) for file in files]
    size = headers[0].width, headers[0].height
    for file, header in zip(files, headers, strict=True):
        if (header.width, header.height) != size:
            raise ValueError(
                f"{file.name} is {header.width}x{header.height}, but {files[0].name} is {size[0]}x{size[1]}: "
                "frames of a clip must have one size"
            )
    digests = [_digest(file, header, read) for file, header in zip(files, headers, strict=True)]
    digest = digests[0] if is_photo else hashlib.sha256("".join(digests).encode()).hexdigest()
    notes = [note for header in headers for note in header.notes]
    if read is read_image and any(header.transparent for header in headers):
        notes.append(ON_WHITE)
    return Source(
        path.name,
        digest,
        len(files),
        1.0 if is_photo else fps,
        *size,
        is_photo,
        lambda wanted: (read(files[index]) for index in wanted),
        notes=tuple(dict.fromkeys(notes)),
    )


def read_mask(path: Path) -> Tensor:
    """A mask image as [H, W, 3] in 0..1. Transparent parts are 0."""
    pixels = read_image(path, "black")
    if (pixels.amax(-1) - pixels.amin(-1)).max() > MOST_COLOUR:
        raise ValueError(f"{path.name} has colours, expected a mask: white where the loss counts, black elsewhere")
    return pixels


def is_transparent(path: Path) -> bool:
    return any(read_header(file).transparent for file in (images_in(path) if path.is_dir() else [path]))


def images_in(folder: Path) -> list[Path]:
    """The still images in a folder, in natural order."""
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted((file for file in files if is_image(file)), key=natural_key)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not is_animated(path)


def _digest(file: Path, header: Header, read: Callable[[Path], Tensor]) -> str:
    """A file's digest for its cache key. Images that PIL reads correctly alone keep the key of earlier versions."""
    plain = not header.converted and read is not read_alpha
    return file_digest(file) if plain else f"{file_digest(file)} {read.__name__} {VERSION}"
