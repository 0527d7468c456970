"""Clips of known sprites on given paths, for image-to-video models, and what a video does of what was asked."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kinoloom.nodes.data.svd_nodes import EncodeSvdClips
from kinoloom.nodes.tracklets.control import ApplyTracklets, load_control
from kinoloom.trainers.conditions.tracklet_sources import from_masks
from kinoloom.trainers.conditions.tracklets import Tracklets
from kinoloom.trainers.core.data import TrainingData
from numpy.random import Generator
from numpy.typing import NDArray

from . import oracle, world
from .install import BUCKET, STRIDE
from .studio import SvdStudio
from .train_vae import random_path

FRAME_RATE = world.FPS // STRIDE
SPARSE, WHOLE = 2000, 600  # training clips of every eighth frame, which cost little, and of every frame that is sampled


def on_path(motion: str, seed: int) -> world.Clip:
    """A clip of a known sprite, drawn for this seed, on the path of any motion."""
    rng = np.random.default_rng(seed)
    return world.draw(replace(world.choose(rng), motion=motion), rng)


def on_random_path(rng: Generator) -> world.Clip:
    """A known sprite that goes by up to four corners."""
    scene = replace(world.choose(rng), motion="still")
    x, y = (random_path(rng) for _ in range(2))
    return world.draw(scene, rng, (x, y))


def training_data(studio: SvdStudio, seed: int) -> TrainingData:
    """Sprites on random paths, in clips of three frames and of all that a video has."""
    rng = np.random.default_rng(seed)
    sparse = encode(studio, [on_random_path(rng) for _ in range(SPARSE)], 4 * STRIDE)
    whole = encode(studio, [on_random_path(rng) for _ in range(WHOLE)])
    return TrainingData(sparse.folder, sparse.rows + whole.rows)


@torch.inference_mode()
def encode(studio: SvdStudio, clips: list[world.Clip], stride: int = STRIDE) -> TrainingData:
    """Every `stride`th frame, with the boxes of the sprites."""
    parts = []
    for clip in clips:
        images = torch.from_numpy(clip.video[::stride]).float() / 255
        (part,) = EncodeSvdClips.execute(
            studio.vae, studio.clip_vision, BUCKET, float(FRAME_RATE), images=images, tracklets=boxes(clip, stride),
            frames_per_clip=len(images), fps=float(FRAME_RATE), size=world.SIZE,
        ).args  # fmt: skip
        parts.append(part)
    return TrainingData(parts[0].folder, tuple(row for part in parts for row in part.rows))


def boxes(clip: world.Clip, stride: int = STRIDE) -> Tracklets:
    """Of the sprite in every `stride`th frame."""
    return from_masks(torch.from_numpy(clip.mask[::stride] > 0.5).long())


def steered(studio: SvdStudio, control: Path, clip: world.Clip) -> Any:
    """The model that moves a sprite as this clip does."""
    return ApplyTracklets.execute(studio.model, load_control(str(control)), boxes(clip)).args[0]


@dataclass(frozen=True)
class Followed:
    """iou: overlap of the sprite's box with the asked one, 0..1, mean over all frames but the first, which is given.
    motion: correlation of the path with the asked one, -1..1. sprite: whether shape and colour stayed those given.
    """

    iou: float
    motion: float
    sprite: float


def score(
    clips: list[world.Clip], model: Callable[[world.Clip], Any], studio: SvdStudio, shown: int
) -> tuple[dict[str, float], list[NDArray[np.uint8]]]:
    """Means over videos from the clips' first frames, made by the model for each, and the first few videos."""
    videos = [studio.animate(model(clip), clip.video[0], seed=i) for i, clip in enumerate(clips)]
    rows = [asdict(follow(clip, video)) for clip, video in zip(clips, videos, strict=True)]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}, videos[:shown]


def follow(clip: world.Clip, video: NDArray[np.uint8]) -> Followed:
    reading = oracle.read(video)
    asked, got = (bounds(masks[::STRIDE]) for masks in (clip.mask > 0.5, oracle.sprite_masks(video)))
    same = (reading.shape, reading.colour) == (clip.scene.shape, clip.scene.colour)
    return Followed(
        iou=float(np.mean([overlap(a, b) for a, b in zip(asked[1:], got[1:], strict=True)])),
        motion=oracle.path_correlation(reading.track, clip.scene.motion),
        sprite=float(same),
    )


def bounds(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """T 4: left, top, right, bottom of each mask; of an empty one all 0."""
    found = np.zeros((len(masks), 4))
    for box, mask in zip(found, masks, strict=True):
        if mask.any():
            rows, columns = np.nonzero(mask)
            box[:] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return found


def overlap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Intersection over union of two boxes."""
    width, height = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return float(width * height / max(sum(areas) - width * height, 1e-9))
