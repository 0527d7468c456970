"""Asynchronous copies to the training device."""

import torch
from torch import Tensor

PINNED = ("cuda",)  # devices that read pinned CPU memory directly


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on `device`, cast there."""
    if tensor.device.type == "cpu" and device.type in PINNED:
        tensor = tensor.contiguous().pin_memory().to(device, non_blocking=True)  # expanded ones cannot be pinned
    return tensor.to(device, dtype)
