"""Stable Diffusion 1.5 with AnimateDiff's motion modules: ComfyUI's UNet, and the modules hooked into it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...conditions.columns import prompts
from ...core.backbone import Backbone, Grid, prepare_latents
from ...core.placement import Placement
from ...core.schedules import Ddpm
from ...host.private import Private
from ...host.weights import extremes, merge_lora, require_finite
from .motion_module import PART, Attached, MotionModule, MotionModules, read, require_layout

LATENT_CHANNELS = 4
CHECKPOINTED = ("ResBlock", "SpatialTransformer")
ATTENTION = r"transformer_blocks\.0\.attention_blocks\.\d\.to_(q|k|v|out\.0)"
FEED_FORWARD = r"transformer_blocks\.0\.ff\.net\.(0\.proj|2)"


def check_model(model: Any) -> None:
    """ValueError unless `model` (a comfy BaseModel) is a Stable Diffusion 1.5 model."""
    kind = model.model_type.name
    if kind != "EPS":
        raise ValueError(f"model: predicts {kind}, expected a Stable Diffusion 1.5 model that predicts the noise (EPS)")
    if (channels := model.diffusion_model.in_channels) != LATENT_CHANNELS:
        raise ValueError(f"model: takes {channels} channels, as inpainting models do, expected {LATENT_CHANNELS}")
    try:
        require_layout(model.diffusion_model)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


def text_width(model: Any) -> int:
    return model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_k.weight.shape[1]


class AnimateDiff(Backbone):
    """Noise predictor eps(x_t, t, prompt_embeds): x_t [B, 4, F, h, w], t [B] in 0..999, prompt_embeds [B, n, D].

    Module paths are `unet.<ComfyUI's path>` and `motion.<path in the motion module's file>`. A clip of one frame skips
    the motion modules.
    """

    name = "animatediff"
    schedule = Ddpm()
    lora_targets = {
        "spatial": r"unet\.\w+\.\d+(\.\d+)?\.(proj_in|proj_out|transformer_blocks\.0\.(attn[12]\.to_(q|k|v|out\.0)"
        r"|ff\.net\.(0\.proj|2)))",
        "spatial_self": r"unet\..*\.transformer_blocks\.0\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))",
        "temporal": rf"motion\..*\.({ATTENTION}|{FEED_FORWARD})",
        "temporal_attention": rf"motion\..*\.{ATTENTION}",
    }

    def __init__(
        self, models: dict[str, Private], device: torch.device, dtype: torch.dtype, transformer_options: dict
    ) -> None:
        model = models["model"].model
        check_model(model)
        self.model, self.unet = model, model.diffusion_model
        carried = models["model"].carried[PART]
        self.layout, tensors = read(carried.state())
        motion = MotionModules(self.layout, device="meta").load(tensors)
        carried.patch(motion)
        motion.to(device, dtype).requires_grad_(False)
        require_finite(extremes(motion), f"motion_module: {Path(carried.path).name}")
        self.module: nn.Module = nn.ModuleDict({"unet": self.unet, "motion": motion})
        self.blocks = [
            m for m in self.module.modules() if type(m).__name__ in CHECKPOINTED or isinstance(m, MotionModule)
        ]
        self.attached = Attached(self.unet, motion).__enter__()  # never left: the model is the run's private copy
        self.device, self.dtype = device, dtype
        self.width = text_width(model)
        self.transformer_options = transformer_options
        self.placement = Placement()

    @staticmethod
    def grid(model: Any, carried: dict[str, nn.Module]) -> Grid:
        check_model(model)
        motion = carried.get(PART)
        if not isinstance(motion, MotionModules):
            raise ValueError("model: has no motion module. Put Apply Motion Module before the train node")
        width, longest = text_width(model), motion.layout.positions
        return Grid(LATENT_CHANNELS, side=8, text_width=width, longest=longest, limited_by="motion module")

    def merge(self, lora_file: Any) -> None:
        """Merge a LoRA for SD1.5, such as AnimateDiff's domain adapter, into the frozen UNet."""
        merge_lora(self.model, lora_file)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return prepare_latents(batch, self.device, self.model.process_latent_in)

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: dict[str, Any]) -> Tensor:
        """`batch` holds prompt_embeds [B, n, D]. Frames are folded into the batch dimension, clip by clip."""
        self.attached.frames = frames = noisy_latents.shape[2]
        context = prompts(batch, self.width, self.device, self.dtype)
        noise = self.unet(
            noisy_latents.transpose(1, 2).flatten(0, 1).to(self.dtype),
            t.repeat_interleave(frames),
            context=context.repeat_interleave(frames, 0),
            transformer_options=dict(self.transformer_options),
        )
        return noise.unflatten(0, (-1, frames)).transpose(1, 2)
