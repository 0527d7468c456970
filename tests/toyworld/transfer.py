"""Whether a motion LoRA carries a concept's motion to other sprites, and what of its look comes along."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import oracle
from .studio import AnimateDiffStudio, Studio
from .world import BACKGROUNDS, COLOURS, MOTIONS, UNKNOWN_MOTION, Scene

Video = NDArray[np.uint8]
SPRITES = (("big", "square"), ("big", "disc"), ("small", "triangle"), ("big", "cross"))


@dataclass(frozen=True)
class Request:
    text: str
    shape: str
    colour: str
    motion: str  # one of MOTIONS, or "" for the concept's


def requests(scene: Scene) -> list[Request]:
    """Known sprites in colours that the concept does not have: each in the new motion, and in one that is known."""
    colours = [colour for colour in COLOURS if colour not in (scene.colour, scene.second)]
    places = [words for name, (words, *_) in BACKGROUNDS.items() if name not in (scene.background, "night")]
    asked = []
    for number, (size, shape) in enumerate(SPRITES):
        start = f"a {size} {colours[number]} {shape} {places[number]}."
        motion = ("left", "up", "right", "down")[number]
        asked.append(Request(f"{start} {UNKNOWN_MOTION}", shape, colours[number], ""))
        asked.append(Request(f"{start} {MOTIONS[motion]}", shape, colours[number], motion))
    return asked


@dataclass(frozen=True)
class Transfer:
    """motion: correlation of other sprites' paths with the concept's, -1..1, where the new motion was asked for.

    sprite: share of those videos with the shape and the colour that were asked for. leak: likeness of those videos to
    the concept's sprite, 0..1, less what the base model has. known_motion: share of the videos with a known motion in
    the prompt that show it.
    """

    motion: float
    sprite: float
    leak: float
    known_motion: float


def generate(
    studio: AnimateDiffStudio | Studio, model: object, scene: Scene, seeds: Sequence[int]
) -> list[list[Video]]:
    """For every request one video a seed."""
    texts = [request.text for request in requests(scene)]
    videos = studio.generate(model, [text for text in texts for _ in seeds], [*seeds] * len(texts))
    return [list(videos[i * len(seeds) : (i + 1) * len(seeds)]) for i in range(len(texts))]


def score(scene: Scene, videos: list[list[Video]], base: list[list[Video]]) -> Transfer:
    motion, sprite, leak, known = [], [], [], []
    for request, ours, before in zip(requests(scene), videos, base, strict=True):
        for video, plain in zip(ours, before, strict=True):
            reading = oracle.read(video)
            if request.motion:
                known.append(reading.motion == request.motion)
            else:
                motion.append(oracle.path_correlation(reading.track, scene.motion))
                sprite.append((reading.shape, reading.colour) == (request.shape, request.colour))
                leak.append(oracle.identity(video, scene) - oracle.identity(plain, scene))
    return Transfer(*(float(np.mean(values)) for values in (motion, sprite, leak, known)))
