"""AnimateDiff: motion modules in ComfyUI's UNet against diffusers, in training and in samplers, and LoRAs on them."""

import math
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.sample
import comfy.samplers
import comfy.supported_models
import comfy.utils
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from diffusers import DDPMScheduler, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from kinoloom.nodes.animatediff import loras as motion_loras
from kinoloom.nodes.animatediff import modules as motion
from kinoloom.trainers.backbones.animatediff import model as animatediff
from kinoloom.trainers.backbones.animatediff.motion_module import Attached, MotionModules, Positions, read
from kinoloom.trainers.core.data import Row, TrainingData
from kinoloom.trainers.core.placement import Placement
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.core.schedules import Ddpm
from kinoloom.trainers.host.attention import TRANSFORMER_OPTIONS
from kinoloom.trainers.host.private import Private, load_private
from kinoloom.trainers.host.source import ModelSource, carried_files, carried_modules
from kinoloom.trainers.motion_director import MotionDirector
from safetensors.torch import load_file, save_file
from tiny import sd as tiny_sd
from torch import Tensor, nn
from torch.nn.functional import group_norm
from toyworld.pack import unet as toy_unet

from ..runs import (
    NO_DATA,
    TEXT_WIDTH,
    load_animatediff,
    load_model,
    make_backbone,
    make_batch,
    make_config,
    motion_lora,
    placements,
    random,
)

SD_WIDTHS, FRAMES, TOKENS = tiny.SD_WIDTHS, 5, 7
X, T = random(2, 4, FRAMES, 8, 16, name="x"), torch.tensor([20, 700])
CONTEXT = random(2, TOKENS, TEXT_WIDTH, name="context")
VERSIONS = {"v3": {}, "v2": {"mid": True}, "v1": {"positions": 24}, "AnimateLCM": {"positions": None}}
POSITIONS = {"v3": 32, "v2": 32, "v1": 24, "AnimateLCM": 64}
NAME = MotionDirector.name
QUERY = "down_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.to_q"
LORA = motion_lora({QUERY: (64, 64)}, 3, "lora")


@pytest.fixture(scope="module")
def folder(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD1.5, and a motion module of every version."""
    folder = tmp_path_factory.mktemp("animatediff")
    (folder / "diffusion_models").symlink_to(tiny_models / "diffusion_models")
    for version, options in VERSIONS.items():
        tiny_sd.write_motion_module(module_file(folder, version), SD_WIDTHS, **options)
    return folder


@pytest.fixture(scope="module")
def applied(folder: Path) -> Any:
    """The MODEL that Apply Motion Module makes with v3."""
    return load_animatediff(folder, "v3")


def module_file(folder: Path, version: str) -> Path:
    return folder / "animatediff_models" / f"{version}.safetensors"


def predict(backbone: Any, x: Tensor = X, t: Tensor = T, context: Tensor = CONTEXT) -> Tensor:
    with torch.no_grad():
        return backbone.predict(x, t, {"prompt_embeds": context})


def image_model(model: Any) -> nn.Module:
    """A private copy of a MODEL's UNet, with nothing attached."""
    return load_private(model, torch.device("cpu")).diffusion_model


def fold(clips: Tensor) -> Tensor:
    """[B C F H W] to [(B F) C H W]."""
    return clips.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def denoise(unet: nn.Module, x: Tensor = X) -> Tensor:
    """What a UNet says of a clip's frames, folded into the batch."""
    count = x.shape[2]
    context, options = CONTEXT.repeat_interleave(count, 0), dict(TRANSFORMER_OPTIONS)
    return unet(fold(x), T.repeat_interleave(count), context, transformer_options=options)


def modules_of(folder: Path, version: str) -> MotionModules:
    layout, tensors = read(load_file(module_file(folder, version)))
    return MotionModules(layout).load(tensors).requires_grad_(False)


def hooks(unet: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


# -- the prediction --------------------------------------------------------------------------------------------------------


class FrameNorm(nn.GroupNorm):
    def forward(self, clips: Tensor) -> Tensor:
        return super().forward(fold(clips)).unflatten(0, (len(clips), -1)).transpose(1, 2)


@pytest.mark.parametrize("version", ["v3", "v2"])
def test_prediction_is_that_of_diffusers(version: str, folder: Path) -> None:
    """Whose motion modules normalise over all frames; AnimateDiff's own code, which made the files, frame by frame."""
    model = load_animatediff(folder, version)
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    weights = load_file(folder / "diffusion_models" / "tiny_sd.safetensors")
    image = UNet2DConditionModel(block_out_channels=SD_WIDTHS, cross_attention_dim=TEXT_WIDTH, attention_head_dim=8)
    image.load_state_dict({theirs: weights[ours] for theirs, ours in names.items() if ours in weights})
    adapter = MotionAdapter(block_out_channels=SD_WIDTHS, use_motion_mid_block=version == "v2")
    converted = convert_animatediff_checkpoint_to_diffusers(load_file(module_file(folder, version)))
    assert not adapter.load_state_dict(converted, strict=False).unexpected_keys
    reference = UNetMotionModel.from_unet2d(image, adapter).eval()
    for module in reference.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            module.norm.__class__ = FrameNorm
    with torch.no_grad():
        expected = reference(X, T, CONTEXT.repeat_interleave(FRAMES, 0), return_dict=False)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(predict(make_backbone(model)), expected, rtol=1e-4, atol=1e-4)


class Placed(nn.Module):
    """A motion module as one more layer of a block."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, FRAMES)


def insert(unet: nn.Module, motion: MotionModules) -> None:
    """AnimateDiff-Evolved's way: the module last in its block, but before an upsampler, and in the middle second."""
    down = [unet.input_blocks[index] for index in (1, 2, 4, 5, 7, 8, 10, 11)]
    middle = [unet.middle_block] if motion.layout.mid else []
    for path, block in zip(motion.layout.modules(), [*down, *middle, *unet.output_blocks], strict=True):
        last = block is unet.middle_block or type(block[-1]).__name__ == "Upsample"
        block.insert(len(block) - 1 if last else len(block), Placed(motion.get_submodule(path)))


@pytest.mark.parametrize(("version", "count"), [("v3", 20), ("v2", 21), ("AnimateLCM", 20)])
def test_hooks_do_what_inserted_layers_do_and_leave_the_unet_as_it_was(
    version: str, count: int, applied: Any, folder: Path
) -> None:
    unet, modules = image_model(applied), modules_of(folder, version)
    keys, plain = list(unet.state_dict()), denoise(unet)
    with Attached(unet, modules) as attached:
        attached.frames = FRAMES
        assert hooks(unet) == count and list(unet.state_dict()) == keys
        hooked = denoise(unet)
    assert hooks(unet) == 0
    assert torch.equal(denoise(unet), plain)
    insert(unet, modules)
    inserted = denoise(unet)
    assert torch.equal(hooked, inserted) and (hooked - plain).abs().max() > 0.1
    moved = {f"output_blocks.{place}.conv.weight" for place in ("2.1", "5.2", "8.2")}
    assert moved <= set(keys) - set(unet.state_dict()), "which is why modules are not inserted"


@pytest.mark.parametrize("version", list(VERSIONS))
def test_a_single_frame_passes_the_motion_modules_by(version: str, folder: Path) -> None:
    model = load_animatediff(folder, version)
    first, backbone = X[:, :, :1], make_backbone(model)
    assert torch.equal(fold(predict(backbone, first)), denoise(image_model(model), first))
    module = modules_of(folder, version).get_submodule("down_blocks.0.motion_modules.0").temporal_transformer
    x = random(1, SD_WIDTHS[0], 4, 4, name="one")
    assert (module(x, 1) - x).abs().max() > 0.1, "it is no identity, so it must be left out"


def test_clips_of_a_batch_do_not_see_each_other(applied: Any) -> None:
    backbone = make_backbone(applied)
    both = predict(backbone)
    for i in range(2):
        one = predict(backbone, X[i : i + 1], T[i : i + 1], CONTEXT[i : i + 1])
        torch.testing.assert_close(one[0], both[i], rtol=1e-4, atol=1e-5)
    other = X.clone()
    other[:, :, -1] = 0
    assert (predict(backbone, other) - both)[:, :, 0].abs().max() > 1e-3, "frames of a clip do"


@pytest.mark.parametrize(("version", "joined"), [("v1", 45), ("v2", 0), ("v3", 0), ("AnimateLCM", 0)])
def test_group_norms_of_v1_and_only_those_see_all_frames(version: str, joined: int, applied: Any, folder: Path) -> None:
    """Those of the 22 ResBlocks and of the output; a transformer's sees frames alone, as in AnimateDiff's code."""
    unet, found = image_model(applied), []
    with Attached(unet, modules_of(folder, version)) as attached, torch.no_grad():
        attached.frames = FRAMES
        for name, norm in ((n, m) for n, m in unet.named_modules() if isinstance(m, nn.GroupNorm)):
            clips = random(2, norm.num_channels, FRAMES, 2, 2, name="clips").cumsum(2)
            form = (norm.num_groups, norm.weight, norm.bias, norm.eps)
            if not torch.allclose(norm(fold(clips)), alone := group_norm(fold(clips), *form), atol=1e-5):
                torch.testing.assert_close(norm(fold(clips)), together := fold(group_norm(clips, *form)))
                assert (together - alone).abs().max() > 0.1
                found.append(name)
    assert len(found) == joined
    assert all(name.split(".")[-2] in ("in_layers", "out_layers") or name == "out.0" for name in found)


def test_positions_are_the_formulas(folder: Path) -> None:
    def value(p: int, c: int) -> float:
        return (math.cos if c % 2 else math.sin)(p * 10000 ** (-(c - c % 2) / 6))

    expected = torch.tensor([[[value(p, c) for c in range(6)] for p in range(40)]])
    torch.testing.assert_close(Positions(6, 40, {"dtype": None, "device": None}).pe, expected, rtol=0, atol=1e-5)


# -- files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", list(VERSIONS))
def test_a_file_of_each_version_is_known_and_read_to_the_bit(version: str, folder: Path) -> None:
    module = motion.load_motion_module(str(module_file(folder, version))).model
    assert (module.layout.version, module.layout.widths) == (version, SD_WIDTHS)
    assert module.layout.positions == POSITIONS[version]
    tensors, loaded = load_file(module_file(folder, version)), module.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())
    assert {key.rpartition(".")[2] for key in loaded.keys() - tensors.keys()} <= {"pe"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_wrappers_prefixes_and_other_entries_are_left_out(wrapped: bool, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(module_file(folder, "v3"))
    named = {f"module.{key}": value for key, value in tensors.items()}
    content = {**named, "module.conv_in.weight": torch.zeros(1), "animatediff_config": {"frames": 16}}
    torch.save({"state_dict": content, "epoch": 3} if wrapped else content, tmp_path / "released.ckpt")
    module = motion.load_motion_module(str(tmp_path / "released.ckpt")).model
    loaded = module.state_dict()
    assert module.layout.version == "v3" and loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())


def without(v3: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: value for key, value in v3.items() if part not in key}


REFUSED = {
    "sd15": (lambda v3: {"cond_stage_model.x": torch.zeros(1), "model.diffusion_model.out.2.bias": torch.zeros(4)},
             "no motion modules in it, but 2 other entries such as cond_stage_model.x"),
    "lora": (lambda v3: LORA, "a motion LoRA, which goes on top of a motion module; use Load Motion LoRA"),
    "sdxl": (lambda v3: without(v3, "blocks.3."), "a motion module with 3 levels, expected the 4 of Stable Diffusion 1.5"),
    "other": (lambda v3: without(v3, "to_q"), "a motion module of another kind than AnimateDiff's v1, v2, v3 or"),
    "short": (lambda v3: without(v3, QUERY), f"a motion module like v3, but 1 entries differ, such as {QUERY}.weight"),
    "wide": (lambda v3: {**v3, f"{QUERY}.weight": torch.zeros(8, 8)}, "a motion module like v3, but 1 entries differ"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(REFUSED))
def test_another_file_is_refused_by_what_it_is(kind: str, folder: Path, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    save_file(make(load_file(module_file(folder, "v3"))), tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=f"motion_module='wrong.safetensors': found {message}"):
        motion.load_motion_module(str(tmp_path / "wrong.safetensors"))


def test_an_empty_file_is_named_once(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match=r"^file .*empty\.safetensors: holds no named tensors, expected a model file$"):
        motion.load_motion_module(str(tmp_path / "empty.safetensors"))


# -- the noise -------------------------------------------------------------------------------------------------------------


def scheduler(betas: str) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule=betas)


def test_training_and_sampling_have_the_linear_betas() -> None:
    linear, scaled = scheduler("linear").alphas_cumprod, scheduler("scaled_linear").alphas_cumprod
    schedule = Ddpm()
    torch.testing.assert_close(schedule.alphas_bar, linear, rtol=1e-4, atol=0)
    assert not torch.allclose(schedule.alphas_bar, scaled, rtol=0.1)
    torch.testing.assert_close(Ddpm(root=True).alphas_bar, scaled, rtol=1e-4, atol=0)
    sigmas = motion.linear_betas().sigmas
    torch.testing.assert_close(sigmas, ((1 - linear) / linear).sqrt(), rtol=1e-4, atol=0)
    assert sigmas[-1].item() == pytest.approx(25.15, abs=0.01), "and not Stable Diffusion's 14.61"
    t = torch.tensor([0, 500, 999])
    assert torch.equal(motion.linear_betas().timestep(sigmas[t]), t)
    assert schedule.timesteps(torch.tensor([1e-4, 0.5, 0.9999])).tolist() == [0, 500, 999]


def test_noise_is_added_as_diffusers_adds_it() -> None:
    noise = random(*X.shape, name="noise")
    ours, theirs = Ddpm().add_noise(X, noise, T), scheduler("linear").add_noise(X, noise, T)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(Ddpm().target(X, noise, T), noise)


# -- sampling --------------------------------------------------------------------------------------------------------------


PROMPTS = {name: random(1, TOKENS, TEXT_WIDTH, name=name) for name in ("positive", "negative")}


def sample(model: Any, frames: int = FRAMES, steps: int = 1, cfg: float = 1.0) -> Tensor:
    """KSampler's result for a batch of `frames` latents."""
    noise = random(frames, 4, 8, 16, name="sample")
    conds = [[[PROMPTS[name], {}]] for name in ("positive", "negative")]
    with torch.inference_mode():
        latents = comfy.sample.sample(
            model, noise, steps, cfg, "euler", "normal", *conds, torch.zeros_like(noise), disable_pbar=True
        )
    return latents.clone()


def around(model: Any, wrapper: Any) -> Any:
    """`model` with a wrapper around its UNet."""
    wrapped = model.clone()
    wrapped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    return wrapped


@pytest.mark.parametrize("version", ["v3", "v1"])
def test_a_sampler_does_what_a_loop_around_the_training_backbone_does(version: str, folder: Path) -> None:
    """Two Euler steps with cfg, a motion LoRA on the module; the loop predicts cond and uncond apart."""
    model = motion_loras.with_motion_lora(load_animatediff(folder, version), LORA, 0.7, "lora")
    backbone, schedule = make_backbone(model), Ddpm()
    start, end = 999, 0  # of KSampler's "normal" with two steps and a last one to zero
    steps = comfy.samplers.calculate_sigmas(motion.linear_betas(), "normal", 2)
    ratio = ((1 - schedule.alphas_bar) / schedule.alphas_bar).sqrt()
    torch.testing.assert_close(steps, torch.stack([ratio[start], ratio[end], torch.tensor(0.0)]), rtol=1e-4, atol=0)
    x = fold(random(FRAMES, 4, 8, 16, name="sample").transpose(0, 1)[None]) * (1 + steps[0] ** 2).sqrt()
    for now, then, t in zip(steps, steps[1:], (start, end), strict=False):
        clip = (x / (1 + now**2).sqrt()).transpose(0, 1)[None]
        positive, negative = (
            predict(backbone, clip, torch.tensor([t]), PROMPTS[name]) for name in ("positive", "negative")
        )
        x = x + (then - now) * fold(negative + 3.0 * (positive - negative))
    torch.testing.assert_close(sample(model, steps=2, cfg=3.0), x / 0.18215, rtol=1e-3, atol=1e-2)


def test_a_longer_batch_is_sampled_in_windows_that_each_begin_at_position_zero(applied: Any) -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def watch(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((x.clone(), executor(x, *args, **kwargs).clone()))
        return calls[-1][1]

    result, backbone = sample(around(applied, watch), frames=40), make_backbone(applied)
    sigma, noise = motion.linear_betas().sigmas[-1], random(40, 4, 8, 16, name="sample")
    total, weights = torch.zeros(40, 4, 8, 16), torch.zeros(40, 1, 1, 1)
    pyramid = torch.tensor([*range(1, 9), *range(8, 0, -1)]).view(-1, 1, 1, 1)
    for (x, out), first in zip(calls, (0, 12, 24), strict=True):
        window = slice(first, first + 16)
        torch.testing.assert_close(x, noise[window], rtol=1e-4, atol=1e-4)
        clip = noise[window].transpose(0, 1)[None]
        expected = fold(predict(backbone, clip, torch.tensor([999]), PROMPTS["positive"]))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        total[window] += pyramid * ((1 + sigma**2).sqrt() * noise[window] - sigma * expected)
        weights[window] += pyramid
    torch.testing.assert_close(result, total / weights / 0.18215, rtol=1e-3, atol=2e-2)


def test_models_that_share_the_unet_or_the_motion_module_are_as_before(folder: Path) -> None:
    base = toy_unet.load(folder / "diffusion_models" / "tiny_sd.safetensors")
    module = motion.load_motion_module(str(module_file(folder, "v3")))
    before, unet = sample(base), base.model.diffusion_model
    applied = motion.ApplyMotionModule.execute(base, module, 16, 4, motion.LINEAR).args[0]
    assert applied.model is base.model and not base.additional_models
    moving = sample(applied)
    assert not torch.allclose(moving, before, atol=0.1)
    patched = motion_loras.with_motion_lora(applied, LORA, 1.0, "lora")
    assert not torch.allclose(sample(patched), moving, atol=1e-3)
    assert torch.equal(sample(applied), moving)
    assert hooks(unet) == 0 and torch.equal(sample(base), before)

    def explode(*_: Any, **__: Any) -> None:
        assert hooks(unet) == 20
        raise RuntimeError("inside the UNet")

    with pytest.raises(RuntimeError, match="inside the UNet"):
        sample(around(applied, explode))
    assert hooks(unet) == 0 and torch.equal(sample(base), before)


def test_applying_another_motion_module_replaces_the_first(applied: Any, folder: Path) -> None:
    module = motion.load_motion_module(str(module_file(folder, "v2")))
    again = motion.ApplyMotionModule.execute(applied, module, 16, 4, motion.LINEAR).args[0]
    assert torch.equal(sample(again), sample(load_animatediff(folder, "v2")))
    assert not torch.allclose(sample(again), sample(applied), atol=1e-2)
    own = load_animatediff(folder, "v3", beta_schedule=motion.KEEP).get_model_object("model_sampling")
    assert own.sigmas[-1].item() == pytest.approx(14.61, abs=0.01)


def test_more_frames_than_positions_are_refused(folder: Path) -> None:
    model = load_animatediff(folder, "v1")
    del model.model_options["context_handler"]  # as a node that sets context windows of its own may do
    with pytest.raises(ValueError, match=r"25 frames.*takes 24 at most"):
        sample(model, frames=25)
    with pytest.raises(ValueError, match="clip of 25 frames, but this motion module takes 24 at most"):
        predict(make_backbone(model), torch.zeros(1, 4, 25, 8, 8), T[:1], CONTEXT[:1])


# -- what fits together ----------------------------------------------------------------------------------------------------


def test_windows_and_motion_modules_that_do_not_fit_are_refused(applied: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"context_length=25: this motion module \(v1\) takes 24 frames at most"):
        load_animatediff(folder, "v1", context_length=25)
    with pytest.raises(ValueError, match="context_overlap=16: expected less than context_length=16"):
        load_animatediff(folder, "v3", context_overlap=16)
    tiny_sd.write_motion_module(tmp_path / "wide.safetensors", (32, 32, 64, 64))
    module = motion.load_motion_module(str(tmp_path / "wide.safetensors"))
    with pytest.raises(ValueError, match="made for 32 channels at down_blocks.1.motion_modules.0, this model has 64"):
        motion.ApplyMotionModule.execute(applied, module, 16, 4, motion.LINEAR)


def test_windows_that_are_set_before_are_kept(applied: Any, folder: Path) -> None:
    handler = object()
    model = applied.clone()
    model.model_options["context_handler"] = handler
    module = motion.load_motion_module(str(module_file(folder, "v3")))
    (again,) = motion.ApplyMotionModule.execute(model, module, 16, 4, motion.LINEAR).args
    assert again.model_options["context_handler"] is handler


def test_a_motion_lora_of_other_shapes_is_refused(applied: Any) -> None:
    lora = motion_lora({QUERY: (48, 32)}, 3, "narrow")
    with pytest.raises(
        ValueError, match=r"narrow: .*to_q is for a layer of \(48, 32\), this motion module's is \(64, 64\)"
    ):
        motion_loras.with_motion_lora(applied, lora, 1.0, "narrow")


def test_models_other_than_sd15_are_refused_by_what_they_are(folder: Path, tiny_models: Path) -> None:
    wan = load_model(tiny_models / "diffusion_models" / "tiny_wan.safetensors")
    module = motion.load_motion_module(str(module_file(folder, "v3")))
    with pytest.raises(ValueError, match="model: predicts FLOW, expected a Stable Diffusion 1.5 model"):
        motion.ApplyMotionModule.execute(wan, module, 16, 4, motion.LINEAR)
    sdxl = comfy.supported_models.SD15(
        {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2],
         "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
         "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_heads": 2, "use_spatial_transformer": True,
         "context_dim": 64, "use_linear_in_transformer": True, "adm_in_channels": None}
    )  # fmt: skip
    with pytest.raises(ValueError, match="a UNet of 9 input and 9 output blocks, 11 spatial transformers, expected"):
        animatediff.check_model(comfy.model_base.BaseModel(sdxl, device=torch.device("meta")))
    inpainting = comfy.model_base.BaseModel(sdxl, device=torch.device("meta"))
    inpainting.diffusion_model.in_channels = 9
    with pytest.raises(ValueError, match="model: takes 9 channels, as inpainting models do, expected 4"):
        animatediff.check_model(inpainting)


def test_data_that_does_not_fit_is_refused_before_a_run(applied: Any) -> None:
    def check(parts: dict[str, nn.Module], *shape: int) -> None:
        animatediff.AnimateDiff.grid(applied.model, parts).check([Row("clip.mp4", "clips", "train", shape, {})])

    with pytest.raises(ValueError, match="model: has no motion module. Put Apply Motion Module before the train node"):
        check({}, 4, 16, 8, 8)
    with pytest.raises(ValueError, match=r"clip.mp4 has 33 frames, but this motion module takes 32 at most"):
        check(carried_modules(applied), 4, 33, 8, 8)
    with pytest.raises(ValueError, match="clip.mp4 has latents of 16 channels, expected 4"):
        check(carried_modules(applied), 16, 5, 8, 8)
    check(carried_modules(applied), 4, 32, 8, 8)


# -- training --------------------------------------------------------------------------------------------------------------


def test_a_private_copy_leaves_the_samplers_random_numbers_alone(applied: Any) -> None:
    before = torch.get_rng_state()
    make_backbone(applied)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [NAME])
def test_gradients_under_dropout_are_the_same_when_activations_are_recomputed(
    name: str, model: Any, data: TrainingData
) -> None:
    recipe = MotionDirector(make_backbone(model), make_config(name, dropout=0.3, spatial_off_prob=0.0))
    recipe.start(recipe.phases(recipe.config, NO_DATA)[0])
    with torch.no_grad():
        for group in ("spatial", "temporal"):
            for path, up in recipe.lora.factors(group, "up").items():
                up.copy_(random(*up.shape, name=path) / 10)
    batch, found = make_batch(recipe.backbone, data), []
    parameters = [p for p in recipe.backbone.module.parameters() if p.requires_grad]
    for _ in placements(recipe.backbone):
        for _, loss in recipe.losses(batch, Rng(0, "clips", 0)):
            loss.backward()
        found.append([p.grad for p in parameters])
        recipe.backbone.module.zero_grad(set_to_none=True)
    assert len(parameters) == 2 * (192 + 200) and all(grad.abs().max() > 0 for grad in found[0])
    assert all(torch.equal(plain, again) for plain, *others in zip(*found, strict=True) for again in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_weights_are_kept_in_half_precision_and_lora_factors_in_fp32(dtype: torch.dtype, applied: Any) -> None:
    cpu, full = torch.device("cpu"), make_backbone(applied)
    private, parts = load_private(applied, cpu, Placement(stored=dtype)), carried_files(applied)
    backbone = animatediff.AnimateDiff({"model": Private(private, parts)}, cpu, dtype, TRANSFORMER_OPTIONS)
    matrices = {name: p.dtype for name, p in backbone.module.named_parameters() if p.ndim in (2, 4)}
    assert set(matrices.values()) == {dtype}
    assert {name.split(".")[0] for name in matrices} == {"unet", "motion"}
    half, exact = predict(backbone), predict(full)
    assert half.dtype == dtype
    assert (half.float() - exact).norm() < 0.1 * exact.norm()
    recipe = MotionDirector(backbone, make_config(NAME))
    recipe.start(recipe.phases(recipe.config, NO_DATA)[0])
    trained = [p for p in backbone.module.parameters() if p.requires_grad]
    assert len(trained) == 2 * (192 + 200) and {p.dtype for p in trained} == {torch.float32}


# -- where a run's model comes from ----------------------------------------------------------------------------------------


def test_identity_changes_with_the_motion_module_and_the_loras_on_it(
    applied: Any, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "diffusion_models").symlink_to(folder / "diffusion_models")
    tiny_sd.write_motion_module(module_file(tmp_path, "copy"), SD_WIDTHS)
    tiny_sd.write_motion_module(module_file(tmp_path, "other"), SD_WIDTHS, seed=1)
    own = ModelSource.of(applied).key
    assert ModelSource.of(load_animatediff(tmp_path, "copy")).key == own, "a path is no identity"
    base = toy_unet.load(folder / "diffusion_models" / "tiny_sd.safetensors")
    others = [
        base,
        load_animatediff(tmp_path, "other"),
        motion_loras.with_motion_lora(applied, LORA, 1.0, "lora"),
        motion_loras.with_motion_lora(applied, LORA, 0.5, "lora"),
        motion_loras.with_motion_lora(applied, motion_lora({QUERY: (64, 64)}, 3, "other"), 1.0, "lora"),
    ]
    identities = [own, *(ModelSource.of(other).key for other in others)]
    assert len(set(identities)) == len(identities)


def test_a_run_goes_on_from_its_files_unless_loras_were_on_them(tmp_path: Path) -> None:
    """At the full width of 320, the only one that ComfyUI's own loader knows."""
    widths = (320, 320, 320, 320)
    weights = tiny_sd.unet(tiny_sd.Weights(0), widths, TEXT_WIDTH)
    save_file({key: value.half() for key, value in weights.items()}, tmp_path / "sd.safetensors")
    tiny_sd.write_motion_module(tmp_path / "mm.safetensors", widths)
    base, module = load_model(tmp_path / "sd.safetensors"), motion.load_motion_module(str(tmp_path / "mm.safetensors"))
    model = motion.ApplyMotionModule.execute(base, module, 16, 4, motion.LINEAR).args[0]
    source = ModelSource.of(model)
    x = (X[:1, :, :2, :8, :8], T[:1], CONTEXT[:1])
    assert torch.equal(predict(make_backbone(source), *x), predict(make_backbone(model), *x))
    patched = motion_loras.with_motion_lora(model, motion_lora({QUERY: (320, 320)}, 3, "wide"), 1.0, "lora")
    with pytest.raises(ValueError, match="on a model with LoRAs applied: run its Train node again"):
        ModelSource.of(patched).require_reloadable()
    with open(tmp_path / "mm.safetensors", "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="its content changed since the run was started"):
        source.reload()
    (tmp_path / "mm.safetensors").unlink()
    with pytest.raises(ValueError, match="mm.safetensors: not found"):
        source.reload()
