"""Samples with the model in training, by Euler's method."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .backbone import Schedule
from .data import Batch


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor, Batch], Tensor],
    schedule: Schedule,
    noise: Tensor,
    levels: Tensor,
    conditions: tuple[Batch, Batch],
    guidance: Tensor,
    should_stop: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """Latents [B, C, T, h, w] in the model's latent space, from N(0, 1) noise of that shape. None if stopped.

    Uses classifier-free guidance: negative + guidance * (positive - negative) (arXiv 2207.12598).
    """
    positive, negative = conditions
    guided, guidance = bool((guidance != 1).any()), guidance.to(noise)
    x = schedule.begin(noise, float(levels[0]))
    for level, following in pairwise(levels.tolist()):
        if should_stop():
            return None
        noisy_latents, t = schedule.model_input(x, level)
        t = t.to(x.device)
        pred = predict(noisy_latents, t, positive).float()
        if guided:
            away = predict(noisy_latents, t, negative).float()
            pred = away + guidance * (pred - away)
        x = x + (following - level) * schedule.slope(x, pred, level)
    return x
