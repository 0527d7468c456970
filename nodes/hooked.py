"""Adds modules of the pack to a sampler's model: they load with it and are active only in its UNet's forward."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn


@dataclass(frozen=True)
class Forward:
    """One forward of a sampler's UNet, with frames [N, C, h, w] of one clip for each of `prompts`.

    A prompt is 0 for the positive and 1 for the negative conditioning.
    """

    unet: nn.Module
    x: Tensor
    options: dict[str, Any]

    @property
    def prompts(self) -> list[int]:
        return self.options.get("cond_or_uncond", [0])

    @property
    def frames(self) -> int:
        frames, rest = divmod(len(self.x), len(self.prompts))
        if rest:
            raise ValueError(
                f"a batch of {len(self.x)} images for {len(self.prompts)} prompts cannot be split into clips"
            )
        return frames


AtWork = Callable[[Forward], AbstractContextManager[dict[str, Any]]]


def hooked(model: Any, name: str, patchers: list[Any], field: str, at_work: AtWork) -> Any:
    """A copy of a MODEL with the patchers' modules, which replace modules of the same `name`.

    The modules are active inside `at_work(forward)`, whose value is the changed keyword arguments of the forward.
    ValueError names `field` if a module's `require_fit(unet)` refuses the model.
    """
    try:
        for patcher in patchers:
            patcher.model.require_fit(model.model.diffusion_model)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error

    def run(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = args[4] if len(args) > 4 else kwargs.get("transformer_options", {})
        with at_work(Forward(executor.class_obj, x, options)) as changed:
            return executor(x, *args, **{**kwargs, **changed})

    made = model.clone()
    made.set_additional_models(name, [patcher.clone() for patcher in patchers])
    made.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, name)
    made.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, name, run)
    return made


def as_loaded(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments with which ComfyUI creates a module of these weights: casting layers, storage type and device."""
    size = sum(tensor.numel() for tensor in tensors.values())
    return {
        "operations": comfy.ops.manual_cast,
        "dtype": comfy.model_management.unet_dtype(model_params=size, weight_dtype=comfy.utils.weight_dtype(tensors)),
        "device": comfy.model_management.unet_offload_device(),
    }


def patcher_of(module: nn.Module, kind: type = comfy.model_patcher.ModelPatcher) -> Any:
    """A patcher of this `kind`, which loads and patches the module as ComfyUI does with a diffusion model."""
    management = comfy.model_management
    return kind(module, load_device=management.get_torch_device(), offload_device=management.unet_offload_device())
