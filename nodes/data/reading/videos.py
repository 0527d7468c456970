"""Reads videos: the time of every frame, and the pixels of chosen frames."""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from torch import Tensor

from .animations import animation, is_animated
from .decoding import Look, decoded, opened
from .hdr import TRANSFERS
from .sources import ON_WHITE, Source, file_digest, pace
from .stamps import damaged, stamps_of

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .3gp .mkv .webm .avi .mts .m2ts .ts .mpg .mpeg .wmv .flv .ogv .gif .apng".split()
)
READING = 2  # part of the cache key: raise it when other frames are read from the same file
LONGEST = 24  # hours


def video(file: Path | BytesIO, start: float = 0.0, duration: float = 0.0) -> Source:
    """The frames from second `start`, for `duration` seconds or (0) to the end. ValueError says why a file fails."""
    if isinstance(file, Path):
        if is_animated(file):
            return animation(file)
        name, digest = file.name, file_digest(file)
        facts = _probe_file(file, digest)
    else:
        name, digest = "video", hashlib.sha256(file.getbuffer()).hexdigest()
        facts = _probe(file, name)
    stamps = facts.between(start, duration)
    times = [float((stamp - stamps[0]) * facts.tick) for stamp in stamps]
    fps, uneven = pace(times, facts.rates, tick=float(facts.tick))
    look = facts.look
    notes = (f"HDR ({TRANSFERS[look.transfer]}), tone-mapped to the standard range",) if look.transfer else ()
    return Source(
        name,
        hashlib.sha256(repr((digest, READING, start, duration)).encode()).hexdigest(),
        len(stamps),
        fps,
        *look.size,
        False,
        lambda wanted: _read(file, name, facts, [stamps[index] for index in wanted]),
        uneven,
        notes + (ON_WHITE,) * look.clear,
    )


@dataclass(frozen=True)
class Facts:
    """Frame times in ticks, a tick's seconds, the frame rates that the file names, and how frames are decoded."""

    stamps: list[int]
    tick: Fraction
    rates: list[float]
    look: Look

    def between(self, start: float, duration: float) -> list[int]:
        first = bisect_left(self.stamps, int(start / self.tick)) if start else 0
        last = bisect_left(self.stamps, int((start + duration) / self.tick)) if duration else len(self.stamps)
        if first >= last:
            raise ValueError(f"holds no frames from second {start:g} on")
        hours = (self.stamps[last - 1] - self.stamps[first]) * self.tick / 3600
        if hours > LONGEST:
            raise ValueError(f"is {float(hours):.0f} hours long: expected at most {LONGEST}")
        return self.stamps[first:last]


@lru_cache(maxsize=1024)
def _probe_file(path: Path, digest: str) -> Facts:
    return _probe(path, path.name)


def _probe(file: Path | BytesIO, name: str) -> Facts:
    with opened(file) as (container, stream):
        first = next(filter(None, decoded(container, stream)), None)
        if first is None:
            raise ValueError("not a readable video (none of its frames can be decoded)")
        look = Look.of(first, stream)
        tick, rates = stream.time_base, [float(rate) for rate in (stream.guessed_rate, stream.average_rate) if rate]
    return Facts(stamps_of(file, name, first), tick, rates, look)


def _read(file: Path | BytesIO, name: str, facts: Facts, stamps: Iterable[int]) -> Iterator[Tensor]:
    with opened(file) as (container, stream):
        shown = facts.look.pictures(filter(None, decoded(container, stream)), stream)
        at, picture = -math.inf, None
        for stamp in stamps:
            while at < stamp:
                at, picture = next(shown, (math.inf, None))
            if at != stamp:
                raise ValueError(f"{name} {_loss(file, facts)}")
            yield facts.look.pixels(picture)


def _loss(file: Path | BytesIO, facts: Facts) -> str:
    with opened(file) as (container, stream):
        given = {frame.pts for frame in decoded(container, stream) if frame}
    return damaged(len(given.intersection(facts.stamps)), len(facts.stamps))
