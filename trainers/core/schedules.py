"""Noise schedules: DDPM, EDM and flow matching."""

import math

import torch
from torch import Tensor

from .transfer import to_device


def logit_normal(u: Tensor) -> Tensor:
    """Uniform quantiles to t = sigmoid(z), z ~ N(0, 1) (Esser et al. 2024, arXiv 2403.03206)."""
    return torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * u - 1))


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): s > 1 moves training towards noise (arXiv 2403.03206, section 5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


class Ddpm:
    """1000 noise steps with rising betas; the model predicts the noise (Ho et al. 2020, arXiv 2006.11239).

    The betas rise linearly from 0.00085 to 0.012, as in AnimateDiff: diffusers' "linear", ComfyUI's "sqrt_linear". With
    `root` their square roots do, as in Stable Diffusion: diffusers' "scaled_linear", ComfyUI's "linear".
    """

    steps, scheduler = 1000, "simple"

    def __init__(self, start: float = 0.00085, end: float = 0.012, *, root: bool = False) -> None:
        power = 2 if root else 1
        betas = torch.linspace(start ** (1 / power), end ** (1 / power), self.steps, dtype=torch.float64) ** power
        self.alphas_bar = torch.cumprod(1 - betas, 0).float()

    def timesteps(self, u: Tensor) -> Tensor:
        """Quantiles in (0, 1) to timesteps 0..999."""
        return (u * self.steps).long()

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, a = alphas_bar, for latents, noise [B, ...] and steps t [B]."""
        kept = _spread(to_device(self.alphas_bar, latents.device)[t], latents)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def sigmas(self, shift: float) -> Tensor:
        """sigma = sqrt((1 - a_t) / a_t) for t = 0..999."""
        return ((1 - self.alphas_bar) / self.alphas_bar).sqrt()

    def begin(self, noise: Tensor, sigma: float) -> Tensor:
        """The first x of sampling: pure noise with the standard deviation of x_0 + sigma noise."""
        return noise * math.sqrt(1 + sigma**2)

    def model_input(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Converts x = x_0 + sigma noise to the model's input x_t and t."""
        kept = 1 / (1 + sigma**2)
        return x * math.sqrt(kept), (self.alphas_bar - kept).abs().argmin().expand(len(x))

    def slope(self, x: Tensor, pred: Tensor, sigma: float) -> Tensor:
        """dx / dsigma. Euler steps with it are DDIM steps (arXiv 2010.02502, section 4.3)."""
        return pred


class Edm:
    """Noise levels t = sigma > 0 on data with standard deviation 1; the model predicts v (arXiv 2206.00364).

    The weighted loss on the denoised latents D, (1 + sigma^2) / sigma^2 |D - x_0|^2, equals the MSE on v. The MSE on v
    does not overflow for sigma near 0.
    """

    scheduler = "karras"

    def timesteps(self, u: Tensor, mean: float, std: float) -> Tensor:
        """Quantiles in (0, 1) to noise levels sigma, where ln(sigma) is normal with `mean` and `std`."""
        return torch.exp(mean + std * math.sqrt(2) * torch.erfinv(2 * u - 1))

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = x_0 + sigma noise for latents, noise [B, ...] and levels t [B]."""
        return latents + _spread(t, latents) * noise

    def scale(self, noisy_latents: Tensor, t: Tensor) -> Tensor:
        """The model's input: x_t scaled to standard deviation 1."""
        return noisy_latents / (1 + _spread(t, noisy_latents) ** 2).sqrt()

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = (noise - sigma x_0) / sqrt(1 + sigma^2)"""
        return self.scale(noise - _spread(t, latents) * latents, t)

    def sigmas(self, shift: float) -> Tensor:
        """The lowest and highest sigma: ComfyUI's "karras" scheduler places the others (Karras et al., eq. 5)."""
        return torch.tensor([0.002, 700.0])

    def begin(self, noise: Tensor, sigma: float) -> Tensor:
        return noise * math.sqrt(1 + sigma**2)

    def model_input(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        return x, torch.full((len(x),), sigma)

    def slope(self, x: Tensor, pred: Tensor, sigma: float) -> Tensor:
        """dx / dsigma = (x - x_0) / sigma, with x_0 computed from the prediction v."""
        return sigma * x / (1 + sigma**2) + pred / math.sqrt(1 + sigma**2)


def _spread(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))


class FlowMatch:
    """Rectified flow: t = 1 is pure noise, the model predicts the velocity noise - data (arXiv 2403.03206)."""

    multiplier, scheduler = 1000.0, "simple"
    steps = 1000  # length of the sigma table that ComfyUI's schedulers choose from

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 - t) x_1 + t x_0 for latents, noise [B, ...] and t [B]."""
        t = _spread(t, latents)
        return (1 - t) * latents + t * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - latents

    def sigmas(self, shift: float) -> Tensor:
        """The noise levels t in (0, 1]."""
        return shift_timesteps(torch.arange(1, self.steps + 1) / self.steps, shift)

    def begin(self, noise: Tensor, t: float) -> Tensor:
        return noise

    def model_input(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return x, torch.full((len(x),), t)

    def slope(self, x: Tensor, pred: Tensor, t: float) -> Tensor:
        """dx / dt, which is the prediction itself."""
        return pred
