"""The training loss of Stable Video Diffusion (Blattmann et al. 2023, arXiv 2311.15127)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.config import TrainConfig, knob
from ...core.data import Batch
from ...core.losses import concept_and_prior, denoising_loss
from ...core.rng import Rng
from .model import Svd


@dataclass(frozen=True, kw_only=True)
class SvdConfig(TrainConfig):
    """Options of the loss, for every recipe for this model."""

    noise_mean: float = knob(
        0.7,
        "Mean of the noise levels, as a natural logarithm. Raise it to 2 to learn positions and motion rather than "
        "detail.",
        min=-5.0,
        max=5.0,
        step=0.1,
        advanced=True,
    )
    noise_std: float = knob(
        1.6,
        "Standard deviation of the noise levels, as natural logarithms. Lower it to 0.8 to skip those that teach "
        "little.",
        min=0.0,
        max=5.0,
        step=0.1,
        advanced=True,
    )
    conditioning_dropout: float = knob(
        0.1,
        "Probability of dropping the image embedding, of dropping the first frame, and of dropping both. Guidance "
        "(cfg) needs it. 0 turns it off.",
        min=0.0,
        max=0.33,
        step=0.01,
        advanced=True,
    )


def video_losses(backbone: Svd, batch: Batch, rng: Rng, config: SvdConfig) -> Iterator[tuple[str, Tensor]]:
    return concept_and_prior(
        lambda batch, rng: video_loss(backbone, batch, rng, config), batch, rng, config.prior_weight
    )


def video_loss(backbone: Svd, batch: Batch, rng: Rng, config: SvdConfig) -> Tensor:
    """MSE on v for one micro-batch, with noise levels and dropped conditions drawn from `rng`."""
    u = rng.uniform(len(batch["latents"]), config.stratified_timesteps)
    t = backbone.schedule.timesteps(u, config.noise_mean, config.noise_std)
    return denoising_loss(backbone, drawn_conditions(batch, rng, config.conditioning_dropout), rng, t)


def drawn_conditions(batch: Batch, rng: Rng, dropout: float) -> Batch:
    """Choose one of the first frame's noise strengths for each clip, and drop conditions.

    For p = `dropout`, only the embedding is dropped with probability p, only the first frame with p, and both with p.
    An evaluation uses the first frame without noise and drops nothing.
    """
    count, stored = batch["augmentations"].shape
    chosen, kept = torch.zeros(count, dtype=torch.long), torch.ones(2, count)
    if not rng.evaluating:
        for i in range(count):
            noising, left_out = (rng.generator(name, rng.sample + i) for name in ("noising", "conditioning"))
            chosen[i] = torch.randint(1, stored, (), generator=noising)
            drawn = float(torch.rand((), generator=left_out))
            kept[0, i], kept[1, i] = drawn >= 2 * dropout, not dropout <= drawn < 3 * dropout
    clips = torch.arange(count)
    return {
        **batch,
        "image_embeds": batch["image_embeds"] * kept[0].unsqueeze(1),
        "first_frame": batch["first_frames"][clips, chosen] * kept[1].view(-1, 1, 1, 1),
        "augmentation": batch["augmentations"][clips, chosen],
    }
