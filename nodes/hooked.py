"""Modules of the pack in a sampler's model: they load with it, and are at work in its UNet's forward and only in it."""

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
    """One forward of a sampler's UNet: frames [N, C, h, w] of a clip for each of `prompts`, one clip after the other.

    A prompt is 0 if it is the positive one and 1 if it is the negative one.
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
                f"a batch of {len(self.x)} images for {len(self.prompts)} prompts cannot be parted into clips"
            )
        return frames


AtWork = Callable[[Forward], AbstractContextManager[dict[str, Any]]]


def hooked(model: Any, name: str, patcher: Any, field: str, at_work: AtWork) -> Any:
    """A copy of a MODEL with the patcher's module in it, in the place of one that it had under `name`.

    The module is at work within `at_work(forward)`, whose value has the keyword arguments of the forward that change.
    ValueError names `field` if the module's `require_fit(unet)` refuses the model.
    """
    try:
        patcher.model.require_fit(model.model.diffusion_model)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error

    def run(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = args[4] if len(args) > 4 else kwargs.get("transformer_options", {})
        with at_work(Forward(executor.class_obj, x, options)) as changed:
            return executor(x, *args, **{**kwargs, **changed})

    made = model.clone()
    made.set_additional_models(name, [patcher.clone()])
    made.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, name)
    made.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, name, run)
    return made


def as_loaded(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """How ComfyUI makes a module with these weights: its layers cast to the input, its type, and where it waits."""
    size = sum(tensor.numel() for tensor in tensors.values())
    return {
        "operations": comfy.ops.manual_cast,
        "dtype": comfy.model_management.unet_dtype(model_params=size, weight_dtype=comfy.utils.weight_dtype(tensors)),
        "device": comfy.model_management.unet_offload_device(),
    }


def patcher_of(module: nn.Module, kind: type = comfy.model_patcher.ModelPatcher) -> Any:
    """A patcher of this `kind` that loads the module and patches it as ComfyUI does a diffusion model."""
    management = comfy.model_management
    return kind(module, load_device=management.get_torch_device(), offload_device=management.unet_offload_device())
