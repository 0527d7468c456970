"""Trains the toy world's image-to-video model: ComfyUI's own SVD UNet, narrow, with the loss of the pack's trainers."""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy.utils import load_torch_file
from kinoloom.trainers.backbones.svd.model import Svd
from kinoloom.trainers.backbones.svd.objective import SvdConfig, video_loss
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.host.attention import TRANSFORMER_OPTIONS
from kinoloom.trainers.host.private import Private
from numpy.random import Generator
from tiny import svd as tiny_svd
from tiny.weights import Weights, save
from torch import Tensor, nn

from . import world
from .install import BUCKET, STRIDE
from .pack import video_unet, vision
from .train_animatediff import SCALE
from .train_base import initialise
from .train_image_vae import build as build_vae
from .train_vae import DEVICE, Optimizer, to_pixels

WIDTHS, BLOCKS = (64, 64, 64), 1
CLIPS, STEPS, BATCH, RATE = 3000, 2500, 12, 2e-3
OBJECTIVE = SvdConfig()
AUGMENTATIONS = (0.0, 0.01, 0.02, 0.05, 0.1)  # of the first frame; the first of them is for evaluations


def main(vae_path: Path, vision_path: Path, model_path: Path, share: float) -> None:
    """Write an image encoder of random weights, encode clips, train on them and write the model."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    write_vision(vision_path)
    clips = encode_clips(vae_path, vision_path, math.ceil(CLIPS * share), rng)
    save(model_path, train(clips, math.ceil(STEPS * share), rng))


def write_vision(path: Path) -> None:
    """Nobody trained it: what it says of an image is a random projection, and the model learns to read it."""
    module = vision.build().model
    initialise(module)
    nn.init.zeros_(module.vision_model.embeddings.class_embedding)
    save(path, {name: value.half() for name, value in module.state_dict().items() if value.is_floating_point()})


@torch.no_grad()
def encode_clips(vae_path: Path, vision_path: Path, count: int, rng: Generator) -> dict[str, Tensor]:
    """What the pack's SVD nodes encode, of clips at half the frame rate: latents [N 4 F 8 8] and the column `image`."""
    vae = build_vae().to(DEVICE)
    vae.load_state_dict(load_torch_file(str(vae_path)))
    see = vision.load(vision_path)
    spread = torch.tensor(AUGMENTATIONS).view(1, -1, 1, 1, 1)
    latents, first_frames, embeds = [], [], []
    while len(latents) * BATCH < count:
        video = np.stack([world.sample(rng).video[::STRIDE] for _ in range(BATCH)])
        pixels = to_pixels(video)  # B 3 F H W
        first = pixels[:, :, 0].unsqueeze(1).cpu()
        noise = torch.from_numpy(rng.standard_normal((BATCH, len(AUGMENTATIONS), *first.shape[2:]))).float()
        noised = (first + 2 * spread * noise).to(DEVICE)  # pixels are -1..1, levels are of 0..1
        with torch.autocast(DEVICE.type, torch.bfloat16):
            frames = vae.encode(pixels.transpose(1, 2).flatten(0, 1)).unflatten(0, (BATCH, -1)).transpose(1, 2)
            noised = vae.encode(noised.flatten(0, 1)).unflatten(0, (BATCH, -1))
        latents.append(frames.half().cpu())
        first_frames.append(noised.half().cpu())
        embeds.append(see.encode_image(torch.from_numpy(video[:, 0]).float() / 255).image_embeds.float().cpu())
    print(f"{len(latents) * BATCH} clips encoded", flush=True)
    return {"latents": torch.cat(latents), "first_frames": torch.cat(first_frames), "image_embeds": torch.cat(embeds)}


def train(clips: dict[str, Tensor], steps: int, rng: Generator) -> dict[str, Tensor]:
    """Weights averaged over the last steps."""
    backbone = build()
    unet = backbone.module
    average = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    optimizer, recent = Optimizer(unet), []
    for step in range(steps):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = video_loss(backbone, draw(clips, rng), Rng(0, "toy", step * BATCH), OBJECTIVE)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step(RATE * min(1, (step + 1) / 200) * min(1, 0.01 + 2 * (1 - step / steps)))
        for name, value in unet.state_dict().items():
            average[name].lerp_(value, 1 - min(0.998, step / (step + 10)))
        recent.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}, loss {np.mean(recent[-50:]):.4f}", flush=True)
    return {name: value.half() for name, value in average.items()}


def draw(clips: dict[str, Tensor], rng: Generator) -> dict[str, Any]:
    """A batch as the trainers have it."""
    chosen = torch.from_numpy(rng.integers(0, len(clips["latents"]), BATCH))
    batch = {name: value[chosen].float().to(DEVICE) for name, value in clips.items()}
    return {
        **batch,
        "latents": batch["latents"] * SCALE,
        "augmentations": torch.tensor(AUGMENTATIONS).expand(BATCH, -1),
        "fps": torch.full((BATCH,), float(world.FPS // STRIDE)),
        "motion_bucket": torch.full((BATCH,), float(BUCKET)),
    }


def build() -> Svd:
    """The model before training: every block leaves its input as it is, and mixes space and time half and half."""
    weights = tiny_svd.unet(Weights(0), WIDTHS, vision.WIDTH, BLOCKS)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "untrained.safetensors", weights)
        model = video_unet.load_unet(Path(folder) / "untrained.safetensors", disable_dynamic=True).model
    unet = model.diffusion_model.to(DEVICE)
    initialise(unet)
    for name, module in unet.named_modules():
        if name.endswith((".proj_out", ".out_layers.3", ".time_stack.0.attn2.to_out.0")) or name == "out.2":
            nn.init.zeros_(module.weight)
    for name, parameter in unet.named_parameters():
        if name.endswith("mix_factor"):
            nn.init.zeros_(parameter)
    unet.requires_grad_(True)
    return Svd({"model": Private(model, {})}, DEVICE, torch.float32, TRANSFORMER_OPTIONS)
