"""A run's private copy of a MODEL, outside ComfyUI's model manager."""

import logging
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.quant_ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import nn

from .layers import make_private
from .source import ModelSource
from .weights import not_finite, require_finite


def load_private(model: Any, device: torch.device) -> Any:
    """A frozen private BaseModel on `device`, with upstream LoRA patches merged. `model` is a MODEL or a ModelSource.

    ComfyUI's model manager does not manage it: it is never unloaded, and changes to it do not affect other workflows.
    Call it outside inference mode, in the run's thread.
    """
    assert not torch.is_inference_mode_enabled()
    if isinstance(model, ModelSource):
        private = model.reload()
    else:
        private = model.clone(disable_dynamic=True, force_deepcopy=True)
    module = private.model.diffusion_model
    for child in module.modules():
        _cast_stored(child)
    private.patch_model(device_to=device)
    require_finite(module, f"model: {Path(str(private.cached_patcher_init[1][0])).name}")
    module.requires_grad_(False)
    for child in module.modules():
        if isinstance(child, comfy.ops.CastWeightBiasOp):
            child.comfy_cast_weights = True
    make_private(module)
    assert not any(p.is_inference() for p in module.parameters())
    logging.info("Kinoloom: private copy of %s on %s", type(private.model).__name__, device)
    return private.model


def _cast_stored(layer: nn.Module) -> None:
    """Cast weights to the storage type that the loader chose, which ComfyUI leaves to its patcher with dynamic VRAM."""
    for name in ("weight", "bias"):
        dtype, parameter = layer.__dict__.get(f"{name}_comfy_model_dtype"), layer._parameters.get(name)
        if dtype is not None and parameter is not None and not isinstance(parameter, QuantizedTensor):
            parameter.data = parameter.data.to(dtype)


def narrow(private: Any, dtype: torch.dtype) -> None:
    """Cast wider matrices and 2-D kernels to `dtype` once, instead of in every forward. Results are the same.

    ValueError names a weight with values too large for `dtype`.
    """
    for layer in private.diffusion_model.modules():
        weight = layer._parameters.get("weight")
        plain = weight is not None and weight.ndim in (2, 4) and not isinstance(weight, QuantizedTensor)
        if plain and weight.dtype.itemsize >= dtype.itemsize:
            weight.data = weight.data.to(dtype)
    if dtype == torch.float16 and (name := not_finite(private.diffusion_model)):
        raise ValueError(f"precision='fp16': weight {name} of the model is too large for it. Choose bf16 or fp32")
