"""What a recipe needs of a frozen model."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .data import Row
from .transfer import to_device

PIXELS = 8  # of a latent's side


class Schedule(Protocol):
    """For samplers: `levels` from most noise to none (`shift` moves a flow's towards noise), and the start `x` at one.

    `model_input` makes of an x at a level what the model predicts from, and `slope` of the prediction dx / dlevel.
    """

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def levels(self, steps: int, shift: float) -> Tensor: ...
    def begin(self, noise: Tensor, level: float) -> Tensor: ...
    def model_input(self, x: Tensor, level: float) -> tuple[Tensor, Tensor]: ...
    def slope(self, x: Tensor, pred: Tensor, level: float) -> Tensor: ...


class Backbone(Protocol):
    """`lora_targets` maps a group of layers to a regular expression over module paths of `module`.

    `blocks` are what gradient checkpointing recomputes; they read `checkpointing` at every call. `prepare` brings a
    batch of stored columns to the device and the model's own latent space.
    """

    module: nn.Module
    blocks: list[nn.Module]
    schedule: Schedule
    lora_targets: dict[str, str]
    checkpointing: bool
    device: Any

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]: ...
    def predict(self, noisy_latents: Tensor, t: Tensor, batch: dict[str, Any]) -> Tensor: ...


def prepare_latents(batch: dict[str, Any], device: torch.device, process_latent_in: Any) -> dict[str, Any]:
    """Latents and mask to the device, latents from the VAE's space to the model's; all else stays on the CPU."""
    own = {**batch, "latents": process_latent_in(batch["latents"].float())}
    return {**own, **{name: to_device(own[name], device) for name in ("latents", "mask") if name in own}}


def prompts(batch: dict[str, Any], width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`prompt_embeds` [B, n, D] with the zeros that were cut off, where the text encoder pads with zeros."""
    prompt_embeds = batch["prompt_embeds"]
    if prompt_embeds.shape[-1] != width:
        raise ValueError(
            f"prompt_embeds: width {prompt_embeds.shape[-1]}, expected {width}. Was the data "
            "encoded with another model's text encoder?"
        )
    padding = int(batch["prompt_length"].max()) - prompt_embeds.shape[1] if "prompt_length" in batch else 0
    return nn.functional.pad(to_device(prompt_embeds, device, dtype), (0, 0, 0, padding))


def latent_size(width: int, height: int, side: int) -> tuple[int, int]:
    """(h, w) of latents. ValueError for a size in pixels that is no multiple of `side`."""
    for name, value in {"width": width, "height": height}.items():
        if value % side:
            raise ValueError(f"{name}={value}: expected a multiple of {side} for this model")
    return height // PIXELS, width // PIXELS


def check_channels(rows: Iterable[Row], channels: int) -> None:
    """ValueError if data was encoded with the VAE of another model."""
    for row in rows:
        if row.shape[0] != channels:
            raise ValueError(
                f"data: {row.name} has latents of {row.shape[0]} channels, expected {channels}: was it encoded with "
                "the VAE of another model?"
            )
