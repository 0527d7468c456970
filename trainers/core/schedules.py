"""The noise schedules of the backbones."""

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
    """Noise in 1000 steps of rising betas; the model predicts the noise (Ho et al. 2020, arXiv 2006.11239).

    The betas rise linearly from 0.00085 to 0.012, as AnimateDiff's do: diffusers' "linear", ComfyUI's "sqrt_linear".
    """

    steps, scheduler = 1000, "simple"

    def __init__(self, start: float = 0.00085, end: float = 0.012) -> None:
        betas = torch.linspace(start, end, self.steps, dtype=torch.float64)
        self.alphas_bar = torch.cumprod(1 - betas, 0).float()

    def timesteps(self, u: Tensor) -> Tensor:
        """Quantiles in (0, 1) to steps 0..999."""
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
        """As if all of x_t were noise, at the spread of x_0 + sigma noise."""
        return noise * math.sqrt(1 + sigma**2)

    def model_input(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """x = x_0 + sigma noise to what the model takes, x_t and its t."""
        kept = 1 / (1 + sigma**2)
        return x * math.sqrt(kept), (self.alphas_bar - kept).abs().argmin().expand(len(x))

    def slope(self, x: Tensor, pred: Tensor, sigma: float) -> Tensor:
        """dx / dsigma, which makes Euler's steps those of DDIM (arXiv 2010.02502, section 4.3)."""
        return pred


class Edm:
    """Noise of any level t = sigma > 0 over data of spread 1; the model predicts v (Karras et al., arXiv 2206.00364).

    The loss on the denoised latents, (1 + sigma^2) / sigma^2 |D - x_0|^2, is the plain one on v, which does not
    overflow where sigma nears 0.
    """

    scheduler = "karras"

    def timesteps(self, u: Tensor, mean: float, std: float) -> Tensor:
        """Quantiles in (0, 1) to noise levels, normal in ln(sigma)."""
        return torch.exp(mean + std * math.sqrt(2) * torch.erfinv(2 * u - 1))

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = x_0 + sigma noise for latents, noise [B, ...] and levels t [B]."""
        return latents + _spread(t, latents) * noise

    def scale(self, noisy_latents: Tensor, t: Tensor) -> Tensor:
        """What the model is given: x_t at spread 1."""
        return noisy_latents / (1 + _spread(t, noisy_latents) ** 2).sqrt()

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = (noise - sigma x_0) / sqrt(1 + sigma^2)"""
        return self.scale(noise - _spread(t, latents) * latents, t)

    def sigmas(self, shift: float) -> Tensor:
        """The ends alone: "karras" spaces levels evenly in the seventh root of sigma (Karras et al., eq. 5)."""
        return torch.tensor([0.002, 700.0])

    def begin(self, noise: Tensor, sigma: float) -> Tensor:
        return noise * math.sqrt(1 + sigma**2)

    def model_input(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        return x, torch.full((len(x),), sigma)

    def slope(self, x: Tensor, pred: Tensor, sigma: float) -> Tensor:
        """dx / dsigma = (x - x_0) / sigma, of what v says x_0 is."""
        return sigma * x / (1 + sigma**2) + pred / math.sqrt(1 + sigma**2)


def _spread(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))


class FlowMatch:
    """Rectified flow: t = 1 is pure noise, the model predicts the velocity noise - data (arXiv 2403.03206)."""

    multiplier, scheduler = 1000.0, "simple"
    steps = 1000  # of the table that ComfyUI's schedulers choose from

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 - t) x_1 + t x_0 for latents, noise [B, ...] and t [B]."""
        t = _spread(t, latents)
        return (1 - t) * latents + t * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - latents

    def sigmas(self, shift: float) -> Tensor:
        """t in (0, 1]."""
        return shift_timesteps(torch.arange(1, self.steps + 1) / self.steps, shift)

    def begin(self, noise: Tensor, t: float) -> Tensor:
        return noise

    def model_input(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return x, torch.full((len(x),), t)

    def slope(self, x: Tensor, pred: Tensor, t: float) -> Tensor:
        """dx / dt"""
        return pred
