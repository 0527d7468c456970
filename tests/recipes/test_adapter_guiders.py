"""Adapters in samplers that call the model in other ways than KSampler, and after nodes that undo what they need."""

import logging
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import DualCFGGuider
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from kinoloom.nodes.adapters.apply import AS_TRAINED, findings, norms_pooled
from kinoloom.nodes.adapters.loading import Loaded
from kinoloom.nodes.animatediff import modules as motion
from kinoloom.nodes.hooked import patcher_of
from kinoloom.trainers.conditions.adapter import Adapter, Query
from torch import Tensor

from ..rows import TEXT_WIDTH, random
from .test_adapters import backbone  # noqa: F401
from .test_beside_sampling import apply, lora
from .test_recorded_maps import PLACES, SIZE, applied, make_loaded, sample  # noqa: F401

PROMPT = random(1, len(PLACES["a"]), TEXT_WIDTH, name="a")  # of `adapter`


@pytest.fixture(scope="module")
def adapter(backbone: Any) -> Loaded:  # noqa: F811
    return make_loaded(backbone, "a", 1.0, Query())


def conditioning(name: str, **options: Any) -> list:
    return [[random(1, 7, TEXT_WIDTH, name=name), options]]


def guided(guider: Any) -> Tensor:
    samples, mask = torch.zeros(3, 4, *SIZE), torch.ones(3, *SIZE)
    samples[0], mask[0] = random(4, *SIZE, name="picture"), 0
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([10.0, 3.0, 1.0, 0.0])
    with torch.inference_mode():
        return guider.sample(random(*samples.shape, name="n"), samples, sampler, sigmas, denoise_mask=mask, disable_pbar=True)


def with_cfg(model: Any, positive: list, cfg: float = 1.0) -> Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, conditioning("negative"))
    guider.set_cfg(cfg)
    return guided(guider)


def test_the_positive_prompt_is_known_where_it_is_not_the_first(applied: Any, adapter: Loaded) -> None:  # noqa: F811
    """Guidance with three prompts, of which one does not count, is that with two."""
    model = apply(applied, adapter)
    guider = DualCFGGuider.execute(model, conditioning("p"), conditioning("negative"), conditioning("third"), 3.0, 1.0, "regular").args[0]
    expected = with_cfg(model, conditioning("p"), 3.0)
    torch.testing.assert_close(guided(guider), expected, rtol=1e-3, atol=1e-3)
    assert (expected - with_cfg(apply(applied, Loaded("none", adapter.patcher, 0.0, None)), conditioning("p"), 3.0)).abs().max() > 0.01


def test_loras_that_change_from_step_to_step_reach_prompts_of_adapters(applied: Any, adapter: Loaded) -> None:  # noqa: F811
    """An adapter with a prompt is as one without, if the sampler has that prompt."""
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.3), (3.0, 0.8)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    key = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    up, down = lora("attn2.to_k").values()
    hooks = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
    hook.weights, hook.need_weight_init = {key: (up @ down,)}, False
    hooks.add(hook)
    hooks.set_keyframes_on_hooks(frames)
    own = with_cfg(apply(applied, adapter), [[PROMPT, {"hooks": hooks}]])
    sampled = with_cfg(apply(applied, Loaded("s", adapter.patcher, 1.0, None)), [[PROMPT, {"hooks": hooks}]])
    torch.testing.assert_close(own, sampled, rtol=1e-3, atol=1e-3)
    assert (own - with_cfg(apply(applied, adapter), [[PROMPT, {}]])).abs().max() > 1e-3


def test_what_takes_the_adapters_conditions_away_is_said(
    applied: Any, adapter: Loaded, tiny_models: Path, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:
    model = apply(applied, adapter)
    with torch.inference_mode():
        module = motion.load_motion_module(str(tiny_models / "animatediff_models" / "tiny_motion.safetensors"))
        after = motion.ApplyMotionModule.execute(model, module, 16, 4, motion.KEEP).args[0]
        other = ModelSamplingDiscrete().patch(model, "eps", True)[0]
        lcm = ModelSamplingDiscrete().patch(model, "lcm", False)[0]
    with pytest.raises(ValueError, match="^model: Apply Motion Module is after Apply I2V Adapters, expected it before the adapters$"):
        sample(after)
    with caplog.at_level(logging.WARNING):
        sample(lcm)
        assert "noise schedule" not in caplog.text
        sample(other)
    assert caplog.text.count("A node after Apply I2V Adapters changes the noise schedule") == 1


def test_what_does_not_fit_is_named_with_its_adapter(applied: Any, adapter: Loaded, backbone: Any) -> None:  # noqa: F811
    wide = Loaded("of SDXL", adapter.patcher, 1.0, random(1, 7, 2048, name="wide"))
    with pytest.raises(ValueError, match=f"^adapters: of SDXL: its prompt has 2048 numbers for each token, expected {TEXT_WIDTH}: connect"):
        apply(applied, adapter, wide)
    place = "down_blocks.0.attentions.0.transformer_blocks.0"
    other = Loaded("other", patcher_of(Adapter({f"{place}.i2v_adapter.to_out.0.weight": (7, 7), f"{place}.i2v_adapter.to_out.0.bias": (7,)}, 1.0)), 0.0, None)
    with pytest.raises(ValueError, match=f"^adapters: other: made for another model: {place}"):
        apply(applied, adapter, other)


def test_group_norms_are_those_of_adapters_with_a_weight() -> None:
    def one(weight: float, pooled: str) -> Loaded:
        return Loaded("one", None, weight, None, (), {"kinoloom.pooled_norms": pooled})

    assert not norms_pooled((one(0.0, "True"), one(1.0, "False")), AS_TRAINED)
    assert norms_pooled((one(1.0, "True"), one(0.0, "False")), AS_TRAINED)
    with pytest.raises(ValueError, match="trained in both ways"):
        norms_pooled((one(1.0, "True"), one(0.5, "False")), AS_TRAINED)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [((1, 32), (1, 32), True), ((1, 32), (2, 32), False), ((1, 32), (2, 16), True), ((1, 32), (4, 16), False), ((0, 64), (3, 16), True), ((-1, 32), (-1, 32), False)],
)
def test_orthogonal_adapters_whose_directions_overlap_are_named(first: tuple, second: tuple, shared: bool) -> None:
    def one(name: str, number: int, rank: int, weight: float = 0.5) -> Loaded:
        return Loaded(name, None, weight, None, (), {"kinoloom.oa_bin": str(number), "kinoloom.rank": str(rank)})

    said = findings((one("a", *first), one("b", *second), one("none", *first, 0.0)))
    expected = f"a (oa_bin {first[0]}, rank {first[1]}) and b (oa_bin {second[0]}, rank {second[1]}) share directions, so they are not orthogonal."
    assert said == [expected] * shared
