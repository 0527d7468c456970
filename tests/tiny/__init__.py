"""Writes tiny Wan and CLIP files that ComfyUI's own loaders accept: real architectures, a few small layers."""

import json
from pathlib import Path

import torch
from torch import Tensor

from . import svd as tiny_svd
from .sd import write_motion_module, write_unet
from .vae import write_wan_vae
from .weights import StateDict, Weights, save

SD_WIDTHS = (32, 64, 64, 64)
CLIP_WIDTH = 768  # core builds CLIP-L at this width whatever the file holds
LATENT_CHANNELS = 16
CLIP_VISION_WIDTH = 1280


def write_all(folder: Path) -> dict[str, Path]:
    """Write one model of each kind into folder/<ComfyUI model folder>/tiny_*.safetensors and return their paths."""
    files = {
        "diffusion_models": folder / "diffusion_models" / "tiny_wan.safetensors",
        "vae": folder / "vae" / "tiny_wan_vae.safetensors",
        "text_encoders": folder / "text_encoders" / "tiny_clip.safetensors",
    }
    write_wan(files["diffusion_models"])
    write_wan_vae(files["vae"])
    write_clip(files["text_encoders"])
    files["svd"] = folder / "diffusion_models" / "tiny_svd.safetensors"
    tiny_svd.write_unet(files["svd"], tiny_svd.TINY)
    files["shallow_svd"] = folder / "diffusion_models" / "shallow_svd.safetensors"
    tiny_svd.write_unet(files["shallow_svd"], tiny_svd.SHALLOW, blocks=1)
    files["sd"] = folder / "diffusion_models" / "tiny_sd.safetensors"
    files["motion"] = folder / "animatediff_models" / "tiny_motion.safetensors"
    write_unet(files["sd"], SD_WIDTHS)
    write_motion_module(files["motion"], SD_WIDTHS)
    return files


def write_wan(
    path: Path,
    *,
    dim: int = 128,
    blocks: int = 2,
    ffn: int = 256,
    text_dim: int = CLIP_WIDTH,
    num_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    in_dim: int | None = None,
    i2v: bool = False,
    seed: int = 0,
    same_blocks: bool = False,
) -> None:
    """Write a Wan 2.1 diffusion model for UNETLoader. With fp8 only the blocks' matrices are fp8.

    `same_blocks`: all blocks have the weights of the first, which writes a large model in seconds.
    """
    make = Weights(seed)
    tensors = _wan_embeddings(make, dim, text_dim, in_dim or (36 if i2v else LATENT_CHANNELS))
    block = _wan_block(make, dim, ffn, i2v)
    for i in range(blocks):
        own = block if same_blocks or i == 0 else _wan_block(make, dim, ffn, i2v)
        tensors |= {f"blocks.{i}.{name}": _cast(f"blocks.{name}", value, dtype).clone() for name, value in own.items()}
    tensors |= make.linear("head.head", LATENT_CHANNELS * 4, dim)
    tensors["head.modulation"] = make.normal(1, 2, dim, std=dim**-0.5)
    if i2v:
        tensors |= _wan_image_embeddings(make, dim)
    config = {"transformer": {"num_heads": num_heads, "text_dim": text_dim}}
    save(path, {name: _cast(name, value, dtype) for name, value in tensors.items()}, {"config": json.dumps(config)})


def write_clip(path: Path, *, seed: int = 0) -> None:
    """Write a CLIP-L text encoder for CLIPLoader, which takes it under the type "wan" too."""
    make = Weights(seed)
    width, prefix = CLIP_WIDTH, "text_model."
    tensors = {
        f"{prefix}embeddings.token_embedding.weight": make.normal(49408, width, std=1.0),
        f"{prefix}embeddings.position_embedding.weight": make.normal(77, width, std=0.1),
        **make.norm(f"{prefix}final_layer_norm", width),
        "text_projection.weight": make.normal(width, width, std=width**-0.5),
    }
    for i in range(12):
        layer = f"{prefix}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= make.linear(f"{layer}self_attn.{name}", width, width)
        tensors |= make.linear(f"{layer}mlp.fc1", 4 * width, width) | make.linear(f"{layer}mlp.fc2", width, 4 * width)
        tensors |= make.norm(f"{layer}layer_norm1", width) | make.norm(f"{layer}layer_norm2", width)
    save(path, {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()})


def _prefixed(prefix: str, tensors: StateDict) -> StateDict:
    return {prefix + name: value for name, value in tensors.items()}


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    is_block_matrix = name.startswith("blocks.") and value.ndim == 2
    if dtype.itemsize > 1 or is_block_matrix:
        return value.to(dtype)
    return value.to(torch.bfloat16)


def _wan_embeddings(make: Weights, dim: int, text_dim: int, in_dim: int) -> StateDict:
    return {
        "patch_embedding.weight": make.normal(dim, in_dim, 1, 2, 2, std=(in_dim * 4) ** -0.5),
        "patch_embedding.bias": make.normal(dim, std=0.02),
        **make.linear("text_embedding.0", dim, text_dim),
        **make.linear("text_embedding.2", dim, dim),
        **make.linear("time_embedding.0", dim, 256),
        **make.linear("time_embedding.2", dim, dim),
        **make.linear("time_projection.1", 6 * dim, dim),
    }


def _wan_image_embeddings(make: Weights, dim: int) -> StateDict:
    return {
        **make.norm("img_emb.proj.0", CLIP_VISION_WIDTH),
        **make.linear("img_emb.proj.1", CLIP_VISION_WIDTH, CLIP_VISION_WIDTH),
        **make.linear("img_emb.proj.3", dim, CLIP_VISION_WIDTH),
        **make.norm("img_emb.proj.4", dim),
    }


def _wan_block(make: Weights, dim: int, ffn: int, i2v: bool) -> StateDict:
    tensors = {"modulation": make.normal(1, 6, dim, std=dim**-0.5), **make.norm("norm3", dim)}
    linears = {"self_attn": ["q", "k", "v", "o"], "cross_attn": ["q", "k", "v", "o"]}
    norms = {"self_attn": ["norm_q", "norm_k"], "cross_attn": ["norm_q", "norm_k"]}
    if i2v:
        linears["cross_attn"] += ["k_img", "v_img"]
        norms["cross_attn"] += ["norm_k_img"]
    for attention in linears:
        for name in linears[attention]:
            tensors |= make.linear(f"{attention}.{name}", dim, dim)
        for name in norms[attention]:
            tensors[f"{attention}.{name}.weight"] = 1 + make.normal(dim, std=0.1)
    return tensors | make.linear("ffn.0", ffn, dim) | make.linear("ffn.2", dim, ffn)
