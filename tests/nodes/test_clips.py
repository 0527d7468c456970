"""Reading clips: decoding, resampling, windows, sizes, captions, masks."""

import os
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from kinoloom.nodes.data.reading import captions, folder, framing, sources, videos
from PIL import Image

from ..media import write_image, write_video


def greys(source: sources.Source, indices: list[int]) -> list[int]:
    """The grey value of frames written by write_video or write_image, back in units of frames."""
    return [round(frame.mean().item() * 255 / 4) for frame in source.frames(indices)]


def test_video_gives_the_frames_asked_for(tmp_path: Path) -> None:
    source = folder.open_source(write_video(tmp_path / "a.mp4", 30, fps=24), 1.0)
    assert (source.count, source.fps, source.width, source.height, source.photo) == (30, 24.0, 64, 48, False)
    assert greys(source, [0, 3, 3, 17, 29]) == [0, 3, 3, 17, 29]
    assert [frame.shape for frame in source.frames([1])] == [(48, 64, 3)]


def test_rotated_video_is_upright(tmp_path: Path) -> None:
    plain = write_video(tmp_path / "plain.mp4", 3)
    turned = tmp_path / "turned.mp4"
    command = f"{imageio_ffmpeg.get_ffmpeg_exe()} -loglevel error -display_rotation 90 -i {plain} -c copy {turned}"
    assert os.system(command) == 0
    source = videos.video(turned)
    assert (source.width, source.height) == (48, 64)
    assert [frame.shape for frame in source.frames([2])] == [(64, 48, 3)]


@pytest.mark.parametrize("name", ["broken.mp4", "broken.png"])
def test_unreadable_file_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a picture" * 100)
    with pytest.raises(ValueError, match="not a readable"):
        folder.open_source(tmp_path / name, 1.0)


def test_truncated_image_says_so(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ValueError, match="cut.png is not a readable image"):
        folder.open_source(path, 1.0)


def test_folder_of_frames_is_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 9, 2, 1, 11):
        write_image(tmp_path / "walk" / f"{number}.png", 4 * number)
    (tmp_path / "walk" / "notes.txt").write_text("not a frame")
    source = folder.open_source(tmp_path / "walk", 12.0)
    assert source.fps == 12.0
    assert greys(source, list(range(source.count))) == [1, 2, 9, 10, 11]


def test_frames_of_two_sizes_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "walk" / "1.png", 0)
    write_image(tmp_path / "walk" / "2.png", 0, (32, 48))
    with pytest.raises(ValueError, match=r"2\.png is 32x48, but 1\.png is 64x48"):
        folder.open_source(tmp_path / "walk", 12.0)


def test_digest_follows_content_not_name(tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return folder.open_source(path, 1.0).digest

    images = {"a.png": 4, "b.png": 4, "c.png": 8}
    first, same, other = (write_image(tmp_path / name, grey) for name, grey in images.items())
    assert digest(first) == digest(same) != digest(other)
    frames = torch.rand(3, 8, 8, 3)
    changed = frames.clone()
    changed[1, 2, 3, 0] += 0.5
    assert sources.from_tensor("x", frames, 16).digest != sources.from_tensor("x", changed, 16).digest


def test_image_turned_by_exif_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "phone" / "1.jpg"
    path.parent.mkdir()
    Image.new("RGB", (64, 48)).save(path, exif=exif)
    source = folder.open_source(path, 1.0)
    assert (source.width, source.height) == (48, 64)
    assert [frame.shape for frame in source.frames([0])] == [(64, 48, 3)]


@pytest.mark.parametrize(
    ("count", "fps", "wanted", "expected"),
    [
        (9, 24.0, 16.0, [0, 2, 3, 5, 6, 8]),
        (9, 30.0, 15.0, [0, 2, 4, 6, 8]),
        (4, 8.0, 16.0, [0, 1, 1, 2, 2, 3, 3]),
        (5, 30.0, 0.0, [0, 1, 2, 3, 4]),
        (5, 16.0, 16.0, [0, 1, 2, 3, 4]),
    ],
)
def test_resampling_takes_the_nearest_frames(count: int, fps: float, wanted: float, expected: list[int]) -> None:
    assert framing.resample(sources.from_tensor("x", torch.zeros(count, 2, 2, 3), fps), wanted) == expected


def test_resampling_keeps_the_duration() -> None:
    indices = framing.resample(sources.from_tensor("x", torch.zeros(241, 1, 1, 3), 23.976), 16.0)
    moments = torch.arange(len(indices)) / 16
    assert (torch.tensor(indices) / 23.976 - moments).abs().max() <= 0.5 / 23.976 + 1e-6
    assert len(indices) == 161


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("first", [0]),
        ("uniform", [0, 5, 11]),
        ("sliding", [0, 4, 8]),
    ],
)
def test_windows(mode: str, expected: list[int]) -> None:
    assert framing.windows(20, 9, mode, 3, 4) == [range(start, start + 9) for start in expected]


def test_uniform_windows_that_fall_together_count_once() -> None:
    assert framing.windows(10, 9, "uniform", 4, 1) == [range(0, 9), range(1, 10)]
    assert framing.windows(9, 9, "uniform", 4, 1) == [range(0, 9)]


@pytest.mark.parametrize(
    ("values", "count", "expected"),
    [
        (5, 8, [0, 1, 2, 3, 4]),
        (9, 3, [0, 4, 8]),
        (9, 1, [0]),
        (9, 9, list(range(9))),
    ],
)
def test_spread(values: int, count: int, expected: list[int]) -> None:
    assert framing.spread(list(range(values)), count) == expected


@pytest.mark.parametrize("frames", [1, 5, 81])
def test_allowed_lengths(frames: int) -> None:
    framing.check_length(frames, 4)


def test_other_lengths_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"frames_per_clip=80: expected 4n\+1 .* 77 and 81"):
        framing.check_length(80, 4)


@pytest.mark.parametrize("source", [(1920, 1080), (1080, 1920), (512, 512), (640, 480), (1280, 300), (3000, 400)])
@pytest.mark.parametrize("side", [512, 256])
def test_sizes_keep_area_and_aspect(source: tuple[int, int], side: int) -> None:
    width, height = framing.bucket(*source, side**2)
    assert width % 16 == 0 and height % 16 == 0
    assert width * height == pytest.approx(side**2, rel=0.1)
    assert width / height == pytest.approx(source[0] / source[1], rel=0.1)


def test_a_square_stays_as_it_is() -> None:
    assert framing.bucket(1000, 1000, 512**2) == (512, 512)


def test_fit_crops_the_centre() -> None:
    frame = torch.zeros(8, 16, 3)
    frame[:, 4:12] = 1
    assert torch.equal(framing.fit(frame, 8, 8), torch.ones(8, 8, 3))
    assert framing.fit(frame, 4, 4).shape == (4, 4, 3)
    same = torch.rand(8, 8, 3)
    assert torch.equal(framing.fit(same, 8, 8), same)


def test_latent_mask_groups_frames_as_the_vae_does() -> None:
    frames = torch.arange(9.0).view(9, 1, 1).expand(9, 2, 3)
    mask = framing.latent_mask(frames, 4)
    assert mask.shape == (1, 3, 2, 3)
    assert mask[0, :, 0, 0].tolist() == [0.0, 2.5, 6.5]
    assert framing.latent_mask(frames[:1], 4).shape == (1, 1, 2, 3)


def resolve(
    plain: str = "", static: str = "", motion: str = "", photo: bool = False, frames: bool = True
) -> tuple[str, str]:
    found = captions.resolve(plain, static, motion, photo=photo, with_frames=frames)
    return found.static, found.motion


def test_caption_rules() -> None:
    assert resolve("a", "", "") == ("a", "a")
    assert resolve("", "a [v]", "a [v] does [u]") == ("a [v]", "a [v] does [u]")
    assert resolve("a", "", "b [u]") == ("a", "b [u]")
    assert resolve("p", "s", "m") == ("s", "m")
    assert resolve("", "", "m") == ("m", "m")
    assert resolve(" a\n", "", "m", photo=True) == ("a", "a")


def test_no_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="no caption"):
        resolve(" ", "\n", "")


def test_motion_token_stays_out_of_single_frames() -> None:
    with pytest.raises(ValueError, match=r"\[u\]"):
        resolve("", "a man does [u]", "b")
    with pytest.raises(ValueError, match="set single_frames to 0"):
        resolve("a man does [u]")
    assert resolve("a man does [u]", frames=False) == ("a man does [u]", "a man does [u]")


def test_captions_of_a_folder_of_frames(tmp_path: Path) -> None:
    walk = tmp_path / "walk"
    walk.mkdir()
    (walk / "caption.txt").write_text("inside", encoding="utf-8-sig")
    assert captions.read_captions(walk, photo=False, with_frames=True).static == "inside"
    (tmp_path / "walk.txt").write_text("beside")
    assert captions.read_captions(walk, photo=False, with_frames=True).static == "beside"


def test_caption_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Mädchen".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        captions.read_captions(tmp_path / "a.mp4", photo=False, with_frames=True)
