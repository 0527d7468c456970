"""Wan 2.1 text-to-video (1.3B and 14B): ComfyUI's own module, called as ComfyUI's sampler calls it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...conditions.columns import prompts
from ...core.backbone import Backbone, Grid, prepare_latents
from ...core.config import TrainConfig, knob
from ...core.placement import Placement
from ...core.schedules import FlowMatch
from ...host.private import Private
from ...host.source import file_of
from .wan_kinds import kind_of, require_wan21

LATENT_CHANNELS = 16


def _check_model(model: Any) -> None:
    """ValueError unless `model` (a comfy BaseModel) is a Wan text-to-video model."""
    plain, module = type(model).__name__ == "WAN21", model.diffusion_model
    if not (plain and module.model_type == "t2v" and module.in_dim == LATENT_CHANNELS):
        raise ValueError(
            f"model: found {kind_of(model)}, expected Wan 2.1 text-to-video with {LATENT_CHANNELS} input channels"
        )


@dataclass(frozen=True, kw_only=True)
class WanConfig(TrainConfig):
    """Options of every recipe for Wan."""

    wan_version: str = knob(
        "auto",
        "Set it to 2.1 if a 14B file is Wan 2.1 but neither its name nor its metadata says so. The experts of Wan 2.2, "
        "which have the same shapes, are refused.",
        choices=("auto", "2.1"),
        advanced=True,
        added=1,
    )

    def check_model(self, model: Any) -> None:
        """`model` is a MODEL."""
        require_wan21(*file_of(model), model.model.diffusion_model.dim, self.wan_version)


class Wan(Backbone):
    """Velocity predictor v(x_t, t, prompt_embeds): x_t [B, 16, T, h, w], t [B] in (0, 1), prompt_embeds [B, L, D]."""

    name = "wan"
    schedule = FlowMatch()
    lora_targets = {
        "all": r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02])",
        "attention": r"blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]",
    }

    def __init__(
        self, models: dict[str, Private], device: torch.device, dtype: torch.dtype, transformer_options: dict
    ) -> None:
        model = models["model"].model
        _check_model(model)
        self.module, self.width = model.diffusion_model, model.diffusion_model.text_dim
        self.blocks = list(model.diffusion_model.blocks)
        self.device, self.dtype = device, dtype
        self.process_latent_in = model.process_latent_in
        self.transformer_options = transformer_options
        self.placement = Placement()

    @staticmethod
    def grid(model: Any, carried: dict[str, nn.Module]) -> Grid:
        _check_model(model)
        return Grid(LATENT_CHANNELS, side=16, text_width=model.diffusion_model.text_dim, frame_step=4)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return prepare_latents(batch, self.device, self.process_latent_in)

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: dict[str, Any]) -> Tensor:
        """`batch` holds prompt_embeds [B, n, D] and, if the text encoder pads with zeros, prompt_length [B]."""
        return self.module(
            noisy_latents.to(self.dtype),
            FlowMatch.multiplier * t,
            context=prompts(batch, self.width, self.device, self.dtype),
            transformer_options=dict(self.transformer_options),
        )
