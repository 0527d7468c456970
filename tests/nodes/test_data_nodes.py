"""The data nodes with a real (tiny) Wan VAE, text encoder and model: files they write, reuse and refuse."""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy_api.latest import InputImpl, Types
from kinoloom.lora_io.file import load
from kinoloom.nodes.data import nodes as data_nodes
from kinoloom.nodes.data.encoding import model_keys
from kinoloom.nodes.data.encoding.columns import Columns
from kinoloom.nodes.data.encoding.vae import encode_pixels
from kinoloom.nodes.data.reading import sources
from kinoloom.nodes.data.reading.cutting import Options
from kinoloom.nodes.training import previews as samples_nodes
from kinoloom.trainers.conditions.columns import LATENTS, MASK, PREVIEW_PROMPT, PROMPT
from kinoloom.trainers.core.data import Batches, Row, TrainingData, column_path
from kinoloom.trainers.run.plain import read
from kinoloom.trainers.run.previews import Previews
from PIL import Image

from ..encoders import load_wan, own_folders
from ..media import write_image, write_video

OPTIONS = {"frames_per_clip": 5, "fps": 16.0, "size": 64, "single_frames": 0, "token_variants": 0, "source_fps": 16.0}


@pytest.fixture(scope="module")
def models(tiny_models: Path) -> dict[str, Any]:
    return load_wan(tiny_models)


@pytest.fixture(scope="module")
def vae(models: dict[str, Any]) -> Any:
    return models["vae"]


@pytest.fixture(scope="module")
def clip(models: dict[str, Any]) -> Any:
    return models["clip"]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> Iterator[Path]:
    with own_folders(tmp_path) as made:
        yield made


@pytest.fixture
def folder(folders: Path) -> Path:
    return folders


def pixels(count: int, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(0))


def encode(models: dict[str, Any], images: torch.Tensor | None, caption: str = "a cat", **options: Any) -> TrainingData:
    made = data_nodes.EncodeClips.execute(
        models["vae"], models["clip"], images=images, caption=caption, **{**OPTIONS, **options}
    )
    return made.result[0]


def from_folder(models: dict[str, Any], folder: str = "set", role: str = "train", **options: Any) -> TrainingData:
    made = data_nodes.ClipsFromFolder.execute(
        models["vae"], models["clip"], folder=folder, role=role, **{**OPTIONS, **options}
    )
    return made.result[0]


def column(data: TrainingData, row: Row, name: str) -> dict[str, torch.Tensor]:
    return load(column_path(data.folder, row.columns[name], name))[0]


def files(data: TrainingData) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(data.folder).iterdir()}


def write_clip(folder: Path, name: str, frames: int = 9, caption: str | None = "a cat", **options: Any) -> Path:
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption)
    return write_video(folder / f"{name}.mp4", frames, **options)


def test_a_single_frame_is_index_0_of_its_clip(vae: Any) -> None:
    frames = pixels(9)
    clip, frame, other = encode_pixels(vae, frames), encode_pixels(vae, frames[:1]), encode_pixels(vae, frames[4:5])
    assert clip.shape == (16, 3, 8, 8) and frame.shape == (16, 1, 8, 8)
    assert torch.allclose(clip[:, :1], frame, atol=1e-4)
    assert not torch.allclose(clip[:, 1:2], other, atol=1e-2)


def test_rows_of_a_clip_and_its_frames(models: dict[str, Any], vae: Any) -> None:
    frames = pixels(9)
    data = encode(models, frames, frames_per_clip=9, single_frames=3)
    assert [(row.name, row.unit, row.role, row.shape) for row in data.rows] == [
        ("images frames 0-8", "clips", "train", (16, 3, 8, 8)),
        ("images frame 0", "frames", "train", (16, 1, 8, 8)),
        ("images frame 4", "frames", "train", (16, 1, 8, 8)),
        ("images frame 8", "frames", "train", (16, 1, 8, 8)),
    ]
    raw = column(data, data.rows[0], "latents")["latents"]
    assert torch.equal(raw, vae.encode(frames)[0]) and raw.dtype == torch.float32
    assert torch.equal(column(data, data.rows[2], "latents")["latents"], vae.encode(frames[4:5])[0])


def test_batches_reads_what_the_nodes_write(models: dict[str, Any]) -> None:
    data = encode(
        models,
        pixels(9),
        single_frames=5,
        window_mode="uniform",
        window_count=2,
        token_variants=2,
        masks=torch.ones(9, 64, 64),
    )
    wide = encode(models, pixels(5, 32, 128), "another, longer caption with more words")
    data = data_nodes.CombineData.execute(data, wide).result[0]
    clips = Batches(data, "clips", "train", (LATENTS, PROMPT), batch_size=2)
    assert len(clips) == 2
    shapes = {tuple(clips[i]["latents"].shape) for i in range(2)}
    assert shapes == {(2, 16, 2, 8, 8), (2, 16, 2, 4, 16)}
    frames = Batches(data, "frames", "train", (LATENTS, PROMPT, MASK), batch_size=2)[0]
    assert frames["prompt_embeds"].shape == (2, 3, 77, 768)
    assert frames["mask"].shape == (2, 1, 1, 8, 8)
    assert frames["prompt_tokens"].shape == (2, 3)


def test_length_that_the_vae_cannot_take(models: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"frames_per_clip=6: .* 5 and 9"):
        encode(models, pixels(9), frames_per_clip=6)


def test_images_and_video_exclude_each_other(models: dict[str, Any]) -> None:
    video = InputImpl.VideoFromComponents(Types.VideoComponents(images=pixels(9), frame_rate=16))
    for images, given in ((None, None), (pixels(9), video)):
        with pytest.raises(ValueError, match="either images or video"):
            encode(models, images, video=given)


def test_too_short_a_clip_says_what_would_fit(models: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"has 7 frames at 16 per second, .* takes 9: set frames_per_clip to 5"):
        encode(models, pixels(7), frames_per_clip=9)


def test_one_image_is_a_photo(models: dict[str, Any]) -> None:
    data = encode(models, pixels(1), single_frames=8, motion_caption="ignored")
    assert [(row.unit, row.shape) for row in data.rows] == [("clips", (16, 1, 8, 8)), ("frames", (16, 1, 8, 8))]
    assert data.rows[0].columns == data.rows[1].columns


def test_video_file_and_video_in_memory_use_their_own_rate(models: dict[str, Any], folder: Path) -> None:
    path = write_clip(folder, "dance", 10, fps=32, size=(64, 64))
    from_file = encode(models, None, video=InputImpl.VideoFromFile(str(path)), source_fps=1.0)
    assert from_file.rows[0].name == "dance.mp4 frames 0-8"
    components = InputImpl.VideoFromFile(str(path)).get_components()
    in_memory = encode(models, None, video=InputImpl.VideoFromComponents(components), source_fps=1.0)
    assert in_memory.rows[0].name == "video frames 0-8"
    latents = [column(data, data.rows[0], "latents")["latents"] for data in (from_file, in_memory)]
    assert torch.allclose(*latents, atol=0.05)
    trimmed = InputImpl.VideoFromFile(str(path), start_time=5 / 32)
    with pytest.raises(ValueError, match="has 3 frames"):
        encode(models, None, video=trimmed)


def test_motion_caption_is_for_the_clip_and_static_for_its_frames(models: dict[str, Any], clip: Any) -> None:
    data = encode(models, pixels(5), "a [v] cat", motion_caption="a [v] cat does [u]", single_frames=1)
    moving, still = (column(data, row, "prompt_embeds")["prompt_embeds"][0] for row in data.rows)
    assert torch.equal(moving, clip.encode_from_tokens(clip.tokenize("a [v] cat does [u]"))[0])
    assert torch.equal(still, clip.encode_from_tokens(clip.tokenize("a [v] cat"))[0])


def test_one_caption_for_both_is_warned_about_once(
    models: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        write_clip(folder, name)
    with caplog.at_level(logging.WARNING):
        from_folder(models, single_frames=2)
    warned = [record.getMessage() for record in caplog.records if "one caption serves" in record.getMessage()]
    assert len(warned) == 1 and "a.mp4, b.mp4" in warned[0] and "static" in warned[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        from_folder(models, single_frames=0)
    assert not [record for record in caplog.records if "one caption serves" in record.getMessage()]


def test_masks_follow_the_latents(models: dict[str, Any]) -> None:
    masks = torch.zeros(9, 64, 64)
    masks[1:5, :, 32:] = 1
    masks[5:7, :8, :8] = 1
    data = encode(models, pixels(9), frames_per_clip=9, single_frames=9, masks=masks)
    mask = column(data, data.rows[0], "mask")["mask"]
    assert mask.shape == (1, 3, 8, 8)
    assert mask[0, 0].sum() == 0
    assert torch.equal(mask[0, 1], torch.tensor([0.0] * 4 + [1.0] * 4).expand(8, 8))
    assert mask[0, 2, 0, 0] == 0.5 and mask[0, 2].sum() == 0.5
    assert [column(data, row, "mask")["mask"].sum().item() for row in data.rows[1:]] == [0, 32, 32, 32, 32, 1, 1, 0, 0]


def test_one_mask_serves_all_frames_and_is_cropped_like_them(models: dict[str, Any]) -> None:
    mask = torch.zeros(1, 64, 128)
    mask[:, :, :64] = 1
    data = encode(models, pixels(5, 100, 200), masks=mask)
    made = column(data, data.rows[0], "mask")["mask"]
    assert made.shape == (1, *data.rows[0].shape[1:])
    assert made.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        (torch.ones(4, 64, 64), "its mask masks has 4"),
        (torch.ones(5, 64, 32), "the same aspect ratio"),
    ],
)
def test_masks_of_the_wrong_shape(models: dict[str, Any], masks: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        encode(models, pixels(5), masks=masks)


def test_second_run_writes_nothing_and_gives_equal_data(models: dict[str, Any], folder: Path) -> None:
    write_clip(folder, "a")
    options = {"single_frames": 3, "token_variants": 1}
    first = from_folder(models, **options)
    before = files(first)
    assert len(before) == 1 + 1 + 3  # one caption, one clip, three frames
    assert from_folder(models, **options) == first
    assert files(first) == before


@pytest.mark.parametrize(
    "change",
    [
        {"size": 48},
        {"frames_per_clip": 9},
        {"caption": "a dog"},
        {"token_variants": 1},
        {"images": pixels(9) * 0.5},
    ],
)
def test_what_changes_the_encoding_is_encoded_again(models: dict[str, Any], change: dict[str, Any]) -> None:
    given = {"images": pixels(9), "caption": "a cat"}
    first = encode(models, **given)
    second = encode(models, **{**given, **change})
    assert first.rows[0].columns != second.rows[0].columns


def test_another_vae_or_text_encoder_is_another_identity(models: dict[str, Any], tiny_models: Path) -> None:
    path = tiny_models / "vae" / "tiny_wan_vae.safetensors"
    weights = comfy.utils.load_torch_file(str(path))
    from_weights = comfy.sd.VAE(sd=dict(weights))
    again = comfy.sd.VAE(sd=dict(weights))
    assert model_keys.of_vae(from_weights) == model_keys.of_vae(again)
    weights["conv1.weight"] = weights["conv1.weight"] + 1e-3
    assert model_keys.of_vae(comfy.sd.VAE(sd=weights)) != model_keys.of_vae(again)
    half = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)), dtype=torch.bfloat16)
    assert model_keys.of_vae(half) != model_keys.of_vae(again)
    skipped = models["clip"].clone()
    skipped.clip_layer(-2)
    assert model_keys.of_text_encoder(skipped) != model_keys.of_text_encoder(models["clip"])


def test_interrupted_encoding_goes_on_where_it_was(models: dict[str, Any], folder: Path) -> None:
    write_clip(folder, "a")
    hook = comfy.utils.PROGRESS_BAR_HOOK

    def cancel(value: int, total: int, preview: Any, node_id: Any = None) -> None:
        if value == 3:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(cancel)
    # the bar tells its hook at most every 100 ms
    throttle, comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL = comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL, 0
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            from_folder(models, single_frames=5)
    finally:
        comfy.utils.set_progress_bar_global_hook(hook)
        comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL = throttle
        comfy.model_management.interrupt_current_processing(False)
    kept = {path.name: path.stat().st_mtime_ns for path in column_folder().iterdir()}
    assert len(kept) == 3
    data = from_folder(models, single_frames=5)
    assert {name: files(data)[name] for name in kept} == kept and len(files(data)) == 7


def column_folder() -> Path:
    return Path(folder_paths.get_system_user_directory("kinoloom")) / "data"


def test_folder_with_videos_frames_photos_and_masks(models: dict[str, Any], folder: Path) -> None:
    write_clip(folder, "clip10", size=(64, 64))
    write_clip(folder, "clip2", size=(64, 64), caption=None)
    (folder / "clip2.static.txt").write_text("a [v] cat")
    (folder / "clip2.motion.txt").write_text("a [v] cat does [u]")
    write_image(folder / "clip2.mask.png", 255, (64, 64))
    for number in range(1, 12):
        write_image(folder / "walk" / f"{number}.png", 4 * number, (64, 64))
        write_image(folder / "walk.mask" / f"{number}.png", 255 * (number > 1), (64, 64))
    (folder / "walk" / "caption.txt").write_text("a walk")
    write_image(folder / "portrait.jpg", 9, (48, 96))
    (folder / "portrait.txt").write_text("a portrait")
    data = from_folder(models)
    assert [(row.name, row.shape[1], "mask" in row.columns) for row in data.rows] == [
        ("clip2.mp4 frames 0-4", 2, True),
        ("clip10.mp4 frames 0-4", 2, False),
        ("portrait.jpg", 1, False),
        ("walk frames 0-4", 2, True),
    ]
    assert column(data, data.rows[3], "mask")["mask"][0, :, 0, 0].tolist() == [0, 1]
    assert data.rows[2].shape[2] > data.rows[2].shape[3]


def test_transparency_as_mask_is_encoded_and_unused_files_are_shown(models: dict[str, Any], folder: Path) -> None:
    picture = Image.new("RGBA", (64, 64), "red")
    picture.paste((255, 0, 255, 0), (0, 0, 32, 64))
    picture.save(folder / "a.png")
    (folder / "a.txt").write_text("red")
    (folder / "a.heic").write_text("not read")
    given = {"folder": "set", "role": "train", **OPTIONS}
    plain, chosen = (
        data_nodes.ClipsFromFolder.execute(models["vae"], models["clip"], alpha_as_mask=mask, **given)
        for mask in (False, True)
    )
    assert "a.heic" in chosen.ui["text"][0] and "white: a.png" in chosen.ui["text"][0]
    assert "mask" not in plain.result[0].rows[0].columns
    data = chosen.result[0]
    assert column(data, data.rows[0], "mask")["mask"][0, 0, 0].tolist() == [0] * 4 + [1] * 4
    assert data.rows[0].columns["latents"] == plain.result[0].rows[0].columns["latents"]


def test_all_bad_clips_are_named_at_once(models: dict[str, Any], folder: Path) -> None:
    write_clip(folder, "good")
    write_clip(folder, "short", 3)
    write_clip(folder, "mute", caption=None)
    write_clip(folder, "empty", caption=" \n")
    (folder / "broken.mp4").write_bytes(b"nothing" * 99)
    write_image(folder / "odd" / "1.png", 0)
    write_image(folder / "odd" / "2.png", 0, (32, 32))
    write_clip(folder, "masked", 9)
    write_video(folder / "masked.mask.mp4", 4)
    write_image(folder / "Good.mask.png", 0)
    with pytest.raises(ValueError) as caught:
        from_folder(models)
    message = str(caught.value)
    assert message.startswith("some clips in 'set' cannot be used") and message.count("\n- ") == 7
    for expected in (
        "short.mp4: has 3 frames",
        "mute.mp4: has no caption",
        "empty.mp4: has no caption",
        "broken.mp4: not a readable video",
        "odd: 2.png is 32x32",
        "masked.mp4: has 9 frames, its mask",
    ):
        assert expected in message
    assert "Good.mask.png: no clip is called Good" in message and "good.mp4" not in message


def test_folders_outside_the_input_folder_are_refused(models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    write_clip(outside, "secret")
    (folder.parent / "link").symlink_to(outside)
    for name in ("../outside", "set/../../outside", str(outside), "link"):
        with pytest.raises(ValueError, match="leads out of the input folder"):
            from_folder(models, name)
    for name in ("", ".", "absent"):
        with pytest.raises(ValueError, match="there is no such folder"):
            from_folder(models, name)


def test_links_in_a_folder_may_not_leave_it(models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "secret.mp4", 9)
    write_image(tmp_path / "secret.png", 9)
    (tmp_path / "secret.txt").write_text("secret")
    write_clip(folder, "plain", caption=None)
    (folder / "plain.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "film.mp4").symlink_to(tmp_path / "secret.mp4")
    (folder / "film.txt").write_text("a film")
    write_clip(folder, "masked")
    (folder / "masked.mask.png").symlink_to(tmp_path / "secret.png")
    (folder / "walk").mkdir()
    (folder / "walk" / "1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError) as caught:
        from_folder(models)
    for link in ("plain.txt", "film.mp4", "masked.mask.png", "walk/1.png"):
        assert link in str(caught.value)
    assert "film.txt" not in str(caught.value)


def test_changed_folder_has_another_fingerprint(folder: Path) -> None:
    def fingerprint() -> str:
        return data_nodes.ClipsFromFolder.fingerprint_inputs(folder="set", role="train", **OPTIONS)

    write_image(folder / "walk" / "1.png", 4)
    first = fingerprint()
    assert fingerprint() == first
    (folder / "walk.txt").write_text("a walk")
    second = fingerprint()
    os.utime(folder / "walk" / "1.png", ns=(1, 1))
    assert len({first, second, fingerprint()}) == 3


def test_held_out_clips_are_the_last_ones(models: dict[str, Any], folder: Path) -> None:
    for name in ("a", "b", "c"):
        write_clip(folder, name)
        write_image(folder / f"{name}.mask.png", 4 * ord(name) % 255)
    data = from_folder(models, hold_out=1, single_frames=2)
    held = [row.name for row in data.rows if row.role == "validation"]
    assert held == ["c.mp4 frames 0-4", "c.mp4 frame 0", "c.mp4 frame 4"]
    assert len(data.rows) == 9
    with pytest.raises(ValueError, match="nothing would be left"):
        from_folder(models, hold_out=3)
    with pytest.raises(ValueError, match="these have role validation"):
        from_folder(models, role="validation", hold_out=1)


def test_frames_trained_on_do_not_validate(models: dict[str, Any]) -> None:
    data = encode(models, pixels(9), window_mode="sliding", window_stride=2, hold_out=1, single_frames=81)
    frames = {role: [row.name for row in data.select("frames", role)] for role in ("train", "validation")}
    assert frames == {
        "train": [f"images frame {i}" for i in range(7)],
        "validation": ["images frame 7", "images frame 8"],
    }


@pytest.mark.parametrize("role", ["validation", "prior"])
def test_role_of_a_folder(models: dict[str, Any], folder: Path, role: str) -> None:
    write_clip(folder, "a")
    assert {row.role for row in from_folder(models, role=role, single_frames=1).rows} == {role}


def test_enlarging_is_logged(models: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encode(models, pixels(5, 32, 32))
        assert "enlarged from 32x32 to 64x64" in caplog.text
        caplog.clear()
        encode(models, pixels(5, 80, 80))
        assert "enlarged" not in caplog.text


def test_combining_drops_duplicates_and_keeps_order(models: dict[str, Any]) -> None:
    first, second = encode(models, pixels(5), "one"), encode(models, pixels(5), "two", single_frames=2)
    both = data_nodes.CombineData.execute(first, second).result[0]
    assert both.rows == (*first.rows, *second.rows)
    assert data_nodes.CombineData.execute(both, second).result[0] == both
    with pytest.raises(ValueError, match="cannot be combined"):
        data_nodes.CombineData.execute(first, TrainingData("elsewhere", second.rows))


PRIORS = {
    "seeds_per_prompt": 1,
    "seed": 7,
    "steps": 2,
    "cfg": 2.0,
    "sampler_name": "euler",
    "scheduler": "simple",
    "single_frames": 2,
    "token_variants": 0,
    "negative": "bad",
}


def add_priors(models: dict[str, Any], data: TrainingData, prompts: str, **options: Any) -> TrainingData:
    return data_nodes.PriorClips.execute(
        models["model"], models["clip"], models["vae"], data=data, prompts=prompts, **{**PRIORS, **options}
    ).result[0]


def test_prior_clips_are_what_the_sampler_makes(models: dict[str, Any], vae: Any) -> None:
    data = encode(models, pixels(5), single_frames=1)
    both = add_priors(models, data, " A man. He walks.\n\n", seeds_per_prompt=2)
    assert both.rows[: len(data.rows)] == data.rows
    priors = both.select("clips", "prior")
    assert [row.shape for row in priors] == [(16, 2, 8, 8)] * 2
    latents = [column(both, row, "latents")["latents"] for row in priors]
    assert not torch.equal(*latents)
    import nodes as core

    clip = models["clip"]
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("A man. He walks.", "bad"))
    expected = core.common_ksampler(
        models["model"], 8, 2, 2.0, "euler", "simple", positive, negative, {"samples": torch.zeros(1, 16, 2, 8, 8)}
    )[0]["samples"]
    assert torch.equal(latents[1], expected[0])

    frames = both.select("frames", "prior")
    assert [row.shape for row in frames] == [(16, 1, 8, 8)] * 4
    last = column(both, frames[3], "latents")["latents"]
    decoded = vae.decode(latents[1][None])[0]
    assert torch.equal(last, vae.encode(decoded[4:5])[0])
    assert not torch.allclose(last, latents[1][:, 1:], atol=1e-2)
    still = column(both, frames[3], "prompt_embeds")["prompt_embeds"][0]
    assert torch.equal(still, clip.encode_from_tokens(clip.tokenize("A man."))[0])


def test_prior_clips_are_made_once(models: dict[str, Any]) -> None:
    data = encode(models, pixels(5), single_frames=1)
    first = add_priors(models, data, "A man. He walks.")
    before = files(first)
    assert add_priors(models, data, "A man. He walks.") == first
    assert files(first) == before
    for change in ({"steps": 1}, {"seed": 8}, {"cfg": 1.0}, {"negative": ""}, {"scheduler": "normal"}):
        changed = add_priors(models, data, "A man. He walks.", single_frames=0, **change)
        assert changed.select("clips", "prior")[0].columns != first.select("clips", "prior")[0].columns


def test_prior_clips_know_the_shift_of_the_model(models: dict[str, Any]) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    shifted = [ModelSamplingSD3().patch(models["model"], shift)[0] for shift in (3.0, 3.0, 8.0)]
    same, again, other = (model_keys.of_model(model) for model in shifted)
    assert same == again != other


def test_prior_clips_take_the_sizes_of_the_data_in_turn(models: dict[str, Any]) -> None:
    data = data_nodes.CombineData.execute(encode(models, pixels(5)), encode(models, pixels(5, 32, 128))).result[0]
    priors = add_priors(models, data, "A.\nB.\nC.")
    assert [row.shape for row in priors.select("clips", "prior")] == [(16, 2, 8, 8), (16, 2, 4, 16), (16, 2, 8, 8)]
    assert priors.select("frames", "prior") == []
    assert [row.name[-6:] for row in priors.select("clips", "prior")] == ["seed 7", "seed 8", "seed 9"]


@pytest.mark.parametrize("prompts", ["A man.\nA [v] man.", "A man does [u].", " \n"])
def test_prior_prompts_without_tokens(models: dict[str, Any], prompts: str) -> None:
    with pytest.raises(ValueError, match=r"contains \[[uv]\]|prompts is empty"):
        add_priors(models, TrainingData("", ()), prompts)


def test_prior_clips_need_clips(models: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no clips to train on"):
        add_priors(models, TrainingData("", ()), "A man.")


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="size=8: expected 16"):
        Options(size=8)


@pytest.mark.parametrize("node", data_nodes.NODES)
def test_every_input_has_a_tooltip(node: Any) -> None:
    schema = node.GET_SCHEMA()
    assert schema.category == "Kinoloom/data" and schema.node_id.startswith("Kinoloom")
    assert all(given.tooltip for given in schema.inputs)


def test_single_frames_are_read_in_one_pass(vae: Any, tmp_path: Path) -> None:
    """A video is decoded from its beginning at every pass."""
    passes: list[list[int]] = []
    whole = sources.from_tensor("counted", pixels(9), 16.0)

    def counted(indices: Iterable[int]) -> Iterator[torch.Tensor]:
        passes.append(list(indices))
        return whole.frames(passes[-1])

    columns = Columns(tmp_path, comfy.utils.ProgressBar(10))
    first = columns.latents(vae, "vae", replace(whole, frames=counted), [[1], [4], [8]], 64, 64)
    assert passes == [[1, 4, 8]]
    again = columns.latents(vae, "vae", replace(whole, frames=counted), [[1], [3], [4], [6]], 64, 64)
    assert passes == [[1, 4, 8], [3, 6]] and (again[0], again[2]) == (first[0], first[1])
    alone = encode_pixels(vae, pixels(9)[6:7])
    assert torch.equal(load(column_path(tmp_path, again[3], "latents"))[0]["latents"], alone)


# -- samples -----------------------------------------------------------------------------------------------------------------


SAMPLED = {
    "width": 32,
    "height": 32,
    "frames": 5,
    "fps": 16.0,
    "steps": 2,
    "cfg": 5.0,
    "shift": 8.0,
    "seed": 7,
    "sample_every": 3,
}


def test_sample_prompts_are_encoded_as_captions_are_and_survive_a_restart(clip: Any) -> None:
    node = samples_nodes.SamplePrompts
    (samples,) = node.execute(clip, "a man\n\n  a [v] dog runs \n", "blurry", **SAMPLED).result
    assert samples.names == ["a man", "a [v] dog runs"] and samples.sample_every == 3
    assert read(Previews, json.loads(json.dumps(asdict(samples))), "samples") == samples
    positive, negative = samples.conditions(1, (PREVIEW_PROMPT,))
    for batch, text in ((positive, "a [v] dog runs"), (negative, "blurry")):
        encoded, length = clip.encode_from_tokens(clip.tokenize(text)), batch["prompt_embeds"].shape[1]
        assert torch.equal(batch["prompt_embeds"], encoded[:, :length]) and not encoded[:, length:].any()
    assert node.execute(clip, "a man\na [v] dog runs", "blurry", **SAMPLED).result == (samples,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": " \n"}, "prompts: found 0, expected 1..16"),
        ({"prompts": "a\n" * 17}, "prompts: found 17, expected 1..16"),
        ({"steps": 0}, "steps=0: expected 1..1000"),
        ({"sample_every": 0}, "sample_every=0: expected 1..1000000"),
    ],
)
def test_samples_that_cannot_be_made_are_refused(options: dict[str, Any], message: str, clip: Any) -> None:
    with pytest.raises(ValueError, match=message):
        samples_nodes.SamplePrompts.execute(clip, **{"prompts": "a", "negative": "", **SAMPLED, **options})
