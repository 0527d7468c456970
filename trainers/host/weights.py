"""Reads model weights from files, merges LoRAs into them, and checks them for NaN."""

from pathlib import Path
from typing import Any

import comfy.lora
import comfy.quant_ops
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor, nn

from ...lora_io.file import load_names

SAFETENSORS = (".safetensors", ".sft")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a model file in any format that ComfyUI reads. Pickled code is never run.

    ValueError says in one sentence that the file is missing, damaged or not a model.
    """
    if path.suffix.lower() in SAFETENSORS:
        load_names(path)
    elif not path.is_file():
        raise ValueError(f"file {path}: not found")
    try:
        found = comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception:  # torch raises many types for a damaged pickle, and advises to turn off its safeguard
        raise ValueError(
            f"file {path}: not a readable model file. It is damaged, or holds more than tensors, which is never opened"
        ) from None
    entries = found.items() if isinstance(found, dict) else ()
    tensors = {key: value for key, value in entries if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"file {path}: holds no named tensors, expected a model file")
    return tensors


def merge_lora(model: Any, path: Path) -> None:
    """Merge a LoRA file at strength 1 into a private BaseModel. ValueError if a layer of it does not fit."""
    patches = lora_patches(model, path)
    merge(model, {key: [(1.0, patch, 1.0, None, None)] for key, patch in patches.items()})


def lora_patches(model: Any, path: Path) -> dict[str, Any]:
    """A LoRA file as ComfyUI patches, by parameter of a BaseModel. ValueError if a layer of it does not fit."""
    keys = comfy.lora.model_lora_keys_unet(model, {})
    patches = comfy.lora.load_lora(load_tensors(path), keys, log_missing=False)
    if not patches:
        raise ValueError(f"{path.name}: none of its layers fits {type(model).__name__}, expected a LoRA for this model")
    for key, patch in patches.items():
        if not isinstance(patch, LoRAAdapter):
            continue
        (up, down), shape = patch.weights[:2], model.get_parameter(key).shape
        if (len(up), down[0].numel()) != (shape[0], shape[1:].numel()):  # ComfyUI would only log it
            raise ValueError(
                f"{path.name}: made for a model of another width: {key} is {len(up)} x {down[0].numel()} in the file, "
                f"{shape[0]} x {shape[1:].numel()} in this model"
            )
        if not (up.isfinite().all() and down.isfinite().all()):
            raise ValueError(f"{path.name}: {key} holds NaN or infinite values")
    return patches


@torch.no_grad()
def merge(module: nn.Module, patches: dict[str, list]) -> None:
    """Apply ComfyUI's weight patches permanently. `patches` maps a parameter's name to its patches."""
    for key, patch in patches.items():
        parameter = module.get_parameter(key)
        quantised = isinstance(parameter, QuantizedTensor)
        weight = parameter.dequantize() if quantised else parameter.data
        merged = comfy.lora.calculate_weight(patch, weight.to(torch.float32, copy=True), key)
        if quantised:
            layer: Any = module.get_submodule(key.rpartition(".")[0])
            layer.set_weight(merged, seed=0)  # also if it is a new tensor
        else:
            parameter.data = merged.to(parameter.dtype)  # a new tensor: the file's may be mapped read-only


def require_finite(limits: dict[str, Tensor], what: str) -> None:
    """ValueError names the first parameter with NaN or infinite values, by its `extremes`. `what` is its file."""
    if name := not_finite(limits):
        raise ValueError(
            f"{what}: weight {name} of the model holds NaN or infinity, and nothing can be trained on it. Get the file "
            "again, or leave out the LoRA that was put on it"
        )


def not_finite(limits: dict[str, Tensor]) -> str:
    """The name of the first parameter with NaN or infinite values, by its `extremes`, or ""."""
    if not limits:
        return ""
    finite = torch.stack(list(limits.values())).isfinite().cpu()  # waits for the device only once
    return next((name for name, fine in zip(limits, finite.tolist(), strict=True) if not fine), "")


def extremes(module: nn.Module, name: str = "", recurse: bool = True) -> dict[str, Tensor]:
    """For each parameter a scalar that is finite exactly if all its values are. `name` is the module's own."""
    found = module.named_parameters(name, recurse)
    return {path: _extremes(parameter) for path, parameter in found if parameter.numel()}


def _extremes(parameter: Tensor) -> Tensor:
    values = parameter.dequantize() if isinstance(parameter, QuantizedTensor) else parameter.data
    if values.dtype.itemsize == 1:
        values = values.to(torch.bfloat16)
    low, high = values.aminmax()
    return (high / 2).float() - (low / 2).float()
