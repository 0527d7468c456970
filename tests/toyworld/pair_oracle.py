"""Reads back from pixels what each sprite of a stage does: each is found by its colour, and read by the oracle's rules."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from . import oracle, pairs, world
from .world import COLOURS, Array

MOVING = oracle.MOVING * pairs.REACH


@dataclass(frozen=True)
class Sighting:
    """One sprite. shape, motion: by the world's names, "none" where nothing was found. track: T 2, centroids in pixels.
    seen: share of the frames that show something of its colour.
    """

    shape: str
    motion: str
    track: Array
    seen: float


def read(video: NDArray[np.uint8], stage: pairs.Stage) -> tuple[Sighting, ...]:
    """What is seen of each actor of a stage in a clip, T H W 3."""
    return tuple(_sight(masks_of(video, actor.colour)) for actor in stage.actors)


def masks_of(video: NDArray[np.uint8], colour: str) -> NDArray[np.bool_]:
    """T H W: the largest piece in each frame that has this colour of the world's."""
    pixels = video.astype(np.float32)
    grey = pixels - pixels.mean(-1, keepdims=True)
    known = np.stack([oracle.hue(np.array(rgb, np.float32)) for rgb in COLOURS.values()], 1)
    alike = (grey @ known).argmax(-1) == list(COLOURS).index(colour)
    return np.stack([_largest(mask) for mask in alike & oracle.sprite_masks(video)])


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    pieces, count = ndimage.label(mask)
    if count < 2:
        return mask
    return pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()


def _sight(masks: NDArray[np.bool_]) -> Sighting:
    seen = float((masks.sum((1, 2)) >= oracle.SMALLEST).mean())
    track = oracle.centroids(masks)
    if seen < 0.8:
        return Sighting("none", "none", track, seen)
    fits = {shape: oracle.fit(masks, shape) for shape in (*world.SHAPES, *world.NEW_SHAPES)}
    return Sighting(max(fits, key=fits.__getitem__), motion_of(track), track, seen)


def motion_of(track: Array) -> str:
    """The motion whose path is nearest, or "still"."""
    if oracle.spread(track) < MOVING:
        return "still"
    paths = (*pairs.PATHS, *world.NEW_MOTIONS)
    return min(paths, key=lambda motion: oracle.path_error(track / pairs.REACH, motion))


def correlation(track: Array, motion: str) -> float:
    """-1..1, as `oracle.path_correlation` gives it for the world's larger paths."""
    return oracle.path_correlation(track / pairs.REACH, motion)
