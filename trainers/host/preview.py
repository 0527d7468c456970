"""Decodes samples into pictures, and computes the noise levels of ComfyUI's samplers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.samplers
import folder_paths
import torch
from comfy.taesd.taehv import TAEHV
from comfy.taesd.taesd import Decoder
from torch import Tensor, nn

from ..core.backbone import Schedule
from .layers import make_private
from .weights import load_tensors

TINY_DECODERS = "vae_approx"  # a model folder


@torch.no_grad()
def decode_preview(latent_format: Any, latents: Tensor) -> Tensor:
    """Decode latents [C, T, h, w] in the model's latent space to frames [F, H, W, 3] in 0..1.

    Uses the tiny decoder in models/vae_approx if there is one, else ComfyUI's linear map with one frame per latent.
    """
    files, name = folder_paths.get_filename_list(TINY_DECODERS), latent_format.taesd_decoder_name
    if file := next((file for file in files if name and file.startswith(name)), None):
        return _decode_tiny(folder_paths.get_full_path_or_raise(TINY_DECODERS, file), latent_format, latents)
    factors, bias = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    colours = torch.einsum("cthw,cr->trhw", latents, torch.tensor(factors).to(latents))
    colours = colours + (0.0 if bias is None else torch.tensor(bias).to(latents).view(3, 1, 1))
    large = nn.functional.interpolate(colours, scale_factor=latent_format.spacial_downscale_ratio, mode="bilinear")
    return (large / 2 + 0.5).clamp(0, 1).movedim(1, -1).cpu()


def _decode_tiny(path: str, latent_format: Any, latents: Tensor) -> Tensor:
    """Decode with TAESD, which takes single frames in the model's latent space, or TAEHV, which takes the VAE's."""
    tensors = load_tensors(Path(path))
    if latent_format.latent_dimensions == 2:
        tiny = Decoder(latent_channels=latent_format.latent_channels)
        tiny.load_state_dict(tensors)
        make_private(tiny.to(latents))
        frames = torch.cat([tiny(frame.unsqueeze(0)) for frame in latents.unbind(1)])
    else:
        tiny = TAEHV(latent_format.latent_channels)
        tiny.load_state_dict(tensors)
        make_private(tiny.to(latents))
        frames = tiny.decode(latent_format.process_out(latents.unsqueeze(0)))[0].movedim(1, 0)
    return frames.clamp(0, 1).movedim(1, -1).cpu()


def levels(schedule: Schedule, steps: int, shift: float) -> Tensor:
    """The noise levels of ComfyUI's sampler with `steps` steps, falling to 0: [steps + 1]."""
    sigmas = schedule.sigmas(shift)
    sampling = SimpleNamespace(sigmas=sigmas, sigma_min=sigmas[0], sigma_max=sigmas[-1])
    return comfy.samplers.calculate_sigmas(sampling, schedule.scheduler, steps)
