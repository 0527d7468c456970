"""Reads image files: the formats that are allowed, their headers, and their pixels in sRGB."""

import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import comfy.model_management
import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

# Only these formats are opened, whatever the suffix says: PIL would start Ghostscript for an EPS file.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "GIF")
IMAGE_SUFFIXES = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".avifs")
    + (".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".gif")
)
MOST_PIXELS = 178_956_970  # PIL's own limit, which other node packs may turn off
LARGE = 2**26  # pixels; larger images are reduced by an integer factor before conversion to float
# The exceptions that PIL's decoders raise for damaged files.
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)
DAMAGE += (AttributeError, struct.error, zlib.error, Image.DecompressionBombError)
GREY = "1LIF"  # first letters of PIL's grey modes; LAB images have a colour profile
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of an ICC profile to PIL's mode
BAD_PROFILE = "its colour profile does not fit; its colours are read as sRGB"
NO_PROFILE = "it says that its colours are not sRGB, but has no colour profile; they are read as sRGB"
MORE_PAGES = "it has several pages; only the first is read"


@dataclass(frozen=True)
class Header:
    """Facts from an image's header: its upright size, and notes for the user about how it is read.

    converted: whether reading does more than PIL's plain conversion to RGB.
    """

    width: int
    height: int
    transparent: bool
    converted: bool
    notes: tuple[str, ...]


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The image with only its header read. ValueError names a file that is damaged or not an image."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    try:
        # opened as a file object: given a path, PIL maps TIFFs into memory and scrambles rotated ones
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if math.prod(image.size) > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, expected at most {MOST_PIXELS} in all")
            yield image
    except UnidentifiedImageError:
        raise ValueError(f"{path.name} is not a readable image (expected one of {', '.join(FORMATS)})") from None
    except DAMAGE as error:
        raise ValueError(f"{path.name} is not a readable image ({error})") from error


def read_header(path: Path) -> Header:
    with opened(path) as image:
        width, height = image.size
        # PIL turns TIFFs upright by itself
        if image.format != "TIFF" and _exif(path, image).get(0x0112) in (5, 6, 7, 8):
            width, height = height, width
        icc = image.info.get("icc_profile")
        profile, transparent = _profile(image.mode, icc), image.has_transparency_data
        notes = [BAD_PROFILE] if icc and not profile else []
        if not icc and _says_other_colours(path, image):
            notes.append(NO_PROFILE)
        if image.format == "TIFF" and image.n_frames > 1:
            notes.append(MORE_PAGES)
        converted = bool(profile) or transparent or image.mode[0] in "IF" or width * height > LARGE
        if image.format == "PNG":
            image.verify()  # finds a truncated file without decoding it
    return Header(width, height, transparent, converted, tuple(notes))


def _says_other_colours(path: Path, image: Image.Image) -> bool:
    """Whether the file is marked as not sRGB: by a camera's Adobe RGB mark or a PNG's gamma."""
    marked = str(_exif(path, image).get_ifd(ExifTags.IFD.Interop).get(1)).startswith("R03")
    return marked or ("srgb" not in image.info and abs(image.info.get("gamma", 1 / 2.2) - 1 / 2.2) > 0.01)


def _exif(path: Path, image: Image.Image) -> Image.Exif:
    """EXIF data. In a PNG it may follow the pixels, where PIL would decode the image to find it."""
    if image.format != "PNG" or "exif" in image.info:
        return image.getexif()
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                image.info["exif"] = file.read(length)
                break
            file.seek(length + 4, os.SEEK_CUR)
    return Image.Image.getexif(image)


def read_image(path: Path, ground: str = "white") -> Tensor:
    """Pixels [H, W, 3] in 0..1, sRGB, upright by the EXIF orientation, transparent parts over the colour `ground`."""
    with _decoded(path) as (image, icc):
        pixels = _srgb(image, icc)
        if image.has_transparency_data:
            pixels = Image.composite(pixels, Image.new(pixels.mode, pixels.size, ground), _alpha(image))
        return _tensor(pixels)


def read_alpha(path: Path) -> Tensor:
    """The alpha channel as [H, W, 3] in 0..1, upright, 1 where the image is opaque."""
    with _decoded(path) as (image, _):
        return _tensor(_alpha(image))


@contextmanager
def _decoded(path: Path) -> Iterator[tuple[Image.Image, bytes | None]]:
    """The upright image with 8 bits per channel, and its colour profile."""
    with opened(path) as image:
        icc = image.info.get("icc_profile")
        ImageOps.exif_transpose(image, in_place=True)
        yield _eight_bits(image), icc


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey images of more than 8 bits, which PIL would clip at 255."""
    if image.mode[0] not in "IF":
        return image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image
    values, tags = np.asarray(image), image.tag_v2 if image.format == "TIFF" else {}
    full = 1.0 if image.mode == "F" else 2.0 ** (12 if tags.get(258) == (12,) else 16) - 1
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= full:
        raise ValueError(f"its grey values range from {low:g} to {high:g}, expected 0 to {full:g}")
    scaled = (values * np.float32(255 / full) + np.float32(0.5)).astype(np.uint8)
    grey = Image.fromarray(255 - scaled if tags.get(262) == 0 else scaled)  # 262: 0 means white
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _profile(mode: str, icc: bytes | None) -> ImageCms.ImageCmsProfile | None:
    """The ICC profile; None if it is missing, damaged, or for another colour space than the image's."""
    if mode == "LAB":
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    if not icc:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(icc))
        space = SPACES.get(profile.profile.xcolor_space.strip())
        ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), space, "RGB")
    except (*DAMAGE, ImageCms.PyCMSError):
        return None
    own = "CMYK" if mode == "CMYK" else "L" if mode[0] in GREY else "RGB"
    return profile if space == own or (space, own) == ("RGB", "L") else None


def _srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """The image in sRGB, or in grey if that gives the same pixels."""
    profile = _profile(image.mode, icc)
    if not profile:
        return image.convert("L" if image.mode[0] in GREY else "RGB")
    mode = SPACES.get(profile.profile.xcolor_space.strip(), "LAB")
    return ImageCms.profileToProfile(image.convert(mode), profile, ImageCms.createProfile("sRGB"), outputMode="RGB")


def _alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A")


def _tensor(image: Image.Image) -> Tensor:
    if image.width * image.height > LARGE:
        image = image.reduce(math.ceil(math.sqrt(image.width * image.height / LARGE)))
    return torch.from_numpy(np.array(image.convert("RGB"))).float().div_(255)
