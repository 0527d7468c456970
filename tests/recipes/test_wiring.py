"""The wiring: latents are scaled, masks are passed on, regularisers are turned off, files have different cache keys."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kinoloom.lora_io.file import fingerprint, load
from kinoloom.trainers import recipes
from kinoloom.trainers.core.data import column_path
from kinoloom.trainers.core.lora import LoraGroups
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.host.source import ModelSource, base_key
from kinoloom.trainers.motion_director import SPATIAL, TEMPORAL, MotionDirector
from kinoloom.trainers.set_and_sequence import IDENTITY, SetAndSequence
from kinoloom.trainers.svd_tracklets import SvdTracklets, box_weights, soften
from torch import Tensor

from ..runs import NO_DATA, load_model, make_backbone, make_batch, make_config, random

BACKBONES = ["KinoloomTrainWanLora", "KinoloomTrainMotionDirector", "KinoloomTrainSvdLora"]


@pytest.mark.parametrize("name", BACKBONES)
def test_latents_are_brought_to_the_models_own_space(name: str, model: Any, data: Any) -> None:
    backbone = make_backbone(model)
    row = data.select("clips", "train")[0]
    stored = load(column_path(data.folder, row.columns["latents"], "latents"))[0]["latents"]
    expected = model.model.process_latent_in(stored.float().unsqueeze(0))
    given = make_batch(backbone, type(data)(data.folder, (row,)))["latents"]
    torch.testing.assert_close(given, expected)
    assert not torch.allclose(given, stored.float().unsqueeze(0))


@pytest.mark.parametrize("place", [0, 1, 37, 99])
def test_a_fingerprint_changes_with_any_part_of_a_file(place: int, tmp_path: Path) -> None:
    path, size = tmp_path / "model", 3 << 20
    content = bytearray(size)
    path.write_bytes(content)
    before = fingerprint(path)
    content[(size - 1) * place // 99] = 1
    path.write_bytes(content)
    assert fingerprint(path) != before


def test_fast_fp8_is_kept_when_a_model_is_read_again(tiny_models: Path) -> None:
    path = tiny_models / "diffusion_models" / "tiny_wan.safetensors"
    source = ModelSource.of(load_model(path, dtype=torch.float8_e4m3fn, fp8_optimizations=True))
    assert source.weight_dtype == "torch.float8_e4m3fn+fast"
    assert ModelSource.of(source.reload()).weight_dtype == source.weight_dtype


def test_two_models_of_a_run_are_told_apart_by_their_inputs() -> None:
    high, low = (ModelSource("file", "loader", "", key, False) for key in ("aa", "bb"))
    assert base_key({"model": high}) == "aa"
    made = [base_key({"high": high, "low": low}), base_key({"high": low, "low": high}), base_key({"high": high, "low": high})]
    assert len({*made, "aa", "bb"}) == 5 and base_key({"low": low, "high": high}) == made[0]


def fill(lora: LoraGroups, *groups: str) -> None:
    with torch.no_grad():
        for group in groups:
            for path, up in lora.factors(group, "up").items():
                up.copy_(random(*up.shape, name=f"{group} {path}"))


def begun(cls: type, model: Any, phase: int = 0, **options: Any) -> Any:
    recipe = cls(make_backbone(model, method=cls.name), make_config(cls.name, **options))
    recipe.start(recipe.phases(recipe.config, NO_DATA)[phase])
    return recipe


def losses(recipe: Any, batch: dict, rng: Rng) -> dict[str, float]:
    return {name: float(loss.detach()) for name, loss in recipe.losses(batch, rng)}


def half_masked(latents: Tensor) -> Tensor:
    mask = torch.ones_like(latents[:, :1])
    mask[..., : mask.shape[-1] // 2] = 0
    return mask


def alone(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "prior"}


@pytest.mark.parametrize("name", ["KinoloomTrainMotionDirector"])
def test_the_mask_weighs_the_look_and_the_motion(name: str, model: Any, data: Any) -> None:
    recipe = begun(MotionDirector, model, spatial_off_prob=0.0)
    batch, rng = alone(make_batch(recipe.backbone, data)), Rng(0, "clips", 0, 0.5)
    plain, ones, half = (
        losses(recipe, {**batch, **mask}, rng)
        for mask in ({}, {"mask": torch.ones_like(batch["latents"][:, :1])}, {"mask": half_masked(batch["latents"])})
    )
    for part in (SPATIAL, TEMPORAL):
        assert ones[part] == pytest.approx(plain[part], rel=1e-5) and half[part] != pytest.approx(plain[part], rel=1e-3)


@pytest.mark.parametrize("name", ["KinoloomTrainMotionDirector"])
@pytest.mark.parametrize(("looks", "at_work"), [(1, True), (2, False)])
def test_samples_have_the_look_unless_there_are_several(
    name: str, looks: int, at_work: bool, model: Any, data: Any
) -> None:
    recipe = begun(MotionDirector, model, spatial_loras=looks)
    groups = [SPATIAL] if looks == 1 else [f"{SPATIAL}-1", f"{SPATIAL}-2"]
    fill(recipe.lora, *groups)
    batch = alone(make_batch(recipe.backbone, data))
    batch["prompt_embeds"] = batch["prompt_embeds"][:, 0]
    t = torch.tensor([500])
    with torch.no_grad():
        shown = recipe.predict(batch["latents"], t, batch)
        with recipe.lora.without(*groups):
            bare = recipe.backbone.predict(batch["latents"], t, batch)
    assert torch.equal(shown, bare) != at_work


@pytest.mark.parametrize("name", ["KinoloomTrainSetAndSequence"])
def test_the_last_mask_of_stage_one_does_not_stay_on_the_frozen_look(name: str, model: Any, data: Any) -> None:
    recipe = begun(SetAndSequence, model)
    losses(recipe, alone(make_batch(recipe.backbone, data, "frames")), Rng(0, "set", 0))
    assert all(IDENTITY in layer.masks for layer in recipe.lora.layers.values())
    recipe.start(recipe.phases(recipe.config, NO_DATA)[1])
    assert not any(IDENTITY in layer.masks for layer in recipe.lora.layers.values())


@pytest.mark.parametrize(("name", "without"), [
    ("KinoloomTrainWanLora", set()),
    ("KinoloomTrainMotionDirector", set()),
    ("KinoloomTrainSvdLora", {"image_embeds", "first_frame"}),
    ("KinoloomTrainSvdTracklets", {"image_embeds", "first_frame", "box_mask"}),
])  # fmt: skip
def test_guidance_leads_away_from_what_is_asked_for(name: str, without: set[str], model: Any) -> None:
    recipe = begun(recipes()[name], model)
    names = ("prompt_embeds", "image_embeds", "first_frame", "boxes", "box_mask", "fps")
    batch = {key: torch.ones(1, 2) for key in names}
    made = recipe.unconditional(batch)
    assert made.keys() == batch.keys()
    assert {key for key in names if not made[key].any()} == without
    assert all(made[key] is batch[key] for key in names if key not in without)


# -- tracklets -------------------------------------------------------------------------------------------------------------


def test_empty_slots_weigh_nothing() -> None:
    boxes = torch.zeros(1, 2, 20, 8)
    boxes[:, :, 0, :4] = torch.tensor([0.0, 0.0, 0.5, 0.5])
    boxes[:, :, 1, :4] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    mask = torch.zeros(1, 2, 20)
    mask[:, :, 0] = 1
    weights = box_weights(boxes, mask, (4, 4), 3.0)
    assert torch.equal(weights[0, 0, 0] > weights.min(), torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]).bool())


@pytest.mark.parametrize("name", [SvdTracklets.name])
def test_the_users_mask_and_the_boxes_weigh_together(name: str, model: Any, data: Any) -> None:
    recipe = begun(SvdTracklets, model, 1, box_weight=3.0)
    batch, rng = alone(make_batch(recipe.backbone, data)), Rng(0, "clean", 0, 0.5)
    plain = losses(recipe, batch, rng)
    half = losses(recipe, {**batch, "mask": half_masked(batch["latents"])}, rng)
    assert plain.keys() == half.keys() and all(half[key] != pytest.approx(plain[key], rel=1e-3) for key in plain)


@pytest.mark.parametrize("name", [SvdTracklets.name])
def test_an_evaluation_sees_the_hard_boxes(name: str, model: Any, data: Any) -> None:
    recipe = begun(SvdTracklets, model, 1, soft_boxes=1.0)
    batch = alone(make_batch(recipe.backbone, data))
    for rng, hard in ((Rng(0, "clean", 0, 0.5), True), (Rng(0, "clean", 0), False)):
        losses(recipe, batch, rng)
        given = recipe.controlled.boxes[..., :4]
        assert torch.equal(given, batch["boxes"].flatten(0, 1)[..., :4]) == hard


def test_soft_boxes_of_every_step_are_drawn_anew() -> None:
    boxes = random(1, 3, 20, 8, name="boxes").sigmoid()
    first, same, later = (soften(boxes, 1.0, Rng(0, "clean", sample)) for sample in (0, 0, 5))
    assert torch.equal(first, same) and not torch.equal(first, later)
