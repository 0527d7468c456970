"""Layers of private models: they have gradients, ignore the interrupt flag and keep no copies of frozen weights."""

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
    """ComfyUI's fused rotary embedding of x [B, L, n, d], with the gradient it lacks: the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, freqs: Tensor) -> Tensor:
        ctx.freqs = freqs
        return comfy.quant_ops.ck.apply_rope1(x, freqs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        inverse = ctx.freqs.transpose(-1, -2).contiguous()
        return comfy.quant_ops.ck.apply_rope1(grad.contiguous(), inverse), None


# ComfyUI keeps some state in process-wide names that prompts read during a run too. Layers of a private model get these
# values instead. A run that polled the interrupt flag would swallow a Cancel meant for a prompt. Without `in_training`
# ComfyUI uses fused kernels that have no gradient. Rope is faster than the rotary embedding ComfyUI uses in training.
REBINDER = Rebinder(
    "comfy",
    {
        "comfy.model_management": {"in_training": True, "throw_exception_if_processing_interrupted": lambda: None},
        "comfy.ldm.flux.math": {"apply_rope1": Rope.apply},
    },
)
OPERATIONS = comfy.ops.manual_cast  # layers that cast their weights to the input's type


def make_private(module: nn.Module) -> None:
    """Change the class of every ComfyUI layer in a module to one that sees the values of REBINDER."""
    for child in module.modules():
        kind: type = type(child)
        child.__class__ = _private_class(kind)


@cache
def _private_class(cls: type) -> type:
    private: Any = REBINDER.cls(cls)
    linear = issubclass(cls, nn.Linear) or cls.__name__ == "Linear"  # ComfyUI's quantised Linear is not an nn.Linear
    if private is cls or not linear:
        return private
    return type(cls.__name__, (private,), {"forward": _frozen_linear(private.forward)})


def _frozen_linear(host_forward: Callable) -> Callable:
    """A Linear forward that keeps no cast or dequantised copy of a frozen weight. Other cases use `host_forward`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.weight.requires_grad or self.weight_function or getattr(self, "pre_quant_scale", None) is not None:
            return host_forward(self, x)
        weight, bias = self.weight, self.bias
        if isinstance(weight, QuantizedTensor) or weight.dtype != x.dtype or weight.device != x.device:
            flat = CastLinear.apply(
                x.flatten(0, -2), weight, bias
            )  # 2-D, so that the result is not a view, which layers could not change in place
            return flat.view(*x.shape[:-1], -1)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x))

    return forward


class CastLinear(torch.autograd.Function):
    """x W^T + b with a frozen W in another number format (fp8, fp16, quantised), cast in both forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # a frozen parameter lives as long as the model, so save_for_backward is not needed
        return nn.functional.linear(x, _plain(weight, x), None if bias is None else bias.to(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ _plain(ctx.weight, grad), None, None


def _plain(weight: Tensor, like: Tensor) -> Tensor:
    return (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).to(like)
