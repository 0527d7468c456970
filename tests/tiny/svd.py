"""Writes Stable Video Diffusion models with random weights, as narrow as asked; no path in them is switched off."""

from pathlib import Path

import torch
from torch import Tensor

from . import sd as tiny_sd
from .weights import StateDict, Weights, save

NARROW = (320, 320, 320, 320)  # the least that ComfyUI's own loaders take for SVD
TINY = (64, 64, 64, 64)  # one head at every level
SHALLOW = (64, 64)  # with one block a level, for the many tests in which the number of layers says nothing
CONTEXT = 1024
IDS = 768  # three numbers of 256 channels each: frame rate, motion bucket, noise augmentation
VISION_WIDTH, VISION_LAYERS, PATCHES, PATCH = 1280, 32, 257, 14  # ViT-H, the only size that core builds


def write_unet(
    path: Path,
    widths: tuple[int, ...],
    *,
    context: int = CONTEXT,
    blocks: int = tiny_sd.BLOCKS,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A UNet of `widths` channels per level, multiples of the first and of 64; ComfyUI knows it if that is 320."""
    save(path, _cast(unet(Weights(seed), widths, context, blocks), dtype))


def unet(make: Weights, widths: tuple[int, ...], context: int, blocks: int = tiny_sd.BLOCKS) -> StateDict:
    """Stable Diffusion's UNet with 8 channels in, three numbers beside the time, and temporal layers in every block."""
    base, time = widths[0], 4 * widths[0]
    tensors = {
        **tiny_sd.unet(make, widths, context, blocks),
        **tiny_sd._conv(make, "input_blocks.0.0", base, 2 * tiny_sd.LATENT_CHANNELS, 3),
        **make.linear("label_emb.0.0", time, IDS),
        **make.linear("label_emb.0.2", time, time),
    }
    for key, value in list(tensors.items()):
        if key.endswith((".proj_in.weight", ".proj_out.weight")):
            tensors[key] = value[..., 0, 0]
        elif key.endswith(".in_layers.2.weight"):
            tensors |= _temporal_res_block(make, key.removesuffix(".in_layers.2.weight"), len(value), time)
        elif key.endswith(".transformer_blocks.0.norm1.weight"):
            name = key.removesuffix(".transformer_blocks.0.norm1.weight")
            tensors |= _temporal_transformer(make, name, len(value), context)
    return tensors


def write_checkpoint(path: Path, widths: tuple[int, ...] = NARROW, seed: int = 0) -> None:
    """A checkpoint for ImageOnlyCheckpointLoader: such a UNet and a tiny image VAE in fp16, ViT-H in fp8 (1.1 GB).

    Core takes SVD's own VAE, the one with the temporal decoder, at its full width only.
    """
    make = Weights(seed)
    vision = _prefixed("conditioner.embedders.0.open_clip.model.visual.", _vision(make, torch.float8_e4m3fn))
    net = _prefixed("model.diffusion_model.", unet(make, widths, CONTEXT))
    vae = _prefixed("first_stage_model.", tiny_sd.tiny_autoencoder(make))
    save(path, {**_cast({**net, **vae}, torch.float16), **vision})


def _temporal_res_block(make: Weights, name: str, width: int, time: int) -> StateDict:
    block = f"{name}.time_stack"
    return {
        **make.norm(f"{block}.in_layers.0", width),
        **_temporal_conv(make, f"{block}.in_layers.2", width),
        **make.linear(f"{block}.emb_layers.1", width, time),
        **make.norm(f"{block}.out_layers.0", width),
        **_temporal_conv(make, f"{block}.out_layers.3", width),
        f"{name}.time_mixer.mix_factor": make.normal(1, std=0.5),
    }


def _temporal_conv(make: Weights, name: str, width: int) -> StateDict:
    weight = make.normal(width, width, 3, 1, 1, std=(3 * width) ** -0.5)
    return {f"{name}.weight": weight, f"{name}.bias": make.normal(width, std=0.02)}


def _temporal_transformer(make: Weights, name: str, width: int, context: int) -> StateDict:
    block = f"{name}.time_stack.0"
    tensors = {
        **make.linear(f"{name}.time_pos_embed.0", 4 * width, width),
        **make.linear(f"{name}.time_pos_embed.2", width, 4 * width),
        f"{name}.time_mixer.mix_factor": make.normal(1, std=0.5),
        **tiny_sd._feed_forward(make, f"{block}.ff_in", width),
        **tiny_sd._feed_forward(make, f"{block}.ff", width),
        **tiny_sd._attention(make, f"{block}.attn1", width, width),
        **tiny_sd._attention(make, f"{block}.attn2", width, context),
    }
    for norm in ("norm_in", "norm1", "norm2", "norm3"):
        tensors |= make.norm(f"{block}.{norm}", width)
    return tensors


def _vision(make: Weights, dtype: torch.dtype) -> StateDict:
    """OpenCLIP's ViT-H in its own names, its layers all alike, for nobody needs to wait for different ones."""
    width = VISION_WIDTH
    layer = {
        **make.norm("ln_1", width),
        **make.norm("ln_2", width),
        "attn.in_proj_weight": make.normal(3 * width, width, std=width**-0.5),
        "attn.in_proj_bias": make.normal(3 * width, std=0.02),
        **make.linear("attn.out_proj", width, width),
        **make.linear("mlp.c_fc", 4 * width, width),
        **make.linear("mlp.c_proj", width, 4 * width),
    }
    tensors = {
        "class_embedding": make.normal(width, std=width**-0.5),
        "positional_embedding": make.normal(PATCHES, width, std=width**-0.5),
        "conv1.weight": make.normal(width, 3, PATCH, PATCH, std=(3 * PATCH * PATCH) ** -0.5),
        **make.norm("ln_pre", width),
        **make.norm("ln_post", width),
        "proj": make.normal(width, CONTEXT, std=width**-0.5),
    }
    for i in range(VISION_LAYERS):
        tensors |= _prefixed(f"transformer.resblocks.{i}.", layer)
    return _cast(tensors, dtype)


def _prefixed(prefix: str, tensors: StateDict) -> StateDict:
    return {prefix + name: value for name, value in tensors.items()}


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> StateDict:
    return {name: value.to(dtype) for name, value in tensors.items()}
