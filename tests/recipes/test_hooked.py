"""Modules of the pack in a sampler's model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from kinoloom.nodes.hooked import Forward, as_loaded, hooked, patcher_of
from torch import Tensor, nn

WIDTH = 3


class Unet(nn.Module):
    """A UNet with the arguments of ComfyUI's, which records its calls."""

    def forward(self, x: Tensor, timesteps: Any, context: Any, y: Any, control: Any, transformer_options: Any, **extra: Any) -> Any:
        return x + sum(hook(x) for hook in getattr(self, "hooks", [])), extra


class Added(nn.Module):
    """A module that fits UNets of its width and adds a number to their output."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(number))

    def require_fit(self, unet: Unet) -> None:
        if unet.width != WIDTH:
            raise ValueError(f"made for {WIDTH} channels, this model has {unet.width}")


def sampler_model(width: int = WIDTH) -> ModelPatcher:
    model = nn.Module()
    model.diffusion_model = Unet()
    model.diffusion_model.width = width
    return patcher_of(model)


def put(model: ModelPatcher, name: str, number: float, seen: list[Forward]) -> ModelPatcher:
    added = patcher_of(Added(number))

    @contextmanager
    def at_work(forward: Forward) -> Iterator[dict[str, Any]]:
        seen.append(forward)
        forward.unet.hooks = [*getattr(forward.unet, "hooks", []), lambda x: added.model.number]
        yield {name: forward.frames}
        forward.unet.hooks = forward.unet.hooks[:-1]

    return hooked(model, name, [added], "field", at_work)


def forward(model: ModelPatcher, frames: int, prompts: list[int], by_name: bool) -> tuple[Tensor, dict]:
    """The model's UNet called as samplers call it, with its options by place or by name."""
    options = {"cond_or_uncond": prompts}
    wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, {"wrappers": model.wrappers})
    unet = model.model.diffusion_model
    executor = WrapperExecutor.new_class_executor(unet.forward, unet, wrappers)
    given = {"transformer_options": options} if by_name else {}
    return executor.execute(torch.zeros(frames, 1), None, None, None, None, *([] if by_name else [options]), **given)


@pytest.mark.parametrize("by_name", [False, True])
def test_modules_are_at_work_together_and_one_takes_the_place_of_its_own_kind(by_name: bool) -> None:
    model, seen = sampler_model(), []
    one = put(put(model, "motion", 1.0, seen), "boxes", 10.0, seen)
    other = put(one, "motion", 2.0, seen)
    for patched, sum_ in ((model, 0), (one, 11), (other, 12)):
        value, extra = forward(patched, 6, [1, 0], by_name)
        assert value.unique().tolist() == [sum_]
        assert extra == ({"motion": 3, "boxes": 3} if sum_ else {})
        loaded = [module.model.number.item() for module in patched.get_additional_models()]
        assert sum(loaded) == sum_ and len(loaded) == (2 if sum_ else 0), "they load with the model"
    assert all(found.prompts == [1, 0] and found.unet is model.model.diffusion_model for found in seen)


def test_a_batch_that_holds_no_whole_clips_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 7 images for 2 prompts cannot be split into clips"):
        forward(put(sampler_model(), "motion", 1.0, []), 7, [0, 1], False)


def test_a_model_that_a_module_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="^field: made for 3 channels, this model has 5$"):
        put(sampler_model(5), "motion", 1.0, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_module_is_made_as_comfyui_makes_one_of_its_weights(dtype: torch.dtype) -> None:
    made = as_loaded({"a.weight": torch.zeros(4, 4, dtype=dtype), "b.weight": torch.zeros(2, 4, dtype=dtype)})
    layer = made.pop("operations").Linear(4, 2, **made)
    assert layer.weight.dtype == torch.float32, "on the CPU"
    assert layer(torch.zeros(1, 4, dtype=torch.float64)).dtype == torch.float64, "cast to what comes in"
