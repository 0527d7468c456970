"""Trains the toy world's image VAE, in the tiny autoencoder's architecture (TAESD) that ComfyUI's Load VAE knows."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from comfy.latent_formats import SD15
from comfy.taesd.taesd import TAESD
from numpy.random import Generator
from tiny.weights import save
from torch import Tensor, nn

from .train_vae import DEVICE, Draw, Optimizer, any_clip, base_clip, video_batch

NOISE = 0.1  # added to the latents, so that near ones decode alike
PULL = 1e-3  # towards zero, against the noise


def main(target: Path, share: float) -> None:
    """Train and write the VAE, its latents scaled to unit spread in ComfyUI's SD15 format."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    vae = build().to(DEVICE)
    train(vae, rng, math.ceil(2000 * share), 2e-3, base_clip)
    train(vae, rng, math.ceil(1000 * share), 1e-3, any_clip)
    match_sd_statistics(vae, rng)
    save(target, {name: value.half() for name, value in vae.state_dict().items()})


def build() -> nn.Module:
    vae = TAESD()
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in vae.modules():
        if hasattr(block, "fuse"):
            nn.init.zeros_(block.conv[4].weight)
    for last in (vae.taesd_encoder[-1], vae.taesd_decoder[-1]):
        last.weight.data *= 0.1
    return vae


def frames(rng: Generator, count: int, draw: Draw) -> Tensor:
    """N 3 64 64 in -1..1."""
    return video_batch(rng, 1, count, draw)[:, :, 0].contiguous(memory_format=torch.channels_last)


def train(vae: nn.Module, rng: Generator, steps: int, rate: float, draw: Draw) -> None:
    """One stage; leaves the averaged weights in `vae`."""
    average = {name: value.clone() for name, value in vae.state_dict().items()}
    optimizer, recent = Optimizer(vae), []
    for step in range(steps):
        images = frames(rng, 24, draw)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            latents = vae.taesd_encoder(images * 0.5 + 0.5)
            decoded = vae.taesd_decoder(latents + NOISE * torch.randn_like(latents)).float() * 2 - 1
        error = F.mse_loss(decoded, images)
        (error + 0.02 * F.l1_loss(decoded, images) + PULL * latents.float().square().mean()).backward()
        optimizer.step(rate * min(1, (step + 1) / 50) * min(1, 0.02 + 3 * (1 - step / steps)))
        for name, value in vae.state_dict().items():
            average[name].lerp_(value, 1 - min(0.99, step / (step + 10)))
        recent.append(error.item())
        if step % 50 == 49:
            psnr = 10 * math.log10(4 / np.mean(recent[-50:]))
            print(f"step {step + 1} of {steps}, PSNR {psnr:.2f} dB, spread {latents.float().std():.2f}", flush=True)
    vae.load_state_dict(average)


@torch.no_grad()
def match_sd_statistics(vae: nn.Module, rng: Generator) -> None:
    """Scale and shift what `encode` gives to zero mean and, times the format's factor, unit spread."""
    latents = vae.encode(frames(rng, 240, base_clip))
    vae.vae_scale.fill_(latents.std() * SD15().scale_factor)
    vae.vae_shift.fill_(-latents.mean() / vae.vae_scale)
