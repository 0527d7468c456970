"""Clips for Stable Video Diffusion: latents, noised first frames, motion buckets, and refused inputs."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy_extras.nodes_video_model as core
import numpy as np
import pytest
import torch
from kinoloom.lora_io.file import load
from kinoloom.nodes.data import svd_nodes as svd_data
from kinoloom.nodes.data.encoding import svd_rows as svd_encode
from kinoloom.nodes.training import previews as samples_nodes
from kinoloom.trainers.backbones.svd.model import Svd
from kinoloom.trainers.conditions.tracklet_painting import paint
from kinoloom.trainers.conditions.tracklets import Keyframe, Tracklet, Tracklets, to_tensors
from kinoloom.trainers.core.data import TrainingData, column_path
from kinoloom.trainers.svd_tracklets import SvdTracklets
from PIL import Image
from torch import Tensor

from ..encoders import image_vae, own_folders, tiny_vision
from ..media import write_image, write_video

OPTIONS = {"frames_per_clip": 4, "fps": 8.0, "size": 64, "motion_bucket": 0, "source_fps": 8.0}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return image_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def clip_vision() -> Any:
    return tiny_vision()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with own_folders(tmp_path) as made:
        yield made


def moving(pixels_per_frame: float, frames: int = 4, height: int = 64, width: int = 128) -> Tensor:
    """A smooth texture that shifts sideways."""
    y, x = np.mgrid[:height, :width].astype("float32")
    images = []
    for frame in range(frames):
        shifted = x - pixels_per_frame * frame
        value = 0.5 + 0.2 * np.sin(shifted / 5) + 0.15 * np.sin(y / 4) + 0.15 * np.sin((shifted + 2 * y) / 9)
        images.append(np.repeat(value[..., None], 3, -1))
    return torch.from_numpy(np.stack(images)).float()


def encode(vae: Any, clip_vision: Any, images: Tensor, **options: Any) -> tuple[TrainingData, str]:
    made = svd_data.EncodeSvdClips.execute(vae, clip_vision, images=images, **{**OPTIONS, **options})
    return made.result[0], made.ui["text"][0]


def column(data: TrainingData, name: str, row: int = 0) -> dict[str, Tensor]:
    return load(column_path(data.folder, data.rows[row].columns[name], name))[0]


def test_a_row_is_what_core_s_own_nodes_encode(vae: Any, clip_vision: Any) -> None:
    """Facts 3 to 5: raw latents of the clip, the first frame's without scale, the numbers of core's sampling node."""
    images = moving(2)
    data, _ = encode(vae, clip_vision, images, motion_bucket=99)
    (row,) = data.rows
    assert row.shape == (4, 4, 8, 16) and row.unit == "clips"
    assert torch.allclose(column(data, "latents")["latents"], vae.encode(images).movedim(0, 1), atol=1e-4)
    image = column(data, "image")
    positive, negative, _ = core.SVD_img2vid_Conditioning().encode(
        clip_vision, images[:1], vae, 128, 64, 4, motion_bucket_id=99, fps=8, augmentation_level=0.0
    )
    pooled, given = positive[0]
    assert torch.allclose(image["image_embeds"], pooled[0, 0], atol=1e-4)
    assert torch.allclose(image["first_frames"][:1], given["concat_latent_image"], atol=1e-4)
    assert (float(image["fps"]), float(image["motion_bucket"])) == (given["fps"], given["motion_bucket_id"])


def test_the_noise_on_a_first_frame_has_the_spread_that_is_noted(clip_vision: Any) -> None:
    """Fact 4, with an identity for a VAE: std over pixels in -1..1, levels exp(N(-3, 0.5)), the first without noise."""

    class Identity:
        def encode(self, pixels: Tensor) -> Tensor:
            return pixels.movedim(-1, 1)

    pixels = moving(0, 1, 128, 256)
    out = svd_encode.first_frame(pixels, Identity(), clip_vision, "key")
    noise = 2 * (out["first_frames"] - pixels.movedim(-1, 1))
    assert out["augmentations"][0] == 0 and not noise[0].any()
    assert torch.allclose(noise[1:].flatten(1).std(1), out["augmentations"][1:], rtol=0.02)
    drawn = torch.cat([svd_encode.first_frame(pixels[:, :8, :8], Identity(), clip_vision, f"{i}")["augmentations"][1:]
                       for i in range(30)]).log()  # fmt: skip
    assert len(out["augmentations"]) == 17 and abs(drawn.mean() + 3) < 0.1 and abs(drawn.std() - 0.5) < 0.06


def test_every_clip_has_noise_of_its_own(vae: Any, clip_vision: Any) -> None:
    first, second = (column(encode(vae, clip_vision, moving(speed))[0], "image")["augmentations"] for speed in (1, 2))
    assert not (first[1:] == second[1:]).any()


@pytest.mark.parametrize("pixels", [0.5, 1.0, 2.0])
def test_motion_is_estimated_in_hundredths_of_the_diagonal(pixels: float) -> None:
    diagonal = (64**2 + 128**2) ** 0.5
    assert abs(svd_encode.estimate_motion_bucket(moving(pixels)) / (127 * 100 * pixels / diagonal) - 1) < 0.15


@pytest.mark.parametrize("height", [1, 10, 15])
def test_motion_in_a_strip_of_a_picture_can_be_estimated(height: int) -> None:
    assert 1 <= svd_encode.estimate_motion_bucket(moving(1, height=height, width=256)) <= 255


def test_an_estimate_is_shown_and_used(vae: Any, clip_vision: Any) -> None:
    data, text = encode(vae, clip_vision, moving(1))
    bucket = int(column(data, "image")["motion_bucket"])
    assert bucket == svd_encode.estimate_motion_bucket(moving(1))
    assert text == f"images frames 0-3: motion bucket {bucket} (estimated), 8 fps"
    assert encode(vae, clip_vision, moving(0))[1].startswith("images frames 0-3: motion bucket 1 (estimated)")
    assert encode(vae, clip_vision, moving(1), motion_bucket=40)[1].endswith("motion bucket 40, 8 fps")


def test_nothing_is_encoded_twice(vae: Any, clip_vision: Any) -> None:
    def files(data: TrainingData) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in Path(data.folder).iterdir()}

    data, _ = encode(vae, clip_vision, moving(1))
    before = files(data)
    again, _ = encode(vae, clip_vision, moving(1))
    assert again.digest == data.digest and files(again) == before
    other, _ = encode(vae, clip_vision, moving(1), motion_bucket=7)
    assert other.digest != data.digest and other.rows[0].columns["latents"] == data.rows[0].columns["latents"]


def test_a_folder_of_videos_and_of_numbered_frames(folder: Path, vae: Any, clip_vision: Any) -> None:
    """The layout of SVD_Xtend: a folder of frames for each clip, in natural order; no captions."""
    write_video(folder / "b.mp4", 9)
    for number in (10, 9, 8, 7):
        write_image(folder / "a" / f"{number}.png", number, (128, 64))
    made = svd_data.SvdClipsFromFolder.execute(vae, clip_vision, folder="set", role="train", **OPTIONS)
    assert [row.name for row in made.result[0].rows] == ["a frames 0-3", "b.mp4 frames 0-6"]
    assert made.ui["text"][0].count("(estimated)") == 2


@pytest.mark.slow
def test_clips_keep_their_aspect_in_multiples_of_64(vae: Any, clip_vision: Any) -> None:
    data, _ = encode(vae, clip_vision, torch.rand(4, 90, 160, 3), size=256)
    _, _, height, width = data.rows[0].shape
    assert (height * 8 % 64, width * 8 % 64) == (0, 0) and width / height > 1.4


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (1, {}, "images: is a photo, expected clips"),
        (3, {}, "images: has 3 frames at 8 per second, but a clip takes 4"),
        (4, {"frames_per_clip": 1}, "frames_per_clip=1: expected 2..256"),
        (4, {"hold_out": 1}, "hold_out=1: nothing would be left"),
    ],
)
def test_what_cannot_be_used_is_refused(vae: Any, clip_vision: Any, images: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        encode(vae, clip_vision, moving(1, images), **options)


def test_one_source_is_asked_for(vae: Any, clip_vision: Any) -> None:
    with pytest.raises(ValueError, match="connect either images or video"):
        svd_data.EncodeSvdClips.execute(vae, clip_vision, **OPTIONS)


def test_a_mask_beside_a_clip_is_encoded(folder: Path, vae: Any, clip_vision: Any) -> None:
    write_video(folder / "a.mp4", 5, fps=8, size=(128, 64))
    half = np.zeros((64, 128), np.uint8)
    half[:, 64:] = 255
    Image.fromarray(half).save(folder / "a.mask.png")
    made = svd_data.SvdClipsFromFolder.execute(vae, clip_vision, folder="set", role="train", **OPTIONS)
    mask = column(made.result[0], "mask")["mask"]
    assert mask.shape == (1, 4, 8, 16)
    assert torch.equal(mask[..., 8:], torch.ones(1, 4, 8, 8)) and not mask[..., :8].any()


def test_latents_that_are_no_numbers_are_not_kept(clip_vision: Any) -> None:
    """As an fp16 VAE may make them."""

    class Overflowing:
        vae_dtype = torch.float16

        def encode(self, pixels: Tensor) -> Tensor:
            return torch.full((len(pixels), 4, 8, 8), math.nan)

    with pytest.raises(ValueError, match="vae: encodes into NaN or infinite values, in torch.float16"):
        svd_encode.first_frame(moving(0, 1), Overflowing(), clip_vision, "key")


# -- tracklets ---------------------------------------------------------------------------------------------------------------

TRACKED = Tracklets(
    128, 64, 4, (Tracklet(5, "a", "#123456", (Keyframe(0, (0.1, 0.2, 0.5, 0.8)), Keyframe(3, (0.4, 0.2, 0.8, 0.8)))),)
)


def test_tracked_clips_hold_their_boxes_and_painted_frames(vae: Any, clip_vision: Any) -> None:
    """Fact 15: outlines of 4 px on all frames but the first; each deal of colours in boxes and paint alike."""
    images = moving(1)
    data, _ = encode(vae, clip_vision, images, tracklets=TRACKED)
    stored = column(data, "tracklets")
    boxes, mask = to_tensors(TRACKED)
    assert torch.equal(stored["boxes"], boxes) and torch.equal(stored["box_mask"], mask)
    assert stored["colors"].shape == (4, 20, 3) and len(stored["colors"].flatten(1).unique(dim=0)) == 4
    for colors, painted in zip(stored["colors"], stored["painted"], strict=True):
        assert len(colors.unique(dim=0)) == 20
        colored = torch.cat([boxes[..., :4], colors.expand(4, -1, -1), boxes[..., 7:]], dim=-1)
        frames = paint(images, colored, mask, 4, skip_first=True)
        assert torch.equal(frames[0], images[0]) and not torch.equal(frames[1], images[1])
        assert torch.allclose(painted, vae.encode(frames).movedim(0, 1), atol=1e-4)


def test_a_window_of_a_tracked_clip_has_the_boxes_of_its_frames(vae: Any, clip_vision: Any) -> None:
    long = replace(TRACKED, frames=9, tracklets=(replace(TRACKED.tracklets[0], keyframes=(
        Keyframe(0, (0.0, 0.2, 0.2, 0.8)), Keyframe(8, (0.8, 0.2, 1.0, 0.8)))),))  # fmt: skip
    options = {"window_mode": "sliding", "window_stride": 5}
    data, _ = encode(vae, clip_vision, moving(1, 9), tracklets=long, **options)
    whole, _ = to_tensors(long)
    assert [row.name for row in data.rows] == ["images frames 0-3", "images frames 5-8"]
    for row, start in enumerate((0, 5)):
        assert torch.equal(column(data, "tracklets", row)["boxes"], whole[start : start + 4])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": 9}, "images: tracklets are for 9 frames, expected 4"),
        ({"width": 64}, "images: tracklets are for 64x64, expected the aspect ratio of 128x64"),
    ],
)
def test_boxes_of_another_clip_are_refused(vae: Any, clip_vision: Any, changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(vae, clip_vision, moving(1), tracklets=replace(TRACKED, **changed))


def test_boxes_are_cut_as_the_frames_are(vae: Any, clip_vision: Any) -> None:
    """A 160x64 video becomes 128x64: 16 px are cut off on either side."""
    tracked = Tracklets(160, 64, 4, (Tracklet(1, "a", "#ff0000", (Keyframe(0, (16 / 160, 0.0, 80 / 160, 1.0)),)),))
    data, _ = encode(vae, clip_vision, moving(1, 4, 64, 160), size=90, tracklets=tracked)
    assert data.rows[0].shape[-2:] == (8, 16)
    assert torch.allclose(column(data, "tracklets")["boxes"][0, 0, :4], torch.tensor([0.0, 0.0, 0.5, 1.0]))


def test_tracklets_lie_beside_clips_in_a_folder(folder: Path, vae: Any, clip_vision: Any) -> None:
    for name in ("a", "b", "c"):
        write_video(folder / f"{name}.mp4", 5, fps=8, size=(128, 64))
    (folder / "a.json").write_text(replace(TRACKED, frames=5).to_json())
    (folder / "b.csv").write_text("1,3,12.8,12.8,51.2,38.4,1,1,1\n5,3,51.2,12.8,51.2,38.4,1,1,1\n")
    made = svd_data.SvdClipsFromFolder.execute(vae, clip_vision, folder="set", role="train", **OPTIONS)
    rows = made.result[0].rows
    assert [("tracklets" in row.columns) for row in rows] == [True, True, False]
    assert torch.allclose(column(made.result[0], "tracklets", 1)["boxes"][0, 0, :4], torch.tensor([0.1, 0.2, 0.5, 0.8]))
    (folder / "c.csv").write_text("1,3,a,12,51,38,1,1,1\n")
    with pytest.raises(ValueError, match="c.csv: line 1: x='a': expected a number"):
        svd_data.SvdClipsFromFolder.execute(vae, clip_vision, folder="set", role="train", **OPTIONS)


SAMPLED = {"size": 64, "frames": 4, "fps": 8, "motion_bucket": 99, "steps": 2, "cfg": 2.5, "seed": 0, "sample_every": 5}


def test_a_sample_starts_from_what_core_s_own_node_makes_of_the_first_frame(vae: Any, clip_vision: Any) -> None:
    images = moving(2)
    (samples,) = samples_nodes.SampleFirstFrames.execute(vae, clip_vision, images[:2], **SAMPLED).result
    assert samples.names == ["image 1", "image 2"] and (samples.width, samples.height) == (128, 64)
    core_node = core.SVD_img2vid_Conditioning()
    given = core_node.encode(
        clip_vision, images[1:2], vae, 128, 64, 4, motion_bucket_id=99, fps=8, augmentation_level=0.0
    )
    positive, negative = samples.conditions(1, SvdTracklets.previews)
    for ours, ((pooled, theirs),) in zip((positive, Svd.unconditional(None, negative)), given[:2], strict=True):
        assert torch.allclose(ours["image_embeds"], pooled[0], atol=1e-4)
        assert torch.allclose(ours["first_frame"], theirs["concat_latent_image"], atol=1e-4)
        told = [float(ours[name]) for name in ("fps", "motion_bucket", "augmentation")]
        assert told == [theirs[name] for name in ("fps", "motion_bucket_id", "augmentation_level")]
        assert not ours["box_mask"].any()
    guidance = samples.guidance(4).flatten()
    torch.testing.assert_close(guidance, torch.tensor([1.0, 1.5, 2.0, 2.5]))


def test_a_sample_s_boxes_are_in_what_is_asked_for_and_not_in_the_negative(vae: Any, clip_vision: Any) -> None:
    key = Keyframe(0, (0.1, 0.1, 0.5, 0.5))
    tracklets = Tracklets(128, 64, 8, (Tracklet(1, "dog", "#ff0000", (key,)),))
    node = samples_nodes.SampleFirstFrames
    (samples,) = node.execute(vae, clip_vision, moving(2)[:1], tracklets, **SAMPLED).result
    positive, negative = samples.conditions(0, SvdTracklets.previews)
    recipe = SvdTracklets.__new__(SvdTracklets)
    recipe.backbone = SimpleNamespace(unconditional=dict)
    negative = recipe.unconditional(negative)
    boxes, mask = to_tensors(tracklets, 4, (128, 64))
    assert torch.equal(positive["boxes"], boxes[None]) and torch.equal(positive["box_mask"], mask[None])
    assert mask.any() and not negative["box_mask"].any()
    (without,) = node.execute(vae, clip_vision, moving(2)[:1], **SAMPLED).result
    assert without.rows[0].columns["boxes"] != samples.rows[0].columns["boxes"]
