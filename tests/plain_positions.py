"""The positional modes of an adapter's cross-attention, one number at a time, in fp64."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Place = tuple[int, int, int]  # frame, row, column
BASE = 10000.0


def places(frames: int, height: int, width: int) -> Iterator[Place]:
    return ((f, y, x) for f in range(frames) for y in range(height) for x in range(width))


def rising(position: int, channels: int, *, sines: bool = False) -> list[float]:
    """sin in even and cos in odd channels of position * 10000^(+2i/C), or sin in all of position * 10000^(+i/C)."""
    if sines:
        return [math.sin(position * BASE ** (i / channels)) for i in range(channels)]
    angles = [position * BASE ** ((i - i % 2) / channels) for i in range(channels)]
    return [math.cos(angle) if i % 2 else math.sin(angle) for i, angle in enumerate(angles)]


def rotated(vector: list[float], position: int) -> list[float]:
    """Each pair of neighbours turned by position * 10000^(-2k/C)."""
    found = []
    for k in range(0, len(vector), 2):
        angle = position * BASE ** (-k / len(vector))
        a, b = vector[k], vector[k + 1]
        found += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return found


def rotated_3d(vector: list[float], place: Place) -> list[float]:
    """A quarter of the channels each turned by frame, row and column; the last quarter as it is."""
    quarter = len(vector) // 4
    parts = [vector[i * quarter : (i + 1) * quarter] for i in range(4)]
    turned = [rotated(part, position) for part, position in zip(parts, place, strict=False)]
    return [*turned[0], *turned[1], *turned[2], *parts[3]]


def each_place(x: Tensor, change: Callable[[list[float], Place], list[float]]) -> Tensor:
    """x [B, F, h, w, C] + change(vector, place) at every place."""
    out = x.double().clone()
    for clip in range(len(x)):
        for place in places(*x.shape[1:4]):
            out[(clip, *place)] += torch.tensor(change(x[(clip, *place)].tolist(), place), dtype=torch.float64)
    return out


def before_queries(mode: str, x: Tensor) -> Tensor:
    """What a mode makes of x [B, F, h, w, C] before the query projection."""
    channels, (height, width) = x.shape[-1], x.shape[2:4]
    changes: dict[str, Callable[[list[float], Place], list[float]]] = {
        "naive": lambda _, p: rising((p[0] * height + p[1]) * width + p[2], channels),
        "temporal": lambda _, p: rising(p[0], channels) if p[0] else [0.0] * channels,
        "temporal_sine": lambda _, p: rising(p[0], channels, sines=True),
        "rope_1d": lambda vector, p: rotated(vector, p[0]),
        "rope_3d": rotated_3d,
    }
    return each_place(x, changes[mode]) if mode in changes else x.double()


def of_queries(mode: str, q: Tensor) -> Tensor:
    """What a mode makes of queries [B, F, h, w, C], in the corrected form."""
    if mode == "ropeQ_3d":
        return each_place(q, rotated_3d)
    return each_place(q, lambda vector, p: rotated(vector, p[0])) if mode.startswith("ropeQK") else q.double()


def of_tokens(mode: str, name: str, tokens: Tensor, frames: int) -> Tensor:
    """What a mode makes of keys ("k") or values ("v") [B, n, C]: with a K in its name a copy for each frame."""
    if not mode.startswith("ropeQK"):
        return tokens.double()
    copies = []
    for frame in range(frames):
        copy = tokens.double().clone()
        for clip in range(len(tokens)):
            for n in range(tokens.shape[1]) if name == "k" or "V" in mode else ():
                copy[clip, n] += torch.tensor(rotated(tokens[clip, n].tolist(), frame), dtype=torch.float64)
        copies.append(copy)
    return torch.cat(copies, dim=1)
