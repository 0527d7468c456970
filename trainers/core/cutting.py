"""Cuts the frames that a training step sees out of longer rows."""

import torch

from .data import Batch
from .rng import Rng

CUT = ("latents", "mask")  # tensors [B, C, F, h, w]


def cut_clips(batch: Batch, frames: int, strides: tuple[int, int], rng: Rng) -> Batch:
    """The batch with `frames` frames of each clip, from a random start, at a random stride of the range `strides`.

    A stride is at most what the row's length allows. Rows of fewer frames stay whole, as do all if `frames` is 0. An
    evaluation takes the first frames at the smallest stride. Latents and masks are [B, C, F, h, w], a frame each.
    """
    have = batch["latents"].shape[2]
    if not frames or have <= frames:
        return batch
    widest = (have - 1) // max(frames - 1, 1)
    low, high = (min(stride, widest) for stride in strides)
    places = [_places(have, frames, low, high, rng, rng.sample + i) for i in range(len(batch["latents"]))]
    cut = {name: [clip[:, own] for clip, own in zip(batch[name], places, strict=True)] for name in CUT if name in batch}
    return {**batch, **{name: torch.stack(clips) for name, clips in cut.items()}}


def _places(have: int, frames: int, low: int, high: int, rng: Rng, sample: int) -> slice:
    if rng.evaluating:
        return slice(0, (frames - 1) * low + 1, low)
    stride = int(torch.randint(low, high + 1, (), generator=rng.generator("stride", sample)))
    last = have - 1 - (frames - 1) * stride
    start = int(torch.randint(last + 1, (), generator=rng.generator("start", sample)))
    return slice(start, start + (frames - 1) * stride + 1, stride)
