"""Training losses as pure functions."""

from collections.abc import Callable, Iterator

from torch import Tensor

from .backbone import Backbone
from .data import Batch
from .rng import Rng
from .schedules import logit_normal, shift_timesteps
from .transfer import to_device


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error in fp32. `mask` multiplies the squared errors; the mean includes masked elements."""
    error = (pred.float() - target.float()).square()
    return (error if mask is None else error * mask).mean()


def sample_timesteps(rng: Rng, count: int, sampling: str, shift: float, stratified: bool) -> Tensor:
    """Timesteps t in (0, 1) [count], drawn "logit_normal" or "uniform" and then shifted."""
    u = rng.uniform(count, stratified)
    return shift_timesteps(logit_normal(u) if sampling == "logit_normal" else u, shift)


def denoising_loss(backbone: Backbone, batch: Batch, rng: Rng, t: Tensor) -> Tensor:
    """MSE between the backbone's prediction and its schedule's target, for one micro-batch at timesteps t [B]."""
    latents = batch["latents"]
    noise = rng.noise_like(latents)
    t = to_device(t, latents.device)
    noisy_latents = backbone.schedule.add_noise(latents, noise, t)
    pred = backbone.predict(noisy_latents, t, batch)
    return masked_mse(pred, backbone.schedule.target(latents, noise, t), batch.get("mask"))


def concept_and_prior(
    loss: Callable[[Batch, Rng], Tensor], batch: Batch, rng: Rng, prior_weight: float
) -> Iterator[tuple[str, Tensor]]:
    """L_concept, then prior_weight * L_prior if the batch has prior clips (DreamBooth, arXiv 2208.12242)."""
    yield "concept", loss(batch, rng)
    if "prior" in batch and prior_weight:
        yield "prior", prior_weight * loss(batch["prior"], rng.fork("prior"))
