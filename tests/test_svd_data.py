"""Clips for Stable Video Diffusion: latents, first frames under noise, motion buckets, and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.sd
import comfy_extras.nodes_video_model as core
import folder_paths
import numpy as np
import pytest
import tiny_sd
import torch
from kinoloom.lora_io.file import load
from kinoloom.nodes import svd_data
from kinoloom.trainers.core.data import TrainingData, column_path
from safetensors.torch import save_file
from torch import Tensor

from .media import write_image, write_video
from tiny_weights import Weights

OPTIONS = {"frames_per_clip": 4, "fps": 8.0, "size": 64, "motion_bucket": 0, "source_fps": 8.0}
VISION = {
    "hidden_size": 32, "image_size": 224, "intermediate_size": 64, "model_type": "clip_vision_model",
    "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 2, "patch_size": 56, "projection_dim": 1024,
    "hidden_act": "gelu",
}  # fmt: skip


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(tiny_sd.tiny_autoencoder(Weights(0)), path)
    return comfy.sd.VAE(comfy.utils.load_torch_file(str(path)))


@pytest.fixture(scope="module")
def clip_vision() -> Any:
    with torch.inference_mode():
        model = comfy.clip_vision.ClipVisionModel(VISION)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return model


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    before = folder_paths.get_input_directory(), folder_paths.get_user_directory()
    folder_paths.set_input_directory(str(tmp_path / "input"))
    folder_paths.set_user_directory(str(tmp_path / "user"))
    (tmp_path / "input" / "set").mkdir(parents=True)
    with torch.inference_mode():
        yield tmp_path / "input" / "set"
    folder_paths.set_input_directory(before[0])
    folder_paths.set_user_directory(before[1])


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
    assert row.shape == (4, 4, 8, 16) and row.split == "clips"
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
    out = svd_data.first_frame(pixels, Identity(), clip_vision, "key")
    noise = 2 * (out["first_frames"] - pixels.movedim(-1, 1))
    assert out["augmentations"][0] == 0 and not noise[0].any()
    assert torch.allclose(noise[1:].flatten(1).std(1), out["augmentations"][1:], rtol=0.02)
    drawn = torch.cat([svd_data.first_frame(pixels[:, :8, :8], Identity(), clip_vision, f"{i}")["augmentations"][1:]
                       for i in range(30)]).log()  # fmt: skip
    assert len(out["augmentations"]) == 17 and abs(drawn.mean() + 3) < 0.1 and abs(drawn.std() - 0.5) < 0.06


@pytest.mark.parametrize("pixels", [0.5, 1.0, 2.0])
def test_motion_is_estimated_in_hundredths_of_the_diagonal(pixels: float) -> None:
    diagonal = (64**2 + 128**2) ** 0.5
    assert abs(svd_data.estimate_motion_bucket(moving(pixels)) / (127 * 100 * pixels / diagonal) - 1) < 0.15


def test_an_estimate_is_shown_and_used(vae: Any, clip_vision: Any) -> None:
    data, text = encode(vae, clip_vision, moving(1))
    bucket = int(column(data, "image")["motion_bucket"])
    assert bucket == svd_data.estimate_motion_bucket(moving(1))
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
