"""Adapters at work against plain formulas: each part, both modes, every positional mode, on a tiny SD1.5."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kinoloom.trainers.backbones.animatediff.image_to_video import AnimateDiffI2v
from kinoloom.trainers.ca_lora import CaLora
from kinoloom.trainers.conditions.adapter import Adapter, Query, spatial_blocks, temporal_attentions
from kinoloom.trainers.conditions.adapter_cross import MODES
from kinoloom.trainers.conditions.adapters_at_work import Adapted, Playing
from kinoloom.trainers.conditions.new_adapter import initialise, shapes_of
from kinoloom.trainers.host.attention import TRANSFORMER_OPTIONS
from kinoloom.trainers.host.private import Private, load_private
from kinoloom.trainers.host.source import carried_files
from torch import Tensor

from ..rows import TEXT_WIDTH, random
from ..runs import load_animatediff, make_config

FRAMES, HEIGHT, WIDTH, HEADS = 3, 8, 16, 8
PLACE = "down_blocks.1.attentions.0.transformer_blocks.0"
TIME = "down_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1"


@pytest.fixture(scope="module")
def backbone(tiny_models: Path) -> AnimateDiffI2v:
    model = load_animatediff(tiny_models)
    private = Private(load_private(model, torch.device("cpu")), carried_files(model))
    return AnimateDiffI2v({"model": private}, torch.device("cpu"), torch.float32, TRANSFORMER_OPTIONS)


def make_adapter(backbone: AnimateDiffI2v, name: str, query: Query | None = None, **options: Any) -> Adapter:
    """An adapter of random weights, none of them zero."""
    config = make_config(CaLora.name, **{"cross_query": True, "image_query": True, **options})
    unet, motion = backbone.unet, backbone.module["motion"]
    adapter = initialise(Adapter(shapes_of(config, unet, motion), config.alpha, query or Query()), unet, 0)
    for key, value in adapter.tensors().items():
        value.data = random(*value.shape, name=f"{name} {key}") * (0.3 if value.ndim > 1 else 0.1)
    return adapter.requires_grad_(False)


class Seen:
    """The inputs and the output of a layer in the backbone's last forward."""

    def __init__(self, layer: Any) -> None:
        self.handle = layer.register_forward_hook(self, with_kwargs=True)

    def __call__(self, layer: Any, inputs: tuple, given: dict, output: Tensor) -> None:
        self.inputs, self.given, self.output = inputs, given, output


@pytest.fixture
def run(backbone: AnimateDiffI2v) -> Iterator[Any]:
    noisy = random(2, 4, FRAMES, HEIGHT, WIDTH, name="noisy")
    batch = {"prompt_embeds": random(2, 7, TEXT_WIDTH, name="prompt"), "first_frame": random(2, 4, HEIGHT, WIDTH, name="0")}

    @torch.no_grad()
    def predict(*playing: Playing, mode: str = "residual", positive: tuple[bool, ...] = (True, True)) -> Tensor:
        with Adapted(backbone.unet, backbone.module["motion"], playing, mode) as adapted:
            adapted.frames, adapted.positive = FRAMES, list(positive)
            return backbone.predict(noisy, torch.tensor([500, 20]), batch)

    yield predict


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(-3, -2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For q [..., L, C], k and v [..., M, C]."""
    q, k, v = heads(q), heads(k), heads(v)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


def update(part: Any, name: str, x: Tensor, scale: float) -> Tensor:
    """scale * x A^T B^T"""
    lora = getattr(part, name)
    return scale * (x @ lora.down.weight.T) @ lora.up.weight.T


def prompts(*names: str) -> list[Tensor]:
    return [random(1, 5 + number, TEXT_WIDTH, name=name) for number, name in enumerate(names)]


@pytest.mark.parametrize("mode", MODES)
def test_cross_attention_follows_the_formula(backbone: AnimateDiffI2v, run: Any, mode: str) -> None:
    adapters, weights = [make_adapter(backbone, name) for name in "ab"], (0.3, 0.7)
    block, contexts = spatial_blocks(backbone.unet)[PLACE], prompts("waterfall", "clouds")
    base, scale = block.attn2, 4.0 / 4
    seen = Seen(base)
    run(*(Playing(*each) for each in zip(adapters, weights, contexts, strict=True)), mode=mode)
    seen.handle.remove()
    x, parts = seen.inputs[0], [adapter.part("cross", PLACE) for adapter in adapters]
    q = base.to_q(x) + sum(w * update(part, "to_q_lora", x, scale) for w, part in zip(weights, parts, strict=True))

    def keys(name: str, factor: float, part: Any, e: Tensor) -> Tensor:
        return getattr(base, name)(e) + factor * update(part, f"{name}_lora", e, scale)

    factors = weights if mode == "weights" else (1.0, 1.0)
    k, v = ([keys(n, *each) for each in zip(factors, parts, contexts, strict=True)] for n in ("to_k", "to_v"))
    weight, bias = base.to_out[0].weight, base.to_out[0].bias
    if mode == "residual":
        expected = torch.zeros_like(x)
        for w, part, own_k, own_v in zip(weights, parts, k, v, strict=True):
            y = softmax_attention(q, own_k, own_v) @ weight.T + bias
            expected += w * (y + update(part, "to_out_lora", y, scale))
    else:
        expected = softmax_attention(q, torch.cat(k, 1), torch.cat(v, 1)) @ weight.T + bias
        for w, part in zip(weights, parts, strict=True):
            expected = expected + w * update(part, "to_out_lora", expected, scale)
    torch.testing.assert_close(seen.output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_temporal_attention_follows_the_formula(backbone: AnimateDiffI2v, run: Any, mode: str) -> None:
    adapters, weights = [make_adapter(backbone, name) for name in "ab"], (0.3, 0.7)
    layer = temporal_attentions(backbone.module["motion"])[TIME]
    seen = Seen(layer)
    run(*(Playing(*each) for each in zip(adapters, weights, strict=True)), mode=mode)
    seen.handle.remove()
    x = layer.pos_encoder(seen.inputs[0])
    parts, (w_o, b_o) = [adapter.part("temporal", TIME) for adapter in adapters], layer.to_out[0].parameters()

    def of(name: str, some: list[tuple[float, Any]]) -> Tensor:
        return getattr(layer, name)(x) + sum(w * update(part, f"{name}_lora", x, 1.0) for w, part in some)

    pairs = list(zip(weights, parts, strict=True))
    if mode == "residual":
        expected = torch.zeros_like(x)
        for w, part in pairs:
            o = softmax_attention(*(of(name, [(1.0, part)]) for name in ("to_q", "to_k", "to_v")))
            expected += w * (o @ w_o.T + b_o + update(part, "to_out_lora", o, 1.0))
    else:
        o = softmax_attention(*(of(name, pairs) for name in ("to_q", "to_k", "to_v")))
        expected = o @ w_o.T + b_o + sum(w * update(part, "to_out_lora", o, 1.0) for w, part in pairs)
    torch.testing.assert_close(seen.output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_every_frame_attends_to_the_first(backbone: AnimateDiffI2v, run: Any, mode: str) -> None:
    adapters, weights = [make_adapter(backbone, name) for name in "ab"], (0.3, 0.7)
    block = spatial_blocks(backbone.unet)[PLACE]
    normed, out = Seen(block.norm1), []
    handle = block.attn1.to_out.register_forward_pre_hook(lambda _, inputs: out.append(block.attn1.to_out[0](inputs[0])))
    after = Seen(block.attn1)
    run(*(Playing(*each) for each in zip(adapters, weights, strict=True)), mode=mode)
    for each in (normed.handle, handle, after.handle):
        each.remove()
    n, expected = normed.output, out[0].clone()
    for w, adapter in zip(weights, adapters, strict=True):
        part = adapter.part("image", PLACE)
        for row in range(len(n)):
            first = n[row // FRAMES * FRAMES][None]
            o = softmax_attention(part.to_q(n[row][None]), block.attn1.to_k(first), block.attn1.to_v(first))
            expected[row] += w * part.to_out[0](o)[0]
    torch.testing.assert_close(after.output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_one_adapter_is_the_same_in_both_modes(backbone: AnimateDiffI2v, run: Any, mode: str) -> None:
    adapter = make_adapter(backbone, "a", Query("rope_3d"), motion_embed=True)
    torch.testing.assert_close(run(Playing(adapter), mode=mode), run(Playing(adapter)), rtol=1e-4, atol=1e-4)


def test_two_equal_halves_are_one(backbone: AnimateDiffI2v, run: Any) -> None:
    adapter, base = make_adapter(backbone, "a"), run()
    one, halves = run(Playing(adapter)), run(Playing(adapter, 0.5), Playing(adapter, 0.5))
    assert (one - base).abs().max() > 0.01
    torch.testing.assert_close(halves, one, rtol=1e-3, atol=1e-3)


def test_weight_0_is_the_base_to_the_bit(backbone: AnimateDiffI2v, run: Any) -> None:
    for mode in MODES:
        assert torch.equal(run(Playing(make_adapter(backbone, "a"), 0.0), mode=mode), run())


def test_small_weights_come_near_the_base(backbone: AnimateDiffI2v, run: Any) -> None:
    adapter, base = make_adapter(backbone, "a"), run()
    distances = [float((run(Playing(adapter, weight)) - base).norm()) for weight in (0.001, 0.01, 0.1)]
    assert distances[0] < 0.02 * distances[2] and distances[1] < 0.2 * distances[2]


def test_prompts_swapped_swap_the_effect(backbone: AnimateDiffI2v, run: Any) -> None:
    a, b = make_adapter(backbone, "a"), make_adapter(backbone, "b")
    first, second = prompts("waterfall", "clouds")
    here = run(Playing(a, 0.5, first), Playing(b, 0.5, second))
    there = run(Playing(a, 0.5, second), Playing(b, 0.5, first))
    turned = run(Playing(b, 0.5, first), Playing(a, 0.5, second))
    assert (here - there).abs().max() > 1e-3
    torch.testing.assert_close(turned, there, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_a_negative_prompt_keeps_the_base_of_cross_attention(backbone: AnimateDiffI2v, run: Any, mode: str) -> None:
    """The clip with the positive prompt is as in a batch of its own kind, the other as with no CA-LoRA."""
    parts = {"train_image": False, "train_temporal": False, "image_query": False}
    adapter, (prompt,) = make_adapter(backbone, "a", **parts), prompts("waterfall")
    both, base = run(Playing(adapter, 1.0, prompt), mode=mode), run()
    mixed = run(Playing(adapter, 1.0, prompt), mode=mode, positive=(True, False))
    torch.testing.assert_close(mixed[0], both[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], base[1], rtol=1e-4, atol=1e-4)
    turned = run(Playing(adapter, 0.4, prompt), mode=mode, positive=(False, True))
    torch.testing.assert_close(turned[0], base[0], rtol=1e-4, atol=1e-4)


def test_a_new_adapter_changes_nothing(backbone: AnimateDiffI2v, run: Any) -> None:
    config = make_config(CaLora.name, motion_embed=True, image_query=True)
    shapes = shapes_of(config, backbone.unet, backbone.module["motion"])
    adapter = initialise(Adapter(shapes, 1.0), backbone.unet, 0).requires_grad_(False)
    torch.testing.assert_close(run(Playing(adapter)), run(), rtol=1e-4, atol=1e-4)
