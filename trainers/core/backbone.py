"""The contract between a recipe and a frozen model."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .data import Row
from .placement import Placement
from .transfer import to_device

PIXELS = 8  # of a latent's side, for most VAEs


class Schedule(Protocol):
    """Noise: how it is added in training, and how a sampler takes it away.

    A sampler's levels are chosen by ComfyUI's `scheduler` from the rising `sigmas` (`shift` moves those of a flow
    towards noise). It starts from `begin` at the first level; `model_input` is what the model predicts from at a level,
    and `slope` the dx / dlevel that a prediction stands for.
    """

    scheduler: str

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def sigmas(self, shift: float) -> Tensor: ...
    def begin(self, noise: Tensor, level: float) -> Tensor: ...
    def model_input(self, x: Tensor, level: float) -> tuple[Tensor, Tensor]: ...
    def slope(self, x: Tensor, pred: Tensor, level: float) -> Tensor: ...


@dataclass(frozen=True)
class Grid:
    """The shapes that a model takes.

    channels: of latents. side: pixels, of which both sides of a video are multiples. text_width: of prompt_embeds, None
    for a model that reads no text. frame_step: frames of a latent frame after the first, which holds one. longest:
    latent frames, None for no limit. pixels: of a latent's side.
    """

    channels: int
    side: int
    text_width: int | None = None
    frame_step: int = 1
    longest: int | None = None
    pixels: int = PIXELS

    def latent_shape(self, width: int, height: int, frames: int) -> tuple[int, ...]:
        """(C, T, h, w) of a video. ValueError names the number that the model cannot have."""
        step = self.frame_step
        if (frames - 1) % step:
            below = (frames - 1) // step * step + 1
            raise ValueError(
                f"frames={frames}: expected {step}n+1 for this model; the nearest are {below} and {below + step}"
            )
        latent_frames = 1 + (frames - 1) // step
        if self.longest and latent_frames > self.longest:
            raise ValueError(f"frames={frames}: expected at most {self.longest} for this model")
        for name, value in {"width": width, "height": height}.items():
            if value % self.side:
                raise ValueError(f"{name}={value}: expected a multiple of {self.side} for this model")
        return (self.channels, latent_frames, height // self.pixels, width // self.pixels)

    def check(self, rows: Iterable[Row]) -> None:
        """ValueError if data was encoded with the VAE of another model, or is too long for this one."""
        for row in rows:
            channels, frames = row.shape[:2]
            if channels != self.channels:
                raise ValueError(
                    f"data: {row.name} has latents of {channels} channels, expected {self.channels}: was it encoded "
                    "with the VAE of another model?"
                )
            if self.longest and frames > self.longest:
                raise ValueError(
                    f"data: {row.name} has {frames} frames, but this model takes {self.longest} at most: lower "
                    "frames_per_clip where the clips are encoded"
                )


class Backbone(Protocol):
    """A frozen model on a private copy of a MODEL.

    `name` is written into files. `lora_targets` maps a group of layers to a regular expression over module paths of
    `module`. `blocks` are what gradient checkpointing recomputes; they read `placement` at every call.
    """

    name: ClassVar[str]
    module: nn.Module
    blocks: list[nn.Module]
    schedule: Schedule
    lora_targets: dict[str, str]
    placement: Placement
    device: torch.device

    def __init__(
        self, model: Any, carried: dict[str, Any], device: torch.device, dtype: torch.dtype, transformer_options: dict
    ) -> None:
        """`model` is a private comfy BaseModel, `carried` what rides on it, by name."""
        ...

    @staticmethod
    def grid(model: Any, carried: dict[str, nn.Module]) -> Grid:
        """ValueError unless `model` (a comfy BaseModel) is of this kind, and `carried` the modules that it needs."""
        ...

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of stored columns on the device, its latents in the model's own space."""
        ...

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: dict[str, Any]) -> Tensor: ...
    def unconditional(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The conditions that guidance goes away from, for a batch whose prompt is the negative one already."""
        ...


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
