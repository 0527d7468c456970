"""The motions that adapters are taught, by clips of one kind of sprite."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from . import pairs, world

CLIPS = 10


@dataclass(frozen=True)
class Lesson:
    """One adapter's motion: of which kind of sprite its clips are, how they move, and its word."""

    shape: str
    motion: str
    word: str

    def sentence(self, subject: str) -> str:
        return f"{subject} is {self.word} moving."


CONCEPTS: dict[str, tuple[Lesson, Lesson]] = {  # settings are chosen on the first, results reported on the others
    "triangle and ring": (Lesson("triangle", "swing", "[u]"), Lesson("ring", "bounce", "[v]")),
    "square and disc": (Lesson("square", "zigzag", "[u]"), Lesson("disc", "swing", "[v]")),
    "cross and square": (Lesson("cross", "eight", "[u]"), Lesson("square", "zigzag", "[v]")),
    "disc and bar": (Lesson("disc", "bounce", "[u]"), Lesson("bar", "eight", "[v]")),
}


def clips(lesson: Lesson) -> list[tuple[NDArray[np.uint8], str]]:
    """Ten clips of single sprites of one kind, in any colour and place, all with the lesson's motion, and their looks."""
    rng, found = np.random.default_rng(3), []
    for _ in range(CLIPS):
        stage = pairs.choose(rng, 1)
        actor = replace(stage.actors[0], shape=lesson.shape, motion=lesson.motion)
        look = f"a {actor.colour} {actor.shape} {world.BACKGROUNDS[stage.background][0]}."
        found.append((pairs.draw(replace(stage, actors=(actor,)), rng).video, look))
    return found
