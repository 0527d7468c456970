"""Writes Stable Diffusion 1.5 models with random weights, as narrow as asked, and motion modules that fit them."""

import math
from pathlib import Path

import torch

from .weights import StateDict, Weights, save

LEVELS, BLOCKS = 4, 2
LATENT_CHANNELS = 4
NARROW = (320, 320, 320, 320)  # the least that ComfyUI's own loaders take for SD1.5
DOWN_MODULES, UP_MODULES = 2, 3


def write_unet(path: Path, widths: tuple[int, ...], *, context: int = 768, seed: int = 0) -> None:
    """A UNet of `widths` channels per level, multiples of the first; ComfyUI's loaders know it if that is 320."""
    save(path, unet(Weights(seed), widths, context))


def unet(make: Weights, widths: tuple[int, ...], context: int, blocks: int = BLOCKS) -> StateDict:
    """`blocks` of them go down at every level; the deepest level has no transformers, but for the one in the middle."""
    base, time, deepest = widths[0], 4 * widths[0], len(widths) - 1
    tensors = {
        **make.linear("time_embed.0", time, base),
        **make.linear("time_embed.2", time, time),
        **_conv(make, "input_blocks.0.0", base, LATENT_CHANNELS, 3),
    }
    skips, width, index = [base], base, 1
    for level, out in enumerate(widths):
        for _ in range(blocks):
            tensors |= _res_block(make, f"input_blocks.{index}.0", out, width, time)
            if level < deepest:
                tensors |= _transformer(make, f"input_blocks.{index}.1", out, context)
            width = out
            skips.append(width)
            index += 1
        if level < deepest:
            tensors |= _conv(make, f"input_blocks.{index}.0.op", width, width, 3)
            skips.append(width)
            index += 1
    tensors |= _res_block(make, "middle_block.0", width, width, time)
    tensors |= _transformer(make, "middle_block.1", width, context)
    tensors |= _res_block(make, "middle_block.2", width, width, time)
    for index in range(len(widths) * (blocks + 1)):
        level, place = deepest - index // (blocks + 1), index % (blocks + 1)
        name, out = f"output_blocks.{index}", widths[level]
        tensors |= _res_block(make, f"{name}.0", out, width + skips.pop(), time)
        if level < deepest:
            tensors |= _transformer(make, f"{name}.1", out, context)
        if level and place == blocks:
            tensors |= _conv(make, f"{name}.{1 if level == deepest else 2}.conv", out, out, 3)
        width = out
    return {**tensors, **make.norm("out.0", width), **_conv(make, "out.2", LATENT_CHANNELS, width, 3)}


def write_motion_module(
    path: Path, widths: tuple[int, ...], *, positions: int | None = 32, mid: bool = False, seed: int = 0
) -> None:
    """A motion module: v3 as it stands, v1 with 24 positions, v2 with `mid`, AnimateLCM with no positions."""
    make = Weights(seed)
    places = [(f"down_blocks.{b}", m, widths[b]) for b in range(LEVELS) for m in range(DOWN_MODULES)]
    places += [(f"up_blocks.{b}", m, widths[-1 - b]) for b in range(LEVELS) for m in range(UP_MODULES)]
    places += [("mid_block", 0, widths[-1])] * mid
    tensors = {}
    for block, module, width in places:
        tensors |= _motion_module(make, f"{block}.motion_modules.{module}.temporal_transformer", width, positions)
    save(path, tensors)


def write_checkpoint(path: Path, clip: Path, widths: tuple[int, ...] = NARROW, seed: int = 0) -> None:
    """A checkpoint for CheckpointLoaderSimple: such a UNet in fp16, the text encoder of the file `clip`, a tiny VAE."""
    from safetensors.torch import load_file

    make = Weights(seed)
    tensors = {f"model.diffusion_model.{key}": value for key, value in unet(make, widths, 768).items()}
    text = {f"cond_stage_model.transformer.{key}": value for key, value in load_file(clip).items()}
    vae = {f"first_stage_model.{key}": value for key, value in tiny_autoencoder(make).items()}
    save(path, {key: value.half() for key, value in {**tensors, **text, **vae}.items()})


def tiny_autoencoder(make: Weights) -> StateDict:
    """Random weights in the shape of TAESD, which ComfyUI accepts as a VAE: 4 channels, an eighth of the size."""
    width = 64
    tensors = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    layers = {
        "taesd_encoder": [("in", 3), "block", *["down", "block", "block", "block"] * 3, ("out", LATENT_CHANNELS)],
        "taesd_decoder": [
            None, ("in", LATENT_CHANNELS), None, *["block", "block", "block", None, "up"] * 3, "block", ("out", 3),
        ],
    }  # fmt: skip
    for part, kinds in layers.items():
        for index, kind in enumerate(kinds):
            name = f"{part}.{index}"
            if kind == "block":
                for place in (0, 2, 4):
                    tensors |= _conv(make, f"{name}.conv.{place}", width, width, 3)
            elif kind in ("down", "up"):
                tensors[f"{name}.weight"] = _conv(make, name, width, width, 3)[f"{name}.weight"]
            elif kind:
                end, channels = kind
                tensors |= _conv(make, name, *((width, channels) if end == "in" else (channels, width)), 3)
    return tensors


def _conv(make: Weights, name: str, out: int, inputs: int, size: int) -> StateDict:
    weight = make.normal(out, inputs, size, size, std=1 / math.sqrt(inputs * size * size))
    return {f"{name}.weight": weight, f"{name}.bias": make.normal(out, std=0.02)}


def _res_block(make: Weights, name: str, out: int, inputs: int, time: int) -> StateDict:
    tensors = {
        **make.norm(f"{name}.in_layers.0", inputs),
        **_conv(make, f"{name}.in_layers.2", out, inputs, 3),
        **make.linear(f"{name}.emb_layers.1", out, time),
        **make.norm(f"{name}.out_layers.0", out),
        **_conv(make, f"{name}.out_layers.3", out, out, 3),
    }
    return tensors if out == inputs else {**tensors, **_conv(make, f"{name}.skip_connection", out, inputs, 1)}


def _transformer(make: Weights, name: str, width: int, context: int) -> StateDict:
    block = f"{name}.transformer_blocks.0"
    tensors = {
        **make.norm(f"{name}.norm", width),
        **_conv(make, f"{name}.proj_in", width, width, 1),
        **_conv(make, f"{name}.proj_out", width, width, 1),
        **_feed_forward(make, f"{block}.ff", width),
    }
    for norm in ("norm1", "norm2", "norm3"):
        tensors |= make.norm(f"{block}.{norm}", width)
    return (
        tensors | _attention(make, f"{block}.attn1", width, width) | _attention(make, f"{block}.attn2", width, context)
    )


def _attention(make: Weights, name: str, width: int, context: int) -> StateDict:
    tensors = make.linear(f"{name}.to_out.0", width, width)
    for layer, inputs in (("to_q", width), ("to_k", context), ("to_v", context)):
        tensors[f"{name}.{layer}.weight"] = make.normal(width, inputs, std=inputs**-0.5)
    return tensors


def _feed_forward(make: Weights, name: str, width: int) -> StateDict:
    return {**make.linear(f"{name}.net.0.proj", 8 * width, width), **make.linear(f"{name}.net.2", width, 4 * width)}


def _motion_module(make: Weights, name: str, width: int, positions: int | None) -> StateDict:
    block = f"{name}.transformer_blocks.0"
    tensors = {
        **make.norm(f"{name}.norm", width),
        **make.linear(f"{name}.proj_in", width, width),
        **make.linear(f"{name}.proj_out", width, width),
        **_feed_forward(make, f"{block}.ff", width),
        **make.norm(f"{block}.ff_norm", width),
    }
    for index in range(2):
        attention = f"{block}.attention_blocks.{index}"
        tensors |= make.norm(f"{block}.norms.{index}", width) | _attention(make, attention, width, width)
        if positions:
            angles = torch.arange(positions).unsqueeze(1) * 10000 ** (-torch.arange(0, width, 2) / width)
            table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
            tensors[f"{attention}.pos_encoder.pe"] = table.unsqueeze(0)
    return tensors
