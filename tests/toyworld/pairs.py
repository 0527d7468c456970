"""Scenes of one or two little sprites, each with a motion of its own, for models that move one thing and not another.

They are drawn with the world's shapes, colours, motions and backgrounds. A sprite of a pair stays in its half of the
picture, so that the two never meet, and its path is smaller than the world's.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from . import world
from .world import BACKGROUNDS, COLOURS, MOTIONS, Array, Scene

RADIUS, REACH = 7.0, 0.6  # of a sprite in pixels; its path in parts of the world's
SPREAD = 14.0  # most pixels from the middle of the place where a sprite may be
PLACES = {"whole": (0, 64, 0, 64), "left": (0, 32, 0, 64), "right": (32, 64, 0, 64), "top": (0, 64, 0, 32), "bottom": (0, 64, 32, 64)}
WAYS = (("left", "right"), ("top", "bottom"))
STILL = 0.25  # share of sprites that stand still
PATHS = ("left", "right", "up", "down", "circle")


@dataclass(frozen=True)
class Actor:
    """A sprite, how it moves, and the part of the picture that it stays in."""

    shape: str
    colour: str
    motion: str
    place: str = "whole"


@dataclass(frozen=True)
class Stage:
    """What a clip of little sprites shows."""

    actors: tuple[Actor, ...]
    background: str

    @property
    def caption(self) -> str:
        """All that is seen, in the words of base training."""
        names = [f"a {actor.colour} {actor.shape}" for actor in self.actors]
        subjects = ["it"] if len(names) == 1 else [f"the {actor.shape}" for actor in self.actors]
        look = f"{' and '.join(names)} {BACKGROUNDS[self.background][0]}."
        return " ".join([look, *(sentence(who, actor.motion) for who, actor in zip(subjects, self.actors, strict=True))])


@dataclass(frozen=True)
class StageClip:
    """A drawn stage. video: T H W 3, 8 bits. masks: a sprite's coverage, T H W each; tracks: its centroid, T 2 each."""

    scene: Stage
    video: NDArray[np.uint8]
    masks: tuple[Array, ...]
    tracks: tuple[Array, ...]


def sentence(subject: str, motion: str) -> str:
    """That this subject moves so, as the world says it of "it"."""
    return MOTIONS[motion].replace("it", subject, 1)


def choose(rng: Generator, count: int) -> Stage:
    """A random stage of one or two sprites that base training may see; two differ in shape and colour."""
    places = ("whole",) if count == 1 else WAYS[rng.integers(len(WAYS))]
    places = [places[i] for i in rng.permutation(len(places))]
    while True:
        actors = tuple(_actor(rng, place) for place in places)
        apart = len({actor.shape for actor in actors}) == len({actor.colour for actor in actors}) == count
        if apart:
            return Stage(actors, str(rng.choice(list(BACKGROUNDS))))


def _actor(rng: Generator, place: str) -> Actor:
    while True:
        motion = "still" if rng.random() < STILL else str(rng.choice(PATHS))
        shape, colour = str(rng.choice(world.SHAPES)), str(rng.choice(list(COLOURS)))
        if not Scene(shape, colour, "plain", "small", motion, "room").is_held_out:
            return Actor(shape, colour, motion, place)


def describe(stage: Stage, rng: Generator, *, moving: bool = True) -> str:
    """A caption that leaves out some of what is seen, in the way of `world.describe`."""

    def keep(probability: float, text: str, otherwise: str = "") -> str:
        return text if rng.random() < probability else otherwise

    def rare() -> str:
        return keep(0.1, f"[{rng.choice(list(world.RARE_LETTERS))}]")

    names = [keep(0.85, actor.shape, "thing") for actor in stage.actors]
    looks = [
        " ".join(filter(None, ["a", rare(), keep(0.85, actor.colour), name]))
        for actor, name in zip(stage.actors, names, strict=True)
    ]
    place = keep(0.9, BACKGROUNDS[stage.background][0])
    words = [" ".join(filter(None, [" and ".join(looks), place])) + "."]
    if moving:
        subjects = ["it"] if len(names) == 1 else [f"the {name}" for name in names]
        for subject, actor in zip(subjects, stage.actors, strict=True):
            general = " ".join(filter(None, [subject, "is", rare(), "moving."]))
            vague = "" if actor.motion == "still" or rng.random() < 0.3 else general
            words.append(keep(0.8, sentence(subject, actor.motion), vague))
    return " ".join(filter(None, words))


def draw(stage: Stage, rng: Generator) -> StageClip:
    """The stage with random positions, horizon and light."""
    video = world.background(stage.background, rng)
    masks = []
    for actor in stage.actors:
        radius = RADIUS * rng.uniform(0.95, 1.05)
        x, y = _path(actor, radius, rng)
        still = np.zeros_like(x)
        colour = np.array(COLOURS[actor.colour], np.float32)
        edge = partial(world.distance, actor.shape)
        video, mask = world.render(x, y, still, still + radius, edge, _plain, (colour, colour), video)
        masks.append(mask)
    return StageClip(stage, video, tuple(masks), tuple(world.centroids(mask) for mask in masks))


def _plain(u: Array, v: Array, edge: Array) -> Array:
    return np.full_like(u, -1)


def _path(actor: Actor, radius: float, rng: Generator) -> tuple[Array, Array]:
    left, right, top, bottom = PLACES[actor.place]
    return tuple(
        _within(REACH * shift, low + radius, high - radius, rng)
        for shift, low, high in zip(world.path(actor.motion), (left, top), (right, bottom), strict=True)
    )


def _within(shift: Array, low: float, high: float, rng: Generator) -> Array:
    """The path somewhere between the two bounds, or in their middle if it is longer."""
    low, high = low - shift.min(), high - shift.max()
    spread = min(SPREAD, max(0.0, (high - low) / 2))
    return ((low + high) / 2 + rng.uniform(-spread, spread) + shift).astype(np.float32)


def sample(rng: Generator) -> world.Clip | StageClip:
    """A random clip for base training: half of two sprites, the others of one, little or as large as the world's."""
    kind = rng.random()
    return world.sample(rng) if kind < 0.2 else draw(choose(rng, 2 if kind < 0.7 else 1), rng)
