"""Mirrored copies of clips: what they hold, and which clips have none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinoloom.lora_io.file import load
from kinoloom.nodes.data import nodes as data_nodes
from kinoloom.nodes.data.encoding.vae import encode_pixels
from kinoloom.trainers.core.data import Row, TrainingData, column_path
from torch import Tensor

from ..encoders import load_wan, own_folders
from ..media import write_image, write_video

OPTIONS = {"frames_per_clip": 5, "fps": 16.0, "size": 64, "single_frames": 0, "token_variants": 0, "source_fps": 16.0}


@pytest.fixture(scope="module")
def models(tiny_models: Path) -> dict[str, Any]:
    return load_wan(tiny_models)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with own_folders(tmp_path) as made:
        yield made


def encode(models: dict[str, Any], **options: Any) -> TrainingData:
    given = {"vae": models["vae"], "clip": models["clip"], "caption": "a cat", **OPTIONS, **options}
    return data_nodes.EncodeClips.execute(**given).result[0]


def of_folder(models: dict[str, Any], **options: Any) -> list[tuple[str, str, str]]:
    given = {"vae": models["vae"], "clip": models["clip"], "folder": "set", "role": "train", **OPTIONS, **options}
    data = data_nodes.ClipsFromFolder.execute(**given).result[0]
    return [(row.name, row.unit, row.role) for row in data.rows]


def tensor(data: TrainingData, row: Row, name: str) -> Tensor:
    return load(column_path(data.folder, row.columns[name], name))[0][name]


def test_a_mirrored_copy_is_encoded_from_mirrored_pixels_with_a_mirrored_mask(models: dict[str, Any]) -> None:
    images = torch.rand(5, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    masks = torch.zeros(5, 64, 64)
    masks[:, :, :24] = 1.0
    plain = encode(models, images=images, masks=masks)
    data = encode(models, images=images, masks=masks, flip=True)
    assert data.rows[:1] == plain.rows, "rows without the option are as before, to the file"
    row, copy = data.rows
    assert (copy.name, copy.unit, copy.role) == ("images (mirrored) frames 0-4", "clips", "train")
    assert copy.shape == row.shape and copy.columns["prompt_embeds"] == row.columns["prompt_embeds"]
    assert torch.equal(tensor(data, copy, "latents"), encode_pixels(models["vae"], images.flip(2)))
    assert not torch.allclose(tensor(data, copy, "latents"), tensor(data, row, "latents").flip(-1), atol=1e-3)
    assert torch.equal(tensor(data, copy, "mask"), tensor(data, row, "mask").flip(-1))
    assert tensor(data, row, "mask")[..., :3].all() and not tensor(data, row, "mask")[..., 3:].any()
    assert encode(models, images=images, masks=masks, flip=True) == data


def test_every_window_photo_and_single_frame_of_a_list_has_a_copy(models: dict[str, Any]) -> None:
    clip, photo = (torch.rand(count, 48, 64, 3, generator=torch.Generator().manual_seed(count)) for count in (7, 1))
    given = {"images": [clip, photo], "window_mode": ["sliding"], "window_stride": [2], "single_frames": [2]}
    lists = {name: [value] for name, value in {**OPTIONS, "caption": "a cat", **models}.items() if name != "model"}
    names = [
        [row.name for row in data_nodes.EncodeClips.execute(**{**lists, **given, "flip": [flip]}).result[0].rows]
        for flip in (False, True)
    ]
    assert len(names[0]) == 2 + 2 + 2 and names[1][:6] == names[0]
    first, second = "images #1", "images #2"
    assert names[1][6:] == [
        name.replace(first, f"{first} (mirrored)").replace(second, f"{second} (mirrored)") for name in names[0]
    ]


def test_clips_for_validation_have_no_copy(models: dict[str, Any], folder: Path) -> None:
    for number, name in enumerate("ab"):
        write_video(folder / f"{name}.mp4", 5 + 4 * number, size=(64, 48))
        (folder / f"{name}.txt").write_text("a cat")
    write_image(folder / "c.png", 99, size=(64, 48))
    (folder / "c.txt").write_text("a cat")
    plain = of_folder(models)
    assert of_folder(models, role="validation", flip=True) == [(name, unit, "validation") for name, unit, _ in plain]
    held = of_folder(models, hold_out=2, flip=True)
    copy = ("a.mp4 (mirrored) frames 0-4", "clips", "train")
    assert held == [*of_folder(models, hold_out=2), copy] and [role for *_, role in held].count("validation") == 2
    assert [role for *_, role in of_folder(models, role="prior", flip=True)] == ["prior"] * 6
    sliding = {"window_mode": "sliding", "window_stride": 4, "hold_out": 2, "single_frames": 9, "flip": True}
    found = [own for own in of_folder(models, **sliding) if "(mirrored)" in own[0]]
    assert [name for name, unit, _ in found if unit == "clips"] == [
        "a.mp4 (mirrored) frames 0-4", "b.mp4 (mirrored) frames 0-4",
    ]  # fmt: skip
    frames = [name for name, unit, role in found if unit == "frames" and role == "train" and name.startswith("b")]
    assert frames == [f"b.mp4 (mirrored) frame {place}" for place in range(5)]


@pytest.mark.parametrize("node", [data_nodes.EncodeClips, data_nodes.ClipsFromFolder])
def test_the_option_is_the_last_widget_and_off(node: Any) -> None:
    last = node.define_schema().inputs[-1]
    assert (last.id, last.default) == ("flip", False) and "left and right" in last.tooltip
