"""The contract between a recipe and a frozen model."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .data import Row
from .placement import Placement
from .transfer import to_device

PIXELS = 8  # side of a latent pixel in pixels, for most VAEs


class Schedule(Protocol):
    """A noise schedule: adds noise in training, and converts predictions for Euler's method in sampling.

    ComfyUI's `scheduler` chooses a sampler's levels from the ascending `sigmas`; `shift` moves a flow's towards noise.
    `begin` is the first x, `model_input` the model's input at a level, `slope` the dx / dlevel of a prediction.
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

    channels: latent channels. side: width and height in pixels are multiples of it. text_width: width of prompt_embeds,
    None for a model without text. frame_step: frames in each latent frame after the first, which holds one. longest:
    upper limit of latent frames, or None, and limited_by the part of the model with that limit, for errors. pixels:
    side of a latent pixel in pixels.
    """

    channels: int
    side: int
    text_width: int | None = None
    frame_step: int = 1
    longest: int | None = None
    limited_by: str = "model"
    pixels: int = PIXELS

    def latent_shape(self, width: int, height: int, frames: int) -> tuple[int, ...]:
        """The latent shape (C, T, h, w) of a video. ValueError names a number that the model does not support."""
        step = self.frame_step
        if (frames - 1) % step:
            below = (frames - 1) // step * step + 1
            raise ValueError(
                f"frames={frames}: expected {step}n+1 for this model; the nearest are {below} and {below + step}"
            )
        latent_frames = 1 + (frames - 1) // step
        if self.longest and latent_frames > self.longest:
            raise ValueError(f"frames={frames}: expected at most {self.longest} for this {self.limited_by}")
        for name, value in {"width": width, "height": height}.items():
            if value % self.side:
                raise ValueError(f"{name}={value}: expected a multiple of {self.side} for this model")
        return (self.channels, latent_frames, height // self.pixels, width // self.pixels)

    def of_cut_rows(self, frames: int) -> "Grid":
        """The grid of rows from which a run cuts `frames` frames: of any length. 0 frames means that rows stay whole.

        ValueError if the model does not take as many frames.
        """
        if not frames:
            return self
        self.latent_shape(self.side, self.side, frames)
        return replace(self, longest=None)

    def check(self, rows: Iterable[Row]) -> None:
        """ValueError if data was encoded with another model's VAE, or is too long for this model."""
        for row in rows:
            self.check_channels(row, "data")
            frames = row.shape[1]
            if self.longest and frames > self.longest:
                raise ValueError(
                    f"data: {row.name} has {frames} frames, but this {self.limited_by} takes {self.longest} at most: "
                    "lower frames_per_clip where the clips are encoded"
                )

    def check_channels(self, row: Row, what: str) -> None:
        """ValueError, which begins with `what`, if a row was encoded with another model's VAE."""
        channels = row.shape[0]
        if channels != self.channels:
            raise ValueError(
                f"{what}: {row.name} has latents of {channels} channels, expected {self.channels}: was it encoded "
                "with the VAE of another model?"
            )


class Backbone(Protocol):
    """A frozen model on a private copy of a MODEL.

    `name` is saved in files. `lora_targets` maps a group of layers to a regular expression over module paths.
    `blocks` are the modules that gradient checkpointing recomputes; they read `placement` at every call.
    """

    name: ClassVar[str]
    module: nn.Module
    blocks: list[nn.Module]
    schedule: Schedule
    lora_targets: dict[str, str]
    placement: Placement
    device: torch.device

    def __init__(
        self, models: dict[str, Any], device: torch.device, dtype: torch.dtype, transformer_options: dict
    ) -> None:
        """models: private copies of the MODELs that the recipe takes; transformer_options: of every forward."""
        ...

    @staticmethod
    def grid(model: Any, carried: dict[str, nn.Module]) -> Grid:
        """The model's grid. ValueError unless `model` (a comfy BaseModel) is of this kind and `carried` complete."""
        ...

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of stored columns on the device, with latents in the model's latent space."""
        ...

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: dict[str, Any]) -> Tensor: ...
    def unconditional(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The unconditional batch for guidance, from a batch that already has the negative prompt.

        A backbone with other conditions than text overrides it.
        """
        return batch


def prepare_latents(batch: dict[str, Any], device: torch.device, process_latent_in: Any) -> dict[str, Any]:
    """Copy latents and mask to the device, and latents to the model's latent space. Other columns stay on the CPU."""
    own = {**batch, "latents": process_latent_in(batch["latents"].float())}
    return {**own, **{name: to_device(own[name], device) for name in ("latents", "mask") if name in own}}
