"""Reading moving files: their times, their pixels, and what is no video."""

from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from kinoloom.nodes import framing, sources, videos
from PIL import Image


def lit(source: sources.Source, indices: list[int]) -> list[int]:
    """Which column of each frame is lit: the time, in files that `moment` wrote."""
    return [int(frame[..., 0].mean(0).argmax()) for frame in source.frames(indices)]


def moment(time: int, size: int = 64) -> np.ndarray:
    """A frame in which the column number `time` is lit."""
    frame = np.zeros((size, size, 3), np.uint8)
    frame[:, time % size] = 255
    return frame


def write_animation(path: Path, lengths: list[int], **options: object) -> Path:
    """Frames that last `lengths` of 50 ms, each lit at its own time."""
    starts = accumulate(lengths[:-1], initial=0)
    pictures = [Image.fromarray(moment(start)) for start in starts]
    shown = [50 * length for length in lengths]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=shown, loop=0, **options)
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
def test_animated_picture_is_a_clip_that_keeps_its_times(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    path = write_animation(tmp_path / name, [1, 1, 4, 2, 12, 1, 3], **options)
    assert videos.is_animated(path)
    source = videos.video(path)
    assert (source.count, source.width, source.height, source.photo) == (7, 64, 64, False)
    assert lit(source, list(range(7))) == [0, 1, 2, 6, 8, 20, 21]
    assert lit(source, framing.resample(source, 20)) == [0, 1, *[2] * 4, 6, 6, *[8] * 12, 20, 21]


def test_animation_of_one_pace_has_that_frame_rate(tmp_path: Path) -> None:
    source = videos.video(write_animation(tmp_path / "a.gif", [1] * 9))
    assert (source.count, source.fps, source.times) == (9, 20, ())
    assert framing.resample(source, 10) == [0, 2, 4, 6, 8]


def test_transparency_of_an_animation_is_white(tmp_path: Path) -> None:
    pictures = [Image.new("RGBA", (16, 16), (255, 0, 255, 0)), Image.new("RGBA", (16, 16), (0, 255, 0, 255))]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=100, lossless=True)
    clear, solid = videos.video(tmp_path / "a.webp").frames([0, 1])
    assert clear.mean((0, 1)).tolist() == [1, 1, 1]
    assert solid.mean((0, 1)).tolist() == [0, 1, 0]


def test_pictures_that_stand_still_are_not_animated(tmp_path: Path) -> None:
    for name in ("a.gif", "a.png", "a.jpg", "a.webp", "a.bmp"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        assert not videos.is_animated(tmp_path / name)
    pages = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    (tmp_path / "text.gif").write_text("no picture")
    assert not videos.is_animated(tmp_path / "pages.tiff")
    assert not videos.is_animated(tmp_path / "text.gif")
