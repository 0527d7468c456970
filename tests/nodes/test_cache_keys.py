"""Every input of a column is in its cache key: with one of them changed, another file is made."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import pytest
import torch
from kinoloom.lora_io.file import load
from kinoloom.nodes.data import nodes as data_nodes
from kinoloom.nodes.data import svd_nodes as svd_data
from kinoloom.nodes.data.encoding import model_keys
from kinoloom.nodes.data.encoding.cache import data_folder
from kinoloom.nodes.data.encoding.columns import Columns
from kinoloom.nodes.data.reading.sources import from_tensor
from kinoloom.nodes.training import previews as samples_nodes
from kinoloom.trainers.conditions.tracklets import Keyframe, Tracklet, Tracklets
from kinoloom.trainers.core.data import TrainingData, column_path
from torch import Tensor

from ..encoders import image_vae, load_wan, own_folders, tiny_vision
from ..media import write_video

WAN = {"frames_per_clip": 5, "fps": 16.0, "size": 64, "single_frames": 1, "token_variants": 0, "source_fps": 16.0}
SVD = {"frames_per_clip": 2, "fps": 8.0, "size": 64, "motion_bucket": 9, "source_fps": 8.0}
PRIOR = {
    "prompts": "a dog. It runs.", "negative": "", "seeds_per_prompt": 1, "seed": 7, "steps": 2, "cfg": 2.0,
    "sampler_name": "euler", "scheduler": "simple", "single_frames": 1, "token_variants": 0,
}  # fmt: skip
FIRST = {"size": 64, "frames": 2, "fps": 8, "motion_bucket": 99, "steps": 2, "cfg": 2.5, "seed": 0, "sample_every": 5}
BOX = Keyframe(0, (0.1, 0.2, 0.5, 0.8))
TRACKED = Tracklets(128, 64, 2, (Tracklet(5, "a", "#123456", (BOX,)),))
MOVED = replace(TRACKED, tracklets=(replace(TRACKED.tracklets[0], keyframes=(replace(BOX, box=(0.2, 0.2, 0.5, 0.8)),)),))


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for all tests, so that each file is encoded once."""
    with own_folders(tmp_path_factory.mktemp("keys")) as made:
        yield made


@pytest.fixture(scope="module")
def wan(tiny_models: Path) -> dict[str, Any]:
    """The tiny Wan, and "other ..." for another of each model."""
    models = load_wan(tiny_models)
    weights = comfy.utils.load_torch_file(str(tiny_models / "vae" / "tiny_wan_vae.safetensors"))
    weights["conv1.weight"] = weights["conv1.weight"] + 1e-3
    shorter = models["clip"].clone()
    shorter.clip_layer(-2)
    return {
        **models,
        "other vae": comfy.sd.VAE(sd=weights),
        "other clip": shorter,
        "other model": patched(models["model"]),
    }


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("svd")
    vaes = {"vae": image_vae(folder), "other vae": image_vae(folder, 1)}
    return {**vaes, "vision": tiny_vision(), "other vision": tiny_vision(1)}


def patched(model: Any, strength: float = 1.0) -> Any:
    """A clone with a LoRA-like patch."""
    clone = model.clone()
    name, weight = next((name, weight) for name, weight in model.model.named_parameters() if weight.ndim > 1)
    clone.add_patches({name: ("diff", (torch.ones_like(weight),))}, strength)
    return clone


def moving(count: int, shade: float = 1.0) -> Tensor:
    return torch.rand(count, 64, 128, 3, generator=torch.Generator().manual_seed(0)) * shade


def files(data: TrainingData, name: str) -> set[str]:
    return {row.columns[name] for row in data.rows if name in row.columns}


def changed(make: Callable[..., dict[str, set[str]]], change: dict[str, Any]) -> set[str]:
    """Names of the columns of which no file is as before; each has some files of its own or the same ones."""
    before, after = make(), make(**change)
    assert before.keys() == after.keys() and make() == before
    assert all(before[name] == after[name] or not before[name] & after[name] for name in before)
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({"vae": "other vae"}, {"latents"}),
        ({"clip": "other clip"}, {"prompt_embeds"}),
        ({"images": 0.5}, {"latents"}),
        ({"masks": 0.5}, {"mask"}),
        ({"size": 48}, {"latents", "mask"}),
        ({"caption": "a dog", "motion_caption": "a dog runs"}, {"prompt_embeds"}),
        ({"caption": "a (cat:1.2)", "motion_caption": "a cat (runs:1.2)"}, {"prompt_embeds"}),
        ({"token_variants": 1}, {"prompt_embeds"}),
    ],
)
def test_clips(wan: dict[str, Any], change: dict[str, Any], columns: set[str]) -> None:
    def make(vae: str = "vae", clip: str = "clip", images: float = 1, masks: float = 1, **options: Any) -> dict:
        given = {"images": moving(5, images), "masks": torch.ones(5, 64, 128) * masks, **options}
        texts = {"caption": "a cat", "motion_caption": "a cat runs"}
        data = data_nodes.EncodeClips.execute(wan[vae], wan[clip], **{**WAN, **texts, **given}).result[0]
        return {name: files(data, name) for name in ("latents", "prompt_embeds", "mask")}

    assert changed(make, change) == columns


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({"vae": "other vae"}, {"latents", "image", "tracklets"}),
        ({"vision": "other vision"}, {"image"}),
        ({"images": 0.5}, {"latents", "image", "tracklets"}),
        ({"size": 128}, {"latents", "image", "tracklets"}),
        ({"source_fps": 7.0}, {"image"}),  # of the same frames
        ({"motion_bucket": 10}, {"image"}),
        ({"motion_bucket": 0}, {"image"}),
        ({"tracklets": MOVED}, {"tracklets"}),
    ],
)
def test_svd_clips(svd: dict[str, Any], change: dict[str, Any], columns: set[str]) -> None:
    def make(vae: str = "vae", vision: str = "vision", images: float = 1, **options: Any) -> dict:
        given = {"images": moving(2, images), "tracklets": TRACKED, **SVD, "fps": 0.0, **options}
        data = svd_data.EncodeSvdClips.execute(svd[vae], svd[vision], **given).result[0]
        return {name: files(data, name) for name in ("latents", "image", "tracklets")}

    assert changed(make, change) == columns


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({"model": "other model"}, {"clips", "frames"}),
        ({"clip": "other clip"}, {"clips", "frames"}),
        ({"vae": "other vae"}, {"frames"}),
        ({"prompts": "a cow. It runs."}, {"clips", "frames"}),
        ({"prompts": "a (dog:1.3). It runs."}, {"clips", "frames"}),
        *(({name: value}, {"clips", "frames"}) for name, value in (
            ("negative", "bad"), ("seed", 8), ("steps", 1), ("cfg", 1.0), ("sampler_name", "heun"),
            ("scheduler", "normal"))),
    ],
)  # fmt: skip
def test_prior_clips(wan: dict[str, Any], change: dict[str, Any], columns: set[str]) -> None:
    def make(model: str = "model", clip: str = "clip", vae: str = "vae", **options: Any) -> dict:
        images = {"images": moving(5), "caption": "a cat"}
        data = data_nodes.EncodeClips.execute(wan["vae"], wan["clip"], **images, **WAN).result[0]
        given = {**PRIOR, **options}
        both = data_nodes.PriorClips.execute(wan[model], wan[clip], wan[vae], data, **given).result[0]
        return {split: {row.columns["latents"] for row in both.select(split, "prior")} for split in ("clips", "frames")}

    assert changed(make, change) == columns


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({"vae": "other vae"}, {"sample"}),
        ({"vision": "other vision"}, {"sample"}),
        ({"images": 0.5}, {"sample"}),
        ({"size": 128}, {"sample", "boxes"}),
        ({"frames": 3}, {"boxes"}),
        ({"fps": 7}, {"sample"}),
        ({"motion_bucket": 98}, {"sample"}),
        ({"tracklets": TRACKED}, {"boxes"}),
    ],
)
def test_first_frames_of_samples(svd: dict[str, Any], change: dict[str, Any], columns: set[str]) -> None:
    def make(vae: str = "vae", vision: str = "vision", images: float = 1, **options: Any) -> dict:
        given = {"images": moving(1, images), **FIRST, **options}
        (row,) = samples_nodes.SampleFirstFrames.execute(svd[vae], svd[vision], **given).result[0].rows
        return {name: {stem} for name, stem in row.columns.items()}

    assert changed(make, change) == columns


def test_windows_and_mask_sizes(tmp_path: Path) -> None:
    """The same mask for latents of another size, and for a VAE of another number of frames per latent step."""
    columns = Columns(tmp_path, comfy.utils.ProgressBar(1))
    mask = from_tensor("mask", torch.ones(9, 64, 64), 16.0)
    given = [([0, 1, 2, 3, 4], 4, (8, 8)), ([1, 2, 3, 4, 5], 4, (8, 8)), ([0, 1, 2, 3, 4], 1, (8, 8)),
             ([0, 1, 2, 3, 4], 4, (4, 4))]  # fmt: skip
    stems = [columns.masks(mask, [window], 64, 64, step, size)[0] for window, step, size in given]
    assert len(set(stems)) == len(given)


def test_patches_are_part_of_a_model_s_identity(wan: dict[str, Any]) -> None:
    for model, of in ((wan["model"], model_keys.of_model), (wan["clip"].patcher, model_keys.of_patcher),
                      (wan["vae"].patcher, model_keys.of_patcher)):  # fmt: skip
        made = [of(model), of(patched(model)), of(patched(model, 0.5))]
        assert len(set(made)) == 3 and of(model.clone()) == made[0]


def test_caption_files_for_frames_and_for_the_clip(wan: dict[str, Any], folder: Path) -> None:
    write_video(folder / "a.mp4", 5, size=(64, 64))
    (folder / "a.static.txt").write_text("a [v] cat")
    (folder / "a.motion.txt").write_text("a [v] cat does [u]")
    made = data_nodes.ClipsFromFolder.execute(wan["vae"], wan["clip"], folder="set", role="train", **WAN).result[0]
    clip = wan["clip"]
    for split, caption in (("clips", "a [v] cat does [u]"), ("frames", "a [v] cat")):
        (row,) = made.select(split, "train")
        stored = load(column_path(data_folder(), row.columns["prompt_embeds"], "prompt_embeds"))[0]["prompt_embeds"]
        assert torch.equal(stored, clip.encode_from_tokens(clip.tokenize(caption))), split
