"""Trains the toy world's image model and motion modules together: ComfyUI's SD1.5 UNet, narrow, and AnimateDiff's modules."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ops
import numpy as np
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.utils import load_torch_file
from kinoloom.trainers.backbones.animatediff.motion_module import Attached, Layout, MotionModules
from kinoloom.trainers.core.schedules import Ddpm
from kinoloom.trainers.host.attention import TRANSFORMER_OPTIONS
from numpy.random import Generator
from tiny.weights import save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from . import world
from .install import STRIDE
from .pack import text_encoder
from .train_base import initialise
from .train_image_vae import build as build_vae
from .train_vae import DEVICE, Optimizer, to_pixels

WIDTHS = (64, 64, 64, 64)
POSITIONS = 32
CLIPS = 3000
HEAVIEST = 30.0  # of a noise level's loss


@dataclass(frozen=True)
class Stage:
    """Part of the training, from rising to falling rate; `moving` clips and `still` single frames are in a batch.

    level: every noise level counts as much as it does in a loss on v, else as in one on the noise, which hardly sees
    what decides about the motion. `started`: share of the clips whose first frame is clean, as in image-to-video.
    """

    steps: int
    moving: int
    still: int
    rate: float
    level: bool
    started: float = 0.0
    warmup: int = 200


STAGES = (Stage(1600, 12, 40, 2e-3, False), Stage(2800, 10, 12, 1.5e-3, True))
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
    attached = Attached(unet, motion).__enter__()
    for stage in STAGES:
        train(stage, math.ceil(stage.steps * share), both, attached, scenes, latents, encode_text, rng)
    for part, path in (("unet.", unet_path), ("motion.", motion_path)):
        save(
            path,
            {key.removeprefix(part): value.half() for key, value in both.state_dict().items() if key.startswith(part)},
        )


def train(
    stage: Stage, steps: int, both: nn.Module, attached: Attached, scenes: list[Any], latents: Tensor,
    encode_text: Callable[[list[str]], Tensor], rng: Generator, *, schedule: Ddpm | None = None,
    describe: Callable[..., str] = world.describe, every: Callable[[dict[str, Tensor]], None] = lambda average: None,
) -> None:  # fmt: skip
    """Train both models in place; they end as the average over their last steps, which `every` 100 steps gets too."""
    average = {name: value.detach().clone() for name, value in both.state_dict().items()}
    optimizer, schedule, recent = Optimizer(both), schedule or Ddpm(), []
    for step in range(steps):
        losses = []
        for count, moving in ((stage.moving, True), (stage.still, False)):
            if not count:
                continue
            chosen = rng.integers(0, len(scenes), count)
            captions = [
                "" if rng.random() < UNCONDITIONAL else describe(scenes[i], rng, moving=moving) for i in chosen
            ]
            batch = latents[torch.from_numpy(chosen)].float()
            if not moving:
                frames = torch.from_numpy(rng.integers(0, batch.shape[1], count))
                batch = batch[torch.arange(count), frames].unsqueeze(1)
            loss, weighted = noise_loss(attached, schedule, batch.to(DEVICE), encode_text(captions), rng, stage)
            weighted.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step(stage.rate * min(1, (step + 1) / stage.warmup) * min(1, 0.01 + 2 * (1 - step / steps)))
        for name, value in both.state_dict().items():
            average[name].lerp_(value, 1 - min(0.998, step / (step + 10)))
        recent.append(losses)
        if step % 100 == 99:
            means = ", ".join(f"{value:.4f}" for value in np.mean(recent[-100:], 0))
            print(f"step {step + 1} of {steps}, loss of clips and of frames {means}", flush=True)
            every(average)
    both.load_state_dict(average)


def text_encoder_of(path: Path) -> nn.Module:
    """Captions to B n 128, remembered; n is 24, or the longest caption's, to which padding is added."""
    clip, known = text_encoder.load(path), {}

    @torch.inference_mode()
    def encode(captions: list[str]) -> Tensor:
        for caption in set(captions) - known.keys():
            known[caption] = clip.encode_from_tokens(clip.tokenize(caption))[0].float()
        return pad_sequence([known[caption] for caption in captions], batch_first=True)

    return lambda captions: encode(captions).clone().to(DEVICE)


@torch.no_grad()
def encode_clips(
    vae_path: Path, count: int, rng: Generator, sample: Callable[[Generator], Any] = world.sample
) -> tuple[list[Any], Tensor]:
    """Scenes, and the latents [N F 4 8 8] of their clips at half the frame rate, as the model has them."""
    vae = build_vae().to(DEVICE, memory_format=torch.channels_last)
    vae.load_state_dict(load_torch_file(str(vae_path)))
    scenes, latents = [], []
    while len(scenes) < count:
        clips = [sample(rng) for _ in range(16)]
        frames = to_pixels(np.stack([clip.video[::STRIDE] for clip in clips])).transpose(1, 2)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            encoded = vae.encode(frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)).unflatten(0, (16, -1))
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
    attached: Attached, schedule: Ddpm, latents: Tensor, context: Tensor, rng: Generator, stage: Stage
) -> tuple[Tensor, Tensor]:
    """Of latents B F 4 8 8, one noise level for all frames of a clip: as the model's loss is, and as it is trained."""
    count, frames = latents.shape[:2]
    t = torch.from_numpy(rng.integers(0, schedule.steps, count)).to(DEVICE)
    noise = torch.from_numpy(rng.standard_normal(latents.shape)).float().to(DEVICE)
    noisy, counted = schedule.add_noise(latents, noise, t), torch.ones(count, frames, device=DEVICE)
    if stage.started:
        started = torch.from_numpy(rng.random(count) < stage.started).to(DEVICE)
        noisy[started, 0], counted[started, 0] = latents[started, 0], 0
    attached.frames = frames
    with torch.autocast(DEVICE.type, torch.bfloat16):
        pred = attached.unet(
            noisy.flatten(0, 1), t.repeat_interleave(frames), context=context.repeat_interleave(frames, 0),
            transformer_options=dict(TRANSFORMER_OPTIONS),
        )  # fmt: skip
    errors = (pred.float().unflatten(0, (count, frames)) - noise).square().flatten(2).mean(2)
    each = (errors * counted).sum(1) / counted.sum(1)
    weight = (1 / schedule.alphas_bar.to(DEVICE)[t]).clamp(max=HEAVIEST) if stage.level else torch.ones_like(each)
    return each.mean(), (weight * each).mean()
