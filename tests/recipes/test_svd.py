"""Stable Video Diffusion: its noise and conditions in closed form, its backbone against diffusers and ComfyUI's sampler."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.sd
import comfy.utils
import pytest
import torch
from kinoloom.lora_io.file import load
from kinoloom.lora_io.keys import to_comfy
from kinoloom.trainers.backbones.svd.model import Svd
from kinoloom.trainers.backbones.svd.objective import SvdConfig, drawn_conditions, video_loss
from kinoloom.trainers.core.data import TrainingData
from kinoloom.trainers.core.lora import LoraGroups
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.core.schedules import Edm
from kinoloom.trainers.run.job import Job
from kinoloom.trainers.svd_finetune import SvdFinetune
from kinoloom.trainers.svd_lora import SvdLora
from safetensors.torch import save_file
from tiny import svd as tiny_svd
from torch import Tensor
from toyworld.pack import video_unet

from ..runs import (
    NO_DATA,
    Published,
    assert_same,
    finish,
    leaves,
    load_model,
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
    write_row,
)

pytestmark = pytest.mark.slow

FRAMES = 3
SIGMA = torch.tensor([0.05, 30.0])
WHOLE = SvdConfig(conditioning_dropout=0.0)
LORA, FINETUNE = SvdLora.name, SvdFinetune.name


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> Any:
    return load_svd(tiny_models)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Large enough that the innermost level has more than one pixel to attend to."""
    folder = tmp_path_factory.mktemp("data")
    rows = tuple(write_row(folder, f"clip {i}", "clips", (4, FRAMES, 8, 16)) for i in range(2))
    return TrainingData(str(folder), rows)


@pytest.fixture(scope="module")
def backbone(model: Any) -> Svd:
    return make_backbone(model)


def conditions() -> dict[str, Tensor]:
    """What `predict` reads, different for each clip."""
    return {
        "image_embeds": random(2, 1024, name="embeds"),
        "first_frame": random(2, 4, 8, 16, name="first"),
        "fps": torch.tensor([7.0, 25.0]),
        "motion_bucket": torch.tensor([127.0, 30.0]),
        "augmentation": torch.tensor([0.02, 0.1]),
    }


# -- noise ---------------------------------------------------------------------------------------------------------------


def test_the_loss_on_v_is_the_weighted_loss_on_denoised_latents() -> None:
    """Facts 1 and 2: lambda c_out^2 = 1, for any model output."""
    schedule, shape = Edm(), (5, 4, 3, 2, 2)
    x0, noise, out = (random(*shape, name=name).double() for name in ("x0", "n", "F"))
    sigma = torch.tensor([0.01, 0.3, 1.0, 20.0, 700.0]).double()
    s = sigma.view(-1, 1, 1, 1, 1)
    noisy = schedule.add_noise(x0, noise, sigma)
    denoised = noisy / (s**2 + 1) - s / (s**2 + 1).sqrt() * out
    weighted = ((1 + s**2) / s**2 * (denoised - x0).square()).flatten(1).mean(1)
    plain = (out - schedule.target(x0, noise, sigma)).square().flatten(1).mean(1)
    assert torch.allclose(weighted, plain, rtol=1e-9)
    assert torch.allclose(schedule.scale(noisy, sigma), noisy / (s**2 + 1).sqrt())


def test_noise_levels_are_log_normal() -> None:
    quantiles = torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99], dtype=torch.float64)
    expected = torch.tensor([0.049, 0.145, 0.68, 2.01, 5.9, 27.9, 83.0], dtype=torch.float64)
    c = SvdConfig()
    assert torch.allclose(Edm().timesteps(quantiles, c.noise_mean, c.noise_std), expected, rtol=0.02)
    drawn = Edm().timesteps(Rng(0, "clips", 0).uniform(4096), c.noise_mean, c.noise_std).log()
    assert abs(float(drawn.mean()) - 0.7) < 0.1 and abs(float(drawn.std()) - 1.6) < 0.1


# -- conditions ------------------------------------------------------------------------------------------------------------


def drawn(dropout: float, count: int = 4000, quantile: float | None = None) -> list[tuple[bool, bool, int]]:
    """Embedding kept, first frame kept, noising taken, of many clips."""
    levels = torch.tensor([0.0, 1.0, 2.0, 3.0])
    batch = {
        "image_embeds": torch.ones(count, 2),
        "first_frames": (1 + levels).view(1, 4, 1, 1, 1).expand(count, 4, 1, 1, 1),
        "augmentations": levels.expand(count, 4),
    }
    out = drawn_conditions(batch, Rng(0, "clips", 0, quantile), dropout)
    kept = [out["image_embeds"].any(1), out["first_frame"].flatten(1).any(1)]
    for i in range(count):  # the level belongs to the first frame that was taken, dropped or not
        assert not kept[1][i] or out["first_frame"][i].item() == 1 + out["augmentation"][i]
    return list(zip(*(value.tolist() for value in (*kept, out["augmentation"].long())), strict=True))


def test_conditions_are_dropped_by_the_table() -> None:
    """Fact 6: of p each, the embedding alone, both, and the first frame alone."""
    shares = Counter((embeds, first) for embeds, first, _ in drawn(0.1))
    for case in ((False, True), (False, False), (True, False)):
        assert abs(shares[case] / 4000 - 0.1) < 0.02
    assert all(embeds and first for embeds, first, _ in drawn(0.0, 200))


def test_a_noising_is_drawn_and_never_the_clean_one_but_in_an_evaluation() -> None:
    shares = Counter(level for *_, level in drawn(0.1))
    assert shares.keys() == {1, 2, 3} and min(shares.values()) > 1200
    assert set(drawn(0.1, 50, quantile=0.5)) == {(True, True, 0)}


# -- backbone ----------------------------------------------------------------------------------------------------------------


def test_a_prediction_is_that_of_comfyui_s_sampler(model: Any, backbone: Svd) -> None:
    """Facts 2 to 5 and 8: apply_model's denoised latents, with the conditioning of ComfyUI's node, equal ours."""
    x0 = random(1, 4, FRAMES, 8, 16, name="x0")
    batch = {name: value[:1] for name, value in conditions().items()}
    for sigma in SIGMA:
        noisy = backbone.schedule.add_noise(x0, random(*x0.shape, name="n"), sigma.view(1))
        with torch.no_grad():
            v = backbone.predict(noisy, sigma.view(1), batch)
            inner = model.model
            options = {"motion_bucket_id": 127, "fps": 7, "augmentation_level": 0.02}
            rows = noisy[0].movedim(1, 0)
            conds = inner.extra_conds(noise=rows, device="cpu", cross_attn=batch["image_embeds"].unsqueeze(1),
                                      concat_latent_image=batch["first_frame"], **options)  # fmt: skip
            given = {
                name: value.process_cond(batch_size=FRAMES, device="cpu", area=None).cond
                for name, value in conds.items()
            }
            comfy.model_management.load_models_gpu([model])
            denoised = inner.apply_model(rows, sigma.expand(FRAMES), **given)
        s = float(sigma)
        ours = noisy / (s**2 + 1) - s / math.sqrt(s**2 + 1) * v
        assert torch.allclose(ours[0].movedim(1, 0), denoised, atol=1e-4 * max(1, s)), (
            (ours[0].movedim(1, 0) - denoised).abs().max()
        )


def test_clips_of_a_batch_do_not_see_each_other(backbone: Svd) -> None:
    x = random(2, 4, FRAMES, 8, 16, name="x")
    with torch.no_grad():
        both = backbone.predict(x, SIGMA, conditions())
        for i in range(2):
            alone = backbone.predict(x[i : i + 1], SIGMA[i : i + 1], {k: v[i : i + 1] for k, v in conditions().items()})
            assert torch.allclose(both[i], alone[0], atol=1e-5)


@pytest.mark.parametrize("name", ["fps", "motion_bucket", "augmentation", "image_embeds", "first_frame"])
def test_every_condition_counts(backbone: Svd, name: str) -> None:
    x, given = random(2, 4, FRAMES, 8, 16, name="x"), conditions()
    with torch.no_grad():
        before = backbone.predict(x, SIGMA, given)
        after = backbone.predict(x, SIGMA, {**given, name: given[name] + 1})
    assert (before - after).abs().amax() > 1e-4


def test_other_models_and_other_latents_are_refused(tiny_models: Path, model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found WAN21.*expected Stable Video Diffusion"):
        Svd.grid(load_tiny(tiny_models, "wan").model, {})
    row = write_row(tmp_path, "wan", "clips", (16, 3, 8, 8))
    with pytest.raises(ValueError, match="wan has latents of 16 channels, expected 4"):
        Svd.grid(model.model, {}).check([row])


def test_checkpointing_changes_nothing(backbone: Svd, data: Any) -> None:
    """Fact 12: every argument reaches the recomputed blocks."""
    lora = LoraGroups(backbone.module, 0)
    lora.add_group("lora", Svd.lora_targets["all"], 4, 4)
    gradients = []
    for _ in placements(backbone):
        backbone.module.zero_grad(set_to_none=True)
        video_loss(backbone, make_batch(backbone, data, size=2), Rng(0, "clips", 0), WHOLE).backward()
        gradients.append([p.grad.clone() for p in lora.factors("lora", "up").values()])
    for plain, *others in zip(*gradients, strict=True):
        assert plain.abs().max() > 0 and all(torch.equal(plain, recomputed) for recomputed in others)


# -- LoRA --------------------------------------------------------------------------------------------------------------------


def test_a_lora_is_on_every_attention_layer_that_can_learn(model: Any) -> None:
    """Fact 9: 256 linear layers, of which the queries and keys of cross-attention, 64, have no gradient."""
    counts = {}
    for targets in ("all", "spatial", "temporal"):
        backbone = make_backbone(model)
        lora = LoraGroups(backbone.module, 0)
        lora.add_group("lora", Svd.lora_targets[targets], 2, 2)
        counts[targets] = len(lora.layers)
    assert counts == {"all": 192, "spatial": 96, "temporal": 96}


def test_queries_and_keys_of_cross_attention_have_no_gradient(model: Any, data: Any) -> None:
    backbone = make_backbone(model)
    lora = LoraGroups(backbone.module, 0)
    lora.add_group("lora", r".*\.attn[12]\.to_(q|k|v|out\.0)", 2, 2)
    assert len(lora.layers) == 256
    for up in lora.factors("lora", "up").values():
        torch.nn.init.normal_(up, std=0.1)
    video_loss(backbone, make_batch(backbone, data), Rng(0, "clips", 0), WHOLE).backward()
    for path, up in lora.factors("lora", "up").items():
        still = ".attn2.to_q" in path or ".attn2.to_k" in path
        assert (up.grad.abs().max() < 1e-7) == still, path


def test_the_file_works_in_comfyui_as_in_training(model: Any, data: Any, tmp_path: Path) -> None:
    config = make_config(LORA, save_precision="fp32", alpha=2.0, validate_every=0)
    job = finish(make_job(tmp_path, model, data, config, LORA), model)
    tensors, metadata = load(Path(job.result_files[-1]))
    assert sum(key.endswith(".lora_A.weight") for key in tensors) == 192 and metadata["kinoloom.recipe"] == LORA
    patches = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(model.model, {}))
    assert len(patches) == 192

    backbone = make_backbone(model)
    lora = LoraGroups(backbone.module, 0)
    lora.add_group("lora", Svd.lora_targets["all"], 4, 2.0)
    lora.load_state_dict(state_of(job).recipe)
    with torch.inference_mode():
        patched = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]
    merged = make_backbone(patched)
    x = random(2, 4, FRAMES, 8, 16, name="x")
    with torch.no_grad():
        trained, loaded = (b.predict(x, SIGMA, conditions()) for b in (backbone, merged))
        before = make_backbone(model).predict(x, SIGMA, conditions())
    assert (trained - before).abs().max() > 1e-2
    assert (trained - loaded).abs().max() < 1e-4


# -- fine-tune -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "trained"), [("temporal attention", 16 * 26), ("temporal", None), ("all", 1424)])
def test_a_fine_tune_trains_what_it_says(model: Any, data: Any, layers: str, trained: int | None) -> None:
    """Fact 7; the loss depends on every trained weight and on no other."""
    backbone = make_backbone(model)
    recipe = SvdFinetune(backbone, make_config(FINETUNE, layers=layers))
    recipe.start(recipe.phases(recipe.config, NO_DATA)[0])
    names = [name for name, p in backbone.module.named_parameters() if p.requires_grad]
    assert names == list(recipe.trained) and all(p.dtype == torch.float32 for p in recipe.trained.values())
    if trained:
        assert len(names) == trained
    ((_, loss),) = recipe.losses(make_batch(backbone, data), Rng(0, "clips", 0))
    assert leaves(loss) == set(recipe.trained.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_trained_weights_are_those_of_a_plain_model(model: Any, data: Any, dtype: torch.dtype) -> None:
    """The private layers, casting included, against finite differences along the gradient."""
    backbone = make_backbone(model, dtype)
    recipe = SvdFinetune(backbone, make_config(FINETUNE, layers="all"))
    recipe.start(recipe.phases(recipe.config, NO_DATA)[0])
    batch = make_batch(backbone, data)

    def loss() -> Tensor:
        return video_loss(backbone, batch, Rng(0, "clips", 0), WHOLE)

    loss().backward()
    if dtype == torch.bfloat16:
        reference = make_backbone(model)
        other = SvdFinetune(reference, make_config(FINETUNE, layers="all"))
        other.start(other.phases(other.config, NO_DATA)[0])
        video_loss(reference, make_batch(reference, data), Rng(0, "clips", 0), WHOLE).backward()
        ours, theirs = (torch.cat([p.grad.flatten() for p in r.trained.values()]) for r in (recipe, other))
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
        return
    squares = sum(float(p.grad.square().sum()) for p in recipe.trained.values())
    step = 1e-3 / math.sqrt(squares)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p in recipe.trained.values():
                p.add_(sign * step * p.grad)
            values.append(float(loss()))
            for p in recipe.trained.values():
                p.sub_(sign * step * p.grad)
    assert math.isclose((values[0] - values[1]) / (2 * step), squares, rel_tol=0.02)


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn])
def test_weights_stored_narrower_than_the_arithmetic_train(tmp_path: Path, data: Any, stored: torch.dtype) -> None:
    """Gradients with weights in half precision on a CPU equal those with the same numbers in fp32."""
    tiny_svd.write_unet(tmp_path / "narrow.safetensors", tiny_svd.TINY, dtype=stored)
    tensors = {key: value.float() for key, value in load(tmp_path / "narrow.safetensors")[0].items()}
    save_file(tensors, tmp_path / "wide.safetensors")
    gradients = []
    for name in ("narrow", "wide"):
        with torch.inference_mode():
            loaded = video_unet.load_unet(tmp_path / f"{name}.safetensors")
        backbone = make_backbone(loaded)
        lora = LoraGroups(backbone.module, 0)
        lora.add_group("lora", Svd.lora_targets["all"], 2, 2)
        video_loss(backbone, make_batch(backbone, data), Rng(0, "clips", 0), WHOLE).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in lora.factors("lora", "up").values()]))
    assert torch.allclose(*gradients, atol=1e-5 * float(gradients[1].abs().max()))


def test_a_fine_tuned_model_loads_as_stable_video_diffusion(tmp_path: Path) -> None:
    """Fact 10: ComfyUI's loader reads the file; frozen weights equal the base model's, trained ones are close."""
    tiny_svd.write_unet(tmp_path / "svd.safetensors", tiny_svd.NARROW, dtype=torch.float16)
    model = load_model(tmp_path / "svd.safetensors")
    data = write_data(tmp_path, "svd", roles=("train",), each=1)
    options = {"steps": 2, "precision": "bf16", "save_precision": "fp32", "validate_every": 0}
    config = make_config(FINETUNE, **options, learning_rate=1e-6)
    job = finish(make_job(tmp_path, model, data, config, FINETUNE), model)
    tuned = load_model(Path(job.result_files[-1]), dtype=torch.float32)
    assert type(tuned.model).__name__ == "SVD_img2vid"
    weights, before = tuned.model.diffusion_model.state_dict(), model.model.diffusion_model.state_dict()
    trained = state_of(job).recipe
    assert weights.keys() == before.keys()
    for name, weight in weights.items():
        expected = trained.get(name, before[name].float())
        assert torch.equal(weight.float(), expected), name
        assert torch.allclose(weight.float(), before[name].float(), atol=4e-6), name
    changed = [name for name, weight in trained.items() if not torch.equal(weight, before[name].float())]
    assert len(changed) > 300  # queries and keys of cross-attention have no gradient


# -- moving average --------------------------------------------------------------------------------------------------------------


def test_the_file_of_a_run_with_a_moving_average_holds_it(model: Any, data: Any, tmp_path: Path) -> None:
    """Weights after every step, averaged as diffusers does: decay min(d, (1 + n) / (10 + n)) after n steps."""
    seen: list[dict[str, Tensor]] = []
    published, steps, decay = Published(), 4, 0.15
    config = make_config(LORA, steps=steps, ema_decay=decay, save_precision="fp32", save_every=1, validate_every=0)
    for done in range(1, steps + 1):
        published.at(done, lambda job: seen.append({} if not job.state_path.is_file() else state_of(job).recipe))
    job = finish(make_job(tmp_path, model, data, config, LORA, published), model)
    weights = [*seen[1:], state_of(job).recipe]
    average = weights[0]
    for n, current in enumerate(weights[1:], start=1):
        kept = min(decay, (1 + n) / (10 + n))
        average = {key: kept * average[key] + (1 - kept) * current[key] for key in current}
    tensors = load(Path(job.result_files[-1]))[0]
    expected = to_comfy({key.removeprefix("lora/"): value for key, value in average.items()})
    assert tensors.keys() == expected.keys()
    assert all(torch.allclose(tensors[key], expected[key], atol=1e-6) for key in tensors)
    assert not all(torch.allclose(tensors[key], value, atol=1e-6) for key, value in to_comfy(
        {key.removeprefix("lora/"): value for key, value in weights[-1].items()}).items())  # fmt: skip


def test_a_stopped_run_with_a_moving_average_resumes_to_the_same_bits(tiny_models: Path, tmp_path: Path) -> None:
    """Also across the end of a phase, after which the next one starts from the average."""
    name = "KinoloomTrainSetAndSequence"
    wan, data = load_tiny(tiny_models, "wan"), write_data(tmp_path / "data", "wan", roles=("train",))
    config = make_config(name, set_steps=3, sequence_steps=2, gradient_accumulation=1, ema_decay=0.5, validate_every=1)
    whole = finish(make_job(tmp_path / "whole", wan, data, config, name), wan)
    for done in (2, 4):
        folder = tmp_path / f"stopped {done}"
        finish(make_job(folder, wan, data, config, name, Published().at(done, Job.stop)), wan, "stopped")
        resumed = finish(make_job(folder, wan, data, config, name), wan)
        assert_same(state_of(resumed).recipe, state_of(whole).recipe)
        for ours, theirs in zip(resumed.result_files, whole.result_files, strict=True):
            assert_same(load(Path(ours))[0], load(Path(theirs))[0])
