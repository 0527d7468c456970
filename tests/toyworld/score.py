"""What a LoRA has learned of a toy concept, measured on videos from ComfyUI's sampler. Import it as studio.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import oracle
from .studio import Studio
from .world import BACKGROUNDS, COLOURS, MOTIONS, SUBJECT, UNKNOWN_MOTION, Scene

Video = NDArray[np.uint8]


@dataclass(frozen=True)
class Prompt:
    """kind: which part of the sheet it belongs to. edit: what the oracle has to read where the prompt differs."""

    kind: str
    text: str
    edit: Mapping[str, str] = field(default_factory=dict)


def prompts(scene: Scene) -> list[Prompt]:
    """The sheet of a concept. Its own colours are in no other sprite."""
    here = BACKGROUNDS[scene.background][0]
    there, elsewhere = [place for place in BACKGROUNDS if place != scene.background][1:4:2]
    colours = [colour for colour in COLOURS if colour not in (scene.colour, scene.second)]
    sheet = [Prompt("training", scene.concept_caption)]
    for place in (there, elsewhere):
        text = f"{SUBJECT} {BACKGROUNDS[place][0]}. {UNKNOWN_MOTION}"
        sheet.append(Prompt("background", text, {"background": place}))
    for motion in ("up", "left"):
        sheet.append(Prompt("known motion", f"{SUBJECT} {here}. {MOTIONS[motion]}", {"motion": motion}))
    for size, colour, shape in (("big", colours[0], "square"), ("small", colours[2], "triangle")):
        text = f"a {size} {colour} {shape} {here}. {UNKNOWN_MOTION}"
        sheet.append(Prompt("known sprite", text, {"shape": shape, "colour": colour}))
    plain = (
        f"a big {colours[1]} square {here}. {MOTIONS['right']}",
        f"a small {colours[3]} triangle {BACKGROUNDS[there][0]}. {MOTIONS['still']}",
        f"a thing {BACKGROUNDS[elsewhere][0]}. it is moving.",
    )
    return [*sheet, *(Prompt("no tokens", text) for text in plain)]


@dataclass(frozen=True)
class Scores:
    """The score sheet of one LoRA.

    identity: overlap with the concept's sprite, 0..1, over every prompt with [v] (oracle.identity).
    motion: correlation of the path with the concept's, -1..1, over every prompt with [u] (oracle.path_correlation).
    motion_error: root mean square distance of the same two paths about their middles, pixels.
    background, known_motion, known_sprite: share of the edited prompts whose edit the oracle sees; adherence: their mean.
    leak: mean absolute difference, of 255, to the base model's videos of the same seeds, for prompts without tokens.
    leak_look: identity in those videos, less what the base model has.
    diversity: mean absolute difference, of 255, between the seeds of one prompt with an edited background; compare it
        only between LoRAs of like identity, for noise is diverse too.
    """

    identity: float
    motion: float
    motion_error: float
    background: float
    known_motion: float
    known_sprite: float
    adherence: float
    leak: float
    leak_look: float
    diversity: float


def generate(studio: Studio, model: Any, scene: Scene, seeds: Sequence[int]) -> dict[str, list[Video]]:
    """The videos of the sheet: prompt to one video for each seed."""
    texts = [prompt.text for prompt in prompts(scene)]
    videos = studio.generate(model, [text for text in texts for _ in seeds], [*seeds] * len(texts))
    return {text: list(videos[i * len(seeds) : (i + 1) * len(seeds)]) for i, text in enumerate(texts)}


def score(scene: Scene, videos: dict[str, list[Video]], base: dict[str, list[Video]]) -> Scores:
    """`videos` against the concept, and against those of the base model at the same prompts and seeds."""
    values: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        values.setdefault(name, []).append(value)

    for prompt in prompts(scene):
        for video, before in zip(videos[prompt.text], base[prompt.text], strict=True):
            reading, likeness = oracle.read(video), oracle.identity(video, scene)
            if prompt.edit:
                right = all(getattr(reading, name) == wanted for name, wanted in prompt.edit.items())
                note(prompt.kind.replace(" ", "_"), right)
            if "[v]" in prompt.text:
                note("identity", likeness)
            if "[u]" in prompt.text:
                note("motion", oracle.path_correlation(reading.track, scene.motion))
                note("motion_error", oracle.path_error(reading.track, scene.motion))
            if prompt.kind == "no tokens":
                note("leak", _difference(video, before))
                note("leak_look", likeness - oracle.identity(before, scene))
        if prompt.kind == "background":
            first, *others = videos[prompt.text]
            for other in others:
                note("diversity", _difference(first, other))
    means = {name: float(np.mean(numbers)) for name, numbers in values.items()}
    edits = [means[name] for name in ("background", "known_motion", "known_sprite")]
    return Scores(**means, adherence=float(np.mean(edits)))


def _difference(one: Video, other: Video) -> float:
    return float(np.abs(one.astype(np.float32) - other).mean())
