"""Trains the toy world's text-to-video model and its text encoder together, in ComfyUI's own Wan and UMT5 architectures."""

import json
import math
from pathlib import Path

import comfy.model_management
import comfy.ops
import numpy as np
import torch
import torch.nn.functional as F
from comfy.latent_formats import Wan21
from comfy.ldm.wan.model import WanModel
from comfy.utils import load_torch_file
from kinoloom.trainers.host.attention import TRANSFORMER_OPTIONS
from numpy.random import Generator
from tiny.weights import save
from torch import Tensor, nn

from . import train_vae, world
from .pack.text_encoder import WIDTH, ToyEncoder, tokenize
from .train_vae import DEVICE

DIM, BLOCKS, FFN, HEADS = 256, 5, 768, 4
CLIPS, STEPS, BATCH = 5000, 6500, 32
UNCONDITIONAL = 0.1  # captions replaced by the empty one, for classifier-free guidance
FRAMES_ONLY = 0.15  # batches of single frames, which Wan is trained on too


def main(vae_path: Path, model_path: Path, text_path: Path, share: float) -> None:
    """Encode clips with the VAE, train on them and write both models."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    scenes, latents, frames = encode_clips(vae_path, math.ceil(CLIPS * share), rng)
    model, text = build_model(), build_text_encoder()
    parameters = dict([*prefixed("model", model), *prefixed("text", text)])
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and (".blocks." in name or ".block." in name)]
    others = [p for p in parameters.values() if all(p is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    average = {name: value.detach().clone() for name, value in parameters.items()}
    steps, recent = math.ceil(STEPS * share), []
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 200) * min(1, 0.01 + 2 * (1 - step / steps))
        still = rng.random() < FRAMES_ONLY
        chosen = rng.integers(0, len(scenes), BATCH)
        captions = [
            "" if rng.random() < UNCONDITIONAL else world.describe(scenes[i], rng, moving=not still) for i in chosen
        ]
        batch = (frames if still else latents)[torch.from_numpy(chosen)].to(DEVICE).float()
        with torch.autograd.graph.allow_mutation_on_saved_tensors():  # UMT5's residuals are added in place
            loss = flow_loss(model, batch, encode_text(text, captions), rng)
            loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, value in parameters.items():
            average[name].lerp_(value.detach(), 1 - min(0.998, step / (step + 10)))
        if not still:
            recent.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1} of {steps}, loss {np.mean(recent[-100:]):.4f}", flush=True)
    write(average, model_path, text_path)


def prefixed(prefix: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f"{prefix}.{name}", value) for name, value in module.named_parameters()]


def write(average: dict[str, Tensor], model_path: Path, text_path: Path) -> None:
    config = json.dumps({"transformer": {"num_heads": HEADS, "text_dim": average["text.shared.weight"].shape[1]}})
    for prefix, path, metadata in (("model.", model_path, {"config": config}), ("text.", text_path, None)):
        part = {name.removeprefix(prefix): v.half() for name, v in average.items() if name.startswith(prefix)}
        save(path, part, metadata)


@torch.no_grad()
def encode_clips(vae_path: Path, count: int, rng: Generator) -> tuple[list[world.Scene], Tensor, Tensor]:
    """Scenes, latents [N 16 5 8 8] of their clips and [N 16 1 8 8] of one frame of each, normalised as the model has them."""
    vae = train_vae.build().to(DEVICE)
    vae.load_state_dict(load_torch_file(str(vae_path)))
    process_in, scenes, latents, frames = Wan21().process_in, [], [], []
    while len(scenes) < count:
        clips = [world.sample(rng) for _ in range(16)]
        video = np.stack([clip.video for clip in clips])
        picked = video[np.arange(16), rng.integers(0, world.FRAMES, 16)][:, None]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            encoded = [process_in(vae.encode(train_vae.to_pixels(x)).float()) for x in (video, picked)]
        latents.append(encoded[0].half().cpu())
        frames.append(encoded[1].half().cpu())
        scenes += [clip.scene for clip in clips]
    print(f"{len(scenes)} clips encoded", flush=True)
    return scenes, torch.cat(latents), torch.cat(frames)


def build_model() -> nn.Module:
    comfy.model_management.in_training = True  # without it Wan's rotary embedding has no gradient
    model = WanModel(
        dim=DIM, ffn_dim=FFN, num_heads=HEADS, num_layers=BLOCKS, text_dim=WIDTH, dtype=torch.float32,
        device=DEVICE, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    initialise(model)
    for block in model.blocks:
        nn.init.normal_(block.modulation, std=0.02)
        nn.init.zeros_(block.self_attn.o.weight)
        nn.init.zeros_(block.cross_attn.o.weight)
        nn.init.zeros_(block.ffn[2].weight)
    nn.init.normal_(model.head.modulation, std=0.02)
    nn.init.zeros_(model.head.head.weight)
    return model.requires_grad_(True)


def build_text_encoder() -> nn.Module:
    text = ToyEncoder(device=DEVICE, dtype=torch.float32)
    initialise(text.transformer)
    nn.init.normal_(text.transformer.shared.weight, std=1.0)
    return text.transformer.requires_grad_(True)


def initialise(module: nn.Module) -> None:
    """ComfyUI's layers are made without values."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.normal_(layer.weight, std=math.prod(layer.weight.shape[1:]) ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.1)
        elif hasattr(layer, "weight") and layer.weight is not None and layer.weight.ndim == 1:
            nn.init.ones_(layer.weight)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)


def encode_text(text: nn.Module, captions: list[str]) -> Tensor:
    """B 24 128: what the pack's CLIP gives for these captions, with a gradient."""
    tokens, mask = (torch.tensor(rows, device=DEVICE) for rows in tokenize(captions))
    encoded = text(tokens, mask)[0]
    return encoded * mask.unsqueeze(-1)


def flow_loss(model: nn.Module, latents: Tensor, context: Tensor, rng: Generator) -> Tensor:
    """Flow matching: mostly at middling noise (logit-normal), where shapes are decided, the rest at ComfyUI's shift of 3."""
    spread, high = rng.standard_normal(len(latents)), rng.random(len(latents))
    sigma = np.where(rng.random(len(latents)) < 0.8, 1 / (1 + np.exp(-spread)), 3 * high / (1 + 2 * high))
    sigma = torch.from_numpy(sigma).float().to(DEVICE)
    noise = torch.from_numpy(rng.standard_normal(latents.shape)).float().to(DEVICE)
    mixed = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        velocity = model(mixed, sigma * 1000, context, transformer_options=dict(TRANSFORMER_OPTIONS))
    return F.mse_loss(velocity.float(), noise - latents)
