"""Positions of queries in the cross-attention of an adapter, as the original adds them.

Modes act on x [B, F, h, w, C] before the query projection or, with a Q in their name, on queries, keys and values
after their projections. Rotary modes add the rotated tensor: x + R(x). The original's sinusoidal modes use rising
frequencies, 10000^(2i/C), and so do these.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

NONE = "none"
BEFORE = ("naive", "temporal", "temporal_sine", "rope_1d", "rope_3d")
# The original skips the query projection in ropeQ_3d, gives queries nothing in the other two, and numbers their keys by
# token instead of by frame. Here queries, keys and values are rotated by the number of their frame.
AFTER = ("ropeQ_3d", "ropeQK_1d", "ropeQKV_1d")
MODES = (NONE, *BEFORE, *AFTER)


def with_positions(mode: str, x: Tensor) -> Tensor:
    """x [B, F, h, w, C] plus its positions, in a mode that acts before the query projection. Others return x."""
    frames, height, width, channels = x.shape[1:]
    if mode == "naive":
        table = sinusoid(torch.arange(frames * height * width, device=x.device), channels)
        return x + table.view(frames, height, width, channels).to(x)
    if mode in ("temporal", "temporal_sine"):
        table = sinusoid(torch.arange(frames, device=x.device), channels, cosines=mode == "temporal")
        table[0] = 0
        return x + table.view(frames, 1, 1, channels).to(x)
    if mode == "rope_1d":
        return x + rotated_by_frame(x)
    return x + rotated_by_place(x) if mode == "rope_3d" else x


def rotated_queries(mode: str, q: Tensor) -> Tensor:
    """Queries [B, F, h, w, C] after their projection, in a mode that acts on them there. Others return q."""
    if mode == "ropeQ_3d":
        return q + rotated_by_place(q)
    return q + rotated_by_frame(q) if mode in AFTER else q


def of_frames(mode: str, k: Tensor, v: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, n, C] repeated for every frame to [B, F n, C], rotated by its number, if the mode says so."""
    if mode not in ("ropeQK_1d", "ropeQKV_1d"):
        return k, v
    keys, values = (x.unsqueeze(1).repeat(1, frames, 1, 1) for x in (k, v))
    keys = keys + rotated_by_frame(keys)
    if mode == "ropeQKV_1d":
        values = values + rotated_by_frame(values)
    return keys.flatten(1, 2), values.flatten(1, 2)


def sinusoid(positions: Tensor, channels: int, *, cosines: bool = True) -> Tensor:
    """sin(p w_i) in even channels and cos(p w_i) in odd ones, [N, C], or sin in all; w rises from 1 to 10000."""
    angles = positions.unsqueeze(1) * _frequencies(channels, 2 if cosines else 1, True, positions.device)
    if not cosines:
        return angles.sin()
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotated_by_frame(x: Tensor) -> Tensor:
    """Rotary embedding of x [B, F, ..., C] over all channels by the number of the frame."""
    return _rotate(x, 1)


def rotated_by_place(x: Tensor) -> Tensor:
    """Rotary embedding of x [B, F, h, w, C]: a quarter of the channels each by frame, row, column; the last is kept."""
    quarter = x.shape[-1] // 4
    *parts, kept = x.split([quarter] * 3 + [x.shape[-1] - 3 * quarter], dim=-1)
    return torch.cat([*(_rotate(part, axis) for axis, part in enumerate(parts, 1)), kept], dim=-1)


def _rotate(x: Tensor, axis: int) -> Tensor:
    """Rotate pairs of neighbouring channels by p 10000^(-2i/C), where p is the place along an axis, in fp32."""
    places = torch.arange(x.shape[axis], device=x.device).view(-1, *[1] * (x.ndim - 1 - axis))
    angles = places * _frequencies(x.shape[-1], 2, False, x.device).repeat_interleave(2)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x * angles.cos() + across * angles.sin()).to(x)


@lru_cache(maxsize=64)
def _frequencies(channels: int, step: int, rising: bool, device: torch.device) -> Tensor:
    """10000^(+-i/C) for every step-th channel i. From the CPU, so that they are the same on every device; kept there.

    Samplers and training share them, so they must not be tensors of inference mode.
    """
    with torch.inference_mode(False):
        place = torch.arange(0, channels, step)
        if rising:
            return torch.exp(place * (math.log(10000.0) / channels)).to(device)
        return (10000.0 ** (-place.float() / channels)).to(device)
