"""What a LoRA has learned of a toy concept, measured on videos from ComfyUI's sampler. Import it as studio.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import oracle
from .studio import Studio
from .world import BACKGROUNDS, MOTIONS, Scene

SUBJECT, UNKNOWN_MOTION = "a [v] thing", "it is [u] moving."
KNOWN_SPRITES = {"a big cyan square": ("square", "cyan"), "a small red cross": ("cross", "red")}
KNOWN_MOTIONS = ("up", "left")
NO_TOKENS = (
    "a big cyan square in a room. it moves to the right.",
    "a small yellow triangle at night. it stands still.",
    "a big purple ring on a meadow. it moves down.",
)

Video = NDArray[np.uint8]


def look_caption(scene: Scene) -> str:
    """The caption of the concept's frames."""
    return f"{SUBJECT} {BACKGROUNDS[scene.background][0]}."


def motion_caption(scene: Scene) -> str:
    """The caption of the concept's clip."""
    return f"{look_caption(scene)} {UNKNOWN_MOTION}"


@dataclass(frozen=True)
class Prompt:
    """kind: which part of the sheet it belongs to. `right`: whether a reading shows what the prompt's edit asks for."""

    kind: str
    text: str
    right: Callable[[oracle.Reading], bool]


def prompts(scene: Scene) -> list[Prompt]:
    """The sheet of a concept."""
    places = list(BACKGROUNDS)
    here = BACKGROUNDS[scene.background][0]
    others = [places[(places.index(scene.background) + step) % len(places)] for step in (2, 4)]
    sheet = [Prompt("training", motion_caption(scene), lambda r: r.background == scene.background)]
    for place in others:
        text = f"{SUBJECT} {BACKGROUNDS[place][0]}. {UNKNOWN_MOTION}"
        sheet.append(Prompt("background", text, lambda r, place=place: r.background == place))
    for motion in KNOWN_MOTIONS:
        text = f"{SUBJECT} {here}. {MOTIONS[motion]}"
        sheet.append(Prompt("known motion", text, lambda r, motion=motion: r.motion == motion))
    for sprite, known in KNOWN_SPRITES.items():
        text = f"{sprite} {here}. {UNKNOWN_MOTION}"
        sheet.append(Prompt("known sprite", text, lambda r, known=known: (r.shape, r.colour) == known))
    return [*sheet, *(Prompt("no tokens", text, lambda r: True) for text in NO_TOKENS)]


@dataclass(frozen=True)
class Scores:
    """The score sheet of one LoRA.

    identity: overlap with the concept's sprite, 0..1, over every prompt with [v] (oracle.identity).
    motion: correlation of the path with the concept's, over every prompt with [u] but no known motion.
    motion_error: root mean square distance of the same two paths about their middles, pixels.
    background, known_motion, known_sprite: share of the edited prompts whose edit the oracle sees; adherence: their mean.
    leak: mean absolute difference, of 255, to the base model's videos of the same seeds, for prompts without tokens.
    diversity: mean absolute difference, of 255, between the seeds of one prompt with an edited background.
    """

    identity: float
    motion: float
    motion_error: float
    background: float
    known_motion: float
    known_sprite: float
    adherence: float
    leak: float
    diversity: float


def generate(studio: Studio, model: Any, scene: Scene, seeds: Sequence[int]) -> dict[str, list[Video]]:
    """The videos of the sheet: prompt to one video for each seed."""
    texts = [prompt.text for prompt in prompts(scene)]
    videos = studio.generate(model, [text for text in texts for _ in seeds], [*seeds] * len(texts))
    return {text: list(videos[i * len(seeds) : (i + 1) * len(seeds)]) for i, text in enumerate(texts)}


def score(scene: Scene, videos: dict[str, list[Video]], base: dict[str, list[Video]]) -> Scores:
    """`videos` against the concept, and against those of the base model at the same prompts and seeds."""
    values: dict[str, list[float]] = {name: [] for name in ("identity", "motion", "motion_error", "leak", "diversity")}
    right: dict[str, list[bool]] = {}
    for prompt in prompts(scene):
        for video, before in zip(videos[prompt.text], base[prompt.text], strict=True):
            reading = oracle.read(video)
            right.setdefault(prompt.kind, []).append(prompt.right(reading))
            if "[v]" in prompt.text:
                values["identity"].append(oracle.identity(video, scene))
            if "[u]" in prompt.text:
                values["motion"].append(oracle.path_correlation(reading.track, scene.motion))
                values["motion_error"].append(oracle.path_error(reading.track, scene.motion))
            if prompt.kind == "no tokens":
                values["leak"].append(_difference(video, before))
        if prompt.kind == "background":
            first, *others = videos[prompt.text]
            values["diversity"] += [_difference(first, other) for other in others]
    means = {name: float(np.mean(numbers)) for name, numbers in values.items()}
    kinds = {
        kind.replace(" ", "_"): float(np.mean(right[kind])) for kind in ("background", "known motion", "known sprite")
    }
    return Scores(**means, **kinds, adherence=float(np.mean(list(kinds.values()))))


def _difference(one: Video, other: Video) -> float:
    return float(np.abs(one.astype(np.float32) - other).mean())
