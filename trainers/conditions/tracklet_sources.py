"""Makes tracklets from trackers' files and from masks of objects."""

import csv
import logging

from torch import Tensor

from .tracklet_fields import expect, inside, number, whole
from .tracklets import MAX_FRAMES, MAX_ID, MAX_OBJECTS, PALETTE, Keyframe, Tracklet, Tracklets


def from_mot(text: str, width: int, height: int, frames: int | None = None) -> Tracklets:
    """Tracklets from a MOT Challenge CSV: `frame,id,x,y,w,h,conf,class,vis`, frames from 1, boxes in pixels.

    Lines need the first six values; lines with conf 0 are ignored. An object is present from its first to its last
    line. ValueError names the line.
    """
    seen: dict[int, dict[int, Keyframe]] = {}
    for place, row in enumerate(csv.reader(text.splitlines()), 1):
        if not row or (place == 1 and row[0].strip() == "frame"):
            continue
        with inside(f"line {place}", ": "):
            expect(len(row) >= 6, "line", ",".join(row), "frame,id,x,y,w,h,conf,class,vis")
            frame, name = (number(field, cell, whole=True) for field, cell in zip(("frame", "id"), row, strict=False))
            x, y, w, h = (number(field, cell) for field, cell in zip("xywh", row[2:], strict=False))
            if len(row) > 6 and number("conf", row[6]) == 0:
                continue
            whole("frame", frame, 1, frames or MAX_FRAMES)
            whole("id", name, 1, MAX_ID)
            key = Keyframe(frame - 1, (x / width, y / height, (x + w) / width, (y + h) / height))
            expect(key.frame not in seen.get(name, {}), "frame", frame, f"each frame of id {name} once")
            seen.setdefault(name, {})[key.frame] = key
    expect(bool(seen), "lines", 0, "at least one box")
    last = max(frame for keys in seen.values() for frame in keys)
    return _collect(seen, width, height, frames or last + 1)


def from_masks(labels: Tensor) -> Tracklets:
    """Bounding boxes from label maps [T, H, W], integers that name each pixel's object, with 0 for no object.

    An object is present from the first frame with one of its pixels to the last.
    """
    frames, height, width = labels.shape
    seen: dict[int, dict[int, Keyframe]] = {}
    for label in labels.unique().tolist():
        if label <= 0:
            continue
        for frame in range(frames):
            y, x = (labels[frame] == label).nonzero(as_tuple=True)
            if len(y):
                left, top, right, bottom = (int(edge) for edge in (x.min(), y.min(), x.max() + 1, y.max() + 1))
                box = (left / width, top / height, right / width, bottom / height)
                seen.setdefault(int(label), {})[frame] = Keyframe(frame, box)
    return _collect(seen, width, height, frames)


def _collect(seen: dict[int, dict[int, Keyframe]], width: int, height: int, frames: int) -> Tracklets:
    if len(seen) > MAX_OBJECTS:
        logging.warning("Kinoloom: %d tracked objects, of which the %d longest are kept", len(seen), MAX_OBJECTS)
        seen = dict(sorted(seen.items(), key=lambda item: -len(item[1]))[:MAX_OBJECTS])
    made = []
    for color, (name, keys) in zip(PALETTE, sorted(seen.items()), strict=False):
        first, last = min(keys), max(keys)
        enter, leave = first or None, None if last == frames - 1 else last
        ordered = tuple(keys[frame] for frame in sorted(keys))
        made.append(Tracklet(name, f"object {name}", color, ordered, enter, leave))
    return Tracklets(width, height, frames, tuple(made))
