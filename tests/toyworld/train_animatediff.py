"""Trains the toy world's image model and motion modules together: ComfyUI's SD1.5 UNet, narrow, and AnimateDiff's modules."""

import math
from pathlib import Path

import comfy.ops
import numpy as np
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.utils import load_torch_file
from kinoloom.trainers.backbones.motion_module import Attached, Layout, MotionModules
from kinoloom.trainers.core.host import TRANSFORMER_OPTIONS
from kinoloom.trainers.core.noise import Ddpm
from numpy.random import Generator
from torch import Tensor, nn

from . import world
from .install import STRIDE
from .pack import text_encoder
from .train_base import initialise
from .train_image_vae import build as build_vae
from .train_vae import DEVICE, Optimizer, to_pixels
from tiny_weights import save

WIDTHS = (64, 64, 64, 64)
POSITIONS = 32
CLIPS, STEPS = 3000, 1600
MOVING, STILL = 12, 40  # clips, and single frames, in a batch
UNCONDITIONAL = 0.1
SCALE = 0.18215  # of SD1.5's latents


def main(vae_path: Path, text_path: Path, unet_path: Path, motion_path: Path, share: float) -> None:
    """Encode clips, train on them and write both models."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    encode_text = text_encoder_of(text_path)
    scenes, latents = encode_clips(vae_path, math.ceil(CLIPS * share), rng)
    unet, motion = build_unet(), build_motion()
    both = nn.ModuleDict({"unet": unet, "motion": motion})
    average = {name: value.detach().clone() for name, value in both.state_dict().items()}
    optimizer, attached, schedule = Optimizer(both), Attached(unet, motion).__enter__(), Ddpm()
    steps, recent = math.ceil(STEPS * share), []
    for step in range(steps):
        losses = []
        for count, moving in ((MOVING, True), (STILL, False)):
            chosen = rng.integers(0, len(scenes), count)
            captions = [
                "" if rng.random() < UNCONDITIONAL else world.describe(scenes[i], rng, moving=moving) for i in chosen
            ]
            batch = latents[torch.from_numpy(chosen)].float()
            if not moving:
                frames = torch.from_numpy(rng.integers(0, batch.shape[1], count))
                batch = batch[torch.arange(count), frames].unsqueeze(1)
            losses.append(noise_loss(unet, attached, schedule, batch.to(DEVICE), encode_text(captions), rng))
            losses[-1].backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step(2e-3 * min(1, (step + 1) / 200) * min(1, 0.01 + 2 * (1 - step / steps)))
        for name, value in both.state_dict().items():
            average[name].lerp_(value, 1 - min(0.998, step / (step + 10)))
        recent.append([loss.item() for loss in losses])
        if step % 100 == 99:
            moving, still = np.mean(recent[-100:], 0)
            print(f"step {step + 1} of {steps}, loss of clips {moving:.4f}, of frames {still:.4f}", flush=True)
    for part, path in (("unet.", unet_path), ("motion.", motion_path)):
        save(path, {key.removeprefix(part): value.half() for key, value in average.items() if key.startswith(part)})


def text_encoder_of(path: Path) -> nn.Module:
    """Captions to B 24 128, remembered."""
    clip, known = text_encoder.load(path), {}

    @torch.inference_mode()
    def encode(captions: list[str]) -> Tensor:
        for caption in set(captions) - known.keys():
            known[caption] = clip.encode_from_tokens(clip.tokenize(caption))[0].float()
        return torch.stack([known[caption] for caption in captions])

    return lambda captions: encode(captions).clone().to(DEVICE)


@torch.no_grad()
def encode_clips(vae_path: Path, count: int, rng: Generator) -> tuple[list[world.Scene], Tensor]:
    """Scenes, and the latents [N F 4 8 8] of their clips at half the frame rate, as the model has them."""
    vae = build_vae().to(DEVICE)
    vae.load_state_dict(load_torch_file(str(vae_path)))
    scenes, latents = [], []
    while len(scenes) < count:
        clips = [world.sample(rng) for _ in range(16)]
        frames = to_pixels(np.stack([clip.video[::STRIDE] for clip in clips])).transpose(1, 2)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            encoded = vae.encode(frames.flatten(0, 1)).unflatten(0, (16, -1))
        latents.append((encoded * SCALE).half().cpu())
        scenes += [clip.scene for clip in clips]
    print(f"{len(scenes)} clips encoded", flush=True)
    return scenes, torch.cat(latents)


def build_unet() -> nn.Module:
    multiples = [width // WIDTHS[0] for width in WIDTHS]
    unet = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=WIDTHS[0], num_res_blocks=[2, 2, 2, 2],
        channel_mult=multiples, num_heads=8, use_spatial_transformer=True, transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], transformer_depth_middle=1, context_dim=text_encoder.WIDTH,
        use_linear_in_transformer=False, dtype=torch.float32, device=DEVICE, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    initialise(unet)
    for module in unet.modules():
        for name in ("proj_out", "out_layers"):
            last = getattr(module, name, None)
            if last is not None:
                nn.init.zeros_((last[-1] if isinstance(last, nn.Sequential) else last).weight)
    nn.init.zeros_(unet.out[-1].weight)
    return unet.requires_grad_(True)


def build_motion() -> MotionModules:
    motion = MotionModules(Layout("v3", WIDTHS, POSITIONS), device=DEVICE)
    initialise(motion)
    for name, module in motion.named_modules():
        if name.endswith("proj_out"):
            nn.init.zeros_(module.weight)
    return motion


def noise_loss(
    unet: nn.Module, attached: Attached, schedule: Ddpm, latents: Tensor, context: Tensor, rng: Generator
) -> Tensor:
    """Latents B F 4 8 8, one noise level for all frames of a clip."""
    count, frames = latents.shape[:2]
    t = torch.from_numpy(rng.integers(0, schedule.steps, count)).to(DEVICE)
    noise = torch.from_numpy(rng.standard_normal(latents.shape)).float().to(DEVICE)
    noisy = schedule.add_noise(latents, noise, t)
    attached.frames = frames
    with torch.autocast(DEVICE.type, torch.bfloat16):
        pred = unet(
            noisy.flatten(0, 1), t.repeat_interleave(frames), context=context.repeat_interleave(frames, 0),
            transformer_options=dict(TRANSFORMER_OPTIONS),
        )  # fmt: skip
    return F.mse_loss(pred.float(), noise.flatten(0, 1))
