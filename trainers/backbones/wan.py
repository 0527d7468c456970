"""Wan 2.1 text-to-video (1.3B and 14B shapes): ComfyUI's own module, called the way its sampler calls it."""

from typing import Any

import torch
from torch import Tensor, nn

from ..core.noise import FlowMatch

LATENT_CHANNELS = 16


def check(model: Any) -> None:
    """ValueError unless `model` (a comfy BaseModel) is a Wan text-to-video model of 16 latent channels."""
    module = getattr(model, "diffusion_model", None)
    kind = type(module).__name__
    if kind != "WanModel":
        raise ValueError(f"model: found {type(model).__name__} ({kind}), expected a Wan 2.1 text-to-video model")
    if module.model_type != "t2v" or module.in_dim != LATENT_CHANNELS:
        raise ValueError(
            f"model: found a Wan {module.model_type} model with {module.in_dim} input channels, expected "
            f"Wan 2.1 text-to-video with {LATENT_CHANNELS}"
        )


class Wan:
    """Velocity predictor v(x_t, t, prompt_embeds): x_t [B, 16, T, h, w], t [B] in (0, 1), prompt_embeds [B, L, D]."""

    schedule = FlowMatch()
    lora_targets = {
        "all": r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02])",
        "attention": r"blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]",
    }

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype, transformer_options: dict) -> None:
        """`model` is a private comfy BaseModel; `transformer_options` go with every forward, such as the attention."""
        check(model)
        self.module: nn.Module = model.diffusion_model
        self.blocks = list(self.module.blocks)
        self.device, self.dtype = device, dtype
        self.process_latent_in = model.process_latent_in
        self.transformer_options = transformer_options
        self.checkpointing = False

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Latents and mask to the device, latents from the VAE's space to the model's; prompts stay on the CPU."""
        moved = {name: batch[name].to(self.device) for name in ("latents", "mask") if name in batch}
        return {**batch, **moved, "latents": self.process_latent_in(moved["latents"].float())}

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: dict[str, Any]) -> Tensor:
        """`batch` holds prompt_embeds [B, n, D] and, where the text encoder pads with zeros, prompt_length [B]."""
        prompt_embeds = batch["prompt_embeds"].to(self.device, self.dtype)
        if prompt_embeds.shape[-1] != self.module.text_dim:
            raise ValueError(
                f"prompt_embeds: width {prompt_embeds.shape[-1]}, expected {self.module.text_dim}. Was the data "
                "encoded with another model's text encoder?"
            )
        padding = int(batch["prompt_length"].max()) - prompt_embeds.shape[1] if "prompt_length" in batch else 0
        return self.module(
            noisy_latents.to(self.dtype),
            FlowMatch.multiplier * t,
            context=nn.functional.pad(prompt_embeds, (0, 0, 0, padding)),
            transformer_options=dict(self.transformer_options),
        )


load = Wan
