"""A picture as the first frame of a sampled video: core's samplers on a tiny SD1.5 against DDIM in plain loops."""

import math
from pathlib import Path
from typing import Any

import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import RandomNoise
from kinoloom.nodes.adapters.start import I2vSigmas, I2vStart, keep_frames
from kinoloom.nodes.animatediff import modules as motion
from kinoloom.trainers.core import first_frame

import nodes as core

from ..encoders import image_vae, load_wan
from ..first_frames import (
    FRAMES,
    HEIGHT,
    NEGATIVE,
    POSITIVE,
    SHAPE,
    WIDTH,
    by_hand,
    by_unet,
    levels,
    picture,
    plain_ddim,
    sample,
    start,
    unchanged,
)  # fmt: skip
from ..runs import load_animatediff
from ..toyworld.pack import unet

CINEMO = {"first_frame_cond": "cinemo"}
DCT = {**CINEMO, "use_dct_init": True, "dct_cutoff_ratio": 0.4}


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


# -- sigmas ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [50, 20, 10])
def test_the_grid_is_core_s_ddim_uniform(model: Any, steps: int) -> None:
    sampling = model.get_model_object("model_sampling")
    made = levels(model, steps)
    assert torch.equal(made, comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", steps))
    assert sampling.timestep(made[:-1]).tolist() == list(range(1001 - 1000 // steps, 0, -1000 // steps))


def test_a_lower_ratio_starts_at_less_noise(model: Any) -> None:
    made = levels(model, 50, 0.9)
    assert model.get_model_object("model_sampling").timestep(made[:-1]).tolist() == list(range(883, 0, -18))
    assert made[-1] == 0 and (made.diff() < 0).all()
    assert 1 / (1 + made[0] ** 2) == pytest.approx(0.016842, abs=1e-6)


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"steps": 600, "cil_ratio": 0.5}, "steps=600: expected 1..500 for cil_ratio=0.5"),
        ({"steps": 10, "cil_ratio": 1.5}, "cil_ratio=1.5: expected above 0, at most 1"),
        ({"cil_ratio": 0.0}, "cil_ratio=0.0: expected above 0"),
        ({"steps": 0}, "steps=0: expected 1..999"),
    ],
)
def test_grids_that_do_not_exist_are_refused(widgets: dict, message: str) -> None:
    assert I2vSigmas.validate_inputs(steps=None, cil_ratio=None) and I2vSigmas.validate_inputs(50, 0.9)
    with pytest.raises(ValueError) as caught:
        I2vSigmas.validate_inputs(**widgets)
    assert str(caught.value).startswith(message)


def test_another_noise_schedule_is_refused(tiny_models: Path) -> None:
    assert len(levels(load_animatediff(tiny_models, beta_schedule=motion.KEEP))) == 7
    with pytest.raises(ValueError, match=f'^model: .*Apply I2V Adapters, or set beta_schedule of Apply Motion Module to "{motion.KEEP}"'):
        levels(load_animatediff(tiny_models))
    flow = unet.load(tiny_models / "diffusion_models" / "tiny_sd.safetensors")
    flow.add_object_patch("model_sampling", comfy.model_sampling.ModelSamplingContinuousEDM())
    with pytest.raises(ValueError, match="^model: its noise schedule is not Stable Diffusion's own"):
        levels(flow)


# -- latents ---------------------------------------------------------------------------------------------------------------


def test_frame_0_is_the_picture_and_masked(vae: Any) -> None:
    latent, noise = start(vae)
    samples, mask = latent["samples"], latent["noise_mask"]
    assert samples.shape == SHAPE and mask.shape == (FRAMES, *SHAPE[2:]) and noise.seed == 5
    torch.testing.assert_close(samples[:1], vae.encode(picture()), rtol=2e-7, atol=0)
    assert not samples[1:].any() and not mask[0].any() and (mask[1:] == 1).all()


@pytest.mark.parametrize(("height", "width"), [(150, 300), (64, 48), (33, 51)])
def test_a_picture_is_cropped_like_training_clips(vae: Any, height: int, width: int) -> None:
    """A picture whose sides lie outside of the crop; what is inside is resized alone."""
    image = picture(height, width)
    scale = max(HEIGHT / height, WIDTH / width)
    inside = min(round(HEIGHT / scale), height), min(round(WIDTH / scale), width)
    top, left = (height - inside[0]) // 2, (width - inside[1]) // 2
    cropped = image[:, top : top + inside[0], left : left + inside[1]]
    assert cropped.numel() < image.numel()
    assert torch.equal(start(vae, image)[0]["samples"], start(vae, cropped)[0]["samples"])


def test_transparent_and_grey_pictures(vae: Any) -> None:
    clear = torch.cat([picture(), torch.zeros(1, HEIGHT, WIDTH, 1)], -1)
    assert torch.equal(start(vae, clear)[0]["samples"], start(vae, torch.ones(1, HEIGHT, WIDTH, 3))[0]["samples"])
    assert start(vae, picture()[..., :1])[0]["samples"][0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100}, "width=100: expected a multiple of 8"),
        ({"height": 8}, "height=8: expected 64..4096"),
        ({"frames": 1}, "frames=1: expected 2..1024"),
        ({"first_frame_cond": "svd"}, "first_frame_cond='svd': expected one of lamp, cinemo"),
        ({"shared_noise_ratio": 1.5}, "shared_noise_ratio=1.5: expected 0.0..1.0"),
        ({"use_dct_init": True}, "use_dct_init=True: expected first_frame_cond=cinemo, not lamp"),
        ({"dct_cutoff_shape": "disc"}, "dct_cutoff_shape='disc': expected one of rect, tri"),
        ({"analytic_variance": True}, "sigmas: found none, expected noise levels"),
        ({"sigmas": torch.zeros(0)}, "sigmas: found an empty list, expected noise levels"),
        ({"sigmas": torch.tensor([25.1, 0.0])}, "sigmas: start at 25.1000, expected above 0, at most 14.6146. Use the model of"),
        ({"sigmas": torch.tensor([0.0])}, "sigmas: start at 0.0000, expected above 0"),
        ({"image": torch.zeros(3, 64, 64, 3)}, "image: found a batch of 3, expected one image"),
    ],
)
def test_a_start_that_cannot_be_made_is_refused(vae: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        start(vae, **options)
    assert str(caught.value).startswith(message)


def test_widgets_are_checked_together_when_they_are_queued() -> None:
    check = I2vStart.validate_inputs
    assert check() and check(64, 64, "cinemo", True) and check(first_frame_cond=None, use_dct_init=True)
    for widgets in ((66, 64, "lamp", False), (64, 64, "lamp", True), (64, 64, "other", False), (64, 9000, None, None)):
        with pytest.raises(ValueError, match=": expected"):
            check(*widgets)


def test_another_vae_is_refused(tiny_models: Path) -> None:
    with pytest.raises(ValueError, match=r"^vae: encodes into \(1, 16, 8, 12\), expected \(1, 4, 8, 12\)"):
        start(load_wan(tiny_models)["vae"])


# -- noise -----------------------------------------------------------------------------------------------------------------


def test_plain_noise_is_core_s_of_that_seed(vae: Any, model: Any) -> None:
    latent, noise = start(vae)
    theirs = RandomNoise.execute(5).result[0].generate_noise(latent)
    made = noise.generate_noise(latent)
    assert torch.equal(made[1:], theirs[1:]) and not made[0].any()
    made += 1
    assert torch.equal(noise.generate_noise(latent)[1:], theirs[1:]), "samplers may write into it"
    assert not torch.equal(start(vae, seed=6)[1].generate_noise(latent)[1:], theirs[1:])
    with pytest.raises(ValueError, match=r"^latent_image: found \(2, 4, 8, 12\), expected \(4, 4, 8, 12\)"):
        noise.generate_noise({"samples": latent["samples"][:2]})


@pytest.mark.parametrize(
    ("options", "cil_ratio"),
    [
        ({}, 1.0),
        ({"shared_noise_ratio": 0.2, "seed": 9}, 1.0),
        ({**CINEMO, "shared_noise_ratio": 0.05}, 1.0),
        (DCT, 1.0),
        ({**DCT, "dct_cutoff_shape": "tri"}, 1.0),
        ({"analytic_variance": True}, 0.6),
    ],
    ids=["lamp", "shared", "cinemo", "rect", "tri", "cil"],
)
def test_sampling_is_ddim_from_that_noise(vae: Any, model: Any, options: dict, cil_ratio: float) -> None:
    sigmas = levels(model, 5, cil_ratio)
    latent, noise = start(vae, sigmas=sigmas, **options)
    timesteps = model.get_model_object("model_sampling").timestep(sigmas[:-1]).tolist()
    kept = float(first_frame.SCHEDULE.alphas_bar[timesteps[0]])
    deviation = math.sqrt(0.566 * kept + 1 - kept) if options.get("analytic_variance") else 1.0
    made = sample(model, noise, comfy.samplers.sampler_object("euler"), sigmas, latent)
    expected = plain_ddim(by_unet(model), by_hand(latent, deviation, **options), timesteps, unchanged)
    assert expected.std() > 0.1
    torch.testing.assert_close(made[1:].double() * 0.18215, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("options", [{}, DCT], ids=["lamp", "dct"])
def test_at_the_highest_level_core_scales_by_itself(vae: Any, model: Any, options: dict) -> None:
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 4)
    without, with_sigmas = start(vae, **options), start(vae, sigmas=sigmas, **options)
    noise = without[1].generate_noise(without[0])
    assert torch.equal(noise, with_sigmas[1].generate_noise(without[0]))
    torch.testing.assert_close(noise[1:], by_hand(without[0], **options), rtol=0, atol=1e-6)
    scaled = start(vae, sigmas=levels(model, 50), **options)[1].generate_noise(without[0])
    torch.testing.assert_close(scaled, 1.00290 * noise, rtol=0, atol=1e-5)


# -- the first frame stays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, DCT], ids=["lamp", "dct"])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "heun", "lcm"])
def test_the_picture_stays_to_the_bit(vae: Any, model: Any, sampler: str, options: dict) -> None:
    sigmas = levels(model, 4)
    latent, noise = start(vae, sigmas=sigmas, **options)
    made = sample(model, noise, comfy.samplers.sampler_object(sampler), sigmas, latent)
    assert torch.equal(made[0], latent["samples"][0]) and made[1:].isfinite().all() and made[1:].any()


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m"])
def test_k_sampler_keeps_the_picture(vae: Any, model: Any, sampler: str) -> None:
    """To rounding in some samplers; to the bit in a model that keeps it, as Apply I2V Adapters lets it."""
    latent, _ = start(vae)
    keeping = model.clone()
    keeping.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", keep_frames)
    given = (3, 4, 2.0, sampler, "normal", POSITIVE, NEGATIVE, latent)
    made, kept = (core.KSampler().sample(each, *given)[0]["samples"] for each in (model, keeping))
    torch.testing.assert_close(made[0], latent["samples"][0], rtol=0, atol=2e-6)
    assert torch.equal(kept[0], latent["samples"][0])
    assert torch.equal(kept[1:], made[1:]) and made[1:].any()


def test_a_sampler_without_a_mask_keeps_what_it_makes(vae: Any, model: Any) -> None:
    keeping = model.clone()
    keeping.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", keep_frames)
    latent, noise = start(vae)
    bare = {"samples": latent["samples"]}
    made, kept = (
        sample(each, noise, comfy.samplers.sampler_object("euler"), levels(model, 2), bare) for each in (model, keeping)
    )
    assert torch.equal(made, kept) and not torch.equal(made[0], latent["samples"][0])


def test_a_long_clip_keeps_the_picture_in_its_context_windows(vae: Any, tiny_models: Path) -> None:
    long = load_animatediff(tiny_models, beta_schedule=motion.KEEP, context_length=4, context_overlap=2)
    sigmas = levels(long, 2)
    latent, noise = start(vae, sigmas=sigmas, frames=7, **CINEMO)
    made = sample(long, noise, comfy.samplers.sampler_object("euler"), sigmas, latent)
    assert made.shape == (7, *SHAPE[1:]) and torch.equal(made[0], latent["samples"][0])
    assert made.isfinite().all() and (made[1:].flatten(1).std(1) > 0.01).all()
