"""Merges several LoRAs into one."""

import torch
from torch import Tensor


def merge(loras: list[tuple[dict[str, Tensor], float]], rank: int = 0) -> dict[str, Tensor]:
    """The sum of strength * up @ down per layer, as `<module path>.lora_down/lora_up.weight` in fp32.

    rank=0 concatenates the factors, which is exact. Any other rank gives the best approximation of that rank.
    """
    paths = dict.fromkeys(key.partition(".lora_")[0] for tensors, _ in loras for key in tensors)
    merged = {}
    for path in paths:
        down, up = f"{path}.lora_down.weight", f"{path}.lora_up.weight"
        having = [(tensors, strength) for tensors, strength in loras if down in tensors]
        downs = torch.cat([tensors[down].float() for tensors, _ in having])
        ups = torch.cat([tensors[up].float() * strength for tensors, strength in having], dim=1)
        if rank and rank < len(downs):
            downs, ups = _truncated(downs, ups, rank)
        merged[down], merged[up] = downs, ups
    return merged


def _truncated(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of up @ down with `rank`, by SVD of the small factors: the full matrix is never made."""
    outer, inner = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(outer.R @ inner.R.T)
    root = s[:rank].sqrt()
    return root.unsqueeze(1) * (v[:rank] @ inner.Q.T), outer.Q @ u[:, :rank] * root
