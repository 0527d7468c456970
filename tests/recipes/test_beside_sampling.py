"""Nodes of ComfyUI and patches of second packs on the MODEL that Apply I2V Adapters makes, in a sampler."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_hypernetwork import load_hypernetwork_patch
from kinoloom.nodes.adapters.apply import ApplyI2vAdapters
from kinoloom.nodes.adapters.loading import Loaded
from kinoloom.nodes.animatediff import modules as motion
from kinoloom.trainers.conditions.adapter import Query
from torch import Tensor

from ..rows import TEXT_WIDTH, random
from ..runs import load_animatediff
from .test_adapters import backbone  # noqa: F401
from .test_beside_adapters import BLOCK, ImageTokens
from .test_recorded_maps import SIZE, applied, make_loaded, record, sample  # noqa: F401

BOTH_CFGS = pytest.mark.parametrize("cfg", [1.0, 7.5])


def apply(model: Any, *adapters: Loaded) -> Any:
    with torch.inference_mode():
        return ApplyI2vAdapters.execute(model, adapters, "residual").args[0]


@pytest.fixture(scope="module")
def adapter(backbone: Any) -> Loaded:  # noqa: F811
    return make_loaded(backbone, "a", 1.0, Query())


def sampled(model: Any, cfg: float) -> Tensor:
    return sample(model, cfg=cfg)["samples"]


def assert_acts_beside(model: Any, change: Callable[[Any], Any], adapter: Loaded, cfg: float) -> None:
    """A node before Apply I2V Adapters does what it does after it, and neither takes the other's effect away."""
    after, before = (sampled(made, cfg) for made in (change(apply(model, adapter)), apply(change(model), adapter)))
    assert torch.equal(after, before)
    for lacking in (apply(model, adapter), change(apply(model, Loaded("none", adapter.patcher, 0.0, None)))):
        assert (after - sampled(lacking, cfg)).abs().max() > 1e-3


@BOTH_CFGS
def test_freeu(applied: Any, adapter: Loaded, cfg: float) -> None:  # noqa: F811
    assert_acts_beside(applied, lambda model: FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).args[0], adapter, cfg)


@BOTH_CFGS
def test_image_tokens_in_the_place_of_cross_attention(applied: Any, adapter: Loaded, cfg: float) -> None:  # noqa: F811
    def change(model: Any) -> Any:
        made = model.clone()
        made.set_model_attn2_replace(ImageTokens(64), *BLOCK)
        return made

    assert_acts_beside(applied, change, adapter, cfg)
    model, maps = record(applied, (adapter,))
    sample(change(model), cfg=cfg)
    assert {level: float(count[0]) for (_, level, _), count in maps.counts.items()} == {"high": 10, "middle": 10, "low": 10}


def lora(name: str) -> dict[str, Tensor]:
    path = f"diffusion_model.input_blocks.4.1.transformer_blocks.0.{name}"
    width = 64 if "to_q" in name or "to_out" in name or "attn1" in name else TEXT_WIDTH
    return {f"{path}.lora_up.weight": random(64, 4, name="up"), f"{path}.lora_down.weight": random(4, width, name="down")}


@pytest.mark.parametrize("layer", ["attn1.to_k", "attn2.to_k", "attn2.to_out.0"])
def test_a_lora_of_the_image_model_reaches_adapters(applied: Any, tiny_models: Path, adapter: Loaded, layer: str) -> None:  # noqa: F811
    """As if its weights were the base's: adapters use the projections of the layer that they stand beside."""

    def change(model: Any) -> Any:
        return comfy.sd.load_lora_for_models(model, None, lora(layer), 0.5, 0)[0]

    assert_acts_beside(applied, change, adapter, 1.0)
    merged = load_animatediff(tiny_models, beta_schedule=motion.KEEP)
    up, down = lora(layer).values()
    with torch.inference_mode():
        merged.model.get_submodule(next(iter(lora(layer))).removesuffix(".lora_up.weight")).weight += 0.5 * up @ down
    torch.testing.assert_close(sampled(apply(merged, adapter), 1.0), sampled(change(apply(applied, adapter)), 1.0), rtol=1e-3, atol=1e-3)


def test_a_hypernetwork_is_said_not_to_reach_prompts_of_adapters(
    applied: Any, adapter: Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:
    """Once, as sampling begins. Where an adapter has the sampler's prompt it is reached."""
    layers = [{"linear.weight": random(768, 768, name=f"hyper {i}") / 28, "linear.bias": torch.zeros(768)} for i in range(2)]
    torch.save({768: layers}, tmp_path / "hyper.pt")

    def change(model: Any) -> Any:
        made = model.clone()
        made.set_model_attn2_patch(load_hypernetwork_patch(str(tmp_path / "hyper.pt"), 0.8))
        return made

    with caplog.at_level(logging.WARNING):
        own, plain = sampled(change(apply(applied, adapter)), 1.0), sampled(apply(applied, adapter), 1.0)
    assert torch.equal(own, plain)
    assert caplog.text.count("Prompts of adapters do not pass through it.") == 1
    caplog.clear()
    assert_acts_beside(applied, change, Loaded("sampler's", adapter.patcher, 1.0, None), 1.0)
    assert "do not pass" not in caplog.text


def test_a_prompt_that_changes_from_frame_to_frame_is_named(applied: Any, adapter: Loaded, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    cond = [[random(3, 7, TEXT_WIDTH, name="of frames"), {}]]
    sample(apply(applied, adapter), positive=cond)
    assert "frame to frame" not in caplog.text
    sample(apply(applied, Loaded("sampler's", adapter.patcher, 1.0, None)), positive=cond)
    assert caplog.text.count("The positive prompt changes from frame to frame.") == 1


def test_a_second_set_of_adapters_takes_the_place_of_the_first_and_says_so(backbone: Any, applied: Any, adapter: Loaded) -> None:  # noqa: F811
    other = make_loaded(backbone, "b", 1.0, Query())
    with torch.inference_mode():
        node = ApplyI2vAdapters.execute(apply(applied, adapter), (other,), "residual")
    assert node.ui["text"][0].startswith("These adapters take the place of a. To use them together, chain their loaders")
    assert torch.equal(sampled(node.args[0], 1.0), sampled(apply(applied, other), 1.0))
    assert ApplyI2vAdapters.execute(applied, (other,), "residual").ui is None


@BOTH_CFGS
def test_prompts_over_masks_work_and_those_of_areas_are_named(backbone: Any, applied: Any, adapter: Loaded, cfg: float) -> None:  # noqa: F811
    """Two positive prompts at once, of which maps are the mean; adapters have their own prompts in both."""
    model, maps = record(applied, (adapter,))
    mask = torch.zeros(1, 8 * SIZE[0], 8 * SIZE[1])
    mask[..., : 4 * SIZE[1]] = 1
    prompts = [[random(1, 7, TEXT_WIDTH, name=name), {"mask": own, "mask_strength": 1.0}] for name, own in (("left", mask), ("right", 1 - mask))]
    both, one = sample(model, cfg=cfg, positive=prompts)["samples"], maps.of_word(0, "water", "high", SIZE)
    plain = sample(model, cfg=cfg)["samples"]
    assert (both - plain).norm() < 1e-3 * plain.norm()
    torch.testing.assert_close(one, maps.of_word(0, "water", "high", SIZE), rtol=0.05, atol=1e-3)
    area = [[random(1, 7, TEXT_WIDTH, name="area"), {"area": (4, 8, 0, 0), "strength": 1.0}], *prompts]
    with pytest.raises(ValueError, match="^a prompt for an area .* beside adapters: expected one with a mask$"):
        sample(model, cfg=cfg, positive=area)
