"""Patches of other nodes beside adapters, put into a model as ComfyUI's nodes do it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import set_model_options_patch_replace
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_tomesd import TomePatchModel
from kinoloom.trainers.backbones.animatediff.image_to_video import AnimateDiffI2v
from kinoloom.trainers.conditions.adapter import Query, spatial_blocks
from kinoloom.trainers.conditions.adapter_cross import MODES
from kinoloom.trainers.conditions.adapters_at_work import Playing
from kinoloom.trainers.host.attention import TRANSFORMER_OPTIONS
from torch import Tensor

from ..rows import TEXT_WIDTH, random
from ..runs import load_animatediff
from .test_adapters import (  # noqa: F401
    PLACE,
    Seen,
    backbone,
    make_adapter,
    prompts,
    run,
    softmax_attention,
    update,
)  # fmt: skip

BLOCK = ("input", 4)  # PLACE in ComfyUI's UNet


@contextmanager
def patched(model: AnimateDiffI2v, replace: dict[str, Any] | None = None, **patches: Any) -> Iterator[list[Tensor]]:
    """The patches in a backbone's model. The list gets what cross-attention at PLACE gave, after all patches."""
    given: list[Tensor] = []

    def watch(n: Tensor, extra: dict) -> Tensor:
        if extra["block"] == BLOCK:
            given.append(n)
        return n

    outputs = [*patches.pop("attn2_output_patch", []), watch]
    options = {"transformer_options": {**TRANSFORMER_OPTIONS, "cond_or_uncond": [0, 1], "patches": {**patches, "attn2_output_patch": outputs}}}
    for name, patch in (replace or {}).items():
        options = set_model_options_patch_replace(options, patch, name, *BLOCK)
    before, model.transformer_options = model.transformer_options, options["transformer_options"]
    try:
        yield given
    finally:
        model.transformer_options = before


class ImageTokens:
    """What IPAdapter packs put in the place of a cross-attention: text attention plus attention to image tokens."""

    def __init__(self, width: int) -> None:
        self.k, self.v = (random(1, 4, width, name=f"image {name}") for name in "kv")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        clips = len(extra["cond_or_uncond"])
        assert len(q) % clips == 0 and extra["n_heads"] == 8
        text = optimized_attention(q, k, v, extra["n_heads"])
        return text + 0.7 * optimized_attention(q, self.k.expand(len(q), -1, -1), self.v.expand(len(q), -1, -1), extra["n_heads"])


CLIPS = pytest.mark.parametrize("positive", [(True, True), (True, False), (False, True)])


@CLIPS
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.5, 0.2)])
def test_image_tokens_add_to_what_adapters_make(
    backbone: AnimateDiffI2v, run: Any, mode: str, weights: tuple[float, ...], positive: tuple[bool, ...]  # noqa: F811
) -> None:
    """The layer gives the adapters' output plus W_O of the attention to the image, for both prompts."""
    attn2 = spatial_blocks(backbone.unet)[PLACE].attn2
    image, seen = ImageTokens(len(attn2.to_q.weight)), Seen(attn2)
    playing = [Playing(make_adapter(backbone, name, Query("rope_1d")), *each) for name, *each in zip("ab", weights, prompts("waterfall", "clouds"), strict=True)]
    with patched(backbone) as plain:
        run(*playing, mode=mode, positive=positive)
    with patched(backbone, {"attn2": image}) as beside:
        run(*playing, mode=mode, positive=positive)
    seen.handle.remove()  # of the run without the patch, which does not call the layer itself
    expected = 0.7 * softmax_attention(attn2.to_q(seen.inputs[0]), image.k, image.v) @ attn2.to_out[0].weight.T
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(beside[0] - plain[0], expected, rtol=1e-3, atol=1e-4)


def test_a_replacement_that_changes_nothing_changes_nothing(backbone: AnimateDiffI2v, run: Any) -> None:  # noqa: F811
    """Ours is then the whole output, also in coarse queries, and beside another patch of prompts."""
    playing = Playing(make_adapter(backbone, "a", Query("rope_3d", 2)), 0.6)
    twice = {"attn2_patch": [lambda n, context, value, extra: (n, 2 * context, 3 * value)]}
    with patched(backbone, **twice) as plain:
        run(playing, positive=(True, False))
    with patched(backbone, {"attn2": lambda q, k, v, extra: optimized_attention(q, k, v, extra["n_heads"])}, **twice) as replaced:
        run(playing, positive=(True, False))
    torch.testing.assert_close(replaced[0], plain[0], rtol=1e-4, atol=1e-4)


def test_a_hypernetwork_reaches_the_prompt_of_the_sampler(backbone: AnimateDiffI2v, run: Any) -> None:  # noqa: F811
    """It changes the inputs of keys and of values apart. Prompts of adapters do not pass through it."""
    hyper = {name: random(TEXT_WIDTH, TEXT_WIDTH, name=f"hyper {name}") / TEXT_WIDTH**0.5 for name in "kv"}
    patch = {"attn2_patch": [lambda n, context, value, extra: (n, context @ hyper["k"], value @ hyper["v"])]}
    adapter, attn2 = make_adapter(backbone, "a"), spatial_blocks(backbone.unet)[PLACE].attn2
    seen = Seen(attn2)
    with patched(backbone, **patch) as given:
        run(Playing(adapter))
    seen.handle.remove()
    (x, part), given_context = (seen.inputs[0], adapter.part("cross", PLACE)), seen.given["context"]
    context = random(2, 7, TEXT_WIDTH, name="prompt").repeat_interleave(3, 0)
    torch.testing.assert_close(given_context, context @ hyper["k"])
    q = attn2.to_q(x) + update(part, "to_q_lora", x, 1.0)
    k, v = (
        getattr(attn2, name)(e) + update(part, f"{name}_lora", e, 1.0)
        for name, e in (("to_k", context @ hyper["k"]), ("to_v", context @ hyper["v"]))
    )
    y = softmax_attention(q, k, v) @ attn2.to_out[0].weight.T + attn2.to_out[0].bias
    torch.testing.assert_close(given[0], y + update(part, "to_out_lora", y, 1.0), rtol=1e-4, atol=1e-4)
    own = Playing(adapter, 1.0, *prompts("waterfall"))
    with patched(backbone, **patch):
        changed = run(own)
    torch.testing.assert_close(changed, run(own), rtol=1e-4, atol=1e-4)


def test_patches_of_self_attention_keep_their_effect(backbone: AnimateDiffI2v, run: Any) -> None:  # noqa: F811
    """The output patch acts on the sum with the I2V-Adapter, as on the base's output without one."""
    outputs: list[Tensor] = []

    def halved(n: Tensor, extra: dict) -> Tensor:
        if extra["block"] != BLOCK:
            return n
        outputs.append(n)
        return n / 2

    playing, after = Playing(make_adapter(backbone, "a")), Seen(spatial_blocks(backbone.unet)[PLACE].attn1)
    with patched(backbone, attn1_output_patch=[halved]):
        run(playing)
    after.handle.remove()
    assert torch.equal(outputs[0], after.output), "the adapter is in it"
    alone: list[Tensor] = []
    with patched(backbone, {"attn1": lambda q, k, v, extra: torch.zeros_like(q)}, attn1_output_patch=[lambda n, extra: (alone.append(n), n)[1]]):
        run(playing)
    with patched(backbone, {"attn1": lambda q, k, v, extra: torch.zeros_like(q)}, attn1_output_patch=[lambda n, extra: (alone.append(n), n)[1]]):
        run()
    half = len(alone) // 2
    index = list(spatial_blocks(backbone.unet)).index(PLACE)
    assert (alone[index] - alone[half + index]).abs().max() > 0.01, "also where a patch takes the place of the attention"


def test_patches_of_blocks_act_beside_adapters(backbone: AnimateDiffI2v, run: Any) -> None:  # noqa: F811
    """As FreeU scales what decoder blocks get."""
    seen: list[Tensor] = []

    def scaled(h: Tensor, skip: Tensor, extra: dict) -> tuple[Tensor, Tensor]:
        seen.append(h)
        return 1.1 * h, 0.9 * skip

    playing = Playing(make_adapter(backbone, "a"))
    plain = run(playing)
    with patched(backbone, output_block_patch=[scaled]):
        changed, base = run(playing), run()
    assert len(seen) == 24 and not torch.allclose(seen[3], seen[15]), "12 blocks each, and adapters act before them"
    assert (changed - plain).abs().max() > 1e-3 and (changed - base).abs().max() > 1e-3


def patches_of(node: Any, model: Any, *values: Any) -> dict[str, Any]:
    made = node.execute(model, *values)
    return getattr(made, "args", made)[0].model_options["transformer_options"]["patches"]


def test_nodes_that_regroup_tokens_of_self_attention_are_named(backbone: AnimateDiffI2v, run: Any, tiny_models: Any) -> None:  # noqa: F811
    """Core's own: ToMe merges tokens, HyperTile runs attention in tiles. Beside adapters without an image part both work."""
    model = load_animatediff(tiny_models)
    tome, tiles = patches_of(TomePatchModel, model, 0.5), patches_of(HyperTile, model, 32, 2, 3, False)
    playing = Playing(make_adapter(backbone, "a"))
    plain = Playing(make_adapter(backbone, "a", image_query=False, train_image=False))
    for patches, found in ((tome, r"\(6, 64\)"), (tiles, r"\(\d+, \d+\)")):
        with patched(backbone, **patches):
            backbone.transformer_options["original_shape"] = [6, 4, 8, 16]
            del backbone.transformer_options["optimized_attention_override"]  # samplers have none; HyperTile needs that
            with pytest.raises(ValueError, match=rf"^model: I2V adapters cannot work beside a node that regroups the tokens of self-attention, such as ToMe or HyperTile: found {found}, expected \(6, 128\)$"):
                run(playing)
            assert run(plain).isfinite().all()


def test_a_node_that_repeats_the_batch_of_cross_attention_is_named(backbone: AnimateDiffI2v, run: Any) -> None:  # noqa: F811
    """As attention couple does, which runs several prompts over masks."""
    repeat = lambda n, context, value, extra: tuple(torch.cat([part, part]) for part in (n, context, value))  # noqa: E731
    whole = lambda n, extra: sum(n.chunk(2)) / 2  # noqa: E731
    message = r"^model: I2V adapters cannot work beside a node that regroups the tokens of cross-attention, such as attention couple: found \(12, 128\), expected \(6, 128\)$"
    for replace in ({}, {"attn2": ImageTokens(64)}):
        with patched(backbone, replace, attn2_patch=[repeat], attn2_output_patch=[whole]), pytest.raises(ValueError, match=message):
            run(Playing(make_adapter(backbone, "a")))
