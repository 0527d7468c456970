"""Copies to the device that trains, for which the CPU does not wait."""

import torch
from torch import Tensor

PINNED = ("cuda",)  # kinds of devices that read memory of the CPU by themselves, if it is pinned


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The same numbers on `device`, cast there."""
    if tensor.device.type == "cpu" and device.type in PINNED:
        tensor = tensor.contiguous().pin_memory().to(device, non_blocking=True)  # expanded ones cannot be pinned
    return tensor.to(device, dtype)
