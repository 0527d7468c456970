"""Lists of core's dataset nodes: one data set of all their items, and never one for each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import execution
import pytest
import torch
from comfy_api.latest import io
from comfy_extras import nodes_dataset as core
from kinoloom.lora_io.file import load
from kinoloom.nodes.data import nodes as data_nodes
from kinoloom.nodes.data import svd_nodes as svd_data
from kinoloom.nodes.training import previews as samples_nodes
from kinoloom.trainers.conditions.tracklets import Tracklets
from kinoloom.trainers.core.data import TrainingData, column_path

from ..encoders import image_vae, load_wan, own_folders, tiny_vision
from ..media import write_image, write_video

OPTIONS = {"frames_per_clip": 5, "fps": 16.0, "size": 64, "single_frames": 0, "token_variants": 0, "source_fps": 16.0}
SVD = {"frames_per_clip": 3, "fps": 8.0, "size": 64, "motion_bucket": 9, "source_fps": 8.0}
SAMPLED = {"steps": 2, "cfg": 2.5, "seed": 0, "sample_every": 5}
PRIORS = {
    "seeds_per_prompt": 1, "seed": 7, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
    "single_frames": 0, "token_variants": 0, "negative": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny_models: Path) -> dict[str, Any]:
    return load_wan(tiny_models)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with own_folders(tmp_path) as made:
        yield made


def run(node: type[io.ComfyNode], **inputs: Any) -> list[Any]:
    """The results of every call that ComfyUI's queue makes for these inputs."""
    lists = as_lists(inputs)
    calls = execution._async_map_node_over_list("prompt", "1", node, lists, node.FUNCTION, v3_data={})
    with pytest.raises(StopIteration) as ended:  # no node of these waits; a browser of another test may have this loop
        calls.send(None)
    return [made.result for made in ended.value.value]


def as_lists(inputs: dict[str, Any]) -> dict[str, list]:
    """Inputs as the queue passes them: a single value becomes a list of one."""
    return {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}


def encode(models: dict[str, Any], **inputs: Any) -> TrainingData:
    ((data,),) = run(data_nodes.EncodeClips, vae=models["vae"], clip=models["clip"], **{**OPTIONS, **inputs})
    return data


def clip(count: int, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def caption_of(data: TrainingData, models: dict[str, Any], row: int, text: str) -> bool:
    stem, expected = data.rows[row].columns["prompt_embeds"], models["clip"].tokenize(text)
    made = load(column_path(data.folder, stem, "prompt_embeds"))[0]["prompt_embeds"]
    return torch.equal(made, models["clip"].encode_from_tokens(expected))


def test_photos_and_texts_of_a_folder_are_one_data_set(models: dict[str, Any], folder: Path) -> None:
    sizes = {"a": (64, 64), "b": (128, 32), "c": (32, 128)}
    for grey, (name, size) in enumerate(sizes.items(), 1):
        write_image(folder / f"{name}.png", 40 * grey, size)
        (folder / f"{name}.txt").write_text(f"photo {name}")
    ((images, texts),) = run(core.LoadImageTextDataSetFromFolderNode, folder="set")
    data = encode(models, images=images, caption=texts)
    assert [(row.name, row.unit) for row in data.rows] == [(f"images #{n}", "clips") for n in (1, 2, 3)]
    for place, text in enumerate(texts):
        width, height = sizes[text[-1]]
        assert (data.rows[place].shape[2] < data.rows[place].shape[3]) == (height < width)
        assert caption_of(data, models, place, text)
    alone = encode(models, images=[images[1]], caption=texts[1])
    assert alone.rows[0].columns == data.rows[1].columns and alone.rows[0].name == "images"


def test_videos_and_texts_of_a_folder_are_one_data_set(models: dict[str, Any], folder: Path) -> None:
    for name, frames in (("a", 5), ("b", 9)):
        write_video(folder / f"{name}.mp4", frames, size=(64, 64))
        (folder / f"{name}.txt").write_text(f"clip {name}")
    ((videos, texts),) = run(core.LoadVideoTextDataSetFromFolderNode, folder="set")
    data = encode(models, video=videos, caption=texts, motion_caption="all move")
    assert [row.name for row in data.rows] == ["a.mp4 #1 frames 0-4", "b.mp4 #2 frames 0-4"]
    assert all(caption_of(data, models, place, "all move") for place in (0, 1))


def test_clips_and_photos_with_one_caption_and_masks_by_place(models: dict[str, Any]) -> None:
    given = {"images": [clip(5), clip(1), clip(9)], "caption": "a cat", "hold_out": 1}
    masks = [torch.ones(1, 64, 64), torch.zeros(1, 64, 64), torch.ones(9, 64, 64)]
    data = encode(models, **given, masks=masks)
    assert [(row.name, row.role, row.shape[1]) for row in data.rows] == [
        ("images #1 frames 0-4", "train", 2), ("images #2", "train", 1), ("images #3 frames 0-4", "validation", 2),
    ]  # fmt: skip
    stored = [load(column_path(data.folder, row.columns["mask"], "mask"))[0]["mask"].mean() for row in data.rows]
    assert stored == [1, 0, 1]
    same = encode(models, **given, masks=masks[0])
    assert len({row.columns["mask"] for row in same.rows[::2]}) == 1


def test_a_batch_stays_a_clip(models: dict[str, Any]) -> None:
    (row,) = encode(models, images=clip(5), caption="a cat").rows
    assert (row.name, row.shape[1]) == ("images frames 0-4", 2)
    (direct,) = data_nodes.EncodeClips.execute(
        models["vae"], models["clip"], images=clip(5), caption="a cat", **OPTIONS
    ).result[0].rows  # fmt: skip
    assert direct == row


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"caption": ["a", "b"]}, "caption: found 2, expected 3, one for each clip or one for all"),
        ({"caption": ["a"], "motion_caption": ["a"] * 4}, "motion_caption: found 4, expected 3"),
        ({"caption": "a", "masks": [torch.ones(1, 64, 64)] * 2}, "masks: found 2, expected 3"),
        ({"caption": "a", "fps": [8.0, 16.0]}, "fps: found a list of 2, expected one value for all clips"),
        ({"caption": "a", "source_fps": [8.0, 16.0]}, "source_fps: found a list of 2"),
        ({"caption": ["a", "", "c"]}, "images #2: has no caption"),
        ({"caption": ["a", " ", ""]}, "some clips cannot be used:\n- images #2: has no caption\n- images #3: has no"),
        ({"caption": "a", "images": [clip(5), clip(3)]}, "images #2: has 3 frames"),
        ({"caption": "a", "images": []}, "images: the list is empty"),
        ({"caption": ["a", "b"], "images": clip(5)}, "caption: found 2, expected 1"),
    ],
)
def test_lists_that_do_not_fit_are_refused(models: dict[str, Any], inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        encode(models, **{"images": [clip(1), clip(1), clip(1)], **inputs})
    assert str(caught.value).startswith(message)


def test_lists_of_clips_for_svd(tmp_path: Path) -> None:
    vae, vision = image_vae(tmp_path), tiny_vision()
    boxes = [Tracklets(128, 64, 3), Tracklets(128, 64, 4)]
    images = [clip(3, 64, 128), clip(4, 64, 128)]
    node, given = svd_data.EncodeSvdClips, {"vae": vae, "clip_vision": vision, **SVD}
    assert node.INPUT_IS_LIST
    data = node.execute(**as_lists({"images": images, "tracklets": boxes, **given})).result[0]
    assert [row.name for row in data.rows] == ["images #1 frames 0-2", "images #2 frames 0-2"]
    assert all("tracklets" in row.columns for row in data.rows)
    for wrong, message in (
        ({"tracklets": boxes[:1]}, "tracklets: found 1, expected 2, one for each clip"),
        ({"tracklets": boxes[::-1]}, "images #1: tracklets are for 4 frames, expected 3"),
        ({"images": [images[0], clip(1)]}, "images #2: is a photo, expected clips"),
        ({"motion_bucket": [1, 2]}, "motion_bucket: found a list of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            node.execute(**as_lists({**given, "images": images, **wrong}))


def test_lists_of_prompts_and_first_frames_are_one_set_of_samples(models: dict[str, Any], tmp_path: Path) -> None:
    prompts = {"width": 32, "height": 32, "frames": 5, "fps": 16.0, "shift": 8.0, "negative": "", **SAMPLED}
    ((samples,),) = run(samples_nodes.SamplePrompts, clip=models["clip"], prompts=["a cat", "a dog\na cow"], **prompts)
    assert samples.names == ["a cat", "a dog", "a cow"]
    node = samples_nodes.SampleFirstFrames
    given = {"vae": image_vae(tmp_path), "clip_vision": tiny_vision(), "size": 64, "frames": 3, "fps": 8} | SAMPLED
    given["motion_bucket"] = 9
    ((samples,),) = run(node, images=[clip(1), clip(2, seed=1)], **given)
    assert samples.names == ["image 1", "image 2", "image 3"]
    with pytest.raises(ValueError, match="images: found the sizes 64x64, 32x64, expected one size"):
        run(node, images=[clip(1), clip(1, 64, 32)], **given)


def test_a_list_of_prior_prompts_is_one_data_set(models: dict[str, Any]) -> None:
    data = encode(models, images=clip(1), caption="a cat")
    given = {name: models[name] for name in ("model", "clip", "vae")}
    ((both,),) = run(data_nodes.PriorClips, data=data, prompts=["a dog.", "a cow."], **given, **PRIORS)
    assert [row.name for row in both.select("clips", "prior")] == ["prior 'a dog.' seed 7", "prior 'a cow.' seed 8"]


@pytest.mark.parametrize("node", [data_nodes.PriorClips, samples_nodes.SamplePrompts])
def test_prompts_of_a_list_are_checked_when_they_are_queued(node: Any) -> None:
    assert node.validate_inputs(prompts=["a dog"]) and node.validate_inputs(prompts=(None,)) and node.validate_inputs()
    with pytest.raises(ValueError, match="prompts"):
        node.validate_inputs(prompts=[" \n"])
