"""Layers of private models: differentiable, deaf to the interrupt, without copies of frozen weights."""

from collections.abc import Callable
from functools import cache
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from .rebound import Rebinder


class Rope(torch.autograd.Function):
    """ComfyUI's fused rotary embedding of x [B, L, n, d], which has no gradient of its own: the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, freqs: Tensor) -> Tensor:
        ctx.freqs = freqs
        return comfy.quant_ops.ck.apply_rope1(x, freqs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        inverse = ctx.freqs.transpose(-1, -2).contiguous()
        return comfy.quant_ops.ck.apply_rope1(grad.contiguous(), inverse), None


# Values that layers of a private model find under process-wide names of ComfyUI, which prompts beside a job read too. A
# job that polled the interrupt flag would swallow a Cancel meant for a prompt. Where `in_training` is not set, ComfyUI
# takes fused kernels that have no gradient. Rope is faster than the rotary embedding that ComfyUI uses in training.
REBINDER = Rebinder(
    "comfy",
    {
        "comfy.model_management": {"in_training": True, "throw_exception_if_processing_interrupted": lambda: None},
        "comfy.ldm.flux.math": {"apply_rope1": Rope.apply},
    },
)
OPERATIONS = comfy.ops.manual_cast  # layers that cast their weights to the input's type


def make_private(module: nn.Module) -> None:
    """Have all layers of a module, of ComfyUI's classes, find the values of REBINDER."""
    for child in module.modules():
        child.__class__ = _private_class(type(child))


@cache
def _private_class(cls: type) -> type:
    private = REBINDER.cls(cls)
    linear = issubclass(cls, nn.Linear) or cls.__name__ == "Linear"  # quantised ones are no nn.Linear
    if private is cls or not linear:
        return private
    return type(cls.__name__, (private,), {"forward": _frozen_linear(private.forward)})


def _frozen_linear(host_forward: Callable) -> Callable:
    """Linear that keeps no cast or dequantised copy of a frozen weight for backward; other cases go the host's way."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.weight.requires_grad or self.weight_function or getattr(self, "pre_quant_scale", None) is not None:
            return host_forward(self, x)
        weight, bias = self.weight, self.bias
        if isinstance(weight, QuantizedTensor) or weight.dtype != x.dtype or weight.device != x.device:
            flat = CastLinear.apply(
                x.flatten(0, -2), weight, bias
            )  # 2-D: no view, which layers could not add to in place
            return flat.view(*x.shape[:-1], -1)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x))

    return forward


class CastLinear(torch.autograd.Function):
    """x W^T + b with a frozen W in another form (fp8, fp16, quantised): cast for the product, and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # a frozen parameter, alive anyway; save_for_backward would only add a version check
        return nn.functional.linear(x, _plain(weight, x), None if bias is None else bias.to(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ _plain(ctx.weight, grad), None, None


def _plain(weight: Tensor, like: Tensor) -> Tensor:
    return (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).to(like)
