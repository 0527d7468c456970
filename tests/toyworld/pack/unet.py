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
    weights = comfy.utils.load_torch_file(str(path), safe_load=True)
    found = comfy.model_detection.detect_unet_config(weights, "")
    form = comfy.supported_models.SD15(found)
    dtype = comfy.utils.weight_dtype(weights)
    on = comfy.model_management.get_torch_device()
    form.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, on))
    model = form.get_model(weights, "", device=comfy.model_management.unet_offload_device())
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=on, offload_device=comfy.model_management.unet_offload_device())
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load, (str(path),))
    return patcher
