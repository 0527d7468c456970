"""Attention that has a gradient, in place of the kernel that ComfyUI was started with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def sdpa(
    original: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *args: Any,
    mask: Tensor | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Attention for q, k, v [B, L, heads * d], or [B, heads, L, d] with `skip_reshape`.

    Replaces ComfyUI's kernel, because flash and sage attention have no backward pass there.
    """
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask) if mask is not None else _attend(q, k, v)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. On a CPU two matrix products in bf16 are three times faster than torch's kernel."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] * k.shape[-2] <= CPU_ATTENTION_ENTRIES:
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1) @ v
    parts = zip(*(x.split(LARGEST_BATCH) for x in (q, k, v)), strict=True)
    attended = [nn.functional.scaled_dot_product_attention(*part) for part in parts]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


LARGEST_BATCH = 1 << 13  # with up to 8 heads; CUDA's kernels take at most 65535 pairs of batch entry and head
CPU_ATTENTION_ENTRIES = 1 << 22  # largest score matrix of one head kept for backward; longer clips are split
TRANSFORMER_OPTIONS = {"optimized_attention_override": sdpa}
