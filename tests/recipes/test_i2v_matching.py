"""Frames with the statistics of the first: in latents, after each step of core's samplers, and in pixels."""

from pathlib import Path
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustom
from kinoloom.nodes.adapters.matching import AdainLatent, AdainSampler, MatchHistogram, match_histogram
from kinoloom.trainers.core import first_frame
from torch import Tensor

from ..encoders import image_vae
from ..first_frames import (
    NEGATIVE,
    POSITIVE,
    SHAPE,
    by_hand,
    by_unet,
    lamps_matching,
    levels,
    plain_ddim,
    sample,
    start,
)
from ..rows import random
from ..toyworld.pack import unet


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> Any:
    with torch.inference_mode():
        return unet.load(tiny_models / "diffusion_models" / "tiny_sd.safetensors")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with torch.inference_mode():
        return image_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(autouse=True)
def as_a_node() -> Any:
    with torch.inference_mode():
        yield


# -- AdaIN -----------------------------------------------------------------------------------------------------------------


def test_adain_after_every_step_is_lamps(vae: Any, model: Any) -> None:
    """Frames 2.. to frame 1 after every step, frame 1 to the picture after steps 3 and 4 of 5."""
    sigmas = levels(model, 5)
    latent, noise = start(vae, sigmas=sigmas)
    clean = latent["samples"][:1].double() * 0.18215
    matching = AdainSampler.execute(comfy.samplers.sampler_object("euler"), 0.5).result[0]
    made = sample(model, noise, matching, sigmas, latent)
    timesteps = model.get_model_object("model_sampling").timestep(sigmas[:-1]).tolist()
    expected = plain_ddim(by_unet(model), by_hand(latent), timesteps, lamps_matching(clean, 2.5))
    torch.testing.assert_close(made[1:].double() * 0.18215, expected, rtol=0, atol=1e-3)
    assert torch.equal(made[0], latent["samples"][0])
    means, deviations = made.mean((-2, -1)), made.std((-2, -1))
    torch.testing.assert_close(means, means[:1].expand_as(means), rtol=0, atol=1e-4)
    torch.testing.assert_close(deviations, deviations[:1].expand_as(means), rtol=1e-4, atol=1e-4)


REFUSED = ("dpm_fast", "dpm_adaptive", "uni_pc", "uni_pc_bh2")


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2"])
def test_one_step_at_a_time_is_the_sampler_itself(vae: Any, model: Any, sampler: str) -> None:
    """Two frames and a share of 1: nothing is matched."""
    sigmas, inner = levels(model, 4), comfy.samplers.sampler_object(sampler)
    latent, noise = start(vae, sigmas=sigmas, frames=2)
    alone, wrapped = (
        sample(model, noise, each, sigmas, latent) for each in (inner, AdainSampler.execute(inner, 1.0).result[0])
    )
    torch.testing.assert_close(wrapped, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [name for name in comfy.samplers.SAMPLER_NAMES if name not in (*REFUSED, "ar_video")])
def test_every_sampler_that_takes_single_steps_runs(vae: Any, model: Any, sampler: str) -> None:
    sigmas = levels(model, 3)
    latent, noise = start(vae, sigmas=sigmas)
    matching = AdainSampler.execute(comfy.samplers.sampler_object(sampler), 0.62).result[0]
    made = sample(model, noise, matching, sigmas, latent)
    deviations = (made * 0.18215).std((-2, -1))
    assert made.isfinite().all()
    torch.testing.assert_close(deviations, deviations[:1].expand_as(deviations), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(made[0], latent["samples"][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", REFUSED)
def test_samplers_of_many_steps_are_refused(sampler: str) -> None:
    with pytest.raises(ValueError, match="^sampler: .* cannot run one step at a time, expected another, such as euler"):
        AdainSampler.execute(comfy.samplers.sampler_object(sampler), 0.62)
    with pytest.raises(ValueError, match="^sampler: Sampler cannot run"):
        AdainSampler.execute(comfy.samplers.Sampler(), 0.62)


def test_noise_differs_between_steps_and_the_preview_counts_them(model: Any) -> None:
    seeds, steps = [], []

    def noisy(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool) -> Tensor:
        seeds.append(extra_args["seed"])
        callback({"i": 0, "x": x, "denoised": x})
        return x

    sampler = AdainSampler.execute(comfy.samplers.KSAMPLER(noisy), 1.0).result[0]
    mask = torch.ones(3, 4, 2, 2)
    mask[0] = 0
    given = {"denoise_mask": mask, "seed": 40}
    latents = type("Masked", (), {"latent_image": torch.rand(3, 4, 2, 2)})
    x = sampler.sampler_function(
        latents, torch.rand(3, 4, 2, 2), torch.tensor([3.0, 2.0, 1.0, 0.0]), extra_args=given,
        callback=lambda state: steps.append(state["i"]), disable=True,
    )  # fmt: skip
    assert seeds == [40, 41, 42] and steps == [0, 1, 2] and x.shape == (3, 4, 2, 2)


def test_adain_sampler_needs_a_kept_first_frame(vae: Any, model: Any) -> None:
    sigmas = levels(model, 2)
    matching = AdainSampler.execute(comfy.samplers.sampler_object("euler"), 0.62).result[0]
    given = (model, True, 0, 1.0, POSITIVE, NEGATIVE, matching, sigmas)
    with pytest.raises(ValueError, match="^latent_image: its first frame is not kept .*expected the LATENT of I2V Start"):
        SamplerCustom.execute(*given, {"samples": torch.zeros(SHAPE)})
    made = SamplerCustom.execute(*given, start(vae)[0]).result[0]["samples"]
    assert made.isfinite().all()


def test_adain_once_after_sampling() -> None:
    latent = {"samples": random(5, 4, 8, 12, name="sampled") * 3 + 1, "noise_mask": torch.ones(5, 8, 12)}
    made = AdainLatent.execute(latent).result[0]
    assert made["noise_mask"] is latent["noise_mask"] and torch.equal(made["samples"], first_frame.adain_last(latent["samples"]))
    means = made["samples"].mean((-2, -1))
    torch.testing.assert_close(means, means[:1].expand_as(means), rtol=0, atol=1e-5)
    for shape in ((1, 16, 3, 8, 8), (2, 4, 1, 1)):
        with pytest.raises(ValueError, match=r"^samples: found latents \(.*\), expected frames, channels, height, width"):
            AdainLatent.execute({"samples": torch.zeros(shape)})


# -- histograms ------------------------------------------------------------------------------------------------------------


def plain_match(values: list[float], wanted: list[float]) -> list[float]:
    """Levels by counting pixels."""
    own, other = ([round(value * 255) for value in each] for each in (values, wanted))
    made = []
    for level in own:
        share = sum(value <= level for value in own) / len(own)
        points = sorted({(sum(value <= at for value in other) / len(other), at) for at in other})
        if share <= points[0][0]:
            made.append(points[0][1] / 255)
            continue
        (x0, y0), (x1, y1) = next((a, b) for a, b in zip(points, points[1:], strict=False) if a[0] <= share <= b[0])
        made.append((y0 + (y1 - y0) * (share - x0) / (x1 - x0)) / 255)
    return made


@pytest.mark.parametrize("seed", [0, 1])
def test_histograms_are_matched_level_by_level(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image, like = torch.rand(5, 7, 3, generator=generator) * 0.5, torch.rand(6, 4, 3, generator=generator) ** 2
    made = torch.from_numpy(match_histogram(image.numpy(), like.numpy()))
    for channel in range(3):
        expected = plain_match(image[..., channel].flatten().tolist(), like[..., channel].flatten().tolist())
        torch.testing.assert_close(made[..., channel].flatten(), torch.tensor(expected), rtol=0, atol=1e-6)


def test_frames_get_the_histogram_of_the_first() -> None:
    images = torch.rand(4, 32, 48, 3, generator=torch.Generator().manual_seed(2)) * torch.tensor([1, 0.3, 0.6, 0.9])[:, None, None, None]
    made = MatchHistogram.execute(images).result[0]
    assert torch.equal(made[0], images[0]) and made.dtype == images.dtype
    for share in (0.1, 0.5, 0.9):
        spots = made.flatten(1, 2).quantile(share, dim=1)
        torch.testing.assert_close(spots, spots[:1].expand_as(spots), rtol=0, atol=0.02)
    assert torch.equal(MatchHistogram.execute(images[:1]).result[0], images[:1])
    flat = MatchHistogram.execute(torch.cat([images[:1], torch.full((1, 32, 48, 3), 0.2)])).result[0]
    assert flat.isfinite().all() and flat[1].unique().numel() <= 3
