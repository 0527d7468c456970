"""Stable Diffusion 1.5's UNet at any width, in ComfyUI's own classes; its loaders only know the full width."""

from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils


def load(path: str | Path, disable_dynamic: bool = False) -> Any:
    """The MODEL in a file, which can be copied for training as those of ComfyUI's own loaders can."""
    patcher = build(path, comfy.supported_models.SD15, disable_dynamic)
    patcher.cached_patcher_init = (load, (str(path),))
    return patcher


def build(path: str | Path, kind: type, disable_dynamic: bool) -> Any:
    """A patcher of the model of a `comfy.supported_models` class, its widths read from the file."""
    weights = comfy.utils.load_torch_file(str(path), safe_load=True)
    form = kind(comfy.model_detection.detect_unet_config(weights, ""))
    dtype = comfy.utils.weight_dtype(weights)
    on = comfy.model_management.get_torch_device()
    form.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, on))
    model = form.get_model(weights, "", device=comfy.model_management.unet_offload_device())
    patcher_type = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_type(model, load_device=on, offload_device=comfy.model_management.unet_offload_device())
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    return patcher
