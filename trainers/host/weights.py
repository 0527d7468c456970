"""Weights of models: read from files, merged with LoRAs, checked."""

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
    """The named tensors of a model file of any format that ComfyUI reads; nothing else in it is opened.

    ValueError says in one sentence that the file is missing, damaged or none of a model.
    """
    if path.suffix.lower() in SAFETENSORS:
        load_names(path)
    elif not path.is_file():
        raise ValueError(f"file {path}: not found")
    try:
        found = comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception:  # torch raises whatever a damaged pickle leads to, with advice to open it without the safeguard
        raise ValueError(
            f"file {path}: not a readable model file. It is damaged, or holds more than tensors, which is never opened"
        ) from None
    entries = found.items() if isinstance(found, dict) else ()
    tensors = {key: value for key, value in entries if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"file {path}: holds no named tensors, expected a model file")
    return tensors


def merge_lora(model: Any, path: Path) -> None:
    """Add a LoRA file, at strength 1, to the weights of a private BaseModel. ValueError if it holds other layers."""
    patches = lora_patches(model, path)
    merge(model, {key: [(1.0, patch, 1.0, None, None)] for key, patch in patches.items()})


def lora_patches(model: Any, path: Path) -> dict[str, Any]:
    """A LoRA file as ComfyUI's patches by parameter of a BaseModel. ValueError if a layer of it does not fit."""
    keys = comfy.lora.model_lora_keys_unet(model, {})
    patches = comfy.lora.load_lora(load_tensors(path), keys, log_missing=False)
    if not patches:
        raise ValueError(f"{path.name}: no layer of it fits {type(model).__name__}, expected a LoRA for this model")
    for key, patch in patches.items():
        shape = model.get_parameter(key).shape
        up, down = patch.weights[:2] if isinstance(patch, LoRAAdapter) else (None, None)
        if up is not None and (len(up), down[0].numel()) != (shape[0], shape[1:].numel()):  # which core only logs
            raise ValueError(
                f"{path.name}: made for a model of another width: {key} is {len(up)} x {down[0].numel()} in the file, "
                f"{shape[0]} x {shape[1:].numel()} in this model"
            )
        if up is not None and not (up.isfinite().all() and down.isfinite().all()):
            raise ValueError(f"{path.name}: {key} holds values that are no numbers (NaN or infinite)")
    return patches


@torch.no_grad()
def merge(module: nn.Module, patches: dict[str, list]) -> None:
    """Apply ComfyUI's weight patches, by parameter name, for good."""
    for key, patch in patches.items():
        parameter = module.get_parameter(key)
        quantised = isinstance(parameter, QuantizedTensor)
        weight = parameter.dequantize() if quantised else parameter.data
        merged = comfy.lora.calculate_weight(patch, weight.to(torch.float32, copy=True), key)
        if quantised:
            module.get_submodule(key.rpartition(".")[0]).set_weight(merged, seed=0)  # a new weight too
        else:
            parameter.data = merged.to(parameter.dtype)  # a tensor of its own: the file's may be mapped read-only


def require_finite(module: nn.Module, what: str) -> None:
    """ValueError names the first parameter of a module that holds NaN or infinite values; `what` is its file."""
    if name := not_finite(module):
        raise ValueError(
            f"{what}: weight {name} of the model holds NaN or infinity, and nothing can be trained on it. Get the file "
            "again, or leave out the LoRA that was put on it"
        )


def not_finite(module: nn.Module) -> str:
    """The name of the first parameter that holds NaN or infinite values; "" if none does."""
    extremes = {name: _extremes(parameter) for name, parameter in module.named_parameters() if parameter.numel()}
    if not extremes:
        return ""
    finite = torch.stack(list(extremes.values())).isfinite().cpu()  # one wait for the device
    return next((name for name, fine in zip(extremes, finite.tolist(), strict=True) if not fine), "")


def _extremes(parameter: Tensor) -> Tensor:
    """A number that is finite if all values are."""
    values = parameter.dequantize() if isinstance(parameter, QuantizedTensor) else parameter.data
    if values.dtype.itemsize == 1:
        values = values.to(torch.bfloat16)
    low, high = values.aminmax()
    return (high / 2).float() - (low / 2).float()
