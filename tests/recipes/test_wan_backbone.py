"""The Wan backbone and its private model: parity with ComfyUI's own path and with diffusers, and nothing shared."""

import gc
import logging
from pathlib import Path
from typing import Any

import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.memory_management
import comfy.model_base
import comfy.model_management
import comfy.quant_ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import tiny
import torch
from comfy.ldm.wan.model import WanModel
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from kinoloom.trainers import recipes
from kinoloom.trainers.backbones.flow import wan
from kinoloom.trainers.core.data import TrainingData
from kinoloom.trainers.core.lora import LoraGroups
from kinoloom.trainers.core.losses import denoising_loss
from kinoloom.trainers.core.placement import Placement
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.host.attention import TRANSFORMER_OPTIONS, sdpa
from kinoloom.trainers.host.device import compute_dtype
from kinoloom.trainers.host.layers import Rope
from kinoloom.trainers.host.private import Private, load_private
from kinoloom.trainers.host.source import ModelSource
from kinoloom.trainers.wan_lora import WanLora
from safetensors.torch import load_file
from torch import Tensor

from ..runs import (
    NO_DATA,
    TEXT_LENGTH,
    TEXT_WIDTH,
    TOKENS,
    Published,
    finish,
    load_model,
    make_backbone,
    make_batch,
    make_config,
    make_job,
    placements,
    random,
    write_row,
)

X, T = random(2, 16, 3, 4, 6, name="x"), torch.tensor([0.25, 0.9])
CONTEXT = random(2, 12, TEXT_WIDTH, name="context")
NAME = WanLora.name


@pytest.fixture(scope="module")
def file(tiny_models: Path) -> Path:
    return tiny_models / "diffusion_models" / "tiny_wan.safetensors"


@pytest.fixture(scope="module")
def model(file: Path) -> Any:
    return load_model(file)


def predict(backbone: Any, x: Tensor = X, t: Tensor = T, context: Tensor = CONTEXT) -> Tensor:
    with torch.no_grad():
        lengths = torch.full((len(x),), context.shape[1])
        return backbone.predict(x, t, {"prompt_embeds": context, "prompt_length": lengths})


def lora_file(strength: float = 1.0) -> dict[str, Tensor]:
    """A file for core's loader on two layers of the first block."""
    return {
        f"diffusion_model.blocks.0.{layer}.lora_{factor}.weight": strength * random(*shape, name=layer + factor) / 5
        for layer, (rows, columns) in {"self_attn.q": (128, 128), "ffn.0": (256, 128)}.items()
        for factor, shape in {"A": (3, columns), "B": (rows, 3)}.items()
    }


# -- parity ----------------------------------------------------------------------------------------------------------------


def test_prediction_is_that_of_comfyuis_apply_model(model: Any) -> None:
    """Core's sampler sees denoised = x - sigma v, each sample at its own sigma."""
    with torch.inference_mode():
        denoised = model.model.apply_model(X, T, c_crossattn=CONTEXT)
    expected = (X - denoised) / T.view(2, 1, 1, 1, 1)
    actual = predict(make_backbone(model))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected.clone(), rtol=1e-3, atol=1e-4)


def test_prediction_is_that_of_diffusers(file: Path, model: Any) -> None:
    reference = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=16, out_channels=16,
        text_dim=TEXT_WIDTH, freq_dim=256, ffn_dim=256, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=1e-6,
    )  # fmt: skip
    reference.load_state_dict(convert_wan_transformer_to_diffusers(load_file(file)))
    with torch.no_grad():
        expected = reference(X, 1000 * T, CONTEXT, return_dict=False)[0]
    torch.testing.assert_close(predict(make_backbone(model)), expected, rtol=1e-3, atol=1e-4)


def test_a_batch_of_two_is_two_singles(model: Any) -> None:
    backbone = make_backbone(model)
    both = predict(backbone)
    for i in range(2):
        torch.testing.assert_close(
            predict(backbone, X[i : i + 1], T[i : i + 1], CONTEXT[i : i + 1])[0], both[i], rtol=1e-4, atol=1e-5
        )
    swapped = predict(backbone, context=CONTEXT.flip(0))
    assert (swapped - both).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3, "each sample has its own condition"


@pytest.mark.parametrize("layout", [{}, {"skip_reshape": True}, {"skip_reshape": True, "skip_output_reshape": True}])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_cores_basic_one(layout: dict[str, bool], masked: bool) -> None:
    q, k, v = (random(2, n, 24, name=name) for name, n in (("q", 5), ("k", 7), ("v", 7)))
    mask = random(5, 7, name="mask") if masked else None
    if layout.get("skip_reshape"):
        q, k, v = (x.unflatten(-1, (3, 8)).transpose(1, 2) for x in (q, k, v))
    basic = comfy.ldm.modules.attention.attention_basic
    expected = basic(q, k, v, 3, mask=mask, **layout)
    torch.testing.assert_close(sdpa(basic, q, k, v, 3, mask=mask, **layout), expected, rtol=1e-4, atol=1e-5)


def test_a_mask_weighs_the_squared_error(model: Any, tmp_path: Path) -> None:
    shape = (16, 3, 4, 4)
    mask = (random(1, 3, 4, 4, name="mask") > 0).float()
    row = write_row(tmp_path, "clip", "clips", shape, mask={"mask": mask})
    backbone = make_backbone(model)
    recipe = WanLora(backbone, make_config(NAME))
    recipe.start(recipe.phases(recipe.config, NO_DATA)[0])
    batch = make_batch(backbone, TrainingData(str(tmp_path), (row,)))
    rng = Rng(0, "clips", 0)
    [(_, loss)] = recipe.losses(batch, rng)
    t = torch.sigmoid(torch.distributions.Normal(0, 1).icdf(rng.uniform(1)))
    noise = rng.noise_like(batch["latents"])
    context = torch.nn.functional.pad(batch["prompt_embeds"][:, 0], (0, 0, 0, TEXT_LENGTH - TOKENS))
    pred = predict(backbone, (1 - t) * batch["latents"] + t * noise, t, context)
    error = (pred - (noise - batch["latents"])).square()
    assert loss.item() == pytest.approx((error * mask).sum().item() / error.numel(), rel=1e-4)
    assert abs(error.mean().item() / loss.item() - 1) > 0.1


def test_gradients_are_the_same_when_activations_are_recomputed(model: Any, data: TrainingData) -> None:
    backbone = make_backbone(model)
    lora = LoraGroups(backbone.module, seed=0)
    lora.add_group("lora", backbone.lora_targets["all"], 4, 4)
    with torch.no_grad():
        for path, up in lora.factors("lora", "up").items():
            up.copy_(random(*up.shape, name=path))
    batch = make_batch(backbone, data)
    batch["prompt_embeds"] = batch["prompt_embeds"][:, 0]
    parameters = [p for p in backbone.module.parameters() if p.requires_grad]
    assert len(parameters) == 40
    grads = []
    for _ in placements(backbone):
        loss = denoising_loss(backbone, batch, Rng(0, "p", 0), torch.tensor([0.4]))
        grads.append(torch.autograd.grad(loss, parameters))
    assert all(torch.equal(a, b) for a, *others in zip(*grads, strict=True) for b in others)
    assert all(g.abs().max() > 0 for g in grads[0])


# -- which models ----------------------------------------------------------------------------------------------------------


def test_another_architecture_is_refused_by_its_name() -> None:
    config = comfy.supported_models.SD15(
        {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1],
         "channel_mult": [1], "transformer_depth": [1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1],
         "num_heads": 2, "use_spatial_transformer": True, "context_dim": 768, "use_linear_in_transformer": False, "adm_in_channels": None}
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"found BaseModel \(UNetModel\), expected Wan 2.1 text-to-video"):
        wan.Wan.grid(comfy.model_base.BaseModel(config), {})


def test_a_model_that_cannot_be_loaded_again_is_refused(model: Any) -> None:
    other = model.clone()
    other.cached_patcher_init = None
    with pytest.raises(ValueError, match="ModelPatcher.* that cannot be loaded a second time"):
        ModelSource.of(other)


def test_bypass_loras_are_refused(model: Any) -> None:
    bypassed, _ = comfy.sd.load_bypass_lora_for_models(model, None, lora_file(), 1.0, 0)
    with pytest.raises(ValueError, match="carries a bypass LoRA"):
        ModelSource.of(bypassed)


# -- the private copy ------------------------------------------------------------------------------------------------------


def test_upstream_lora_patches_are_merged_and_the_shared_model_is_not_touched(model: Any) -> None:
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora_file(), 0.5, 0)
    private = make_backbone(patched)
    for layer in ("self_attn.q", "ffn.0"):
        key = f"diffusion_model.blocks.0.{layer}"
        update = lora_file()[f"{key}.lora_B.weight"] @ lora_file()[f"{key}.lora_A.weight"]
        merged = private.module.get_submodule(f"blocks.0.{layer}").weight
        torch.testing.assert_close(merged, before[f"{key}.weight"] + 0.5 * update, rtol=1e-4, atol=1e-5)
    plain = make_backbone(model)
    assert torch.equal(plain.module.blocks[0].ffn[0].weight, before["diffusion_model.blocks.0.ffn.0.weight"])
    assert (predict(private) - predict(plain)).abs().max() > 1e-3
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())


def test_the_private_copy_shares_no_storage_and_needs_no_gradient(model: Any) -> None:
    private = make_backbone(model).module
    shared = {p.untyped_storage().data_ptr() for p in model.model.diffusion_model.parameters()}
    again = {p.untyped_storage().data_ptr() for p in make_backbone(model).module.parameters()}
    own = {p.untyped_storage().data_ptr() for p in private.parameters()}
    assert len(own) == len(shared) == len(again) and not own & shared and not own & again
    assert not any(p.requires_grad or p.is_inference() for p in private.parameters())
    assert [name for name, _ in private.named_parameters()] == list(
        dict(model.model.diffusion_model.named_parameters())
    )


def test_identity_changes_with_content_storage_and_patches(file: Path, model: Any, tmp_path: Path) -> None:
    own = ModelSource.of(model).key
    assert ModelSource.of(load_model(file)).key == own
    tiny.write_wan(tmp_path / "copy.safetensors")
    assert ModelSource.of(load_model(tmp_path / "copy.safetensors")).key == own, "a path is no identity"
    tiny.write_wan(tmp_path / "other.safetensors", seed=1)
    others = [load_model(tmp_path / "other.safetensors"), load_model(file, dtype=torch.float8_e4m3fn)]
    for strength, file_strength in ((1.0, 1.0), (0.5, 1.0), (1.0, 2.0)):
        others.append(comfy.sd.load_lora_for_models(model, None, lora_file(file_strength), strength, 0)[0])
    again = comfy.sd.load_lora_for_models(load_model(file), None, lora_file(), 1.0, 0)[0]
    identities = [own, *(ModelSource.of(other).key for other in others)]
    assert len(set(identities)) == len(identities)
    assert ModelSource.of(again).key == identities[3]


def test_a_source_reloads_the_same_model_or_says_why_not(file: Path, model: Any, tmp_path: Path) -> None:
    for options in ({}, {"dtype": torch.float8_e4m3fn}):
        source = ModelSource.of(load_model(file, **options))
        assert ModelSource.of(source.reload()).key == source.key
        assert torch.equal(predict(make_backbone(source)), predict(make_backbone(load_model(file, **options))))
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora_file(), 1.0, 0)
    with pytest.raises(ValueError, match="on a model with LoRAs applied: run its Train node again"):
        ModelSource.of(patched).reload()
    path = tmp_path / "moved.safetensors"
    tiny.write_wan(path)
    source = ModelSource.of(load_model(path))
    tiny.write_wan(path, seed=1)
    with pytest.raises(ValueError, match=r"moved.safetensors: its content changed"):
        source.reload()
    path.unlink()
    with pytest.raises(ValueError, match=r"moved.safetensors: not found"):
        source.reload()


# -- a run beside a working ComfyUI ----------------------------------------------------------------------------------------


def test_the_interrupt_flag_is_neither_consumed_nor_obeyed(model: Any, data: TrainingData, tmp_path: Path) -> None:
    comfy.model_management.interrupt_current_processing(True)
    try:
        job = finish(make_job(tmp_path, model, data, make_config(NAME, steps=2), NAME), model)
        assert comfy.model_management.processing_interrupted(), "the flag belongs to the prompt that was cancelled"
        assert job.done == 2
        with pytest.raises(comfy.model_management.InterruptProcessingException), torch.inference_mode():
            model.model.apply_model(X, T, c_crossattn=CONTEXT)
    finally:
        comfy.model_management.interrupt_current_processing(False)


def test_rotary_embedding_is_the_samplers_own_and_has_the_gradient_of_the_formula() -> None:
    freqs = comfy.ldm.flux.math.rope(torch.arange(6.0)[None], 8, 10000).movedim(1, 1).unsqueeze(2)  # B L 1 d/2 2 2
    x = random(2, 6, 3, 8, name="rope").requires_grad_()
    ours, theirs = Rope.apply(x, freqs), comfy.ldm.flux.math._apply_rope1(x, freqs)
    assert torch.equal(ours, comfy.quant_ops.ck.apply_rope1(x.detach(), freqs))
    weight = random(2, 6, 3, 8, name="weight")
    (mine,), (reference,) = (torch.autograd.grad((out * weight).sum(), x) for out in (ours, theirs))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(mine, reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(recipes()))
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_changes_and_leaves_nothing_in_the_process(
    name: str, fails: bool, own: tuple[Any, TrainingData], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = own

    def explode(job: Any) -> None:
        raise RuntimeError("in the thread")

    gc.collect()
    before = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    models = count_models()
    published = Published().at(1, explode) if fails else Published()
    job = make_job(tmp_path, model, data, make_config(name), name, published)
    with caplog.at_level(logging.CRITICAL + 1):  # a kept log record would keep the traceback and all that it refers to
        finish(job, model, "failed" if fails else "finished")
    assert job.error == ("RuntimeError: in the thread" if fails else "")
    assert not comfy.model_management.in_training
    assert all(torch.equal(weight, before[key]) for key, weight in model.model.state_dict().items())
    assert not model.patches and not model.model.diffusion_model.training
    job = None
    gc.collect()
    assert count_models() == models, "the private copy is freed"


def count_models() -> int:
    return sum(issubclass(type(thing), WanModel) for thing in gc.get_objects())


# -- precision -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("storage", [None, torch.float8_e4m3fn], ids=["fp32 file", "fp8 storage"])
def test_every_precision_and_storage_trains_close_to_fp32(
    precision: str, storage: torch.dtype | None, file: Path, data: TrainingData, tmp_path: Path
) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = load_model(file, **({"dtype": storage} if storage else {}))
    backbone = make_backbone(model, dtype)
    assert backbone.module.blocks[0].ffn[0].weight.dtype == (storage or torch.float32)
    seen = []
    backbone.module.blocks[0].ffn[0].register_forward_hook(
        lambda module, args, out: seen.append((args[0].dtype, out.dtype))
    )
    predict(backbone)
    assert seen == [(dtype, dtype)]

    options = {"steps": 4, "learning_rate": 1e-3, "stratified_timesteps": False}
    job = finish(make_job(tmp_path / "a", model, data, make_config(NAME, precision=precision, **options), NAME), model)
    full = finish(make_job(tmp_path / "b", model, data, make_config(NAME, precision="fp32", **options), NAME), model)
    assert job.losses() == pytest.approx(full.losses(), rel=0.02)
    assert precision == "fp32" or job.losses() != full.losses()


def test_automatic_precision_is_bf16_on_a_cpu_that_multiplies_it() -> None:
    cpu, has = torch.device("cpu"), torch.cpu.get_capabilities()
    fast = has.get("avx512_bf16", False) or has.get("amx_bf16", False)
    assert compute_dtype("auto", cpu) == (torch.bfloat16 if fast else torch.float32)
    assert compute_dtype("fp32", cpu) == torch.float32
    assert compute_dtype("bf16", cpu) == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_equals_torch_with_gradients(dtype: torch.dtype) -> None:
    q, k, v = (random(2, tokens, 4 * 16, name=f"attention {tokens}").to(dtype).requires_grad_() for tokens in (7, 5, 5))
    ours = sdpa(None, q, k, v, heads=4)
    split = [x.float().unflatten(-1, (4, 16)).transpose(1, 2) for x in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(-2)
    tolerance = {"rtol": 0.03, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours.float(), theirs, **tolerance)
    weight = random(2, 7, 64, name="weight")
    for mine, reference in zip(
        torch.autograd.grad((ours.float() * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine.float(), reference.float(), **tolerance)


def test_storage_type_chosen_in_the_loader_holds_under_dynamic_vram(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There ComfyUI leaves weights in the file's type and casts them in a patcher that a private copy does not use."""
    path = tiny_models / "diffusion_models" / "tiny_wan.safetensors"
    model = load_model(path, dtype=torch.float8_e4m3fn)
    usual = make_backbone(model).module
    weights, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)

    def load_again(path: str, options: dict[str, Any], disable_dynamic: bool) -> Any:
        monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)  # its own file reader needs a GPU
        return comfy.sd.load_diffusion_model_state_dict(
            dict(weights), options, metadata=metadata, disable_dynamic=disable_dynamic
        )

    model.cached_patcher_init = (load_again, model.cached_patcher_init[1])
    dynamic = make_backbone(model).module
    expected = {name: (p.dtype, p.float()) for name, p in usual.named_parameters()}
    assert expected["blocks.0.ffn.0.weight"][0] == torch.float8_e4m3fn
    for name, parameter in dynamic.named_parameters():
        assert parameter.dtype == expected[name][0] and torch.equal(parameter.float(), expected[name][1]), name


def test_model_patched_inside_is_refused_by_what_was_patched(model: Any) -> None:
    patched = model.clone()
    patched.add_object_patch("diffusion_model.blocks.1", patched.model.diffusion_model.blocks[0])
    with pytest.raises(ValueError, match=r"the patched part 'diffusion_model\.blocks\.1'"):
        ModelSource.of(patched)
    schedule = model.clone()
    schedule.add_object_patch("model_sampling", model.get_model_object("model_sampling"))
    assert ModelSource.of(schedule).key == ModelSource.of(model).key


def test_matrices_narrowed_once_give_the_bits_of_those_cast_at_every_use(model: Any, data: TrainingData) -> None:
    gradients = []
    for narrowed in (False, True):
        placement = Placement(stored=torch.bfloat16 if narrowed else None)
        private = load_private(model, torch.device("cpu"), placement)
        module = private.diffusion_model
        assert module.blocks[0].ffn[0].weight.dtype == (torch.bfloat16 if narrowed else torch.float32)
        assert module.patch_embedding.weight.dtype == torch.float32, "computed in fp32 by the model"
        backbone = wan.Wan({"model": Private(private, {})}, torch.device("cpu"), torch.bfloat16, TRANSFORMER_OPTIONS)
        recipe = WanLora(backbone, WanLora.Config(rank=4))
        recipe.start(recipe.phases(recipe.config, NO_DATA)[0])
        for path, up in recipe.lora.factors("lora", "up").items():
            up.data.copy_(random(*up.shape, name=path) * 0.1)
        for _, loss in recipe.losses(make_batch(backbone, data), Rng(0, "test", 0)):
            loss.backward()
        gradients.append([p.grad for name in ("down", "up") for p in recipe.lora.factors("lora", name).values()])
    assert all(torch.equal(cast, stored) for cast, stored in zip(*gradients, strict=True))
