"""Chooses a clip's frames and its size in pixels."""

import logging
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .sources import Source

SIDE = 16  # pixels per token side: VAE 8 x patch 2
WINDOW_MODES = ("first", "uniform", "sliding")


def nearest_lengths(frames: int, step: int) -> tuple[int, int]:
    """The allowed lengths below (or at) and above `frames`."""
    below = (frames - 1) // step * step + 1
    return below, below + step


def check_length(frames: int, step: int) -> None:
    """ValueError unless `frames` is 1 + n * step, the lengths that a causal video VAE encodes."""
    if (frames - 1) % step:
        below, above = nearest_lengths(frames, step)
        raise ValueError(
            f"frames_per_clip={frames}: expected {step}n+1 frames for this VAE; the nearest are {below} and {above}"
        )


def resample(source: Source, fps: float) -> list[int]:
    """Index of the source frame shown at each time k / fps. fps=0 uses the source's own frame rate."""
    if source.photo:
        return list(range(source.count))
    if fps > source.fps and not source.times:
        logging.warning(
            "Kinoloom: %s has %g frames per second; frames repeat to make %g. Set fps to %g or 0 if its "
            "motion stutters.",
            source.name,
            source.fps,
            fps,
            source.fps,
        )
    if source.times:
        return _shown(np.array(source.times), fps or source.fps)
    if fps in (0, source.fps):
        return list(range(source.count))
    moments = math.floor((source.count - 1) / source.fps * fps + 1e-6) + 1
    return [min(math.floor(k * source.fps / fps + 0.5), source.count - 1) for k in range(moments)]


def _shown(times: np.ndarray, fps: float) -> list[int]:
    """The frame nearest to each time k / fps, never one more than half a frame late: a pause stays a pause."""
    moments = np.arange(math.floor(times[-1] * fps + 1e-6) + 1) / fps
    held = np.searchsorted(times, moments + 1e-9, side="right") - 1
    coming = np.minimum(held + 1, len(times) - 1)
    wait = times[coming] - moments
    return np.where(wait <= np.minimum(moments - times[held], 0.5 / fps) + 1e-9, coming, held).tolist()


def windows(available: int, length: int, mode: str, count: int, stride: int) -> list[range]:
    """Windows of `length` frames: the first one, `count` evenly spread ones, or one every `stride` frames."""
    last = available - length
    if mode == "first":
        starts = [0]
    elif mode == "uniform":
        starts = sorted({place * last // max(count - 1, 1) for place in range(count)})
    elif mode == "sliding":
        starts = range(0, last + 1, stride)
    else:
        raise ValueError(f"window_mode={mode!r}: expected one of {', '.join(WINDOW_MODES)}")
    return [range(start, start + length) for start in starts]


def spread(values: list[int], count: int) -> list[int]:
    """At most `count` of the values, ends included, evenly spread."""
    if len(values) <= count:
        return values
    return [values[place * (len(values) - 1) // max(count - 1, 1)] for place in range(count)]


def bucket(width: int, height: int, area: int, side: int = SIDE) -> tuple[int, int]:
    """Width and height, multiples of `side`, with about `area` pixels and the aspect ratio nearest to the source's."""

    def misfit(size: tuple[int, int]) -> tuple[float, int]:
        w, h = size
        return 2 * abs(math.log(w * height / (h * width))) + abs(math.log(w * h / area)), abs(w - h)

    ideal = math.sqrt(area * width / height)
    tokens = max(int(ideal // side), 1)
    widths = [side * n for n in range(max(tokens - 1, 1), tokens + 3)]
    return min(
        ((w, side * n) for w in widths for n in {max(int(area / w // side), 1), int(area / w // side) + 1}), key=misfit
    )


def center_crop(frame: Tensor, width: int, height: int) -> Tensor:
    """The largest central part of [H, W, C] with the aspect ratio width / height, as [1, C, H', W']."""
    have_h, have_w = frame.shape[:2]
    scale = max(width / have_w, height / have_h)
    crop_w, crop_h = min(round(width / scale), have_w), min(round(height / scale), have_h)
    top, left = (have_h - crop_h) // 2, (have_w - crop_w) // 2
    return frame[top : top + crop_h, left : left + crop_w].movedim(-1, 0).unsqueeze(0)


def fit(frame: Tensor, width: int, height: int) -> Tensor:
    """Crop and resize a frame [H, W, C] to [height, width, C]."""
    pixels = center_crop(frame, width, height)
    if pixels.shape[-2:] != (height, width):
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return pixels[0].movedim(0, -1)


def latent_mask(frames: Tensor, step: int) -> Tensor:
    """A mask [F, h, w] averaged over the frames of each latent frame (1, step, step, ...), as [1, T, h, w]."""
    first, rest = frames[:1], frames[1:]
    rest = rest.reshape(-1, step, *frames.shape[1:]).mean(1) if len(rest) else rest
    return torch.cat([first, rest]).unsqueeze(0)
