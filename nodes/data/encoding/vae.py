"""Encodes pixels to latents with a ComfyUI VAE."""

from typing import Any

from torch import Tensor


def frame_step(vae: Any) -> int:
    """Frames per latent frame after the first: 4 for Wan, 1 for an image VAE."""
    return vae.temporal_compression_decode() or 1


def encode_pixels(vae: Any, frames: Tensor) -> Tensor:
    """Encode frames [F, H, W, 3] in 0..1 to the VAE's unscaled latents [C, T, h, w]."""
    latents = vae.encode(frames)
    if not latents.isfinite().all():
        raise ValueError(f"vae: encodes into NaN or infinite values, in {vae.vae_dtype}: expected bf16 or fp32")
    return (latents[0] if latents.ndim == 5 else latents.movedim(0, 1)).float().cpu()
