"""MotionDirector against its paper and other programs: losses, trained factors, presets, adapter, files, merging."""

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.lora
import comfy.sd
import comfy.utils
import pytest
import torch
from kinoloom.lora_io.file import load, save
from kinoloom.lora_io.keys import from_motion_lora
from kinoloom.nodes.animatediff import loras as motion_loras
from kinoloom.trainers.backbones.animatediff.motion_module import PART
from kinoloom.trainers.core.data import TrainingData
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.host.source import carried_modules
from kinoloom.trainers.motion_director import MotionDirector, temporal_loss
from kinoloom.trainers.run.job import Job
from torch import Tensor

from ..runs import (
    NO_DATA,
    finish,
    leaves,
    make_backbone,
    make_batch,
    make_config,
    make_job,
    random,
    state_of,
    write_row,
)

pytestmark = pytest.mark.slow

NAME = MotionDirector.name
SHAPE, PHOTO = (4, 6, 8, 8), (4, 1, 8, 8)  # more frames than channels
ALPHA, RANK = 2.0, 4


@pytest.fixture(scope="module")
def model(inputs: Callable[[str], Any]) -> Any:
    return inputs(NAME)[0]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    """Two clips and nothing else."""
    return write_clips(tmp_path_factory.mktemp("clips"), SHAPE, SHAPE)


@pytest.fixture(scope="module")
def adapter(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AnimateDiff's domain adapter in its own names: every attention layer of the image model, no alpha."""
    tensors = {}
    for path, key in attention_keys(model).items():
        weight = model.model.diffusion_model.get_parameter(key)
        name = re.sub(r"\.(to_\w+)(\.0)?\.weight", r".processor.\1_lora", path)
        tensors[f"{name}.down.weight"] = random(3, weight.shape[1], name=f"{name} down") / 10
        tensors[f"{name}.up.weight"] = random(weight.shape[0], 3, name=f"{name} up") / 10
    assert len(tensors) == 2 * 128
    file = tmp_path_factory.mktemp("adapter") / "v3_sd15_adapter.ckpt"
    torch.save({"state_dict": tensors, "animatediff_config": {"rank": 3}}, file)
    return file


@pytest.fixture(scope="module")
def run(model: Any, clips: TrainingData, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A short run with the adapter, at a scale other than one, its files in fp32."""
    options = {"alpha": ALPHA, "save_precision": "fp32", "domain_adapter": str(adapter)}
    return trained(tmp_path_factory.mktemp("run"), model, clips, **options)


def trained(folder: Path, model: Any, data: TrainingData, **options: Any) -> Job:
    config = make_config(NAME, **{"steps": 2, "validate_every": 0, "spatial_off_prob": 0.0, **options})
    config.check_data(data)
    return finish(make_job(folder, model, data, config, NAME), model)


def write_clips(folder: Path, *shapes: tuple[int, ...], role: str = "train") -> TrainingData:
    rows = [write_row(folder, f"{role}-{i}", "clips", shape, role) for i, shape in enumerate(shapes)]
    return TrainingData(str(folder), tuple(rows))


def attention_keys(model: Any) -> dict[str, str]:
    """Diffusers' names of the image model's attention weights, and ComfyUI's."""
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    return {path: key for path, key in names.items() if re.search(r"\.attn[12]\.to_(q|k|v|out\.0)\.weight", path)}


def started(model: Any, **options: Any) -> MotionDirector:
    """The method at its first step, with factors that are not at their start values."""
    recipe = MotionDirector(make_backbone(model), make_config(NAME, **options))
    recipe.start(recipe.phases(recipe.config, NO_DATA)[0])
    with torch.no_grad():
        for group in recipe.lora.active:
            for path, up in recipe.lora.factors(group, "up").items():
                up.copy_(random(*up.shape, name=path) / 10)
    return recipe


def watch(recipe: MotionDirector, cheap: bool = False) -> list[SimpleNamespace]:
    """Record the backbone's calls and the active LoRAs. A `cheap` backbone returns invented predictions."""
    calls, real = [], recipe.backbone.predict

    def predict(x: Tensor, t: Tensor, batch: dict[str, Any]) -> Tensor:
        pred = 0.5 * x if cheap else real(x, t, batch)
        calls.append(SimpleNamespace(x=x, t=t, active=set(recipe.lora.active), pred=pred.detach()))
        return pred

    recipe.backbone.predict = predict
    return calls


def parameters(recipe: MotionDirector, *groups: str) -> set[Tensor]:
    return {p for group in groups for factor in ("down", "up") for p in recipe.lora.factors(group, factor).values()}


def frame_of(frames: Tensor, single: Tensor) -> int:
    """Which frame of a clip [1 C F H W] a single one is."""
    return [torch.equal(frames[:, :, k], single[:, :, 0]) for k in range(frames.shape[2])].index(True)


def written_out(pred: Tensor, target: Tensor, anchors: list[int]) -> tuple[Tensor, Tensor]:
    """The plain and the debiased part of the temporal loss as the paper has them."""
    plain, debiased = torch.zeros(()), torch.zeros(())
    for b, anchor in enumerate(anchors):
        for i in range(pred.shape[2]):
            phi_pred = math.sqrt(2) * pred[b, :, i] - pred[b, :, anchor]
            phi_target = math.sqrt(2) * target[b, :, i] - target[b, :, anchor]
            plain += (pred[b, :, i] - target[b, :, i]).square().sum() / pred.numel()
            debiased += (phi_pred - phi_target).square().sum() / pred.numel()
    return plain, debiased


# -- losses ----------------------------------------------------------------------------------------------------------------


def test_the_temporal_loss_is_the_papers() -> None:
    pred, target = random(2, 4, 5, 3, 3, name="pred"), random(2, 4, 5, 3, 3, name="target")
    plain, debiased = written_out(pred, target, [1, 4])
    for weight in (0.0, 0.5, 1.0):
        loss = temporal_loss(pred, target, torch.tensor([1, 4]), weight, None)
        torch.testing.assert_close(loss, plain + weight * debiased)
    error = torch.zeros_like(pred)
    error[:, :, 2] = 1.0  # of the anchor alone: it counts (sqrt 2 - 1)^2 in its own frame, and 1 in the four others
    of_anchor = temporal_loss(target + error, target, torch.tensor([2, 2]), 1.0, None).item()
    assert of_anchor == pytest.approx((1 + (math.sqrt(2) - 1) ** 2 + 4) / 5, rel=1e-5)
    same = temporal_loss(target + 1, target, torch.tensor([0, 3]), 1.0, None).item()
    assert same == pytest.approx(1 + (math.sqrt(2) - 1) ** 2, rel=1e-5), "what all frames share is weighed down"


def test_a_mask_weighs_both_carried_files_the_temporal_loss() -> None:
    pred, target = random(1, 4, 5, 3, 3, name="pred"), random(1, 4, 5, 3, 3, name="target")
    mask = (random(1, 1, 5, 3, 3, name="mask") > 0).float()
    error = pred - target
    debiased = math.sqrt(2) * error - error[:, :, 1:2]
    expected = ((error.square() + debiased.square()) * mask).mean()
    torch.testing.assert_close(temporal_loss(pred, target, torch.tensor([1]), 1.0, mask), expected)


def test_a_step_is_a_frame_and_then_the_clip_with_the_same_latents_noise_and_timestep(
    model: Any, clips: TrainingData
) -> None:
    recipe = started(model, dropout=0.0, spatial_off_prob=0.0)
    batch, rng, calls = make_batch(recipe.backbone, clips), Rng(3, "clips", 5), watch(recipe)
    losses = {name: loss.item() for name, loss in recipe.losses(batch, rng)}
    assert list(losses) == ["spatial", "temporal"]
    spatial, temporal = calls
    assert (spatial.x.shape[2], temporal.x.shape[2]) == (1, 6)
    assert (spatial.active, temporal.active) == ({"spatial"}, {"spatial", "temporal"})
    assert torch.equal(spatial.t, temporal.t) and spatial.t.shape == (1,)

    clean, noise = batch["latents"], rng.noise_like(batch["latents"])
    kept = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)[temporal.t]
    torch.testing.assert_close(temporal.x, kept.sqrt() * clean + (1 - kept).sqrt() * noise, rtol=1e-4, atol=1e-4)
    pictures = noise.transpose(1, 2).flatten(2)[0]
    assert (torch.corrcoef(pictures.flatten(1)) - torch.eye(6)).abs().max() < 0.25, "noise of its own in every frame"
    frame = frame_of(temporal.x, spatial.x)
    expected = (spatial.pred - noise[:, :, [frame]]).square().mean().item()
    assert losses["spatial"] == pytest.approx(expected, rel=1e-5)
    matches = [sum(written_out(temporal.pred, noise, [anchor])).item() for anchor in range(6)]
    assert sum(losses["temporal"] == pytest.approx(value, rel=1e-5) for value in matches) == 1


def test_clips_of_a_batch_have_a_timestep_a_frame_and_a_noise_each(model: Any, clips: TrainingData) -> None:
    recipe = started(model, dropout=0.0, spatial_off_prob=0.0)
    batch, calls, frames = make_batch(recipe.backbone, clips, size=2), watch(recipe, cheap=True), set()
    for sample in range(0, 20, 2):
        rng = Rng(0, "clips", sample)
        list(recipe.losses(batch, rng))
        spatial, temporal = calls[-2:]
        assert torch.equal(spatial.t, temporal.t) and len(set(temporal.t.tolist())) == 2
        frames.add(tuple(frame_of(temporal.x[[i]], spatial.x[[i]]) for i in range(2)))
    assert any(first != second for first, second in frames)


def test_frame_anchor_and_turns_without_the_spatial_lora_are_drawn_evenly(model: Any, clips: TrainingData) -> None:
    recipe, count = started(model), 400
    batch, calls, frames, anchors, alone = make_batch(recipe.backbone, clips), watch(recipe, cheap=True), [], [], 0
    noises, timesteps = set(), set()
    for sample in range(count):
        calls.clear()
        rng = Rng(0, "clips", sample)
        losses = {name: loss.item() for name, loss in recipe.losses(batch, rng)}
        noise = rng.noise_like(batch["latents"])
        noises.add(noise.sum().item())
        timesteps.add(calls[-1].t.item())
        values = torch.stack([sum(written_out(calls[-1].pred, noise, [anchor])) for anchor in range(6)])
        anchors.append(int((values - losses["temporal"]).abs().argmin()))
        if "spatial" in losses:
            assert [call.active for call in calls] == [{"spatial"}, {"spatial", "temporal"}]
            frames.append(frame_of(calls[1].x, calls[0].x))
        else:
            assert [call.active for call in calls] == [{"temporal"}]
            alone += 1
    assert abs(alone - 0.2 * count) < 4 * (count * 0.2 * 0.8) ** 0.5
    for drawn in (frames, anchors):
        counts = torch.bincount(torch.tensor(drawn), minlength=6)
        assert len(counts) == 6, "of frames, not of channels or anything longer"
        assert ((counts - len(drawn) / 6).abs() < 4 * (len(drawn) * 5 / 36) ** 0.5).all()
    assert len(noises) == count and len(timesteps) > 250, "no draw comes back as the run goes on"


@pytest.mark.parametrize("alone", [0.0, 1.0])
def test_each_loss_trains_its_own_lora_and_never_the_other(alone: float, model: Any, clips: TrainingData) -> None:
    recipe = started(model, spatial_off_prob=alone, learning_rate=3e-3, spatial_learning_rate=7e-4)
    batch = make_batch(recipe.backbone, clips)
    trains = {name: leaves(loss) for name, loss in recipe.losses(batch, Rng(0, "clips", 0))}
    both = {name: parameters(recipe, name) for name in ("spatial", "temporal")}
    assert trains == (both if not alone else {"temporal": both["temporal"]})
    assert [len(both[name]) for name in both] == [2 * 192, 2 * 200]
    assert all(p.requires_grad for p in parameters(recipe, "spatial", "temporal")), "as before"
    groups = recipe.param_groups(recipe.phases(recipe.config, NO_DATA)[0])
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert rates == {**dict.fromkeys(both["spatial"], 7e-4), **dict.fromkeys(both["temporal"], 3e-3)}


def test_prior_clips_give_the_same_two_losses_at_their_weight(model: Any, tmp_path: Path) -> None:
    rows = [*write_clips(tmp_path, SHAPE).rows, *write_clips(tmp_path, SHAPE, role="prior").rows]
    recipe = started(model, dropout=0.0, spatial_off_prob=0.0, prior_weight=0.25)
    batch, rng = make_batch(recipe.backbone, TrainingData(str(tmp_path), tuple(rows))), Rng(0, "clips", 0)
    calls = watch(recipe, cheap=True)
    losses = {name: loss.item() for name, loss in recipe.losses(batch, rng)}
    assert list(losses) == ["spatial", "temporal", "prior spatial", "prior temporal"]
    alone = {name: loss.item() for name, loss in recipe.losses(batch["prior"], rng.fork("prior"))}
    assert losses["prior spatial"] == pytest.approx(0.25 * alone["spatial"], rel=1e-6)
    assert losses["prior temporal"] == pytest.approx(0.25 * alone["temporal"], rel=1e-6)
    assert calls[0].t != calls[2].t
    recipe.config = make_config(NAME, prior_weight=0.0, spatial_off_prob=0.0)
    assert [name for name, _ in recipe.losses(batch, rng)] == ["spatial", "temporal"]


def test_evaluation_has_both_losses_and_no_dropout(model: Any, clips: TrainingData) -> None:
    recipe = started(model, dropout=0.9, spatial_off_prob=1.0)
    batch = make_batch(recipe.backbone, clips)

    def measure() -> dict[str, float]:
        return {name: loss.item() for name, loss in recipe.losses(batch, Rng(0, "clips", 0, quantile=0.5))}

    with torch.no_grad():
        measured = measure()
        list(recipe.losses(batch, Rng(0, "clips", 0)))
        assert measure() == measured
        dropped = dict(recipe.losses(batch, Rng(0, "clips", 0)))
        recipe.config = make_config(NAME, dropout=0.0, spatial_off_prob=1.0)
        assert list(measured) == ["spatial", "temporal"] and measure() == measured
        assert dropped["temporal"] != dict(recipe.losses(batch, Rng(0, "clips", 0)))["temporal"], "dropout acts"


# -- what is trained -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "groups"), [("both", ["spatial", "temporal"]), ("spatial", ["spatial"]), ("temporal", ["temporal"])]
)
def test_either_lora_can_be_trained_alone(train: str, groups: list[str], model: Any, clips: TrainingData) -> None:
    recipe = started(model, train=train, spatial_off_prob=0.0)
    assert list(recipe.exports(recipe.config, NO_DATA)) == groups
    batch, calls = make_batch(recipe.backbone, clips), watch(recipe)
    trains = {name: leaves(loss) for name, loss in recipe.losses(batch, Rng(0, "clips", 0))}
    assert trains == {group: parameters(recipe, group) for group in groups}
    assert [call.x.shape[2] for call in calls] == [{"spatial": 1, "temporal": 6}[group] for group in groups]


def test_layers_are_those_of_the_published_trainers_or_fewer(model: Any) -> None:
    whole = started(model).lora
    assert [len(whole.factors(group, "down")) for group in ("spatial", "temporal")] == [192, 200]
    down = torch.cat([down.flatten() for down in whole.factors("spatial", "down").values()])
    assert down.std().item() == pytest.approx(1 / RANK, rel=0.02), "as in MotionDirector's LoRA layers"
    fewer = started(model, spatial_layers="self-attention and feed-forward", temporal_layers="attention").lora
    paths = fewer.factors("spatial", "down")
    assert [len(paths), len(fewer.factors("temporal", "down"))] == [96, 160]
    assert all(".attn1." in path or ".ff." in path for path in paths)


def test_photos_train_the_look_only(model: Any, tmp_path: Path) -> None:
    data = write_clips(tmp_path, PHOTO, SHAPE)
    photo, clip = (TrainingData(data.folder, (row,)) for row in data.rows)
    recipe = started(model, spatial_off_prob=1.0)
    batch = make_batch(recipe.backbone, photo)
    assert [name for name, _ in recipe.losses(batch, Rng(0, "clips", 0))] == ["spatial"]
    job = trained(tmp_path, model, photo, train="spatial")
    assert list(job.files) == ["spatial"]
    make_config(NAME, train="temporal").check_data(clip)
    with pytest.raises(ValueError, match="train='temporal': train-0 is a single frame, expected clips"):
        make_config(NAME, train="temporal").check_data(data)
    held_out = TrainingData(data.folder, (*clip.rows, *write_clips(tmp_path, PHOTO, role="validation").rows))
    with pytest.raises(ValueError, match="train='temporal': validation-0 is a single frame, expected clips"):
        make_config(NAME, train="temporal").check_data(held_out)


def test_clips_with_a_spatial_lora_each_train_that_alone(model: Any, clips: TrainingData, tmp_path: Path) -> None:
    recipe = started(model, spatial_loras=2, spatial_off_prob=0.0)
    batch, calls, seen = make_batch(recipe.backbone, clips), watch(recipe), []
    for row in (0, 1):
        calls.clear()
        own = f"spatial-{row + 1}"
        losses = recipe.losses({**batch, "group": torch.tensor([row])}, Rng(0, "clips", 0))
        assert {name: leaves(loss) for name, loss in losses} == {
            "spatial": parameters(recipe, own), "temporal": parameters(recipe, "temporal")
        }  # fmt: skip
        seen += [call.active for call in calls]
    assert seen == [{"spatial-1"}, {"spatial-1", "temporal"}, {"spatial-2"}, {"spatial-2", "temporal"}]

    both = trained(tmp_path, model, clips, spatial_loras=2)
    assert list(both.files) == ["spatial-1", "spatial-2", "temporal"]
    factors = [load(Path(both.files[name]))[0] for name in ("spatial-1", "spatial-2")]
    assert all(len(core_patches(model, tensors)) == 192 for tensors in factors)
    ups = [key for key in factors[0] if key.endswith("_proj_out.lora_up.weight")]
    assert len(ups) == 16 and not any(torch.equal(*(tensors[key] for tensors in factors)) for key in ups)


def test_prior_and_held_out_clips_go_with_a_spatial_lora_per_clip(model: Any, tmp_path: Path) -> None:
    """They belong to none of them."""
    shape = (4, 2, 8, 8)
    rows = [
        row for role, count in (("train", 2), ("prior", 1), ("validation", 1))
        for row in write_clips(tmp_path, *[shape] * count, role=role).rows
    ]  # fmt: skip
    job = trained(tmp_path, model, TrainingData(str(tmp_path), tuple(rows)), spatial_loras=2, validate_every=1, steps=1)
    [step] = [event for event in job.history if event["event"] == "step"]
    assert list(step["losses"]) == ["spatial", "temporal", "prior temporal"]


def test_numbers_of_spatial_loras_that_do_not_fit_the_data_are_refused(clips: TrainingData) -> None:
    for loras in (1, 2):
        make_config(NAME, spatial_loras=loras).check_data(clips)
    with pytest.raises(ValueError, match="spatial_loras=3: expected 1, or 2, the number of clips to train on"):
        make_config(NAME, spatial_loras=3).check_data(clips)
    with pytest.raises(ValueError, match="batch_size=2: expected 1 when each clip has a spatial LoRA of its own"):
        make_config(NAME, spatial_loras=2, batch_size=2).check_data(clips)
    make_config(NAME, spatial_loras=3, train="temporal").check_data(clips)


# -- options ---------------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_published_ones() -> None:
    c = MotionDirector.Config()
    assert (c.preset, c.train, c.steps, c.batch_size, c.spatial_loras) == ("preferred", "both", 500, 1, 1)
    assert (c.spatial_off_prob, c.debias_weight, c.dropout, c.alpha) == (0.2, 1.0, 0.1, 0.0)
    assert (c.max_grad_norm, c.lr_schedule, c.warmup_steps, c.beta2) == (0.0, "constant", 0, 0.999)
    assert (c.spatial_layers, c.temporal_layers, c.domain_adapter) == ("all", "all", "")


@pytest.mark.parametrize(("preset", "rank"), [("low", 32), ("preferred", 64), ("best", 64)])
def test_presets_set_rank_rates_and_decay_of_both_optimizers(preset: str, rank: int) -> None:
    typed = {"rank": 7, "learning_rate": 1.0, "spatial_learning_rate": 2.0, "weight_decay": 3.0}

    def numbers(**options: Any) -> tuple[float, ...]:
        c = MotionDirector.Config(**options)
        return c.rank, c.learning_rate, c.spatial_learning_rate, c.weight_decay

    for adam in ("AdamW", "AdamW8bit"):
        assert numbers(preset=preset, optimizer=adam) == (rank, 5e-4, 1e-4, 0.01)
    assert numbers(preset=preset, optimizer="Lion") == (rank, 5e-5, 1e-5, 0.1), "a tenth, and ten times the decay"
    for optimizer in ("AdamW", "Lion", "Prodigy"):
        assert numbers(preset="custom", optimizer=optimizer, **typed) == tuple(typed.values()), "as typed"
    for name, value in typed.items():
        with pytest.raises(ValueError, match=f"{name}={value}: expected .* preset '{preset}' sets.*custom"):
            numbers(preset=preset, **{name: value})
    with pytest.raises(ValueError, match="Prodigy': the presets have learning rates for AdamW, AdamW8bit, Lion;"):
        numbers(preset=preset, optimizer="Prodigy")


# -- the domain adapter ----------------------------------------------------------------------------------------------------


def test_the_domain_adapter_is_merged_as_cores_loader_applies_it(
    model: Any, clips: TrainingData, adapter: Path
) -> None:
    tensors = comfy.utils.load_torch_file(str(adapter), safe_load=True)
    in_core, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0)
    assert len(in_core.patches) == 128
    ours = MotionDirector(make_backbone(model), make_config(NAME, domain_adapter=str(adapter))).backbone
    batch = make_batch(ours, clips)
    prompts, t = {**batch, "prompt_embeds": batch["prompt_embeds"][:, 0]}, torch.tensor([500])
    with torch.no_grad():
        merged, expected, plain = (
            backbone.predict(batch["latents"], t, prompts)
            for backbone in (ours, make_backbone(in_core), make_backbone(model))
        )
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert (merged - plain).abs().max() > 0.1
    assert not model.patches, "the shared model is as it was"


def test_an_adapter_for_another_model_is_refused(model: Any, tmp_path: Path) -> None:
    save(tmp_path / "wan.safetensors", {"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.zeros(1, 8)})
    with pytest.raises(ValueError, match=r"wan.safetensors: none of its layers fits \w+, expected a LoRA for this model"):
        started(model, domain_adapter=str(tmp_path / "wan.safetensors"))


def test_files_say_what_they_were_trained_on(run: Job) -> None:
    for path in run.files.values():
        _, metadata = load(Path(path))
        assert (metadata["model_type"], metadata["rank"], metadata["format"]) == ("motion_director", "4", "pt")
        assert metadata["kinoloom.motion_module"] == "v3"
        assert metadata["kinoloom.domain_adapter"] == "v3_sd15_adapter.ckpt"


# -- files -----------------------------------------------------------------------------------------------------------------


MODULES = [f"down_blocks.{b}.motion_modules.{m}" for b in range(4) for m in range(2)]
MODULES += [f"up_blocks.{b}.motion_modules.{m}" for b in range(4) for m in range(3)]
BLOCKS = [f"{module}.temporal_transformer.transformer_blocks.0" for module in MODULES]
ATTENTION = ("to_q", "to_k", "to_v", "to_out")
OFFICIAL = [f"{b}.attention_blocks.{a}.processor.{name}_lora" for b in BLOCKS for a in (0, 1) for name in ATTENTION]
FEED_FORWARD = [f"{b}.ff.{name}" for b in BLOCKS for name in ("net.0.processor.proj_lora", "net.processor.2_lora")]


def evolved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What AnimateDiff-Evolved adds to each parameter of a motion module at strength 1: its rule for reading a file."""
    found = {}
    for key, value in tensors.items():
        if "temporal" in key and "up." not in key:
            name = key.replace("processor.", "").replace("_lora", "").replace("down.", "").replace("up.", "")
            if "to_out." in name and "to_out.0." not in name:
                name = name.replace("to_out.", "to_out.0.")
            found[name] = torch.mm(tensors[key.replace(".down.", ".up.")].float(), value.float())
    return found


def layers_of(model: Any, feed_forward: bool = True) -> set[str]:
    endings = [*(f"{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0"))]
    endings += ["ff.net.0.proj.weight", "ff.net.2.weight"] * feed_forward
    return {key for key in carried_modules(model)[PART].state_dict() if key.endswith(tuple(endings))}


@pytest.mark.parametrize(("layers", "count"), [("all", 200), ("attention", 160)])
def test_a_motion_lora_is_named_and_read_as_others_do(
    layers: str, count: int, model: Any, clips: TrainingData, run: Job, tmp_path: Path
) -> None:
    options = {"train": "temporal", "temporal_layers": layers, "alpha": ALPHA, "save_precision": "fp32", "steps": 1}
    job = run if layers == "all" else trained(tmp_path, model, clips, **options)
    tensors, _ = load(Path(job.files["temporal"]))
    names = OFFICIAL + FEED_FORWARD * (layers == "all")
    assert tensors.keys() == {f"{name}.{side}.weight" for name in names for side in ("down", "up")}, "and no alpha"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    shapes = {tensor.shape[".up." in key] for key, tensor in tensors.items()}
    assert shapes == {RANK}
    added = evolved(tensors)
    assert len(added) == count and added.keys() == layers_of(model, layers == "all")

    patched = motion_loras.with_motion_lora(model, tensors, 1.0, "file")
    plain, loaded = (make_backbone(m).module["motion"].state_dict() for m in (model, patched))
    state = state_of(job).recipe
    for key, delta in added.items():
        path = f"temporal/motion.{key.removesuffix('.weight')}"
        trained_as = ALPHA / RANK * state[f"{path}.lora_up.weight"] @ state[f"{path}.lora_down.weight"]
        torch.testing.assert_close(delta, trained_as, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(loaded[key] - plain[key], delta, rtol=1e-3, atol=1e-6)
        assert torch.count_nonzero(delta)


def core_patches(model: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(model.model, {}))


def test_a_spatial_lora_is_kohyas_and_core_finds_a_place_for_all_of_it(
    model: Any, run: Job, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, _ = load(Path(run.files["spatial"]))
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    layer = r".*\.attentions\.\d\.(proj_in|proj_out|transformer_blocks\.0\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)))\.weight"
    expected = {path: key for path, key in names.items() if re.fullmatch(layer, path)}
    kohya = {"lora_unet_" + path.removesuffix(".weight").replace(".", "_"): key for path, key in expected.items()}
    assert len(kohya) == 192
    parts = ("lora_up.weight", "lora_down.weight", "alpha")
    assert tensors.keys() == {f"{name}.{part}" for name in kohya for part in parts}
    assert all(tensors[f"{name}.alpha"].shape == () and tensors[f"{name}.alpha"] == ALPHA for name in kohya)
    kernels = {name for name in kohya if tensors[f"{name}.lora_up.weight"].ndim == 4}
    assert kernels == {name for name in kohya if name.endswith(("_proj_in", "_proj_out"))}
    with caplog.at_level(logging.WARNING):
        patches = core_patches(model, dict(tensors))
    assert patches.keys() == {f"diffusion_model.{key}" for key in kohya.values()} and "not loaded" not in caplog.text


def test_files_are_written_in_the_precision_asked_for_at_a_scale_of_one(
    model: Any, clips: TrainingData, tmp_path: Path
) -> None:
    job = trained(tmp_path, model, clips, save_precision="fp16", steps=1)
    state, spatial = state_of(job).recipe, load(Path(job.files["spatial"]))[0]
    assert {float(tensor) for key, tensor in spatial.items() if key.endswith(".alpha")} == {float(RANK)}
    motion_lora = load(Path(job.files["temporal"]))[0]
    assert {t.dtype for file in (spatial, motion_lora) for t in file.values() if t.ndim} == {torch.float16}
    for key, tensor in from_motion_lora(motion_lora).items():
        assert torch.equal(tensor, state[f"temporal/motion.{key}"].half())
