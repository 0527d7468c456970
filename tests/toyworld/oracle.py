"""Reads back from pixels what a toy clip shows. It compares with the world's own templates; nothing in it is learned."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from . import world
from .world import FRAMES, SIZE, Array

CHROMA = 58  # sprites are above it, backgrounds below
SMALLEST = 12  # pixels of a sprite
GRID = 24  # cells of a sprite's normalised mask
REACH = 2.2  # half its width, in root mean square radii
MOVING = 3.5  # pixels of root mean square distance from the middle of the path
GROWN = 1.7  # last area over first
TURNED = 0.12  # share of the sprite that looks different an eighth of a turn on


@dataclass(frozen=True)
class Reading:
    """What was read, by the world's names; "none" where that cannot be told. track: T 2, centroids in pixels."""

    shape: str
    colour: str
    motion: str
    background: str
    track: Array


def read(video: NDArray[np.uint8]) -> Reading:
    """Read a clip, T H W 3."""
    masks = sprite_masks(video)
    track, place = centroids(masks), _background(video, masks)
    if (masks.sum((1, 2)) < SMALLEST).mean() > 0.2:
        return Reading("none", "none", "none", place, track)
    shapes = (*world.SHAPES, *world.NEW_SHAPES)
    fits = {shape: max(fit(masks, shape, spin) for spin in (False, True)) for shape in shapes}
    shape = max(fits, key=fits.__getitem__)
    return Reading(shape, _colour(video, masks), _motion(video, masks, track), place, track)


def sprite_masks(video: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """T H W: where something colourful is."""
    pixels = video.astype(np.int16)
    return pixels.max(-1) - pixels.min(-1) > CHROMA


def centroids(masks: NDArray[np.bool_]) -> Array:
    """T 2: mean x, y of each mask; frames without a sprite take those of their neighbours."""
    seen = masks.sum((1, 2)) >= SMALLEST
    if not seen.any():
        return np.full((len(masks), 2), SIZE / 2, np.float32)
    frames, found = np.arange(len(masks)), world.centroids(masks[seen].astype(np.float32))
    return np.stack([np.interp(frames, frames[seen], values) for values in found.T], 1).astype(np.float32)


def path_error(track: Array, motion: str) -> float:
    """Root mean square distance in pixels between the two paths about their middles."""
    return spread(track - _path_of(motion))


def path_correlation(track: Array, motion: str) -> float:
    """How alike the two paths' movements over two frames are, -1..1: 1 at any place and size, 0 if nothing moves."""
    ours, wanted = (path[2:] - path[:-2] for path in (track, _path_of(motion)))
    if spread(track) < MOVING:
        return 0.0
    return float((ours * wanted).sum() / (np.linalg.norm(ours) * np.linalg.norm(wanted)))


def _path_of(motion: str) -> Array:
    return np.stack(world.path(motion), 1)


def spread(track: Array) -> float:
    """Root mean square distance of a path from its middle."""
    return float(np.sqrt(((track - track.mean(0)) ** 2).sum(1).mean()))


def identity(video: NDArray[np.uint8], scene: world.Scene) -> float:
    """Intersection over union of the clip's sprite with the scene's, where only pixels of the right colour count.

    Both are laid over each other at their centres, give or take two pixels; mean over the frames.
    """
    drawn = world.sprite(scene)
    wanted_mask, wanted = drawn.mask[0] > 0.5, drawn.video[0].astype(np.float32)
    (x, y) = centroids(wanted_mask[None])[0]
    masks = sprite_masks(video)
    scores = []
    for frame, mask, (left, top) in zip(video.astype(np.float32), masks, centroids(masks), strict=True):
        shifts = [
            (round(x - left) + dx, round(y - top) + dy) for dx in range(-2, 3) for dy in range(-2, 3) if mask.any()
        ]
        scores.append(max((_overlap(frame, mask, wanted, wanted_mask, *shift) for shift in shifts), default=0.0))
    return float(np.mean(scores))


def _overlap(frame: Array, mask: Array, wanted: Array, wanted_mask: Array, dx: int, dy: int) -> float:
    frame, mask = (np.roll(values, (dy, dx), (0, 1)) for values in (frame, mask))
    union = mask | wanted_mask
    right = mask & wanted_mask & (np.abs(frame - wanted).mean(-1) < 40)
    return right.sum() / union.sum()


@cache
def _template(shape: str, angle: float) -> Array:
    axis = (np.arange(4 * GRID) + 0.5) / (2 * GRID) - 1
    dx, dy = np.meshgrid(axis * 2, axis * 2)
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    return _normalised(world.distance(shape, u, v) < 0)


def _normalised(mask: NDArray[np.bool_]) -> Array:
    """GRID x GRID samples of a mask about its centre, scaled by its own spread."""
    rows, columns = np.nonzero(mask)
    y, x = rows.mean(), columns.mean()
    unit = REACH * np.sqrt(((rows - y) ** 2 + (columns - x) ** 2).mean())
    steps = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * unit
    down, across = (np.rint(centre + steps).astype(int) for centre in (y, x))
    inside = ((down >= 0) & (down < mask.shape[0]))[:, None] & ((across >= 0) & (across < mask.shape[1]))[None]
    return mask[down.clip(0, mask.shape[0] - 1)][:, across.clip(0, mask.shape[1] - 1)] & inside


def fit(masks: NDArray[np.bool_], shape: str, spin: bool = False) -> float:
    """Mean intersection over union with the shape, upright or in a half turn over the clip."""
    scores = []
    for frame, mask in enumerate(masks):
        if mask.sum() < SMALLEST:
            continue
        template = _template(shape, round(np.pi * frame / (FRAMES - 1), 4) if spin else 0.0)
        ours = _normalised(mask)
        scores.append((ours & template).sum() / (ours | template).sum())
    return float(np.mean(scores))


def _colour(video: NDArray[np.uint8], masks: NDArray[np.bool_]) -> str:
    pixels = video[masks].astype(np.float32)
    brightest = pixels[pixels.max(-1) - pixels.min(-1) >= np.median(pixels.max(-1) - pixels.min(-1))]
    ours = hue(brightest.mean(0))
    return min(world.COLOURS, key=lambda name: 1 - ours @ hue(np.array(world.COLOURS[name], np.float32)))


def hue(rgb: Array) -> Array:
    """The colour's direction from grey."""
    direction = rgb - rgb.mean()
    return direction / max(float(np.linalg.norm(direction)), 1e-6)


def _motion(video: NDArray[np.uint8], masks: NDArray[np.bool_], track: Array) -> str:
    if spread(track) > MOVING:
        paths = [motion for motion in (*world.MOTIONS, *world.NEW_MOTIONS) if spread(_path_of(motion)) > 0]
        return min(paths, key=lambda motion: path_error(track, motion))
    area = masks.sum((1, 2)).astype(np.float32)
    if area[-3:].mean() > GROWN * max(area[:3].mean(), 1):
        return "grow"
    return "spin" if _turn(video, masks, track) > TURNED else "still"


def _turn(video: NDArray[np.uint8], masks: NDArray[np.bool_], track: Array) -> float:
    """How much of the sprite looks different an eighth of a turn on."""
    changes = []
    eighth = (FRAMES - 1) // 4  # of the turn; the clip shows half of one
    for frame in range(FRAMES - eighth):
        shift = np.rint(track[frame] - track[frame + eighth]).astype(int)
        later = np.roll(video[frame + eighth], shift[::-1], (0, 1)).astype(np.float32)
        either = masks[frame] | np.roll(masks[frame + eighth], shift[::-1], (0, 1))
        different = np.abs(video[frame] - later).mean(-1) > 40
        changes.append((different & either).sum() / max(either.sum(), 1))
    return float(np.mean(changes))


def _background(video: NDArray[np.uint8], masks: NDArray[np.bool_]) -> str:
    pixels = np.where(masks[..., None], np.nan, video.astype(np.float32))
    bands = [pixels[:, rows].reshape(-1, 3) for rows in (slice(0, 16), slice(54, 64))]
    if any(np.isnan(band).all() for band in bands):
        return "none"
    found = np.array([np.nanmedian(band, 0) for band in bands])
    known = {name: np.array(colours, np.float32) for name, (_, *colours) in world.BACKGROUNDS.items()}
    return min(known, key=lambda name: np.abs(found - known[name]).mean())
