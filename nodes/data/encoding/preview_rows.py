"""Rows of previews: the conditions of a run's samples, encoded, and the options of its sampler."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ....trainers.backbones.svd.model import SIDE
from ....trainers.conditions.columns import PREVIEW_BOXES, PREVIEW_FRAME, PREVIEW_PROMPT, PREVIEW_START
from ....trainers.conditions.tracklets import Tracklets, to_tensors
from ....trainers.core.config import check, knob
from ....trainers.core.data import Row
from ....trainers.run.previews import Previews
from ...lists import by_place
from ..reading import sources
from ..reading.framing import SIDE as MULTIPLE
from ..reading.framing import bucket, fit
from . import model_keys
from .columns import open_columns
from .svd_rows import LARGEST_BUCKET
from .vae import encode_pixels

MOST = 16  # most samples at a time
LIKE_TRAINING = "Use the same as for the clips."


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Sampler settings, and the number of steps between samples."""

    steps: int = knob(20, "Sampling steps. Fewer are faster and rougher.", min=1, max=1000)
    cfg: float = knob(6.0, "Guidance. Use the same as for generation.", min=0.0, max=100.0, step=0.1)
    seed: int = knob(0, "Seed of the first sample; the others follow. It does not change in a run.", min=0, max=2**53)
    sample_every: int = knob(
        100,
        "Training steps between samples. Samples before the first step and at the end of each phase are added. Raise "
        "it if sampling takes too much time.",
        min=1,
        max=1_000_000,
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            check(option, getattr(self, option.name))


@dataclass(frozen=True, kw_only=True)
class PromptOptions(SampleOptions):
    width: int = knob(512, "In pixels, a multiple of 16 for Wan, of 8 for AnimateDiff.", min=16, max=4096, step=8)
    height: int = knob(512, "In pixels, a multiple of 16 for Wan, of 8 for AnimateDiff.", min=16, max=4096, step=8)
    frames: int = knob(33, "Length: 4n+1 for Wan, 16 for AnimateDiff. " + LIKE_TRAINING, min=1, max=1025)
    fps: float = knob(
        16.0, "Frames per second at which samples are shown: 16 for Wan, 8 for AnimateDiff.", min=1.0, max=240.0,
        advanced=True,
    )  # fmt: skip
    shift: float = knob(
        5.0,
        "Above 1 samples more at high noise, for Wan: use the shift that you generate with. AnimateDiff ignores it.",
        min=0.1,
        max=100.0,
        step=0.1,
        advanced=True,
    )


@dataclass(frozen=True, kw_only=True)
class FirstFrameOptions(SampleOptions):
    size: int = knob(
        512, "Side of a square with as many pixels as a sample gets. " + LIKE_TRAINING, min=64, max=2048, step=16
    )
    frames: int = knob(14, "Length: 14 for svd, 25 for svd_xt. " + LIKE_TRAINING, min=2, max=256)
    fps: int = knob(7, "Frames per second, a condition of the model. " + LIKE_TRAINING, min=1, max=240)
    motion_bucket: int = knob(127, "The amount of motion, a condition of the model.", min=1, max=LARGEST_BUCKET)
    cfg: float = knob(2.5, "Guidance of the last frame; it rises evenly from 1.", min=0.0, max=100.0, step=0.1)


@dataclass(frozen=True, kw_only=True)
class StartOptions(SampleOptions):
    size: int = knob(
        512, "Side of a square with as many pixels as a sample gets. " + LIKE_TRAINING, min=64, max=2048, step=16
    )
    frames: int = knob(16, "Length, the first frame included: 16 for AnimateDiff.", min=2, max=256)
    fps: float = knob(8.0, "Frames per second at which samples are shown.", min=1.0, max=240.0, advanced=True)
    cfg: float = knob(
        1.0, "Guidance. 1 is usual: the captions are not dropped in training.", min=0.0, max=100.0, step=0.1
    )


def read_prompts(prompts: str) -> tuple[str, ...]:
    """The lines that are not empty. ValueError if there are none or too many."""
    names = tuple(line.strip() for line in prompts.splitlines() if line.strip())
    require_count("prompts", len(names))
    return names


def sample_prompts(text_encoder: Any, prompts: str, negative: str, options: PromptOptions) -> Previews:
    """The samples of prompts. ValueError if there are no prompts or too many."""
    names = read_prompts(prompts)
    columns = open_columns(len(names) + 1)
    key = model_keys.of_text_encoder(text_encoder)
    texts = {negative: "negative", **dict.fromkeys(names, "prompts")}
    stems = columns.prompts(text_encoder, key, texts, 0, literal=False)
    rows = tuple(preview(name, {PREVIEW_PROMPT.name: stems[name]}) for name in names)
    away = preview("negative", {PREVIEW_PROMPT.name: stems[negative]})
    return Previews(str(columns.folder), rows, away, first_cfg=options.cfg, **vars(options))


def sample_starts(
    vae: Any, text_encoder: Any, images: Tensor, prompts: str, negative: str, options: StartOptions
) -> Previews:
    """One sample for each image [N, H, W, C], which is its first frame, with the prompt of its place or the only one.

    The unconditional batch differs from a sample's by its prompt alone: it keeps the first frame.
    """
    require_count("images", len(images))
    texts = by_place("prompts", list(read_prompts(prompts)), len(images), one_for="image")
    given = vars(options).copy()
    width, height = bucket(images.shape[2], images.shape[1], given.pop("size") ** 2, side=MULTIPLE)
    columns = open_columns(len({negative, *texts}) + len(images))
    named = {negative: "negative", **dict.fromkeys(texts, "prompts")}
    key = model_keys.of_text_encoder(text_encoder)
    stems = columns.prompts(text_encoder, key, named, 0, literal=False)
    vae_id, rows = model_keys.of_vae(vae), []
    for number, text in enumerate(texts):
        frame = sources.from_tensor(f"image {number + 1}", images[number : number + 1], options.fps)

        def start(frame: sources.Source = frame) -> dict[str, Tensor]:
            pixels = fit(next(frame.frames([0])), width, height).unsqueeze(0)
            return {PREVIEW_START.name: encode_pixels(vae, pixels)[:, 0]}

        stem = columns.cached(PREVIEW_START, (vae_id, width, height, frame.digest), frame.name, start)
        own = {PREVIEW_PROMPT.name: stems[text], PREVIEW_START.name: stem}
        rows.append(preview(f"{frame.name}: {text}", own, columns.shape(stem, PREVIEW_START)))
    away = preview("negative", {PREVIEW_PROMPT.name: stems[negative]})
    size = {"width": width, "height": height, "shift": 1.0, "first_cfg": options.cfg}
    return Previews(str(columns.folder), tuple(rows), away, **size, **given)


def sample_first_frames(
    vae: Any, clip_vision: Any, images: Tensor, tracklets: Tracklets | None, options: FirstFrameOptions
) -> Previews:
    """One sample for each image [N, H, W, C], cropped to multiples of 64, all with the same boxes."""
    require_count("images", len(images))
    given = vars(options).copy()
    width, height = bucket(images.shape[2], images.shape[1], given.pop("size") ** 2, SIDE)
    numbers = {"fps": options.fps, "motion_bucket": given.pop("motion_bucket"), "augmentation": 0}
    columns = open_columns(len(images) + 1)
    models = model_keys.of_vae(vae), model_keys.of_patcher(clip_vision.patcher)
    frames = [sources.from_tensor(f"image {n + 1}", images[n : n + 1], options.fps) for n in range(len(images))]

    def make(frame: sources.Source) -> dict[str, Tensor]:
        pixels = fit(next(frame.frames([0])), width, height).unsqueeze(0)
        return {
            "image_embeds": clip_vision.encode_image(pixels).image_embeds[0].float().cpu(),
            "first_frame": encode_pixels(vae, pixels)[:, 0],
            **{name: torch.tensor(float(value)) for name, value in numbers.items()},
        }

    def boxes() -> dict[str, Tensor]:
        drawn = to_tensors(tracklets or Tracklets(width, height, options.frames), options.frames, (width, height))
        return dict(zip(("boxes", "box_mask"), drawn, strict=True))

    key = (width, height, options.frames, tracklets and tracklets.to_json())
    placed = columns.cached(PREVIEW_BOXES, key, "tracklets", boxes)
    rows = []
    for frame in frames:
        key = (*models, width, height, numbers, frame.digest)
        stem = columns.cached(PREVIEW_FRAME, key, frame.name, lambda frame=frame: make(frame))
        rows.append(preview(frame.name, {PREVIEW_FRAME.name: stem, PREVIEW_BOXES.name: placed}))
    size = {"width": width, "height": height, "shift": 1.0, "first_cfg": 1.0}
    return Previews(str(columns.folder), tuple(rows), None, **size, **given)


def preview(name: str, columns: dict[str, str], shape: tuple[int, ...] = ()) -> Row:
    return Row(name, "clips", "preview", shape, columns)


def require_count(field: str, count: int) -> None:
    if not 1 <= count <= MOST:
        raise ValueError(f"{field}: found {count}, expected 1..{MOST}")
