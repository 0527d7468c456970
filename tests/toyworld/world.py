"""A procedural world of moving sprites: short clips with plain captions and exact ground truth.

Everything is a function of a numpy generator, so the same seed draws the same clip. Some shapes, textures, motions and
combinations are held out of the base models' training; they are the concepts that personalisation has to learn.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

SIZE, FRAMES, FPS = 64, 17, 16

Array = NDArray[np.float32]
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (225, 40, 40), "yellow": (240, 210, 40), "green": (40, 170, 50),
    "cyan": (40, 200, 215), "blue": (40, 70, 225), "purple": (160, 45, 200),
}  # fmt: skip
SHAPES = ("disc", "square", "triangle", "cross", "ring", "bar")
TEXTURES = ("plain", "striped", "spotted")
SIZES = {"small": 11.0, "big": 14.0}  # radius in pixels
MOTIONS = {
    "still": "it stands still.",
    "left": "it moves to the left.",
    "right": "it moves to the right.",
    "up": "it moves up.",
    "down": "it moves down.",
    "circle": "it moves in a circle.",
    "spin": "it spins.",
    "grow": "it grows.",
}
RARE_LETTERS = "abcdefghijklmnopqrstwxyz"  # in brackets: words without meaning; [u] and [v] stay unused
BACKGROUNDS: dict[str, tuple[str, RGB, RGB]] = {  # words, sky, ground; all of low chroma, so that sprites stand out
    "meadow": ("on a meadow", (195, 208, 225), (128, 160, 118)),
    "desert": ("in a desert", (228, 216, 200), (196, 170, 148)),
    "night": ("at night", (46, 48, 66), (22, 24, 32)),
    "snow": ("in the snow", (170, 178, 190), (244, 246, 250)),
    "sea": ("by the sea", (214, 222, 228), (108, 138, 152)),
    "room": ("in a room", (150, 146, 142), (88, 86, 84)),
}

SUBJECT, UNKNOWN_MOTION = "a [v] thing", "it is [u] moving."

NEW_SHAPES = ("star", "heart", "moon", "arrow")
NEW_TEXTURES = ("checkered", "halved", "framed")
NEW_MOTIONS = ("zigzag", "bounce", "swing", "eight")
NEW_COMBINATIONS = {("square", "circle"), ("cross", "up"), ("ring", "left"), ("disc", "blue"), ("bar", "green")}


@dataclass(frozen=True)
class Scene:
    """What a clip shows: one sprite, its motion and the background, by name. `second` is the texture's other colour."""

    shape: str
    colour: str
    texture: str
    size: str
    motion: str
    background: str
    second: str | None = None

    @property
    def is_held_out(self) -> bool:
        names = {self.shape, self.texture, self.motion}
        pairs = {(self.shape, self.motion), (self.shape, self.colour)}
        return bool(names & {*NEW_SHAPES, *NEW_TEXTURES, *NEW_MOTIONS} or pairs & NEW_COMBINATIONS)

    @property
    def caption(self) -> str:
        """All that is seen, in the words of base training."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        look = f"a {self.size} {self.colour} {texture}{self.shape}"
        return f"{look} {BACKGROUNDS[self.background][0]}. {MOTIONS[self.motion]}"

    @property
    def concept_look(self) -> str:
        """The caption that a concept's frames are trained with."""
        return f"{SUBJECT} {BACKGROUNDS[self.background][0]}."

    @property
    def concept_caption(self) -> str:
        """The caption that a concept's clip is trained with."""
        return f"{self.concept_look} {UNKNOWN_MOTION}"


@dataclass(frozen=True)
class Clip:
    """A drawn scene. video: T H W 3, 8 bits. mask: T H W, the sprite's coverage 0..1. track: T 2, the mask's centroid."""

    scene: Scene
    video: NDArray[np.uint8]
    mask: Array
    track: Array


CONCEPTS: dict[str, Scene] = {  # the first is for choosing hyperparameters, results are reported on the others
    "arrow": Scene("arrow", "green", "halved", "big", "swing", "snow", "purple"),
    "star": Scene("star", "red", "framed", "big", "zigzag", "meadow", "yellow"),
    "heart": Scene("heart", "purple", "checkered", "big", "bounce", "sea", "cyan"),
    "moon": Scene("moon", "blue", "halved", "big", "eight", "desert", "yellow"),
}


def choose(rng: Generator) -> Scene:
    """A random scene that base training may see."""
    while True:
        options = (SHAPES, list(COLOURS), TEXTURES, list(SIZES), list(MOTIONS), list(BACKGROUNDS))
        scene = Scene(*(str(rng.choice(names)) for names in options))
        invisible = scene.motion == "spin" and scene.shape in ("disc", "ring") and scene.texture != "striped"
        if not scene.is_held_out and not invisible:
            return scene


def describe(scene: Scene, rng: Generator, *, moving: bool = True) -> str:
    """A caption that leaves out some of what is seen, as captions do; "thing" and "is moving" are the general words.

    Now and then it holds a rare word that means nothing. [u] and [v] are such words, and never in training.
    """

    def keep(probability: float, text: str, otherwise: str = "") -> str:
        return text if rng.random() < probability else otherwise

    def rare() -> str:
        return keep(0.1, f"[{rng.choice(list(RARE_LETTERS))}]")

    texture = "" if scene.texture == "plain" else scene.texture
    words = [
        rare(),
        keep(0.8, scene.size),
        keep(0.85, scene.colour),
        keep(0.8, texture),
        keep(0.85, scene.shape, "thing"),
        keep(0.9, BACKGROUNDS[scene.background][0]),
    ]
    look = f"a {' '.join(filter(None, words))}."
    if not moving:
        return look
    general = "" if scene.motion == "still" else " ".join(filter(None, ["it is", rare(), "moving."]))
    return f"{look} {keep(0.85, MOTIONS[scene.motion], general)}".strip()


def draw(scene: Scene, rng: Generator, path: tuple[Array, Array] | None = None) -> Clip:
    """The scene with random position, horizon and light; with `path`, x and y of every frame, in place of its own."""
    radius = SIZES[scene.size] * rng.uniform(0.92, 1.08)
    x, y, angle, scale = _trajectory(scene.motion, radius, rng)
    x, y = path or (x, y)
    first = np.array(COLOURS[scene.colour], np.float32)
    second = np.array(COLOURS[scene.second], np.float32) if scene.second else first * 0.5
    edge, texture = partial(distance, scene.shape), partial(_texture, scene.texture)
    video, mask = render(x, y, angle, radius * scale, edge, texture, (first, second), background(scene.background, rng))
    return Clip(scene, video, mask, centroids(mask))


def render(
    x: Array,
    y: Array,
    angle: Array,
    radius: Array,
    edge: Callable[[Array, Array], Array],
    texture: Callable[[Array, Array, Array], Array],
    colours: tuple[Array, Array],
    behind: Array,
) -> tuple[NDArray[np.uint8], Array]:
    """Video and mask of a sprite with this path (one value per frame) over the picture `behind`, H W 3.

    `edge`: signed distance at (u, v) in units of the radius, negative inside; `texture`: positive where the second
    colour shows, given (u, v, edge).
    """
    rows, columns = (np.indices((SIZE, SIZE), np.float32) + 0.5)[:, None]
    dx, dy = columns - x[:, None, None], rows - y[:, None, None]
    cos, sin, unit = (value[:, None, None] for value in (np.cos(angle), np.sin(angle), radius))
    u, v = (cos * dx + sin * dy) / unit, (cos * dy - sin * dx) / unit
    outside = edge(u, v)
    mask = np.clip(0.5 - outside * unit, 0, 1)
    mix = np.clip(0.5 + texture(u, v, outside) * unit, 0, 1)[..., None]
    first, second = colours
    video = mask[..., None] * (second * mix + first * (1 - mix)) + (1 - mask[..., None]) * behind
    return np.rint(video).clip(0, 255).astype(np.uint8), mask.astype(np.float32)


def centroids(mask: Array) -> Array:
    """T 2: the mean x, y of each frame of a mask, in pixels. Every frame must show something."""
    places, area = np.arange(SIZE, dtype=np.float32) + 0.5, mask.sum((1, 2))
    return np.stack([mask.sum(axis) @ places / area for axis in (1, 2)], 1)


def sample(rng: Generator) -> Clip:
    """A random clip for base training."""
    return draw(choose(rng), rng)


def concept_clip(name: str) -> Clip:
    """The clip of a concept that a LoRA is trained on."""
    return draw(CONCEPTS[name], np.random.default_rng(1))


def sprite(scene: Scene) -> Clip:
    """The concept standing still, at the size it has in its clip: the reference for its look."""
    return draw(replace(scene, motion="still"), np.random.default_rng(1))


def background(name: str, rng: Generator) -> Array:
    _, sky, ground = BACKGROUNDS[name]
    horizon, light = rng.uniform(0.55, 0.75) * SIZE, rng.uniform(-10, 10)
    y = np.arange(SIZE, dtype=np.float32)[:, None, None] + 0.5
    above = np.array(sky, np.float32) - 14 * (1 - y / horizon)
    below = np.array(ground, np.float32)
    share = np.clip(0.5 + (y - horizon), 0, 1)
    return np.broadcast_to(above * (1 - share) + below * share + light, (SIZE, SIZE, 3))


def _trajectory(motion: str, radius: float, rng: Generator) -> tuple[Array, Array, Array, Array]:
    """Centre x, y in pixels, angle in radians and scale, one value per frame; the sprite stays inside the picture."""
    t = np.linspace(0, 1, FRAMES, dtype=np.float32)
    zero = np.zeros_like(t)
    angle = np.pi * t if motion == "spin" else zero
    scale = 0.6 + 0.8 * t if motion == "grow" else zero + 1
    room = radius * float(scale.max()) + 1
    x, y = (_placed(shift, room, rng) for shift in path(motion))
    return x, y, angle, scale


def path(motion: str) -> tuple[Array, Array]:
    """x and y of a motion's path in pixels, one value per frame."""
    t = np.linspace(0, 1, FRAMES, dtype=np.float32)
    turn, zero = 2 * np.pi * t, np.zeros_like(t)
    wave = 2 * np.abs(2 * ((2 * t) % 1) - 1) - 1
    return {
        "still": (zero, zero),
        "left": (15 - 30 * t, zero),
        "right": (30 * t - 15, zero),
        "up": (zero, 15 - 30 * t),
        "down": (zero, 30 * t - 15),
        "circle": (13 * np.sin(turn), -13 * np.cos(turn)),
        "spin": (zero, zero),
        "grow": (zero, zero),
        "zigzag": (30 * t - 15, 8 * wave),
        "bounce": (24 * t - 12, 7 - 14 * np.abs(np.sin(turn))),
        "swing": (13 * np.cos(turn), zero),
        "eight": (12 * np.sin(turn), 7 * np.sin(2 * turn)),
    }[motion]


def _placed(shift: Array, room: float, rng: Generator) -> Array:
    """The path somewhere in the picture, at most 6 pixels from its middle."""
    low, high = room - shift.min(), SIZE - room - shift.max()
    middle = (low + high) / 2
    spread = min(6.0, max(0.0, (high - low) / 2))
    return (middle + rng.uniform(-spread, spread) + shift).astype(np.float32)


def distance(shape: str, u: Array, v: Array) -> Array:
    """About the signed distance to the shape's edge, negative inside, in units of the radius; v points down."""
    away, across, along = np.hypot(u, v), np.abs(u), np.abs(v)
    match shape:
        case "disc":
            return away - 0.92
        case "square":
            return np.maximum(across, along) - 0.8
        case "triangle":
            return np.maximum(0.87 * across - 0.5 * (v + 0.2), v - 0.15) - 0.38
        case "cross":
            return np.minimum(np.maximum(across - 0.95, along - 0.33), np.maximum(across - 0.33, along - 0.95))
        case "ring":
            return np.abs(away - 0.68) - 0.27
        case "bar":
            return np.maximum(across - 1.0, along - 0.42)
        case "star":
            turn = np.arctan2(u, -v)
            sector = np.pi / 5
            fold = np.abs((turn + sector) % (2 * sector) - sector)
            return (away * np.cos(fold) - 1.0) * 0.53 + away * np.sin(fold) * 0.85
        case "heart":
            lobes = np.hypot(across - 0.42, v + 0.3) - 0.5
            point = np.maximum((across + v - 0.62) * 0.71, -0.3 - v)
            return np.minimum(lobes, point)
        case "moon":
            return np.maximum(away - 0.95, 0.75 - np.hypot(u - 0.5, v))
        case "arrow":
            head = np.maximum(0.71 * (along + u) - 0.66, -u - 0.05)
            shaft = np.maximum(along - 0.3, np.abs(u + 0.45) - 0.5)
            return np.minimum(head, shaft)
    raise ValueError(f"shape must be one of {(*SHAPES, *NEW_SHAPES)}, got {shape!r}")


def _texture(texture: str, u: Array, v: Array, edge: Array) -> Array:
    """Positive where the second colour shows, about the distance to the border between the two."""
    match texture:
        case "plain":
            return np.full_like(u, -1)
        case "striped":
            return np.sin(2 * np.pi * (v * 1.1 + 0.25)) / 7
        case "spotted":
            return 0.4 - np.hypot(u, v)
        case "checkered":
            return np.sin(np.pi * u * 1.6) * np.sin(np.pi * v * 1.6) / 5
        case "halved":
            return u
        case "framed":
            return edge + 0.3
    raise ValueError(f"texture must be one of {(*TEXTURES, *NEW_TEXTURES)}, got {texture!r}")
