"""Tracklets: boxes that follow objects through a clip, as a value, as JSON and as tensors."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .tracklet_fields import expect, inside, whole

MAX_OBJECTS = 20  # slots of Tracklet2Video (TrackDiffusion, SVD branch: "fixed_objs")
MAX_FRAMES, MAX_SIDE, MAX_ID = 100_000, 16384, 2**31 - 1
REACH = 10.0  # largest coordinate: a box may be outside the frame, but one in pixels is a mistake
MIN_SIDE = 0.01  # a box with a smaller visible side, relative to the frame, is masked
WHOLE = ("width", "height", "frames", "id", "frame", "enter", "leave")
INTERPOLATED = ("hard", "soft")
PALETTE = (
    "#ff0000 #00ff00 #1e3cff #ffff00 #e100ff #00f0ff #ffb400 #8700e1 #00c387 #e178b4 #0096d2 #b47800 #a5c3ff #1e7800 "
    "#ff781e #874b87 #c3ffc3 #d20096 #9678ff #b42d00 #a5d21e #ffa5ff #2d6996 #009678 #ffb4a5 #00a500 #0ff0a5 #ff69ff "
    "#00c3e1"
).split()  # at least 0.12 apart in Oklab, and visible on black and on white


def rgb(color: str) -> list[float]:
    """#rrggbb as three numbers in 0..1."""
    return [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]


@dataclass(frozen=True)
class Keyframe:
    """box: x1, y1, x2, y2 as fractions of the frame. hard: the object fills the box; soft: it is somewhere in it."""

    frame: int
    box: tuple[float, float, float, float]
    hard: bool = True

    def __post_init__(self) -> None:
        whole("frame", self.frame, 0, MAX_FRAMES - 1)
        expect(isinstance(self.hard, bool), "hard", self.hard, "true or false")
        right = isinstance(self.box, tuple) and len(self.box) == 4 and all(map(_coordinate, self.box))
        wanted = f"x1, y1, x2, y2 as fractions of the frame, which is 0..1, within {-REACH:g}..{REACH:g}"
        expect(right, "box", self.box, wanted)
        x1, y1, x2, y2 = self.box
        expect(x1 < x2 and y1 < y2, "box", self.box, "x1, y1, x2, y2 with x1 < x2 and y1 < y2")


@dataclass(frozen=True)
class Tracklet:
    """One object, present from frame `enter` to frame `leave` inclusive. None means the first and the last frame."""

    id: int
    name: str
    color: str
    keyframes: tuple[Keyframe, ...]
    enter: int | None = None
    leave: int | None = None

    def __post_init__(self) -> None:
        whole("id", self.id, 1, MAX_ID)
        expect(isinstance(self.name, str), "name", self.name, "text")
        right = isinstance(self.color, str) and re.fullmatch("#[0-9a-fA-F]{6}", self.color)
        expect(bool(right), "color", self.color, "a colour such as #ff0000")
        frames = [key.frame for key in self.keyframes]
        expect(frames != [], "keyframes", [], "at least one key frame")
        expect(frames == sorted(set(frames)), "keyframes", frames, "ascending frames, each once")
        for name in ("enter", "leave"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 0, MAX_FRAMES - 1)
        if self.enter is not None and self.leave is not None:
            expect(self.enter <= self.leave, "leave", self.leave, f"a frame not before enter={self.enter}")


@dataclass(frozen=True)
class Tracklets:
    """The value of a TRACKLETS wire: objects in a clip of `frames` frames of `width` x `height` pixels.

    Boxes are interpolated linearly between key frames, and do not move before the first and after the last one.
    Interpolated frames are soft if `interpolated` is "soft"; if it is "hard" they are hard between two hard key frames.
    A ValueError names field, value and expected values.
    """

    width: int
    height: int
    frames: int
    tracklets: tuple[Tracklet, ...] = ()
    interpolated: str = "hard"

    def __post_init__(self) -> None:
        whole("width", self.width, 1, MAX_SIDE)
        whole("height", self.height, 1, MAX_SIDE)
        whole("frames", self.frames, 1, MAX_FRAMES)
        expect(self.interpolated in INTERPOLATED, "interpolated", self.interpolated, "hard or soft")
        expect(len(self.tracklets) <= MAX_OBJECTS, "tracklets", len(self.tracklets), f"at most {MAX_OBJECTS}")
        ids = [tracklet.id for tracklet in self.tracklets]
        for index, tracklet in enumerate(self.tracklets):
            with inside(f"tracklets[{index}]"):
                expect(tracklet.id not in ids[:index], "id", tracklet.id, "an id that no other tracklet has")
                numbers = {f"keyframes[{place}].frame": key.frame for place, key in enumerate(tracklet.keyframes)}
                for name, frame in (numbers | {"enter": tracklet.enter, "leave": tracklet.leave}).items():
                    if frame is not None:
                        whole(name, frame, 0, self.frames - 1)

    @staticmethod
    def from_json(value: str | dict) -> "Tracklets":
        """Tracklets from JSON, as text or parsed. Key frames may be in any order. Missing colours are PALETTE's."""
        if isinstance(value, str):
            try:
                value = json.loads(value, parse_constant=float)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"not JSON ({error})") from None
        given = _known(Tracklets, value, required=("width", "height", "frames", "tracklets"))
        return Tracklets(**{**given, "tracklets": tuple(_parsed(given, "tracklets", _tracklet))})

    def to_json(self) -> str:
        """One line of JSON. `from_json` returns an equal value."""
        value = asdict(self)
        for tracklet in value["tracklets"]:
            for name in ("enter", "leave"):
                if tracklet[name] is None:
                    del tracklet[name]
        return json.dumps(value, allow_nan=False)

    def add(self, tracklet: Tracklet, name: str = "") -> "Tracklets":
        """A copy with one more tracklet, in the palette's next colour. `name` renames it."""
        color = PALETTE[len(self.tracklets) % len(PALETTE)]
        added = replace(tracklet, color=color, name=name or tracklet.name)
        return replace(self, tracklets=(*self.tracklets, added))

    def retime(self, frames: int) -> "Tracklets":
        """The same motion in another number of frames. First and last frame stay; other key frames are rounded."""
        whole("frames", frames, 1, MAX_FRAMES)
        if frames == self.frames:
            return self
        scale = (frames - 1) / max(self.frames - 1, 1)

        def nearest(frame: int) -> int:
            return math.floor(frame * scale + 0.5)

        moved = []
        for tracklet in self.tracklets:
            keys: dict[int, Keyframe] = {}  # if several round to one frame, the nearest in time wins, then the first
            for key in sorted(tracklet.keyframes, key=lambda key: abs(key.frame * scale - nearest(key.frame))):
                keys.setdefault(nearest(key.frame), replace(key, frame=nearest(key.frame)))
            enter, leave = (None if at is None else nearest(at) for at in (tracklet.enter, tracklet.leave))
            ordered = tuple(keys[frame] for frame in sorted(keys))
            moved.append(replace(tracklet, keyframes=ordered, enter=enter, leave=leave))
        return replace(self, frames=frames, tracklets=tuple(moved))

    def crop(self, left: int, top: int, width: int, height: int) -> "Tracklets":
        """The tracklets in a crop of the frame, given in pixels. Boxes outside it are kept, outside 0..1."""

        def seen(key: Keyframe) -> Keyframe:
            x1, y1, x2, y2 = key.box
            x1, x2 = ((x * self.width - left) / width for x in (x1, x2))
            y1, y2 = ((y * self.height - top) / height for y in (y1, y2))
            return replace(key, box=(x1, y1, x2, y2))

        moved = (replace(item, keyframes=tuple(map(seen, item.keyframes))) for item in self.tracklets)
        return replace(self, width=width, height=height, tracklets=tuple(moved))

    def fit(self, width: int, height: int) -> "Tracklets":
        """The tracklets after the largest centre crop with the aspect ratio width / height, and a resize."""
        scale = max(width / self.width, height / self.height)
        crop_w, crop_h = (max(round(side / scale), 1) for side in (width, height))
        crop_w, crop_h = min(crop_w, self.width), min(crop_h, self.height)
        all_of_it = (crop_w, crop_h) == (self.width, self.height)
        left, top = (self.width - crop_w) // 2, (self.height - crop_h) // 2
        return replace(self if all_of_it else self.crop(left, top, crop_w, crop_h), width=width, height=height)


def to_tensors(
    tracklets: Tracklets, frames: int | None = None, size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Boxes [T, 20, 8] (x1, y1, x2, y2, R, G, B in 0..1, and 1 if hard), and mask [T, 20], 1 if the object is present.

    An object's slot is its place in the list. `frames` stretches the time, and `size` (width, height) crops the frame.
    Boxes are clipped to the frame. A slot whose box is narrower than 0.01 then is masked and all zeros.
    """
    tracklets = tracklets.retime(tracklets.frames if frames is None else frames)
    tracklets = tracklets if size is None else tracklets.fit(*size)
    boxes = torch.zeros(tracklets.frames, MAX_OBJECTS, 8)
    mask = torch.zeros(tracklets.frames, MAX_OBJECTS)
    for slot, tracklet in enumerate(tracklets.tracklets):
        color = rgb(tracklet.color)
        last = tracklets.frames - 1 if tracklet.leave is None else tracklet.leave
        for frame in range(tracklet.enter or 0, last + 1):
            box, hard = _at(tracklet, frame, tracklets.interpolated == "hard")
            x1, y1, x2, y2 = (min(max(edge, 0.0), 1.0) for edge in box)
            if min(x2 - x1, y2 - y1) >= MIN_SIDE:
                boxes[frame, slot] = torch.tensor([x1, y1, x2, y2, *color, float(hard)])
                mask[frame, slot] = 1
    return boxes, mask


def _at(tracklet: Tracklet, frame: int, hard_between: bool) -> tuple[list[float], bool]:
    """A tracklet's box at a frame, and whether it is hard."""
    keys = tracklet.keyframes
    before = next((key for key in reversed(keys) if key.frame <= frame), keys[0])
    after = next((key for key in keys if key.frame >= frame), keys[-1])
    if before.frame == frame:
        return list(before.box), before.hard
    part = (frame - before.frame) / max(after.frame - before.frame, 1)
    moved = [a + (b - a) * part for a, b in zip(before.box, after.box, strict=True)]
    return moved, hard_between and before.hard and after.hard


def _coordinate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -REACH <= value <= REACH


def _tracklet(value: Any, index: int) -> Tracklet:
    given = _known(Tracklet, value, required=("id", "keyframes"))
    keys = _parsed(given, "keyframes", _keyframe)
    defaults = {"name": f"object {given['id']}", "color": PALETTE[index % len(PALETTE)]}
    return Tracklet(**{**defaults, **given, "keyframes": tuple(sorted(keys, key=lambda key: key.frame))})


def _keyframe(value: Any, _: int) -> Keyframe:
    given = _known(Keyframe, value, required=("frame", "box"))
    box = given["box"]
    return Keyframe(**{**given, "box": tuple(box) if isinstance(box, list) else box})


def _known(kind: type, value: Any, required: tuple[str, ...]) -> dict[str, Any]:
    names = [field.name for field in fields(kind)]
    expect(isinstance(value, dict), kind.__name__.lower(), value, f"an object with {', '.join(required)}")
    for name in value:
        expect(name in names, name, value[name], f"one of {', '.join(names)}")
    for name in required:
        expect(name in value, name, None, f"a value; {', '.join(required)} are needed")
    def is_whole(name: str, found: Any) -> bool:  # JSON has one kind of number, so 1.0 is whole, as in the editor
        return name in WHOLE and isinstance(found, float) and found.is_integer()

    return {name: int(found) if is_whole(name, found) else found for name, found in value.items()}


def _parsed(given: dict[str, Any], name: str, parse: Callable[[Any, int], Any]) -> list[Any]:
    expect(isinstance(given[name], list), name, given[name], "a list")
    made = []
    for index, item in enumerate(given[name]):
        with inside(f"{name}[{index}]"):
            made.append(parse(item, index))
    return made
