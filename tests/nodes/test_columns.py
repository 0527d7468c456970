"""Columns on disk: each window has its own frames, and NaN is never stored."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import pytest
import torch
from kinoloom.lora_io.file import load
from kinoloom.nodes.data import nodes as data_nodes
from kinoloom.nodes.data import svd_nodes as svd_data
from kinoloom.nodes.data.encoding.cache import data_folder
from kinoloom.nodes.data.encoding.columns import Columns
from kinoloom.nodes.data.encoding.prompts import MOST_TOKENS, encode_prompt, tokenize
from kinoloom.nodes.data.reading import sources
from kinoloom.nodes.data.reading.framing import resample
from kinoloom.nodes.training import previews as samples_nodes
from kinoloom.trainers.conditions.columns import IMAGE, LATENTS, MASK, PREVIEW_FRAME, PREVIEW_PROMPT, PROMPT, TRACKLETS
from kinoloom.trainers.core.data import Row, TrainingData, column_path, texts_of, write_column
from kinoloom.trainers.core.rng import derived_generator
from kinoloom.trainers.run import export
from safetensors.torch import save_file
from torch import Tensor

from ..encoders import image_vae, load_wan, own_folders, tiny_vision
from ..media import write_image

OPTIONS = {"frames_per_clip": 5, "fps": 16.0, "size": 64, "single_frames": 0, "token_variants": 0, "source_fps": 16.0}
SAMPLED = {
    "width": 32, "height": 32, "frames": 5, "fps": 16.0, "steps": 2, "cfg": 5.0, "shift": 8.0, "seed": 7,
    "sample_every": 3,
}  # fmt: skip
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


def levels(count: int) -> Tensor:
    """Frame i is grey (i + 1) / 32."""
    return ((torch.arange(count) + 1) / 32).reshape(-1, 1, 1, 1).expand(count, 16, 16, 3)


class Seen:
    """A VAE of one latent per frame, which is the frame's grey, 32 times."""

    vae_dtype = torch.float32

    def encode(self, frames: Tensor) -> Tensor:
        return (32 * frames[..., :1]).movedim(-1, 1)


def frames_of(columns: Columns, stem: str) -> list[int]:
    latents = load(column_path(columns.folder, stem, "latents"))[0]["latents"]
    return [round(float(value)) - 1 for value in latents[0, :, 0, 0]]


@pytest.mark.parametrize(("rate", "length"), [(48.0, 2), (40.0, 3), (100.0, 2), (33.0, 1), (16.0, 1)])
def test_every_window_holds_its_own_frames(tmp_path: Path, rate: float, length: int) -> None:
    """Where frames repeat to make a higher rate, many windows are of equal frames."""
    source = sources.from_tensor("clip", levels(9), 16.0)
    places = resample(source, rate)
    windows = [places[start : start + length] for start in range(len(places) - length + 1)]
    columns = Columns(tmp_path, comfy.utils.ProgressBar(1))
    for taken in (windows[3:5], windows, windows[::-1]):
        stems = columns.latents(Seen(), "vae", source, taken, 16, 16)
        assert [frames_of(columns, stem) for stem in stems] == taken


@pytest.mark.parametrize("order", itertools.permutations([[7], [2], [2], [5]]))
def test_single_frames_in_any_order_are_their_own(tmp_path: Path, order: tuple) -> None:
    columns = Columns(tmp_path, comfy.utils.ProgressBar(1))
    stems = columns.latents(Seen(), "vae", sources.from_tensor("clip", levels(9), 16.0), list(order), 16, 16)
    assert [frames_of(columns, stem) for stem in stems] == list(order)


def test_a_file_that_another_server_makes_meanwhile_shifts_nothing(tmp_path: Path) -> None:
    source = sources.from_tensor("clip", levels(9), 16.0)
    columns = Columns(tmp_path, comfy.utils.ProgressBar(1))

    class Twice(Seen):
        begun = False

        def encode(self, frames: Tensor) -> Tensor:
            if not Twice.begun:
                Twice.begun = True
                columns.latents(Seen(), "vae", source, [[3]], 16, 16)
            return super().encode(frames)

    stems = columns.latents(Twice(), "vae", source, [[1], [3], [5], [6]], 16, 16)
    assert [frames_of(columns, stem) for stem in stems] == [[1], [3], [5], [6]]


def test_masks_of_repeated_frames_are_their_own(tmp_path: Path) -> None:
    mask = sources.from_tensor("mask", levels(9)[..., 0], 16.0)
    columns = Columns(tmp_path, comfy.utils.ProgressBar(1))
    windows = [[0, 0], [0, 1], [1, 1], [1, 1], [1, 2], [2, 2]]
    stems = columns.masks(mask, windows, 16, 16, 1, (2, 2))
    made = [load(column_path(tmp_path, stem, "mask"))[0]["mask"][0, :, 0, 0] for stem in stems]
    assert [[round(float(32 * value)) - 1 for value in values] for values in made] == windows


def test_files_of_earlier_versions_are_not_trusted() -> None:
    """They may hold the frames of other windows, or NaN."""
    earlier = {LATENTS: 1, PROMPT: 1, MASK: 1, IMAGE: 2, TRACKLETS: 1, PREVIEW_PROMPT: 1, PREVIEW_FRAME: 2}
    assert all(column.version > version for column, version in earlier.items())


def test_a_cache_key_holds_the_column_and_its_version(tmp_path: Path) -> None:
    columns = Columns(tmp_path, comfy.utils.ProgressBar(1))
    given = [(MASK, 1), (MASK, 2), (LATENTS, 1), (replace(MASK, version=MASK.version + 1), 1)]
    assert len({columns.find(column, key)[0] for column, key in given}) == len(given)


# -- captions are literal, prompts are prompts -------------------------------------------------------------------------------

BRACKETS = ["a (red:1.5) cat", "a ((very)) big cat", "cat (:", ") cat (", "(dog:nan)", "(a:1e99) b", r"cat \(animal\) (x)"]


@pytest.mark.parametrize("caption", BRACKETS)
def test_captions_are_literal(models: dict[str, Any], caption: str) -> None:
    clip = models["clip"]
    expected = clip.encode_from_tokens(clip.tokenize(caption, disable_weights=True))
    assert torch.equal(encode_prompt(clip, caption, 0)["prompt_embeds"], expected)
    data = encode(models, caption)
    assert torch.equal(column(data, "prompt_embeds")["prompt_embeds"], expected)


def test_prompts_of_samples_and_priors_have_weights(models: dict[str, Any]) -> None:
    clip, prompt = models["clip"], "a (red:1.5) cat"
    weighted = clip.encode_from_tokens(clip.tokenize(prompt))
    assert not torch.equal(weighted, clip.encode_from_tokens(clip.tokenize(prompt, disable_weights=True)))
    (samples,) = samples_nodes.SamplePrompts.execute(clip, prompt, "", **SAMPLED).result
    assert torch.equal(load(column_path(samples.folder, samples.rows[0].columns["prompt_embeds"], "prompt_embeds"))[0]["prompt_embeds"], weighted)
    row = add_priors(models, prompt).rows[-1]
    made = load(column_path(data_folder(), row.columns["prompt_embeds"], "prompt_embeds"))[0]["prompt_embeds"]
    assert torch.equal(made, weighted)


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("a (cat:nan)", "has the prompt weight nan"),
        ("a (cat:inf)", "has the prompt weight inf"),
        ("((a:-inf) b:2)", "has the prompt weight -inf"),
        ("(" * 3000 + ")" * 3000, "brackets are nested too deeply"),
        ("a cat, embedding:nowhere", "embedding:nowhere is not in models/embeddings"),
        ("cat " * 3000 + "!", "has 12001 characters, expected at most 10000"),
        ("a b " * 2000, "has 4158 tokens, expected at most 1024"),
    ],
)
def test_prompts_that_cannot_be_meant_are_named(models: dict[str, Any], prompt: str, why: str) -> None:
    for field, act in (
        ("prompts", lambda: samples_nodes.SamplePrompts.execute(models["clip"], prompt, "", **SAMPLED)),
        ("negative", lambda: samples_nodes.SamplePrompts.execute(models["clip"], "a", prompt, **SAMPLED)),
        ("prompts", lambda: add_priors(models, prompt)),
    ):
        with pytest.raises(ValueError, match=why) as caught:
            act()
        assert str(caught.value).startswith(f"{field} {prompt.strip()[:10]!r}"[:-1]) and len(str(caught.value)) < 200
    assert not list(data_folder().glob("*.prompt_embeds.*"))


def test_a_megabyte_of_caption_is_refused_before_anything_is_encoded(models: dict[str, Any], folder: Path) -> None:
    for name, text in (("a", "a fine cat"), ("b", "cat " * (1 << 18))):
        write_image(folder / f"{name}.png", 9)
        (folder / f"{name}.txt").write_text(text)
    with pytest.raises(ValueError, match=r"b\.png: caption 'cat cat .*\.\.\.': has 1048575 characters"):
        data_nodes.ClipsFromFolder.execute(models["vae"], models["clip"], folder="set", role="train", **OPTIONS)
    assert not data_folder().exists() or not list(data_folder().iterdir())


def test_the_longest_captions_that_are_taken(models: dict[str, Any]) -> None:
    """Sections of 77 tokens: 13 of them hold 975 words."""
    assert len(tokenize(models["clip"], "cat " * 975, literal=True)["l"]) * 77 <= MOST_TOKENS
    with pytest.raises(ValueError, match="has 1078 tokens"):
        tokenize(models["clip"], "cat " * 976, literal=True)


def test_an_embedding_in_a_caption_is_loaded_and_part_of_the_cache_key(
    models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = models["clip"].tokenizer.clip_l
    monkeypatch.setattr(tokenizer, "embedding_directory", [str(tmp_path)])
    made = []
    for seed in (0, 1):
        vectors = torch.randn(2, 768, generator=derived_generator(seed))
        save_file({"emb_params": vectors}, tmp_path / "me.safetensors")
        made.append(encode(models, "a photo of embedding:me, smiling").rows[0].columns["prompt_embeds"])
    assert made[0] != made[1]
    with pytest.raises(ValueError, match=r"images: caption 'embedding:you': embedding:you is not in models/embeddings"):
        encode(models, "embedding:you")


class Broken:
    """A text encoder, VAE or model with a weight that is no number."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.weight = next(weight for name, weight in module.named_parameters() if "norm" in name or weight.ndim == 1)

    def __enter__(self) -> None:
        self.kept = self.weight.clone()
        self.weight.fill_(math.nan)

    def __exit__(self, *_: object) -> None:
        self.weight.copy_(self.kept)


def test_encodings_that_are_no_numbers_are_never_kept(models: dict[str, Any], tmp_path: Path) -> None:
    with Broken(models["clip"].cond_stage_model), pytest.raises(ValueError, match="images: caption 'a cat': prompt_emb"):
        encode(models, "a cat")
    data = encode(models, "a cat")
    with Broken(models["model"].model), pytest.raises(ValueError, match="prior 'a dog' seed 7: latents came out"):
        add_priors(models, "a dog", data)
    vision = tiny_vision()
    with Broken(vision.model), pytest.raises(ValueError, match="images frames 0-3: image_embeds came out"):
        options = {"frames_per_clip": 4, "fps": 8.0, "size": 64, "motion_bucket": 0, "source_fps": 8.0}
        svd_data.EncodeSvdClips.execute(image_vae(tmp_path), vision, images=levels(4), **options)
    for path in data_folder().iterdir():
        assert all(value.isfinite().all() for value in load(path)[0].values())


def encode(models: dict[str, Any], caption: str) -> TrainingData:
    images = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    return data_nodes.EncodeClips.execute(
        models["vae"], models["clip"], images=images, caption=caption, **OPTIONS
    ).result[0]


def add_priors(models: dict[str, Any], prompts: str, data: TrainingData | None = None) -> TrainingData:
    uncaptioned = Row("clip", "clips", "train", (16, 1, 8, 8), {})
    data = data or TrainingData(str(data_folder()), (uncaptioned,))
    return data_nodes.PriorClips.execute(
        models["model"], models["clip"], models["vae"], data=data, prompts=prompts, **PRIORS
    ).result[0]


def column(data: TrainingData, name: str) -> dict[str, Tensor]:
    return load(column_path(data.folder, data.rows[0].columns[name], name))[0]


def test_looking_for_what_is_on_disk_hears_cancel(tmp_path: Path) -> None:
    source = sources.from_tensor("clip", levels(2), 16.0)

    def many() -> Iterator[list[int]]:
        yield [0]
        comfy.model_management.interrupt_current_processing()
        yield [1]
        pytest.fail("it looks on after Cancel")

    columns = Columns(tmp_path, comfy.utils.ProgressBar(1))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        columns.of_windows(LATENTS, source, many(), (), (), lambda frames: {})


def test_a_column_of_a_caption_says_its_text(tmp_path: Path) -> None:
    stems = ("first", "same", "older")
    for stem, text in zip(stems, ("a waterfall", "a waterfall", ""), strict=True):
        write_column(tmp_path, stem, PROMPT.name, {"prompt_embeds": torch.zeros(1, 2, 3)}, text)
    rows = [Row(stem, "clips", "train", (4, 2, 8, 8), {PROMPT.name: stem}) for stem in stems]
    held_out = Row("other", "clips", "validation", (4, 2, 8, 8), {PROMPT.name: "gone"})
    data = TrainingData(str(tmp_path), (*rows, held_out))
    assert texts_of(data, (PROMPT,)) == ["a waterfall"]
    described = export.described(data, (PROMPT,))
    assert described == {"kinoloom.latents": "[[4, 2, 8, 8]]", "kinoloom.captions": '["a waterfall"]'}
