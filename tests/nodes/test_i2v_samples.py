"""Samples that begin with given images: their first frames, prompts and negative, and refused inputs."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from kinoloom.nodes.data.encoding.vae import encode_pixels
from kinoloom.nodes.training import previews as samples_nodes
from kinoloom.trainers.conditions.columns import PREVIEW_PROMPT, PREVIEW_START
from kinoloom.trainers.core.backbone import Grid
from kinoloom.trainers.run.plain import read
from kinoloom.trainers.run.previews import Previews
from torch import Tensor

from ..encoders import image_vae, load_wan, own_folders

COLUMNS = (PREVIEW_PROMPT, PREVIEW_START)
SAMPLED = {"size": 64, "frames": 4, "fps": 8.0, "steps": 2, "cfg": 1.0, "seed": 0, "sample_every": 5}
NODE = samples_nodes.SampleI2v


@pytest.fixture(scope="module")
def models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    wan, folder = load_wan(tiny_models), tmp_path_factory.mktemp("vae")
    return {"vae": image_vae(folder), "clip": wan["clip"], "other vae": image_vae(folder, 1), "video vae": wan["vae"]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with own_folders(tmp_path) as made:
        yield made


def pictures(count: int, height: int = 64, width: int = 128) -> Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(count))


def make(models: dict[str, Any], prompts: str = "rain", negative: str = "", **changed: Any) -> Previews:
    given = {"vae": models["vae"], "clip": models["clip"], "images": pictures(2), **SAMPLED, **changed}
    return NODE.execute(prompts=prompts, negative=negative, **given).result[0]


def test_a_sample_has_its_image_and_the_prompt_of_its_place(models: dict[str, Any]) -> None:
    images, clip = pictures(2), models["clip"]
    samples = make(models, "rain\n\n smoke ", "a cat", cfg=3.0)
    assert samples.names == ["image 1: rain", "image 2: smoke"]
    assert (samples.width, samples.height, samples.frames, samples.fps) == (96, 48, 4, 8.0)
    positive, negative = samples.conditions(1, COLUMNS)
    square = make(models, images=pictures(2, 64, 64)).conditions(1, COLUMNS)[0]["start"]
    assert torch.equal(square[0], encode_pixels(models["vae"], pictures(2, 64, 64)[1:])[:, 0])
    assert positive["start"].shape == (1, 4, 6, 12) and not torch.equal(square, positive["start"])
    assert torch.equal(negative["start"], positive["start"]), "guidance asks for another motion of the same picture"
    for batch, text in ((positive, "smoke"), (negative, "a cat")):
        encoded, length = clip.encode_from_tokens(clip.tokenize(text)), batch["prompt_embeds"].shape[1]
        assert torch.equal(batch["prompt_embeds"], encoded[:, :length])
    assert torch.equal(samples.guidance(4).flatten(), torch.full((4,), 3.0))
    assert read(Previews, json.loads(json.dumps(asdict(samples))), "samples") == samples
    assert make(models, "rain\nsmoke", "a cat", cfg=3.0, images=images) == samples


def test_one_prompt_serves_all_images(models: dict[str, Any]) -> None:
    given = {"vae": models["vae"], "clip": models["clip"], "negative": "", **SAMPLED}
    given = {name: [value] for name, value in given.items()}
    images = [*pictures(2).split(1), pictures(1)]
    samples = NODE.execute(images=images, prompts=["rain"], **given).result[0]
    assert samples.names == ["image 1: rain", "image 2: rain", "image 3: rain"]
    assert len({row.columns["start"] for row in samples.rows}) == 3
    assert len({row.columns["prompt_embeds"] for row in samples.rows}) == 1
    each = NODE.execute(images=images, prompts=["rain", "smoke", "rain"], **given).result[0]
    assert each.names == ["image 1: rain", "image 2: smoke", "image 3: rain"]
    with pytest.raises(ValueError, match="images: found the sizes 128x64, 64x64, expected one size"):
        NODE.execute(images=[pictures(1), pictures(1, 64, 64)], prompts=["rain"], **given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": "rain\nsmoke\nclouds"}, "prompts: found 3, expected 2, one for each image or one for all"),
        ({"prompts": " \n"}, "prompts: found 0, expected 1..16"),
        ({"images": pictures(17)}, "images: found 17, expected 1..16"),
        ({"frames": 1}, "frames=1: expected 2..256"),
        ({"cfg": -1.0}, "cfg=-1.0: expected 0.0..100.0"),
        ({"prompts": "rain (x:nan)"}, r"prompts 'rain \(x:nan\)': has the prompt weight nan"),
    ],
)
def test_samples_that_cannot_be_made_are_refused(
    models: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(models, **changed)


def test_a_first_frame_of_another_vae_is_refused_when_the_run_begins(models: dict[str, Any]) -> None:
    grid = Grid(channels=4, side=8, longest=16, limited_by="motion module")
    fitted = make(models).fitted(COLUMNS, grid)
    assert {row.shape for row in fitted.rows} == {(4, 4, 6, 12)} and fitted.fitted(COLUMNS, grid) == fitted
    with pytest.raises(ValueError, match="samples: image 1: rain has latents of 16 channels, expected 4"):
        make(models, vae=models["video vae"]).fitted(COLUMNS, grid)
    with pytest.raises(ValueError, match="samples: frames=17: expected at most 16 for this motion module"):
        make(models, frames=17).fitted(COLUMNS, grid)
    prompts = {"width": 64, "height": 64, "frames": 4, "fps": 8.0, "shift": 1.0, "steps": 2, "cfg": 1.0, "seed": 0}
    (without,) = samples_nodes.SamplePrompts.execute(models["clip"], "rain", "", sample_every=5, **prompts).result
    with pytest.raises(ValueError, match=r"column 'start' is missing\): use Sample First Frames \(I2V\)"):
        without.fitted(COLUMNS, grid)


@pytest.mark.parametrize(
    ("changed", "columns"),
    [
        ({"vae": "other vae"}, {"start"}),
        ({"images": pictures(2) * 0.5}, {"start"}),
        ({"size": 128}, {"start"}),
        ({"prompts": "smoke"}, {"prompt_embeds"}),
        ({"frames": 5, "steps": 3, "seed": 1, "fps": 4.0, "negative": "a cat"}, set()),
    ],
)
def test_what_changes_a_column(models: dict[str, Any], changed: dict[str, Any], columns: set[str]) -> None:
    given = {**changed, "vae": models[changed["vae"]]} if "vae" in changed else changed
    before, after = make(models).rows[0].columns, make(models, **given).rows[0].columns
    assert {name for name in before if before[name] != after[name]} == columns
