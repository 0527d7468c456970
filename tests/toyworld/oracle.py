"""Reads back from pixels what a toy clip shows. It compares with the world's own templates; nothing in it is learned."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from . import world
from .world import FRAMES, SIZE, Array

CHROMA = 58  # sprites are above it, backgrounds below
GRID = 24  # cells of a sprite's normalised mask
REACH = 2.2  # half its width, in root mean square radii
MOVING = 3.5  # pixels of root mean square distance from the middle of the path
GROWN = 1.7  # last area over first
TURNED = 0.12  # share of the sprite that looks different an eighth of a turn on


@dataclass(frozen=True)
class Reading:
    """What was read. track: T 2 pixels; visible: the share of frames that show a sprite at all."""

    shape: str
    colour: str
    motion: str
    background: str
    track: Array
    visible: float


def read(video: NDArray[np.uint8]) -> Reading:
    """Read a clip, T H W 3."""
    masks = sprite_masks(video)
    visible = float((masks.sum((1, 2)) >= 12).mean())
    track = centres(masks)
    scores = {shape: max(_fit(masks, track, shape, spin) for spin in (False, True)) for shape in world.SHAPES}
    return Reading(
        max(scores, key=scores.__getitem__),
        _colour(video, masks),
        _motion(video, masks, track),
        _background(video, masks),
        track,
        visible,
    )


def sprite_masks(video: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """T H W: where something colourful is."""
    pixels = video.astype(np.int16)
    return pixels.max(-1) - pixels.min(-1) > CHROMA


def centres(masks: NDArray[np.bool_]) -> Array:
    """T 2: mean x, y of each mask; frames without a sprite take those of their neighbours."""
    places = np.arange(SIZE) + 0.5
    area = masks.sum((1, 2))
    seen = area >= 12
    if not seen.any():
        return np.full((len(masks), 2), SIZE / 2, np.float32)
    x, y = (masks.sum(axis) @ places / np.maximum(area, 1) for axis in (1, 2))
    frames = np.arange(len(masks))
    return np.stack([np.interp(frames, frames[seen], values[seen]) for values in (x, y)], 1).astype(np.float32)


def path_of(motion: str) -> Array:
    """T 2: the motion's path about its middle."""
    return _centred(np.stack(world.path(motion), 1))


def path_error(track: Array, motion: str) -> float:
    """Root mean square distance in pixels between the two paths about their middles."""
    return float(np.sqrt(((_centred(track) - path_of(motion)) ** 2).sum(1).mean()))


def path_correlation(track: Array, motion: str) -> float:
    """1 for the same path at any size and place, 0 for an unrelated one or none."""
    ours, wanted = _centred(track), path_of(motion)
    length = np.linalg.norm(ours) * np.linalg.norm(wanted)
    return float((ours * wanted).sum() / length) if np.linalg.norm(ours) > MOVING else 0.0


def identity(video: NDArray[np.uint8], scene: world.Scene) -> float:
    """Intersection over union of the clip's sprite with the scene's, where only pixels of the right colour count.

    Both are laid over each other at their centres, give or take two pixels; mean over the frames.
    """
    drawn = world.sprite(scene)
    wanted_mask, wanted = drawn.mask[0] > 0.5, drawn.video[0].astype(np.float32)
    (x, y) = centres(wanted_mask[None])[0]
    masks = sprite_masks(video)
    scores = []
    for frame, mask, (left, top) in zip(video.astype(np.float32), masks, centres(masks), strict=True):
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


def _centred(track: Array) -> Array:
    return track - track.mean(0)


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


def _fit(masks: NDArray[np.bool_], track: Array, shape: str, spin: bool) -> float:
    """Mean intersection over union with the shape, upright or in a half turn over the clip."""
    scores = []
    for frame, mask in enumerate(masks):
        if mask.sum() < 12:
            continue
        template = _template(shape, round(np.pi * frame / (FRAMES - 1), 4) if spin else 0.0)
        ours = _normalised(mask)
        scores.append((ours & template).sum() / (ours | template).sum())
    return float(np.mean(scores)) if scores else 0.0


def _colour(video: NDArray[np.uint8], masks: NDArray[np.bool_]) -> str:
    if not masks.any():
        return "none"
    pixels = video[masks].astype(np.float32)
    brightest = pixels[pixels.max(-1) - pixels.min(-1) >= np.median(pixels.max(-1) - pixels.min(-1))]
    ours = _hue(brightest.mean(0))
    return min(world.COLOURS, key=lambda name: 1 - ours @ _hue(np.array(world.COLOURS[name], np.float32)))


def _hue(rgb: Array) -> Array:
    """The colour's direction from grey."""
    direction = rgb - rgb.mean()
    return direction / max(float(np.linalg.norm(direction)), 1e-6)


def _motion(video: NDArray[np.uint8], masks: NDArray[np.bool_], track: Array) -> str:
    if np.sqrt((_centred(track) ** 2).sum(1).mean()) > MOVING:
        paths = [motion for motion in (*world.MOTIONS, *world.NEW_MOTIONS) if np.ptp(path_of(motion)) > 0]
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
    bands = [np.nanmedian(pixels[:, rows].reshape(-1, 3), 0) for rows in (slice(0, 16), slice(54, 64))]
    known = {name: np.array(colours, np.float32) for name, (_, *colours) in world.BACKGROUNDS.items()}
    return min(known, key=lambda name: np.abs(np.array(bands) - known[name]).mean())
