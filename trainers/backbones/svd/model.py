"""Stable Video Diffusion, image to video: ComfyUI's own UNet, called as ComfyUI's sampler calls it."""

from typing import Any

import torch
from torch import Tensor, nn

from ...core.backbone import Backbone, Grid, prepare_latents
from ...core.placement import Placement
from ...core.schedules import Edm
from ...core.transfer import to_device
from ...host.private import Private

LATENT_CHANNELS = 4
SIDE = 64  # pixels: VAE 8 x three halvings in the UNet
CHECKPOINTED = ("VideoResBlock", "SpatialVideoTransformer")
# Cross-attention has a single token, so its queries and keys have no effect and never get a gradient.
ATTENTION = r"\.0\.(attn1\.to_(q|k|v|out\.0)|attn2\.to_(v|out\.0))"


def check_model(model: Any) -> None:
    """ValueError unless `model` (a comfy BaseModel) is Stable Video Diffusion."""
    if (kind := type(model).__name__) != "SVD_img2vid":
        raise ValueError(f"model: found {kind}, expected Stable Video Diffusion (SVD_img2vid)")


class Svd(Backbone):
    """v predictor v(x_t, sigma, image): x_t [B, 4, T, h, w], sigma [B] > 0.

    A batch holds CLIP vision's image_embeds [B, 1024], first_frame [B, 4, h, w] as unscaled VAE latents, and fps,
    motion_bucket and augmentation [B].
    """

    name = "svd"
    schedule = Edm()
    lora_targets = {
        "all": rf".*\.(transformer_blocks|time_stack){ATTENTION}",
        "spatial": rf".*\.transformer_blocks{ATTENTION}",
        "temporal": rf".*\.time_stack{ATTENTION}",
    }

    def __init__(
        self, models: dict[str, Private], device: torch.device, dtype: torch.dtype, transformer_options: dict
    ) -> None:
        model = models["model"].model
        check_model(model)
        self.module: nn.Module = model.diffusion_model
        self.blocks = [module for module in self.module.modules() if type(module).__name__ in CHECKPOINTED]
        self.device, self.dtype = device, dtype
        self.embed, self.process_latent_in = model.embedder, model.process_latent_in
        self.transformer_options = transformer_options
        self.placement = Placement()
        for name, module in self.module.named_modules():
            if type(module).__name__ == "SpatialVideoTransformer":
                module.register_forward_hook(_contiguous_output)
            elif name.endswith(".time_stack.0.attn2"):
                module.register_forward_pre_hook(_contiguous_context, with_kwargs=True)

    @staticmethod
    def grid(model: Any, carried: dict[str, nn.Module]) -> Grid:
        check_model(model)
        return Grid(LATENT_CHANNELS, SIDE)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return prepare_latents(batch, self.device, self.process_latent_in)

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: dict[str, Any]) -> Tensor:
        """Frames are folded into the batch dimension, clip by clip. The first frame's latents are not scaled."""
        frames = noisy_latents.shape[2]
        first_frame = to_device(batch["first_frame"], self.device, noisy_latents.dtype)
        first_frames = first_frame.unsqueeze(2).expand_as(noisy_latents)
        x = torch.cat([self.schedule.scale(noisy_latents, t), first_frames], dim=1)
        ids = torch.stack([batch["fps"] - 1, batch["motion_bucket"], batch["augmentation"]], dim=1)
        ids = self.embed(to_device(ids.flatten(), self.device)).view(len(ids), -1)
        image_embeds = to_device(batch["image_embeds"], self.device, self.dtype)
        v = self.module(
            x.transpose(1, 2).flatten(0, 1).to(self.dtype),
            (0.25 * t.log()).repeat_interleave(frames),
            context=image_embeds.unsqueeze(1).repeat_interleave(frames, 0),
            y=ids.to(self.dtype).repeat_interleave(frames, 0),
            num_video_frames=frames,
            transformer_options=dict(self.transformer_options),
        )
        return v.unflatten(0, (-1, frames)).transpose(1, 2)

    def unconditional(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the first frame's embedding and latents set to zero."""
        return {**batch, **{name: torch.zeros_like(batch[name]) for name in ("image_embeds", "first_frame")}}


def _contiguous_output(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    """Make the output contiguous. ComfyUI's is channels-last, with which group norms take ten times as long."""
    return out.contiguous()


def _contiguous_context(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Copy the context, which is one token expanded to all positions; a linear layer would copy its weight instead."""
    return args, {**kwargs, "context": kwargs["context"].contiguous()}
