"""Image files: colours, bit depths, transparency, and files that are not images."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from kinoloom.nodes.data.reading import folder, images, photos
from PIL import Image

from . import icc


def pixel(path: Path, x: int = 0, y: int = 0) -> list[int]:
    """The colour of a pixel as it is trained on, of 255."""
    (frame,) = folder.open_source(path, 1.0).frames([0])
    return (frame[y, x] * 255).round().int().tolist()


def row(path: Path) -> list[int]:
    (frame,) = folder.open_source(path, 1.0).frames([0])
    return (frame[0, :, 0] * 255).round().int().tolist()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "avif"])
@pytest.mark.parametrize(("matrix", "gamma"), [(icc.P3, 0), (icc.ADOBE, 563 / 256)])
def test_colours_of_a_profile_become_srgb(tmp_path: Path, suffix: str, matrix: np.ndarray, gamma: float) -> None:
    colour, path = (190, 80, 60), tmp_path / f"wide.{suffix}"
    Image.new("RGB", (16, 16), colour).save(path, icc_profile=icc.rgb_profile(matrix, gamma), quality=100)
    expected = icc.in_srgb(colour, matrix, gamma)
    assert np.abs(expected - colour).max() > 12
    assert np.abs(expected - pixel(path)).max() <= 3


def test_display_p3_of_a_phone(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), (200, 60, 40)).save(path, icc_profile=icc.rgb_profile(icc.P3, 0))
    assert np.abs(np.array(pixel(path)) - (217, 42, 23)).max() <= 4


def test_inks_follow_their_profile(tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(path, icc_profile=icc.ink_profile(), quality=100)
    assert np.abs(np.array(pixel(path)) - 119).max() <= 3  # lightness 50
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(path, quality=100)
    assert np.abs(np.array(pixel(path)) - (0, 255, 255)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_follows_its_profile(tmp_path: Path, mode: str) -> None:
    path, value = tmp_path / "grey.png", {"L": 100, "LA": (100, 255), "I;16": 25700}[mode]
    Image.new(mode, (4, 4), value).save(path, icc_profile=icc.grey_profile(1.0))
    assert pixel(path) == pytest.approx([168] * 3, abs=2)


def test_palettes_follow_their_profile(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4), (190, 80, 60)).quantize(4)
    picture.save(tmp_path / "a.png", icc_profile=icc.rgb_profile(icc.P3, 0))
    assert np.abs(icc.in_srgb((190, 80, 60), icc.P3, 0) - pixel(tmp_path / "a.png")).max() <= 3


def test_lab_becomes_srgb(tmp_path: Path) -> None:
    Image.new("LAB", (4, 4), (128, 128, 128)).save(tmp_path / "a.tif")
    assert pixel(tmp_path / "a.tif") == pytest.approx([119] * 3, abs=2)


def test_a_grey_photo_may_have_a_profile_of_colours(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 100).save(tmp_path / "a.jpg", icc_profile=icc.rgb_profile(icc.P3, 1.0), quality=100)
    assert pixel(tmp_path / "a.jpg") == pytest.approx([168] * 3, abs=2)


@pytest.mark.parametrize("profile", [b"no profile at all", icc.ink_profile(), icc.grey_profile(2.2)])
def test_a_profile_that_does_not_fit_is_said(tmp_path: Path, profile: bytes) -> None:
    Image.new("RGB", (4, 4), (10, 20, 30)).save(tmp_path / "a.png", icc_profile=profile)
    assert folder.open_source(tmp_path / "a.png", 1.0).notes == (images.BAD_PROFILE,)
    assert pixel(tmp_path / "a.png") == [10, 20, 30]


def test_colours_that_a_camera_or_a_png_says_without_a_profile_are_said(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    Image.new("RGB", (4, 4)).save(tmp_path / "camera.jpg", exif=exif)
    png(tmp_path / "linear.png", 8, 2, (1, 1), bytes(3), before=(b"gAMA", struct.pack(">I", 100000)))
    png(tmp_path / "usual.png", 8, 2, (1, 1), bytes(3), before=(b"gAMA", struct.pack(">I", 45455)))
    for name, said in (("camera.jpg", True), ("linear.png", True), ("usual.png", False)):
        assert (images.NO_PROFILE in folder.open_source(tmp_path / name, 1.0).notes) == said, name


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_grey_of_16_bits_is_scaled(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray(np.array([[0, 129, 12000, 40000, 65535]], np.uint16)).save(path)
    assert row(path) == [0, 1, 47, 156, 255]


def test_tiff_of_16_bits_may_start_with_the_high_byte_or_mean_white_by_0(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 12000, 65535)).save(tmp_path / "high.tif")
    assert row(tmp_path / "high.tif") == [47, 255]
    Image.fromarray(np.array([[0, 12000]], np.uint16)).save(tmp_path / "white.tif", tiffinfo={262: 0})
    assert row(tmp_path / "white.tif") == [255, 208]


def png(
    path: Path, depth: int, kind: int, size: tuple[int, int], pixels: bytes, before: tuple = (), after: tuple = ()
) -> Path:
    """A PNG whose lines of pixels are all the same, with a chunk before or after the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    body = zlib.compress((b"\0" + pixels) * size[1], 9)
    head = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", head), before, (b"IDAT", body), after, (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts if part))
    return path


def test_colours_of_16_bits_are_scaled(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", 16, 2, (1, 1), struct.pack(">HHH", 12000, 40000, 65535))
    assert pixel(path) == pytest.approx([46.7, 155.6, 255], abs=1)
    path = png(tmp_path / "a.png", 16, 6, (1, 1), struct.pack(">HHHH", 12000, 40000, 65535, 65535))
    assert pixel(path) == pytest.approx([46.7, 155.6, 255], abs=1)


def test_grey_of_floats_is_scaled_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, 0.25, 1]], np.float32)).save(path)
    assert row(path) == [0, 64, 255]
    for value in (1.5, -0.1, np.nan):
        Image.fromarray(np.array([[0, value]], np.float32)).save(path)
        with pytest.raises(ValueError, match=r"a\.tif .*expected 0 to 1"):
            row(path)


def test_palettes_and_two_colours(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([250, 40, 10, 10, 90, 200])
    picture.putpixel((1, 0), 1)
    for name in ("a.png", "a.gif", "a.bmp", "a.tif"):
        picture.save(tmp_path / name)
        assert [pixel(tmp_path / name, x) for x in (0, 1)] == [[250, 40, 10], [10, 90, 200]]
    two = Image.new("1", (2, 1))
    two.putpixel((1, 0), 1)
    for name in ("b.png", "b.tif", "b.pbm"):
        two.save(tmp_path / name)
        assert row(tmp_path / name) == [0, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_transparent_parts_are_white_and_opaque_ones_as_they_are(tmp_path: Path, mode: str) -> None:
    path, options = tmp_path / "a.png", {}
    if mode in ("RGBA", "LA"):
        picture = Image.new("RGBA", (3, 1), (80, 80, 80, 255)).convert(mode)
        picture.putalpha(Image.fromarray(np.array([[255, 0, 128]], np.uint8)))
        expected = [80, 255, 167]
    else:
        greys = np.array([[80, 30, 80]], np.uint16) * (257 if mode == "I;16" else 1)
        picture = Image.fromarray(greys if mode == "I;16" else greys.astype(np.uint8))
        picture = picture.convert("RGB").quantize(4) if mode == "P" else picture.convert(mode)
        hidden = picture.getpixel((1, 0))
        options, expected = {"transparency": hidden}, [80, 255, 80]
    picture.save(path, **options)
    assert row(path) == pytest.approx(expected, abs=1)
    assert folder.open_source(path, 1.0).notes == (photos.ON_WHITE,)
    (mask,) = photos.open_images(path, 1.0, images.read_alpha).frames([0])
    assert (mask[0, :, 1] * 255).round().int().tolist() == [255, 0, 128 if "A" in mode else 255]


def test_transparent_colours_of_a_profile_are_converted_first(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture = Image.new("RGBA", (2, 1), (200, 60, 40, 255))
    picture.putpixel((1, 0), (255, 0, 255, 0))
    picture.save(path, icc_profile=icc.rgb_profile(icc.P3, 0))
    assert pixel(path) == pytest.approx([217, 42, 23], abs=4) and pixel(path, 1) == [255] * 3


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "P", "1", "F", "CMYK", "RGBA"])
def test_every_kind_is_turned_upright(tmp_path: Path, mode: str) -> None:
    path, exif = tmp_path / "a.tif", Image.Exif()
    exif[0x0112] = 8
    picture = Image.new(mode, (6, 4))
    picture.save(path, exif=exif)
    source = folder.open_source(path, 1.0)
    assert (source.width, source.height) == (4, 6)
    assert [frame.shape for frame in source.frames([0])] == [(6, 4, 3)]


def test_a_png_may_say_behind_its_pixels_which_way_is_up(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")
    path = png(tmp_path / "a.png", 8, 2, (6, 4), bytes(18), after=turned)
    source = folder.open_source(path, 1.0)
    assert (source.width, source.height) == (4, 6)
    assert [frame.shape for frame in source.frames([0])] == [(6, 4, 3)]


def test_a_huge_image_is_measured_without_decoding_and_decoded_small(tmp_path: Path) -> None:
    """A PNG whose lines do not match its header, which only decoding finds."""
    broken = png(tmp_path / "broken.png", 1, 0, (13000, 13000), bytes(3))
    assert (images.read_header(broken).width, images.read_header(broken).height) == (13000, 13000)
    whole = png(tmp_path / "whole.png", 1, 0, (9600, 9000), b"\xff" * 600 + b"\0" * 600)
    source = folder.open_source(whole, 1.0)
    (frame,) = source.frames([0])
    assert (source.width, source.height, frame.shape) == (9600, 9000, (4500, 4800, 3))
    assert torch.equal(frame[0, :, 0], torch.tensor([1.0] * 2400 + [0.0] * 2400))


def test_a_bomb_is_refused_even_if_another_pack_switches_the_limit_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = png(tmp_path / "bomb.png", 1, 0, (100_000, 100_000), b"\0")
    for limit in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"bomb\.png is not a readable image"):
            folder.open_source(path, 1.0)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff", "a.gif"])
@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(ran) == showpage\n",
        b"a text",
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"P6 99999 99999 255\n",
    ],
)
def test_what_is_no_image_is_named_and_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *_, **__: pytest.fail("started a program"))
    with pytest.raises(ValueError, match=r"^a\.\w+ is not a readable image \([^\n]+\)$"):
        photos.open_images(path, 1.0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "tif", "gif", "bmp", "jp2"])
def test_damaged_images_are_named(tmp_path: Path, suffix: str) -> None:
    random = np.random.default_rng(0)
    picture, path = Image.fromarray(random.integers(0, 255, (40, 40, 3), np.uint8)), tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path, **({} if suffix in ("gif", "bmp", "jp2") else {"exif": exif}))
    whole, refused = path.read_bytes(), 0
    for _ in range(150):
        damaged = bytearray(whole[: random.integers(8, len(whole))] if random.random() < 0.3 else whole)
        for place in random.integers(4, len(damaged), 8):
            damaged[place % 200 if random.random() < 0.7 and len(damaged) > 200 else place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            photos.is_image(path)
            list(photos.open_images(path, 1.0).frames([0]))
        except ValueError as error:
            assert str(error).startswith(f"a.{suffix} is not a readable image")
            refused += 1
    assert refused
