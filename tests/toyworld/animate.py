"""Training data of a lesson, pictures of two sprites, and how each of them moves in a video of the picture."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from kinoloom.nodes.data.nodes import EncodeClips
from kinoloom.trainers.core.data import TrainingData
from numpy.typing import NDArray

from . import oracle, pair_oracle, pairs, world
from .install import STRIDE
from .lessons import Lesson, clips
from .studio import PairStudio

MOST_ALIKE = 2  # pixels by which two sprites may be shifted against each other to be compared


@torch.inference_mode()
def training_data(studio: PairStudio, lesson: Lesson) -> TrainingData:
    """The lesson's clips, each with its look and the lesson's sentence."""
    parts = []
    for video, look in clips(lesson):
        images = torch.from_numpy(video[::STRIDE]).float() / 255
        (part,) = EncodeClips.execute(
            studio.vae, studio.clip, look, float(world.FPS // STRIDE), images=images,
            motion_caption=f"{look} {lesson.sentence('it')}", frames_per_clip=len(images), fps=world.FPS // STRIDE,
            size=world.SIZE, single_frames=0, token_variants=0,
        ).args  # fmt: skip
        parts.append(part)
    return TrainingData(parts[0].folder, tuple(row for part in parts for row in part.rows))


@dataclass(frozen=True)
class Picture:
    """A still of two sprites, H W 3, and the words for each adapter."""

    stage: pairs.Stage
    image: NDArray[np.uint8]

    @property
    def look(self) -> str:
        first, second = (f"a {actor.colour} {actor.shape}" for actor in self.stage.actors)
        return f"{first} and {second} {world.BACKGROUNDS[self.stage.background][0]}."

    def prompt(self, lesson: Lesson) -> str:
        """The words for one adapter: both sprites, and that one of them moves."""
        return f"{self.look} {lesson.sentence(f'the {lesson.shape}')}"


def pictures(lessons: Sequence[Lesson], seed: int, count: int) -> list[Picture]:
    """Stills of one sprite of each kind, in other colours, places and backgrounds every time."""
    rng, found = np.random.default_rng(1000 + seed), []
    while len(found) < count:
        stage = pairs.choose(rng, 2)
        shapes = [lesson.shape for lesson in lessons]
        actors = [replace(actor, shape=shape, motion="still") for actor, shape in zip(stage.actors, shapes, strict=True)]
        stage = replace(stage, actors=tuple(actors))
        found.append(Picture(stage, pairs.draw(stage, rng).video[0]))
    return found


@dataclass(frozen=True)
class Animation:
    """own: correlation of a sprite's path with the motion of its own adapter, -1..1. other: with that of the other
    adapter. look: overlap of the sprite with the picture's, 0..1.
    """

    own: float
    other: float
    look: float


def score(video: NDArray[np.uint8], picture: Picture, lessons: Sequence[Lesson]) -> list[Animation]:
    """How each of the picture's two sprites does in a video, T H W 3."""
    return [
        Animation(
            own=pair_oracle.correlation(seen.track, own.motion),
            other=pair_oracle.correlation(seen.track, other.motion),
            look=likeness(video, picture.image, actor.colour),
        )
        for seen, actor, own, other in zip(
            pair_oracle.read(video, picture.stage), picture.stage.actors, lessons, reversed(lessons), strict=True
        )
    ]


def likeness(video: NDArray[np.uint8], image: NDArray[np.uint8], colour: str) -> float:
    """Intersection over union of the sprite of this colour in each frame with that in the image, laid over each other
    at their centres, give or take two pixels: the mean over the frames.
    """
    wanted = pair_oracle.masks_of(image[None], colour)
    masks = pair_oracle.masks_of(video, colour)
    (x, y), reach = oracle.centroids(wanted)[0], range(-MOST_ALIKE, MOST_ALIKE + 1)
    scores = []
    for mask, (left, top) in zip(masks, oracle.centroids(masks), strict=True):
        down, across = round(y - top), round(x - left)
        moved = [np.roll(mask, (down + dy, across + dx), (0, 1)) for dy in reach for dx in reach]
        scores.append(max((m & wanted[0]).sum() / max((m | wanted[0]).sum(), 1) for m in moved))
    return float(np.mean(scores))
