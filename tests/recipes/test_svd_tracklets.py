"""Tracklet control: the modules against GLIGEN's, each phase's trained layers and data, control in ComfyUI's sampler."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.gligen
import comfy.model_management
import comfy.sample
import pytest
import torch
from comfy.context_windows import IndexListContextWindow
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from diffusers.models.attention import GatedSelfAttentionDense
from kinoloom.lora_io.file import load
from kinoloom.nodes.tracklets import control as control_nodes
from kinoloom.nodes.training import registry as jobs
from kinoloom.trainers.conditions.tracklet_control import (
    Controlled,
    Fuser,
    PositionNet,
    TrackletControl,
    fourier,
    read,
    widths_of,
)
from kinoloom.trainers.conditions.tracklets import Keyframe, Tracklet, Tracklets, to_tensors
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.host.source import ModelSource
from kinoloom.trainers.svd_tracklets import CLEAN, PAINTED, SvdTracklets, box_weights, soften
from torch import Tensor, nn

from ..runs import (
    NO_DATA,
    assert_same,
    finish,
    leaves,
    load_svd,
    load_tiny,
    make_backbone,
    make_batch,
    make_config,
    make_job,
    placements,
    random,
    state_of,
    write_data,
)
from .test_svd import SIGMA, conditions

pytestmark = pytest.mark.slow

NAME, FRAMES = SvdTracklets.name, 3
PATH = Tracklets(
    128, 64, FRAMES,
    (Tracklet(1, "a", "#ff0000", (Keyframe(0, (0.0, 0.0, 0.3, 0.5)), Keyframe(2, (0.6, 0.4, 0.9, 0.9)))),),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> Any:
    return load_svd(tiny_models)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_data(tmp_path_factory.mktemp("data"), "svd", roles=("train",))


def new_recipe(model: Any, phase: int = 0, **options: Any) -> SvdTracklets:
    recipe = SvdTracklets(make_backbone(model), make_config(NAME, **options))
    recipe.start(recipe.phases(recipe.config, NO_DATA)[phase])
    return recipe


def opened(control: TrackletControl) -> TrackletControl:
    """With open gates, a null token, and no weight at rest."""
    with torch.no_grad():
        for name, parameter in control.named_parameters():
            parameter.copy_(random(*parameter.shape, name=name) * 0.2 + (0.5 if "alpha" in name else 0))
    return control


# -- modules -----------------------------------------------------------------------------------------------------------------


def test_positions_are_gligen_s_fourier_features() -> None:
    """Fact 13: 112 numbers by band, then sine and cosine, then coordinate."""
    x = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    ours = fourier(x)
    assert ours.shape == (5, 112) and torch.allclose(ours, comfy.gligen.FourierEmbedder(8, 100)(x), atol=1e-6)


@pytest.mark.parametrize("numbers", [7, 8])
def test_a_masked_slot_is_the_null_token(numbers: int) -> None:
    net = PositionNet(numbers, nn, {})
    nn.init.normal_(net.null_position_feature)
    boxes, mask = torch.rand(2, 20, 8), torch.zeros(2, 20)
    mask[0, 3] = 1
    tokens = net(boxes, mask, torch.float32)
    null = net.linears(net.null_position_feature)
    assert tokens.shape == (2, 20, 1024)
    assert torch.allclose(tokens[mask == 0], null.expand(39, -1), atol=1e-6)
    assert torch.allclose(tokens[0, 3], net.linears(fourier(boxes[0, 3, :numbers])), atol=1e-6)


def test_a_fuser_is_gligen_s_gated_attention() -> None:
    """Fact 14: with the names of the released weights, against diffusers' module."""
    theirs, ours = GatedSelfAttentionDense(128, 1024, 2, 64), Fuser(128, nn, {})
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for fuser in (theirs, ours):
            fuser.alpha_attn.fill_(0.4)
            fuser.alpha_dense.fill_(-0.7)
    x, tokens = random(2, 6, 128, name="x"), random(2, 20, 1024, name="tokens")
    assert torch.allclose(x + ours(x, tokens), theirs(x, tokens), atol=1e-5)


def test_a_new_control_changes_no_bit(model: Any) -> None:
    plain, controlled = make_backbone(model), new_recipe(model)
    x = random(2, 4, FRAMES, 8, 16, name="x")
    with torch.no_grad():
        before = plain.predict(x, SIGMA, conditions())
        controlled.controlled.boxes, controlled.controlled.mask = torch.rand(6, 20, 8), torch.ones(6, 20)
        assert torch.equal(controlled.backbone.predict(x, SIGMA, conditions()), before)


def test_the_control_stands_between_self_and_cross_attention_of_spatial_blocks_alone(model: Any) -> None:
    """The hooks against ComfyUI's own place for it, middle_patch, which temporal blocks have too."""
    backbone = make_backbone(model)
    unet, rows = backbone.module, 2 * FRAMES
    control = opened(TrackletControl(widths_of(unet)))
    boxes, mask = torch.rand(rows, 20, 8), (torch.rand(rows, 20) < 0.3).float()
    paths, calls = list(control.fusers), []

    def patch(x: Tensor, options: dict) -> Tensor:
        calls.append(x.shape)
        if len(calls) % 2 == 0:
            return x
        tokens = control.position_net(boxes, mask, x.dtype)
        return x + control.fusers[paths[len(calls) // 2]](x, tokens)

    x = random(2, 4, FRAMES, 8, 16, name="x")
    with torch.no_grad():
        before = backbone.predict(x, SIGMA, conditions())
        with Controlled(unet, control) as controlled:
            controlled.boxes, controlled.mask = boxes, mask
            ours = backbone.predict(x, SIGMA, conditions())
        backbone.transformer_options = {**backbone.transformer_options, "patches": {"middle_patch": [patch]}}
        theirs = backbone.predict(x, SIGMA, conditions())
    assert len(control.fusers) == 16 and len(calls) == 32
    assert torch.allclose(ours, theirs, atol=1e-5) and (ours - before).abs().max() > 1e-2


# -- training ----------------------------------------------------------------------------------------------------------------


def test_what_is_trained(model: Any, data: Any) -> None:
    """Fact 15: fusers, position net, time mixers, first and last layer, in fp32; with a gradient once a gate is open."""
    recipe = new_recipe(model)
    opened(recipe.control)
    trainable = {name for name, p in recipe.backbone.module.named_parameters() if p.requires_grad}
    assert trainable == set(recipe._trained())
    base = [name for name in trainable if not name.startswith("tracklet_control.")]
    assert sum("time_mixer" in name for name in base) == 38 and len(base) == 38 + 4
    ((_, loss),) = recipe.losses(make_batch(recipe.backbone, data), Rng(0, PAINTED, 0))
    assert leaves(loss) == set(recipe._trained().values())


@pytest.mark.parametrize("phase", [0, 1])
def test_self_tracking_learns_the_painted_clip_and_then_the_clean_one(model: Any, data: Any, phase: int) -> None:
    recipe = new_recipe(model, phase)
    batch = make_batch(recipe.backbone, data)
    seen = []
    recipe.backbone.predict = lambda noisy, t, given: seen.append((noisy, t, given)) or torch.zeros_like(noisy)
    list(recipe.losses(batch, Rng(0, "x", 5)))
    (noisy, t, given) = seen[0]
    noise = Rng(0, "x", 5).noise_like(noisy)
    target = noisy - t.view(-1, 1, 1, 1, 1) * noise
    scaled = recipe.backbone.process_latent_in(batch["painted"][0])
    expected = [*scaled] if phase == 0 else [batch["latents"][0]]
    assert any(torch.allclose(target[0], latents, atol=1e-3) for latents in expected)
    assert any(
        torch.equal(given["first_frame"][0], frame) or not given["first_frame"].any()
        for frame in batch["first_frames"][0]
    )
    colors = recipe.controlled.boxes[:, :, 4:7]
    assert any(torch.equal(colors, deal.expand(FRAMES, -1, -1)) for deal in batch["colors"][0])


def test_colours_and_target_come_from_one_deal(model: Any, data: Any) -> None:
    recipe = new_recipe(model)
    batch = make_batch(recipe.backbone, data)
    pairs = set()
    for sample in range(12):

        def keep(noisy: Tensor, t: Tensor, given: dict, sample: int = sample) -> Tensor:
            target = noisy - t.view(-1, 1, 1, 1, 1) * Rng(0, "x", sample).noise_like(noisy)
            scaled = recipe.backbone.process_latent_in(batch["painted"][0])
            deal = int((scaled - target).flatten(1).abs().mean(1).argmin())
            pairs.add((deal, torch.equal(recipe.controlled.boxes[0, :, 4:7], batch["colors"][0, deal])))
            return torch.zeros_like(noisy)

        recipe.backbone.predict = keep
        list(recipe.losses(batch, Rng(0, "x", sample)))
    assert pairs == {(0, True), (1, True)}


def test_checkpointing_carries_the_boxes(model: Any, data: Any) -> None:
    """Fact 12."""
    recipe = new_recipe(model)
    opened(recipe.control)
    gradients = []
    for _ in placements(recipe.backbone):
        recipe.backbone.module.zero_grad(set_to_none=True)
        ((_, loss),) = recipe.losses(make_batch(recipe.backbone, data, size=2), Rng(0, PAINTED, 0))
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in recipe._trained().items()})
    for name, plain in gradients[0].items():
        assert all(torch.equal(plain, recomputed[name]) for recomputed in gradients[1:]), name
    assert gradients[0]["tracklet_control.position_net.linears.0.weight"].abs().max() > 0


def test_soft_boxes_hold_the_hard_ones() -> None:
    boxes, _ = to_tensors(PATH)
    boxes = boxes[None].repeat(200, 1, 1, 1)
    soft = soften(boxes, 0.8, Rng(0, "x", 0))
    marked = soft[:, :, 0, 7] == 0
    assert abs(float(marked.float().mean()) - 0.8) < 0.05
    assert torch.equal(soft[:, :, 0][~marked], boxes[:, :, 0][~marked])
    wide, hard = soft[:, :, 0][marked], boxes[:, :, 0][marked]
    assert (wide[:, :2] <= hard[:, :2]).all() and (wide[:, 2:4] >= hard[:, 2:4]).all() and wide[:, :4].min() >= 0
    sides = hard[:, 2:4] - hard[:, :2]
    assert (hard[:, :2] - wide[:, :2] <= 0.5 * sides + 1e-6).all() and torch.equal(wide[:, 4:7], hard[:, 4:7])
    assert torch.equal(soften(boxes, 0.0, Rng(0, "x", 0)), boxes)


def test_a_box_weighs_more_and_the_mean_stays() -> None:
    boxes, mask = torch.zeros(1, 2, 20, 8), torch.zeros(1, 2, 20)
    boxes[0, 0, 0, :4] = torch.tensor([0.5, 0.0, 1.0, 1.0])
    mask[0, 0, 0] = 1
    weights = box_weights(boxes, mask, (4, 8), 3.0)
    assert weights.shape == (1, 1, 2, 4, 8) and torch.isclose(weights.mean(), torch.tensor(1.0))
    assert torch.allclose(weights[0, 0, 0, :, 4:] / weights[0, 0, 0, :, :4], torch.tensor(3.0))
    assert torch.allclose(weights[0, 0, 1], weights[0, 0, 0, 0, 0].expand(4, 8))


def test_a_phase_without_steps_is_left_out_and_none_at_all_refused() -> None:
    phases = SvdTracklets.phases(make_config(NAME, self_tracking_steps=0), NO_DATA)
    assert [phase.name for phase in phases] == [CLEAN]
    with pytest.raises(ValueError, match="self_tracking_steps=0 and clean_steps=0: expected steps"):
        make_config(NAME, self_tracking_steps=0, clean_steps=0)


# -- sampling ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0.0, 0.8], ids=["hard", "soft"])
def trained(request: pytest.FixtureRequest, model: Any, data: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run, and its file."""
    options = {
        "soft_boxes": request.param,
        "learning_rate": 0.02,
        "clean_learning_rate": 0.02,
        "save_precision": "fp32",
        "validate_every": 0,
    }
    job = finish(make_job(tmp_path_factory.mktemp("run"), model, data, make_config(NAME, **options), NAME), model)
    return job, Path(job.result_files[-1])


def applied(model: Any, path: Path, tracklets: Tracklets = PATH) -> Any:
    with torch.inference_mode():
        control = control_nodes.load_control(str(path))
        return control_nodes.ApplyTracklets.execute(model, control, tracklets).args[0]


def denoise(model: Any, halves: list[int], frames: int = FRAMES, options: dict | None = None) -> Tensor:
    """v of the MODEL's UNet, called as samplers call it, [halves, frames, 4, 8, 16]."""
    comfy.model_management.load_models_gpu([model, *model.get_additional_models()])
    rows = len(halves) * frames
    x = random(frames, 8, 8, 16, name="x").repeat(len(halves), 1, 1, 1)
    transformer_options = comfy.model_patcher.create_model_options_clone(model.model_options)["transformer_options"]
    transformer_options |= {"wrappers": copy.copy(model.wrappers), "cond_or_uncond": halves, **(options or {})}
    with torch.inference_mode():
        v = model.model.diffusion_model(
            x, torch.full((rows,), 0.3), context=random(1, 1, 1024, name="c").expand(rows, -1, -1),
            y=random(1, 768, name="y").expand(rows, -1), num_video_frames=frames, transformer_options=transformer_options,
        )  # fmt: skip
    return v.unflatten(0, (len(halves), frames))


def expected(model: Any, job: Any, boxes: Tensor, mask: Tensor) -> Tensor:
    """The same of the training model, with its state."""
    recipe = new_recipe(model, 1, soft_boxes=job.config.soft_boxes)
    recipe.load_state_dict(state_of(job).recipe)
    recipe.controlled.boxes, recipe.controlled.mask = boxes, mask
    x, frames = random(len(boxes), 8, 8, 16, name="x"), len(boxes)
    with torch.no_grad():
        return recipe.backbone.module(
            x, torch.full((frames,), 0.3), context=random(1, 1, 1024, name="c").expand(frames, -1, -1),
            y=random(1, 768, name="y").expand(frames, -1), num_video_frames=frames,
            transformer_options=dict(recipe.backbone.transformer_options),
        )  # fmt: skip


def test_the_file_controls_in_comfyui_as_in_training(model: Any, trained: Any) -> None:
    job, path = trained
    tensors, metadata = load(path)
    widths, numbers, base = read(tensors)
    assert len(widths) == 16 and len(base) == 42 and numbers == (8 if job.config.soft_boxes else 7)
    assert {key for key in tensors if "fuser" not in key and "position_net" not in key} == set(base)
    boxes, mask = to_tensors(PATH)
    with_boxes, without = (expected(model, job, boxes, m) for m in (mask, 0 * mask))
    assert (with_boxes - without).abs().max() > 1e-3
    both = denoise(applied(model, path), [0, 1])
    assert torch.allclose(both[0], with_boxes, atol=2e-5) and torch.allclose(both[1], without, atol=2e-5)
    for halves, value in (([1, 0], (without, with_boxes)), ([0], (with_boxes,)), ([1], (without,))):
        assert torch.allclose(denoise(applied(model, path), halves), torch.stack(value), atol=2e-5)


def test_a_model_without_the_node_is_as_before(model: Any, trained: Any) -> None:
    before = denoise(model, [0])
    denoise(applied(model, trained[1]), [0])
    model.model.current_patcher = None
    comfy.model_management.unload_all_models()
    assert torch.equal(denoise(model, [0]), before)


@pytest.mark.parametrize("anchor", [-1, 0])
def test_context_windows_get_their_own_boxes(model: Any, trained: Any, anchor: int) -> None:
    """Frames of ComfyUI's own windows of a longer clip, which may have an anchor before them."""
    job, path = trained
    window = IndexListContextWindow([2, 3] if anchor >= 0 else [2, 3, 4], total_frames=6)
    if anchor >= 0:
        window.causal_anchor_index = anchor
    frames = window.get_tensor(torch.arange(6)).tolist()
    assert frames == ([0, 2, 3] if anchor >= 0 else [2, 3, 4])
    boxes, mask = (value[frames] for value in to_tensors(PATH, 6))
    here = denoise(applied(model, path), [0], options={"context_window": window})
    assert torch.allclose(here[0], expected(model, job, boxes, mask), atol=2e-5)


def test_the_sampler_controls_a_clip_in_context_windows(model: Any, trained: Any) -> None:
    """ComfyUI's sampler with boxes gives other videos than without."""
    _, path = trained
    videos = []
    for tracklets in (PATH, replace(PATH, tracklets=())):
        windowed = ContextWindowsManualNode.execute(
            applied(model, path, tracklets), context_length=3, context_overlap=1, context_schedule="standard_static",
            context_stride=1, closed_loop=False, fuse_method="pyramid", dim=0, freenoise=False,
            cond_retain_index_list="", split_conds_to_windows=False, causal_window_fix=False,
        ).result[0]  # fmt: skip
        latents = torch.zeros(5, 4, 8, 16)
        numbers = {"motion_bucket_id": 127, "fps": 7, "augmentation_level": 0.0}
        given = [
            [[random(1, 1, 1024, name="c") * s, {**numbers, "concat_latent_image": random(1, 4, 8, 16, name="i") * s}]]
            for s in (1, 0)
        ]
        with torch.inference_mode():
            noise = comfy.sample.prepare_noise(latents, 1)
            videos.append(comfy.sample.sample(windowed, noise, 1, 2.0, "euler", "karras", *given, latents))
    assert all(video.shape == (5, 4, 8, 16) and video.isfinite().all() for video in videos)
    assert not torch.allclose(*videos, atol=1e-4)


def test_time_mixers_are_at_work_only_in_the_forward(model: Any, trained: Any) -> None:
    """Time mixers are not set by patches, because dynamic VRAM applies those only to layers."""
    _, path = trained
    with_control = applied(model, path)
    assert not any("mix_factor" in key for key in with_control.patches) and len(with_control.patches) == 4
    tensors = load(path)[0]
    unet, seen = model.model.diffusion_model, []
    mixer = next(name for name in tensors if name.endswith("mix_factor"))
    before = unet.get_parameter(mixer).clone()
    hook = unet.out.register_forward_hook(lambda *_: seen.append(unet.get_parameter(mixer).clone()))
    denoise(with_control, [0])
    hook.remove()
    assert torch.allclose(seen[0], tensors[mixer].float()) and not torch.equal(seen[0], before)
    assert torch.equal(unet.get_parameter(mixer), before)


def test_each_phase_has_its_own_rate(model: Any, data: Any, tmp_path: Path) -> None:
    """Fact 15: 2e-4 for self-tracking, 3e-5 after it."""
    defaults = SvdTracklets.Config()
    assert (defaults.learning_rate, defaults.clean_learning_rate) == (2e-4, 3e-5)
    options = {"self_tracking_steps": 1, "clean_steps": 1, "lr_schedule": "constant", "validate_every": 0}
    config = make_config(NAME, **options, learning_rate=2e-4, clean_learning_rate=3e-5)
    job = finish(make_job(tmp_path, model, data, config, NAME), model)
    rates = [(event["phase"], event["learning_rate"]) for event in job.history if event["event"] == "step"]
    assert rates == [(PAINTED, 2e-4), (CLEAN, 3e-5)]


def test_a_run_goes_on_from_a_control_file(model: Any, trained: Any, data: Any, tmp_path: Path) -> None:
    """With a learning rate of zero the clean phase does not change the control."""
    job, file = trained
    options = {"self_tracking_steps": 0, "clean_steps": 1, "clean_learning_rate": 0.0, "save_precision": "fp32"}
    other_boxes = 0.0 if job.config.soft_boxes else 0.8
    config = make_config(NAME, **options, soft_boxes=job.config.soft_boxes, control_file=str(file))
    again = finish(make_job(tmp_path / "again", model, data, config, NAME), model)
    assert_same(load(Path(again.result_files[-1]))[0], load(file)[0])
    config = make_config(NAME, **options, soft_boxes=other_boxes, control_file=str(file))
    refused = finish(make_job(tmp_path / "refused", model, data, config, NAME), model, "failed")
    assert f"control_file={file.name!r}: was trained with soft_boxes" in refused.error


def test_soft_boxes_on_a_control_that_knows_none_are_said(
    model: Any, trained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (box,) = PATH.tracklets
    soft_key = replace(box, keyframes=(box.keyframes[0], replace(box.keyframes[1], hard=False)))
    for tracklets, soft in (
        (PATH, False),
        (replace(PATH, interpolated="soft"), True),
        (replace(PATH, tracklets=(soft_key,)), True),
    ):
        caplog.clear()
        applied(model, trained[1], tracklets)
        assert ("takes soft boxes for hard ones" in caplog.text) == (soft and not trained[0].config.soft_boxes)


def test_a_control_for_another_model_and_other_files_are_refused(tiny_models: Path, model: Any, trained: Any) -> None:
    with torch.inference_mode():
        control = control_nodes.load_control(str(trained[1]))
        del control[0].model.fusers["middle_block/1"]
        with pytest.raises(ValueError, match="control: made for a model of 15 transformers.*this one has 16"):
            control_nodes.ApplyTracklets.execute(model, control, PATH)
        with pytest.raises(ValueError, match="expected Stable Video Diffusion"):
            control_nodes.ApplyTracklets.execute(load_tiny(tiny_models, "wan"), control, PATH)
    with pytest.raises(ValueError, match="tiny_svd.safetensors.*no position_net and fusers"):
        control_nodes.load_control(str(tiny_models / "diffusion_models" / "tiny_svd.safetensors"))


def test_a_model_with_tracklets_applied_is_refused_by_training(
    model: Any, trained: tuple[SvdTracklets, Path], tmp_path: Path
) -> None:
    """Its layers would be merged and its boxes dropped."""
    controlled = applied(model, trained[1])
    with pytest.raises(ValueError, match="carries the model 'tracklet_control', the diffusion_model wrapper"):
        ModelSource.of(controlled)


def test_only_a_run_s_file_is_taken_by_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jobs, "_registry", jobs.Registry(tmp_path))
    with pytest.raises(ValueError, match="path='/etc/passwd': expected the file of a training run"):
        control_nodes.LoadTrackletControl.execute("none", "/etc/passwd")
