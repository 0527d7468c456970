"""Whether a motion LoRA carries a concept's motion to other sprites, and what of its look comes along."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import oracle
from .studio import Studio
from .world import BACKGROUNDS, COLOURS, UNKNOWN_MOTION, Scene

Video = NDArray[np.uint8]
SPRITES = (("big", "square"), ("big", "disc"), ("small", "triangle"), ("big", "cross"))


@dataclass(frozen=True)
class Request:
    """A prompt for the concept's motion; of a sprite by shape and colour, or of a thing of which nothing is said."""

    text: str
    shape: str = ""
    colour: str = ""


def requests(scene: Scene) -> list[Request]:
    """Known sprites in colours that the concept does not have, then things."""
    colours = [colour for colour in COLOURS if colour not in (scene.colour, scene.second)]
    places = [words for name, (words, *_) in BACKGROUNDS.items() if name not in (scene.background, "night")]
    sprites = [
        Request(f"a {size} {colour} {shape} {place}. {UNKNOWN_MOTION}", shape, colour)
        for (size, shape), colour, place in zip(SPRITES, colours, places, strict=False)
    ]
    return [*sprites, *(Request(f"a thing {place}. {UNKNOWN_MOTION}") for place in places[:2])]


@dataclass(frozen=True)
class Transfer:
    """motion: correlation of other sprites' paths with the concept's, -1..1. sprite: share of those videos with the
    shape and the colour that were asked for. leak: likeness to the concept's sprite, 0..1, where the prompt says nothing
    of the look, less what the base model has.
    """

    motion: float
    sprite: float
    leak: float


def generate(studio: Studio, model: object, scene: Scene, seeds: Sequence[int]) -> list[list[Video]]:
    """For every request one video a seed."""
    texts = [request.text for request in requests(scene)]
    videos = studio.generate(model, [text for text in texts for _ in seeds], [*seeds] * len(texts))
    return [list(videos[i * len(seeds) : (i + 1) * len(seeds)]) for i in range(len(texts))]


def score(scene: Scene, videos: list[list[Video]], base: list[list[Video]]) -> Transfer:
    motion, sprite, leak = [], [], []
    for request, ours, before in zip(requests(scene), videos, base, strict=True):
        for video, plain in zip(ours, before, strict=True):
            if request.shape:
                reading = oracle.read(video)
                motion.append(oracle.path_correlation(reading.track, scene.motion))
                sprite.append((reading.shape, reading.colour) == (request.shape, request.colour))
            else:
                leak.append(oracle.identity(video, scene) - oracle.identity(plain, scene))
    return Transfer(*(float(np.mean(values)) for values in (motion, sprite, leak)))
