"""A run's private copy of a MODEL, outside ComfyUI's model manager."""

import logging
from dataclasses import dataclass
from typing import Any

import comfy.ops
import comfy.quant_ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import nn

from ..core.placement import AS_IT_IS, Placement
from .layers import make_private
from .source import Carried, ModelSource, path_of
from .text import make_trainable
from .weights import extremes, not_finite, require_finite


@dataclass(frozen=True)
class Private:
    """A run's own copy of a MODEL: the frozen BaseModel, and the files of the models that ride on it, by name."""

    model: Any
    carried: dict[str, Carried]


def load_private(model: Any, device: torch.device, placement: Placement = AS_IT_IS) -> Any:
    """A frozen private BaseModel on `device`, with upstream LoRA patches merged. `model` is a MODEL or a ModelSource.

    Of the model patcher of a CLIP, or its source, a text encoder, as it is in the file whatever `placement` says.
    Layers move to the device one by one. It never holds more than the weights as `placement` stores them and one layer
    as it was in the file. ComfyUI's model manager does not manage the copy: it is never unloaded, and changes to it do
    not affect other workflows. Call it outside inference mode, in the run's thread.
    """
    assert not torch.is_inference_mode_enabled()
    private = model.reload() if isinstance(model, ModelSource) else _loaded_again(model)
    if private.is_clip:
        placement, module, prefix = AS_IT_IS, private.model, ""
        make_trainable(module)
    else:
        module, prefix = private.model.diffusion_model, "diffusion_model."
    limits: dict[str, torch.Tensor] = {}
    for name, layer in module.named_modules():
        _cast_stored(layer)
        _bring(private, layer, f"{prefix}{name}", device)
        limits |= extremes(layer, name, recurse=False)
        if placement.stored:
            _narrow(layer, placement.stored)
    private.model.to(device)  # what is not of the layers, such as the noise schedule
    require_finite(limits, f"{'clip' if private.is_clip else 'model'}: {path_of(private).name}")
    if placement.stored == torch.float16:
        _require_fp16(module)
    module.requires_grad_(False)
    for child in module.modules():
        if isinstance(child, comfy.ops.CastWeightBiasOp):
            child.comfy_cast_weights, child.comfy_force_cast_weights = True, private.force_cast_weights
    make_private(module)
    assert not any(p.is_inference() for p in module.parameters())
    logging.info("Kinoloom: private copy of %s on %s", type(private.model).__name__, device)
    return private.model


def _loaded_again(model: Any) -> Any:
    """A MODEL or a CLIP's model patcher, on weights of its own.

    ComfyUI's own way would put a text encoder into its list of loaded models.
    """
    if not model.is_clip:
        return model.clone(disable_dynamic=True, force_deepcopy=True)
    private = ModelSource.of(model).load()
    private.patches = model.patches
    return private


def _cast_stored(layer: nn.Module) -> None:
    """Cast weights to the storage type that the loader chose, which ComfyUI leaves to its patcher with dynamic VRAM."""
    for name in ("weight", "bias"):
        dtype, parameter = layer.__dict__.get(f"{name}_comfy_model_dtype"), layer._parameters.get(name)
        if dtype is not None and parameter is not None and not isinstance(parameter, QuantizedTensor):
            parameter.data = parameter.data.to(dtype)


def _bring(private: Any, layer: nn.Module, name: str, device: torch.device) -> None:
    """Move a layer's own tensors to the device, and merge the patches of the MODEL `private` into them there.

    ComfyUI leaves out patches of layers that hold other layers with weights, and so does this.
    """
    names = [own for own, _ in layer.named_parameters()]
    if not any("." in own for own in names):
        for own in names:
            private.patch_weight_to_device(f"{name}.{own}", device_to=device)
    layer._apply(lambda tensor: tensor.to(device), recurse=False)


def _narrow(layer: nn.Module, dtype: torch.dtype) -> None:
    """Cast a wider matrix or 2-D kernel to `dtype` once, instead of in every forward. Results are the same."""
    weight = layer._parameters.get("weight")
    if weight is None or weight.ndim not in (2, 4) or isinstance(weight, QuantizedTensor):
        return
    if weight.dtype.itemsize >= dtype.itemsize:
        weight.data = weight.data.to(dtype)


def _require_fp16(module: nn.Module) -> None:
    """ValueError names a weight with values too large for fp16, in which the module is stored."""
    if name := not_finite(extremes(module)):
        raise ValueError(f"precision='fp16': weight {name} of the model is too large for it. Choose bf16 or fp32")
