"""What is easily got wrong in this method, and which test holds it. Tests without a file are below.

1. LoRAs are scaled by alpha / rank; no tensor says alpha: test_updates_are_scaled_by_alpha_over_rank
2. CA-LoRA of the output acts on W_O's output and its bias, that of temporal attention on W_O's input:
   test_the_output_lora_is_a_merge_after_the_layer, test_adapters.test_temporal_attention_follows_the_formula
3. I2V-Adapters attend to frame 0 of the normed input, for frame 0 too, and start at zero:
   test_adapters.test_every_frame_attends_to_the_first, test_adapters.test_a_new_adapter_changes_nothing
4. They train their output alone, and copies of the base's projections in a file are the base's:
   test_an_i2v_adapter_trains_its_output_and_uses_the_bases_projections
5. Frame 0 is clean under the common timestep, and no part of the loss: test_the_first_frame_is_clean_and_outside_the_loss;
   never changed by samplers: test_i2v_adapters.test_the_first_frame_stays_and_adapters_act
6. The schedule is Stable Diffusion's, 50 steps begin at 981: pure/test_first_frame.test_the_schedule_is_stable_diffusions,
   test_fifty_steps_go_down_from_981; test_i2v_adapters.test_the_schedule_is_the_models_own
7. No text dropout, so cfg 1 is the trained setting: test_a_step_always_has_the_prompt; others work in both modes:
   test_i2v_adapters.test_the_first_frame_stays_and_adapters_act
8. Group norms of ResBlocks and of the output run over all frames, others over each:
   test_norms_of_res_blocks_run_over_all_frames_and_those_of_transformers_do_not
9. Weights are raw, and a sum other than 1 is said: test_i2v_adapters.test_what_does_not_fit_is_said. Here the rest to 1
   is the base's, where the original leaves it out: test_adapters.test_small_weights_come_near_the_base
10. residual and weights: test_adapters.test_cross_attention_follows_the_formula,
    test_adapters.test_temporal_attention_follows_the_formula
11. I2V-Adapters are added by weight and query LoRAs share one query, in both modes: the same tests
12. Clips have the prompt that the sampler says, in any order: test_adapters.test_a_negative_prompt_keeps_the_base_of_
    cross_attention, test_beside_adapters.test_image_tokens_add_to_what_adapters_make
13. Names and defaults of options: nodes/test_options_table
14. Orthogonal adapters fix `up` and train `down` from zero, but for keys and values of cross-attention; all layers take
    the same bin, of which rank 32 has 10: test_bins_are_orthogonal_where_the_original_has_them, pure/test_adapter_bases
15. Stride 1 without positions is ordinary cross-attention: test_stride_1_without_positions_is_ordinary; modes and strides:
    test_cross_attention_over_space_and_time. Here modes act at every stride.
16. Rising frequencies, no sinusoid in frame 0, x + R(x), and ropeQ modes as they are meant: pure/test_adapter_positions
17. to 19. Noise, DCT and AdaIN: pure/test_first_frame, test_i2v_matching
20. Attention maps: test_recorded_maps, pure/test_attention_maps. Words and scale are chosen; each frame is its own.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinoloom.lora_io.file import load, save
from kinoloom.nodes.animatediff import modules as motion
from kinoloom.trainers.ca_lora import CaLora
from kinoloom.trainers.conditions.adapter import Adapter, Query, spatial_blocks, split
from kinoloom.trainers.conditions.adapter_positions import MODES, with_positions
from kinoloom.trainers.conditions.adapters_at_work import Playing
from kinoloom.trainers.conditions.new_adapter import orthogonal_loras, shapes_of
from kinoloom.trainers.core.data import TrainingData
from kinoloom.trainers.core.rng import Rng
from torch import Tensor, nn

from ..plain_positions import before_queries, of_queries, of_tokens
from ..rows import TEXT_WIDTH, TOKENS, random
from ..runs import finish, load_animatediff, make_backbone, make_batch, make_config, make_job
from .test_adapters import (  # noqa: F401
    FRAMES,
    PLACE,
    Seen,
    backbone,
    make_adapter,
    prompts,
    run,
    softmax_attention,
    update,
)  # fmt: skip


def make_recipe(tiny_models: Path, **options: Any) -> CaLora:
    model = load_animatediff(tiny_models, beta_schedule=motion.KEEP)
    recipe = CaLora(make_backbone(model, method=CaLora.name), make_config(CaLora.name, **options))
    recipe.start(recipe.phases(recipe.config, None)[0])
    return recipe


def alone(data: TrainingData) -> TrainingData:
    """The clips to train on, without those of the base model."""
    return replace(data, rows=tuple(row for row in data.rows if row.role == "train"))


# -- LoRAs and the I2V-Adapter -----------------------------------------------------------------------------------------------


def test_updates_are_scaled_by_alpha_over_rank(backbone: Any) -> None:  # noqa: F811
    for alpha, rank, scale in ((1.0, 32, 1 / 32), (4.0, 8, 0.5), (8.0, 8, 1.0)):
        config = make_config(CaLora.name, alpha=alpha, rank=rank)
        shapes = shapes_of(config, backbone.unet, backbone.module["motion"])
        lora = Adapter(shapes, alpha).part("cross", PLACE).to_k_lora
        x = random(3, TEXT_WIDTH, name="x")
        torch.testing.assert_close(lora(x), scale * x @ lora.down.weight.T @ lora.up.weight.T)
        assert not any("alpha" in key for key in shapes)
    assert CaLora.Config.alpha == 1.0 and CaLora.Config.rank == 32


def merged(linear: nn.Linear, down: Tensor, up: Tensor) -> nn.Linear:
    made = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    made.weight.data = linear.weight + up @ down
    if linear.bias is not None:
        made.bias.data = linear.bias.clone()
    return made


@torch.no_grad()
def test_the_output_lora_is_a_merge_after_the_layer(backbone: Any, run: Any) -> None:  # noqa: F811
    """dW_O = s B A W_O and db_O = s B A b_O; keys, values and queries are ordinary merges."""
    adapter, base = make_adapter(backbone, "a"), spatial_blocks(backbone.unet)[PLACE].attn2
    seen, (prompt,) = Seen(base), prompts("waterfall")
    run(Playing(adapter, 1.0, prompt))
    seen.handle.remove()
    part = adapter.part("cross", PLACE)
    q, k, v = (merged(getattr(base, name), (lora := getattr(part, f"{name}_lora")).down.weight, lora.up.weight) for name in ("to_q", "to_k", "to_v"))
    after = part.to_out_lora.up.weight @ part.to_out_lora.down.weight
    w_o, b_o = base.to_out[0].weight, base.to_out[0].bias
    o = softmax_attention(q(seen.inputs[0]), k(prompt), v(prompt))
    torch.testing.assert_close(seen.output, o @ (w_o + after @ w_o).T + b_o + after @ b_o, rtol=1e-4, atol=1e-4)


def test_an_i2v_adapter_trains_its_output_and_uses_the_bases_projections(backbone: Any, run: Any) -> None:  # noqa: F811
    keys = shapes_of(make_config(CaLora.name), backbone.unet, backbone.module["motion"])
    image = [key for key in keys if split(key)[0] == "image"]
    assert {split(key)[2] for key in image} == {"to_out.0.weight", "to_out.0.bias"} and len(image) == 32
    adapter = make_adapter(backbone, "a", image_query=False)
    tensors = {key: value.data for key, value in adapter.tensors().items()}
    for place, block in spatial_blocks(backbone.unet).items():
        for name in ("to_q", "to_k", "to_v"):
            tensors[f"{place}.i2v_adapter.{name}.weight"] = getattr(block.attn1, name).weight.data
    copies = Adapter({key: tuple(value.shape) for key, value in tensors.items()}, adapter.alpha).load(tensors)
    torch.testing.assert_close(run(Playing(copies)), run(Playing(adapter)), rtol=1e-4, atol=1e-4)


# -- Training ----------------------------------------------------------------------------------------------------------------


def test_the_first_frame_is_clean_and_outside_the_loss(tiny_models: Path, inputs: Any) -> None:
    recipe = make_recipe(tiny_models)
    batch = make_batch(recipe.backbone, alone(inputs(CaLora.name)[1]), size=2)
    given, rng = [], Rng(0, "x", 0)
    recipe.backbone.unet.register_forward_pre_hook(lambda _, *inputs: given.append(inputs), with_kwargs=True)
    ((_, loss),) = list(recipe.losses(batch, rng))
    ((x, t), named), latents, schedule = given[0], batch["latents"], recipe.backbone.schedule
    steps = t.view(2, -1)
    assert (steps == steps[:, :1]).all(), "one timestep for all frames"
    x = x.unflatten(0, (2, -1)).transpose(1, 2)
    assert torch.equal(x[:, :, 0], latents[:, :, 0]) and not torch.isclose(x[:, :, 1:], latents[:, :, 1:]).any(dim=1).all()
    noise = Rng(0, "x", 0).noise_like(latents)
    torch.testing.assert_close(x[:, :, 1:], schedule.add_noise(latents, noise, steps[:, 0])[:, :, 1:])
    with torch.no_grad():
        out = recipe.backbone.unet(*given[0][0], **named)
    pred = out.unflatten(0, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(loss, ((pred - noise)[:, :, 1:] ** 2).mean(), rtol=1e-3, atol=1e-4)


def test_a_step_always_has_the_prompt(tiny_models: Path, inputs: Any) -> None:
    """Not an empty one, and none with tokens left out."""
    recipe = make_recipe(tiny_models)
    batch, seen = make_batch(recipe.backbone, alone(inputs(CaLora.name)[1]), size=2), []
    recipe.backbone.unet.register_forward_pre_hook(lambda _, inputs, given: seen.append(given["context"]), with_kwargs=True)
    for step in range(4):
        list(recipe.losses(batch, Rng(0, "x", step)))
    expected = batch["prompt_embeds"][:, 0].repeat_interleave(3, 0)
    assert len(seen) == 4 and all(torch.equal(context[:, :TOKENS], expected) and not context[:, TOKENS:].any() for context in seen)


class Given:
    """The input of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(self)

    def __call__(self, layer: nn.Module, inputs: tuple) -> None:
        self.x = inputs[0]


@torch.no_grad()
@pytest.mark.parametrize("pooled", [True, False])
def test_norms_of_res_blocks_run_over_all_frames_and_those_of_transformers_do_not(tiny_models: Path, pooled: bool) -> None:
    """The clean first frame counts too."""
    recipe = make_recipe(tiny_models, pooled_norms=pooled)
    block, unet = recipe.backbone.unet.input_blocks[4], recipe.backbone.unet
    norms = {"in": block[0].in_layers[0], "out": block[0].out_layers[0], "last": unet.out[0], "transformer": block[1].norm}
    before = {"in": Given(block[0]), "last": Given(unet.out), "transformer": Given(block[1])}
    after = {name: Seen(norm) for name, norm in norms.items()}
    batch = {"prompt_embeds": random(2, 7, TEXT_WIDTH, name="p"), "start": random(2, 4, 8, 16, name="f")}
    recipe.predict(random(2, 4, 3, 8, 16, name="n"), torch.tensor([5, 700]), batch)
    for name, own in before.items():
        norm, expected = norms[name], []
        for frames in own.x.split(3 if pooled and name != "transformer" else 1):
            values = frames.unflatten(1, (32, -1))  # F groups C/32 h w
            mean = values.mean((0, 2, 3, 4), keepdim=True)
            variance = ((values - mean) ** 2).mean((0, 2, 3, 4), keepdim=True)
            normed = ((values - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
            expected.append(normed * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1))
        torch.testing.assert_close(after[name].output, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert (after["out"].inputs[0].ndim == 5) == pooled


# -- Orthogonal adapters -----------------------------------------------------------------------------------------------------


def test_bins_are_orthogonal_where_the_original_has_them(tiny_models: Path) -> None:
    loras = []
    for number in (0, 1):
        recipe = make_recipe(tiny_models, oa_bin=number, cross_query=True)
        found = orthogonal_loras(recipe.adapter)
        assert all(not lora.down.weight.any() and not lora.up.weight.requires_grad for lora in found.values())
        trained = {id(parameter) for group in recipe.param_groups(None) for parameter in group["params"]}
        assert all(id(lora.down.weight) in trained and id(lora.up.weight) not in trained for lora in found.values())
        ordinary = recipe.adapter.part("cross", PLACE).to_k_lora
        assert ordinary.down.weight.any() and not ordinary.up.weight.any() and id(ordinary.up.weight) in trained
        loras.append(found)
    kinds = [place.rpartition(".")[2] for place in loras[0] if ".attn2." in place]
    assert sorted(set(kinds)) == ["to_out_lora", "to_q_lora"] and len(kinds) == 32 and len(loras[0]) == 32 + 160
    for place, one in loras[0].items():
        first, second = (lora.up.weight @ random(4, 8, name=f"{place} {n}") for n, lora in enumerate((one, loras[1][place])))
        assert (first.T @ second).norm() < 1e-5 * first.norm() * second.norm(), place


def test_a_bin_that_a_layer_lacks_ends_the_run_at_its_start(tiny_models: Path) -> None:
    """The narrowest layer has 32 channels here."""
    with pytest.raises(ValueError, match=r"^oa_bin=8: expected 0\.\.7 for rank 4 and a layer of 32 channels$"):
        make_recipe(tiny_models, oa_bin=8)


def test_orthogonal_adapters_are_checked_before_a_run_starts(tiny_models: Path) -> None:
    model = load_animatediff(tiny_models)
    make_config(CaLora.name, oa_bin=7).check_model(model)
    with pytest.raises(ValueError, match=r"^oa_bin=8: expected 0\.\.7 for rank 4 and a layer of 32 channels$"):
        make_config(CaLora.name, oa_bin=8).check_model(model)
    with pytest.raises(ValueError, match=r"^oa_bin=0: there is none for rank 64 and a layer of 32 channels$"):
        make_config(CaLora.name, oa_bin=0, rank=64).check_model(model)
    with pytest.raises(ValueError, match=r"^oa_bases='nowhere/bases': not a folder on this machine$"):
        make_config(CaLora.name, oa_bin=0, oa_bases="nowhere/bases").check_model(model)


def test_a_folder_of_bases_takes_the_place_of_those_of_the_pack(tiny_models: Path, inputs: Any, tmp_path: Path) -> None:
    bases = tmp_path / "bases"
    bases.mkdir()
    own = {}
    for place, lora in orthogonal_loras(make_recipe(tiny_models).adapter).items():
        own[place] = torch.linalg.qr(random(len(lora.up.weight), len(lora.up.weight), name=place))[0]
        torch.save(own[place], bases / f"{place}.pt")
    model, data = inputs(CaLora.name)
    options = {"steps": 2, "validate_every": 0, "oa_bin": 2, "oa_bases": str(bases), "save_precision": "fp32"}
    job = finish(make_job(tmp_path, model, data, make_config(CaLora.name, **options), CaLora.name), model)
    tensors, _ = load(Path(job.files["adapter"]))
    for place, matrix in own.items():
        assert torch.equal(tensors[f"{place}.up.weight"], matrix[:, 8:12]), place
        assert tensors[f"{place}.down.weight"].any()
    (bases / f"{place}.pt").unlink()
    with pytest.raises(ValueError, match=rf"^oa_bases=.*: has no {place}\.pt$"):
        make_recipe(tiny_models, oa_bin=2, oa_bases=str(bases))


def test_a_run_starts_from_an_adapter_of_its_own_bin_alone(tiny_models: Path, tmp_path: Path) -> None:
    first = make_recipe(tiny_models, oa_bin=1)
    tensors = {key: value.to(torch.bfloat16) for key, value in first.export("adapter").items()}
    save(tmp_path / "first.safetensors", tensors, first.metadata("adapter"))
    again = make_recipe(tiny_models, oa_bin=1, start_from=str(tmp_path / "first.safetensors"))
    for place, lora in orthogonal_loras(first.adapter).items():
        assert torch.equal(orthogonal_loras(again.adapter)[place].up.weight, lora.up.weight), "in full precision"
    with pytest.raises(ValueError, match=r"start_from.*it was not trained with oa_bin=2"):
        make_recipe(tiny_models, oa_bin=2, start_from=str(tmp_path / "first.safetensors"))


# -- Cross-attention over space and time -------------------------------------------------------------------------------------


def nearest(x: Tensor, height: int, width: int) -> Tensor:
    """x [B, F, h, w, C] at another size, each place by the nearest one."""
    rows, columns = x.shape[2:4]
    return x[:, :, [i * rows // height for i in range(height)]][:, :, :, [i * columns // width for i in range(width)]]


@torch.no_grad()
@pytest.mark.parametrize(("mode", "stride"), [*((mode, 1) for mode in MODES), ("none", 2), ("naive", 2), ("rope_3d", 3), ("ropeQKV_1d", 2)])
def test_cross_attention_over_space_and_time(backbone: Any, run: Any, mode: str, stride: int) -> None:  # noqa: F811
    adapter, base = make_adapter(backbone, "a", Query(mode, stride)), spatial_blocks(backbone.unet)[PLACE].attn2
    seen, (prompt,), part = Seen(base), prompts("waterfall"), adapter.part("cross", PLACE)
    run(Playing(adapter, 1.0, prompt))
    seen.handle.remove()
    height, width = 4, 8
    x = seen.inputs[0].view(2, FRAMES, height, width, -1)
    x = nearest(x, height // stride, width // stride)
    # Of sinusoids, whose large angles fp32 rounds, test_adapter_positions has the formula.
    x = with_positions(mode, x) if mode in ("naive", "temporal", "temporal_sine") else before_queries(mode, x).float()
    q = of_queries(mode, base.to_q(x) + update(part, "to_q_lora", x, 1.0)).float()
    k, v = (
        of_tokens(mode, name[-1], getattr(base, name)(prompt) + update(part, f"{name}_lora", prompt, 1.0), FRAMES).float()
        for name in ("to_k", "to_v")
    )
    y = softmax_attention(q.flatten(1, 3), k, v) @ base.to_out[0].weight.T + base.to_out[0].bias
    y = (y + update(part, "to_out_lora", y, 1.0)).view(q.shape)
    torch.testing.assert_close(seen.output, nearest(y, height, width).flatten(0, 1).flatten(1, 2), rtol=1e-3, atol=1e-3)


def test_stride_1_without_positions_is_ordinary(backbone: Any, run: Any) -> None:  # noqa: F811
    """Each frame on its own, by ComfyUI's own layer, gives the same as all frames of a clip together."""
    config = make_config(CaLora.name, train_image=False, train_temporal=False)
    adapter = Adapter(shapes_of(config, backbone.unet, backbone.module["motion"]), 1.0, Query("none", 1)).requires_grad_(False)
    for value in adapter.tensors().values():
        value.zero_()
    torch.testing.assert_close(run(Playing(adapter)), run(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("option", "part"), [("image_query", "train_image"), ("motion_embed", "train_temporal"), ("cross_query", "train_cross")])
def test_an_option_of_a_part_that_is_not_trained_is_refused(option: str, part: str) -> None:
    with pytest.raises(ValueError, match=f"^{option}=True: expected {part} on$"):
        make_config(CaLora.name, **{option: True, part: False})
