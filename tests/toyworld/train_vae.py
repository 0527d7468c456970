"""Trains the toy world's video VAE, in ComfyUI's own Wan architecture: single frames first, then short and whole clips."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from comfy.latent_formats import Wan21
from comfy.ldm.wan.vae import WanVAE
from numpy.random import Generator
from tiny.weights import save
from torch import Tensor, nn

from . import world

Draw = Callable[[Generator], np.ndarray]  # a clip, T H W 3, 8 bits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIM = 16
CHANNELS = 16
KL_WEIGHT = 3e-5


def main(target: Path, share: float) -> None:
    """Train and write the VAE, its latents scaled to the mean and spread that ComfyUI expects of Wan's."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    vae = build().to(DEVICE)
    stages = (  # frames, batch size, steps, learning rate, clips
        (1, 24, 1260, 2e-3, base_clip),
        (5, 6, 540, 1.5e-3, base_clip),
        (17, 2, 560, 1e-3, base_clip),
        (17, 2, 700, 1e-3, any_clip),
    )
    for frames, batch, steps, rate, draw in stages:
        train(vae, rng, frames, batch, math.ceil(steps * share), rate, draw)
    match_wan_statistics(vae, rng)
    save(target, {name: value.half() for name, value in vae.state_dict().items()})


def train(vae: nn.Module, rng: Generator, frames: int, batch: int, steps: int, rate: float, draw: Draw) -> None:
    """One stage; leaves the averaged weights in `vae`."""
    average = {name: value.clone() for name, value in vae.state_dict().items()}
    optimizer = Optimizer(vae)
    recent = []
    for step in range(steps):
        clips = video_batch(rng, frames, batch, draw)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            mean, log_var = encode(vae, clips)
            latents = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
            decoded = vae.decode(latents).float()
        error = F.mse_loss(decoded, clips)
        kl = 0.5 * (mean.float() ** 2 + log_var.float().exp() - 1 - log_var.float()).mean()
        (error + 0.02 * F.l1_loss(decoded, clips) + KL_WEIGHT * kl).backward()
        optimizer.step(rate * min(1, step / 50) * min(1, 0.02 + 3 * (1 - step / steps)))
        for name, value in vae.state_dict().items():
            average[name].lerp_(value, 1 - min(0.99, step / (step + 10)))
        recent.append(error.item())
        if step % 50 == 49:
            psnr = 10 * math.log10(4 / np.mean(recent[-50:]))
            print(f"{frames} frames, step {step + 1} of {steps}, PSNR {psnr:.2f} dB, KL {kl.item():.1f}", flush=True)
    vae.load_state_dict(average)


class Optimizer:
    """Muon for matrices and kernels, each taken as a matrix, and AdamW for norms and biases."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = [p for p in module.parameters() if p.ndim >= 2 and p.shape[1] > 1]
        self.matrices = [nn.Parameter(p.data.view(len(p), -1)) for p in self.weights]  # the same memory
        others = [p for p in module.parameters() if all(p is not w for w in self.weights)]
        self.muon = torch.optim.Muon(self.matrices, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, rate: float) -> None:
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.reshape(matrix.shape)
            weight.grad = None
        for optimizer in (self.muon, self.adam):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def build() -> nn.Module:
    vae = WanVAE(DIM, CHANNELS, temperal_downsample=[False, True, True])
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            nn.init.zeros_(module.bias)
            if isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3):
                module.weight.data[:, :, :2] = 0  # frames by themselves at first
    for name, module in vae.named_modules():
        if name.endswith("residual.6") or name.endswith(".proj"):
            nn.init.zeros_(module.weight)
        if name.endswith("time_conv"):  # hand on the last frame at first
            nn.init.zeros_(module.weight)
            width = module.weight.shape[1]
            for start in range(0, module.weight.shape[0], width):
                module.weight.data[start : start + width, :, -1, 0, 0] = torch.eye(width)
    return vae


def video_batch(rng: Generator, frames: int, batch: int, draw: Draw) -> Tensor:
    """B 3 T 64 64 in -1..1, from clips as `draw` makes them."""
    per_clip = 3 if frames == 1 else 1
    videos = []
    for _ in range(batch // per_clip):
        video = draw(rng)
        videos += [video[start : start + frames] for start in rng.integers(0, world.FRAMES - frames + 1, per_clip)]
    return to_pixels(np.stack(videos))


def to_pixels(videos: np.ndarray) -> Tensor:
    """B T H W 3, 8 bits, to B 3 T H W in -1..1 on the device."""
    return torch.from_numpy(videos).to(DEVICE).movedim(-1, 1).float() / 127.5 - 1


def base_clip(rng: Generator) -> np.ndarray:
    """A clip of base training, half of the textures with any second colour."""
    second = str(rng.choice(list(world.COLOURS))) if rng.random() < 0.5 else None
    return world.draw(replace(world.choose(rng), second=second), rng).video


def any_clip(rng: Generator) -> np.ndarray:
    """A blob with random stripes in random colours on a random path: for a codec of more than the base's clips."""
    if rng.random() < 0.3:
        return base_clip(rng)
    radius = rng.uniform(8, 14)
    waves = [(rng.uniform(0, 0.3 / order), order, rng.uniform(0, 2 * np.pi)) for order in range(1, 7)]
    turn, period = rng.uniform(0, np.pi), rng.uniform(0.6, 4)

    def edge(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        place = np.arctan2(v, u)
        return np.hypot(u, v) - 0.75 - sum(size * np.cos(order * place + phase) for size, order, phase in waves)

    def stripes(u: np.ndarray, v: np.ndarray, _: np.ndarray) -> np.ndarray:
        return np.sin(2 * np.pi * (np.cos(turn) * u + np.sin(turn) * v) / period + turn) * period / (2 * np.pi)

    colours = rng.permutation(np.array(list(world.COLOURS.values()), np.float32))[:2]
    background = world.background(str(rng.choice(list(world.BACKGROUNDS))), rng)
    angle = np.linspace(0, rng.choice([0, 0, np.pi]), world.FRAMES, dtype=np.float32)
    x, y = random_path(rng), random_path(rng)
    return world.render(x, y, angle, np.full_like(x, radius), edge, stripes, (colours[0], colours[1]), background)[0]


def random_path(rng: Generator) -> np.ndarray:
    """One coordinate through up to four corners, at most six pixels a frame."""
    corners = np.linspace(0, world.FRAMES - 1, int(rng.integers(2, 5)))
    steps = rng.uniform(-6, 6, len(corners) - 1) * rng.random() * np.diff(corners)
    places = np.concatenate([[0], np.cumsum(steps)])
    path = np.interp(np.arange(world.FRAMES), corners, places - places.mean())
    return (world.SIZE / 2 + np.clip(path, -20, 20) + rng.uniform(-5, 5)).astype(np.float32)


def encode(vae: nn.Module, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance; core's own encode drops the variance."""
    taken: list[Tensor] = []
    handle = vae.conv1.register_forward_hook(lambda module, inputs, output: taken.append(output))
    try:
        vae.encode(clips)
    finally:
        handle.remove()
    mean, log_var = taken[0].chunk(2, dim=1)
    return mean, log_var.clamp(-30, 10)


@torch.no_grad()
def match_wan_statistics(vae: nn.Module, rng: Generator) -> None:
    """Scale the latents, channel by channel, to what ComfyUI's Wan21 format normalises, inside the 1x1 convolutions."""
    wan = Wan21()
    latents = torch.cat([vae.encode(video_batch(rng, 17, 8, base_clip)) for _ in range(8)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    wanted_mean, wanted_std = (value.flatten().to(DEVICE) for value in (wan.latents_mean, wan.latents_std))
    scale = wanted_std / std
    shift = wanted_mean - mean * scale
    first, last = vae.conv1, vae.conv2
    first.weight[:CHANNELS] *= scale.view(-1, 1, 1, 1, 1)
    first.bias[:CHANNELS] = first.bias[:CHANNELS] * scale + shift
    weight = last.weight / scale.view(1, -1, 1, 1, 1)
    last.bias -= (weight.flatten(1) * shift).sum(1)
    last.weight.copy_(weight)
