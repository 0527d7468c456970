"""What a recipe needs of a frozen model."""

from typing import Any, Protocol

from torch import Tensor, nn


class Schedule(Protocol):
    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def target(self, latents: Tensor, noise: Tensor) -> Tensor: ...


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
