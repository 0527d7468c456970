"""Random draws and noise schedules against closed forms, scipy, ComfyUI's model sampling and diffusers' scheduler."""

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from kinoloom.trainers.core.losses import masked_mse, sample_timesteps
from kinoloom.trainers.core.rng import STRATA, Rng, derived_generator
from kinoloom.trainers.core.schedules import Ddpm, FlowMatch, logit_normal, shift_timesteps
from scipy.special import expit
from scipy.stats import kstest, norm

from ..rows import random as tensor

LATENTS, NOISE = tensor(2, 16, 3, 4, 4, name="latents"), tensor(2, 16, 3, 4, 4, name="noise")


def uniforms(rng: Rng, windows: int, stratified: bool = True) -> torch.Tensor:
    return rng.uniform(windows * STRATA, stratified).view(windows, STRATA)


# -- Rng -------------------------------------------------------------------------------------------------------------------


def test_draws_depend_on_the_place_alone() -> None:
    """A batch of four is four samples; earlier draws change nothing."""
    x = torch.zeros(4, 2, 3)
    batch = Rng(5, "clips", 8)
    noise, u = batch.noise_like(x), batch.uniform(4)
    for i in (3, 1, 0, 2):
        assert torch.equal(Rng(5, "clips", 8 + i).noise_like(x[:1])[0], noise[i])
        assert torch.equal(Rng(5, "clips", 8 + i).uniform(1)[0], u[i])
    assert torch.equal(batch.noise_like(x), noise) and torch.equal(batch.uniform(4), u)


@pytest.mark.parametrize(
    "other", [Rng(6, "clips", 8), Rng(5, "set", 8), Rng(5, "clips", 9), Rng(5, "clips", 8).fork("prior")]
)
def test_another_place_draws_otherwise(other: Rng) -> None:
    own, x = Rng(5, "clips", 8), torch.zeros(1, 64)
    assert not torch.isclose(own.noise_like(x), other.noise_like(x)).any()
    assert own.uniform(1) != other.uniform(1)
    assert own.generator("masks").initial_seed() != other.generator("masks").initial_seed()


def test_purposes_are_independent_and_derived_generators_repeat() -> None:
    rng = Rng(0, "p", 0)
    assert rng.generator("masks").initial_seed() != rng.generator("prompt").initial_seed()
    first = torch.randn(3, generator=derived_generator("a", 1))
    assert torch.equal(torch.randn(3, generator=derived_generator("a", 1)), first)
    assert not torch.equal(torch.randn(3, generator=derived_generator("a", 2)), first)


def test_noise_is_standard_normal_in_the_dtype_of_the_latents() -> None:
    noise = Rng(0, "p", 0).noise_like(torch.zeros(4, 16, 5, 8, 8))
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert not torch.isclose(noise[0], noise[1]).all()
    half = Rng(0, "p", 0).noise_like(torch.zeros(4, 16, 5, 8, 8, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16 and torch.equal(half, noise.bfloat16())


def test_stratified_windows_hold_one_sample_of_every_sixteenth() -> None:
    windows = uniforms(Rng(0, "p", 0), 20)
    strata = (windows * STRATA).long()
    assert torch.equal(strata.sort(dim=1).values, torch.arange(STRATA).expand(20, STRATA))
    assert len({tuple(row.tolist()) for row in strata}) == 20, "in another order each time"
    assert kstest((windows * STRATA % 1).flatten().numpy(), "uniform").pvalue > 1e-3, "uniform within its sixteenth"


def test_unstratified_draws_are_uniform_and_uneven() -> None:
    windows = uniforms(Rng(0, "p", 0), 40, stratified=False)
    assert kstest(windows.flatten().numpy(), "uniform").pvalue > 1e-3
    assert any(len(set((row * STRATA).long().tolist())) < STRATA for row in windows)
    assert not torch.equal(windows, uniforms(Rng(0, "p", 0), 40))


def test_an_evaluation_sits_at_its_quantile() -> None:
    rng = Rng(0, "p", 0, quantile=0.3)
    assert torch.equal(rng.uniform(3), torch.full((3,), 0.3)) and rng.evaluating and not Rng(0, "p", 0).evaluating
    assert rng.fork("prior").quantile == 0.3
    assert torch.equal(rng.noise_like(LATENTS), Rng(0, "p", 0).noise_like(LATENTS))


# -- timesteps -------------------------------------------------------------------------------------------------------------

U = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


def test_logit_normal_is_the_sigmoid_of_the_normal_quantile() -> None:
    u = torch.cat([U[::97], torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64)])
    torch.testing.assert_close(logit_normal(u), torch.from_numpy(expit(norm.ppf(u.numpy()))), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("shift", "mean", "above"), [(1, 0.50, 0.03), (3, 0.71, 0.20), (5, 0.79, 0.37), (8, 0.85, 0.55)]
)
def test_shift_moves_the_distribution_as_tabled(shift: float, mean: float, above: float) -> None:
    t = shift_timesteps(logit_normal(U), shift)
    assert t.mean().item() == pytest.approx(mean, abs=0.005)
    assert (t > 0.875).double().mean().item() == pytest.approx(above, abs=0.005)
    edge = 0.875 / (shift - 0.875 * (shift - 1))  # where the shift puts 0.875
    assert (t > 0.875).double().mean().item() == pytest.approx(norm.sf(numpy.log(edge / (1 - edge))), abs=1e-4)


@pytest.mark.parametrize("sampling", ["logit_normal", "uniform"])
@pytest.mark.parametrize("stratified", [True, False])
def test_timesteps_are_the_draws_at_the_samplings_quantiles(sampling: str, stratified: bool) -> None:
    rng = Rng(3, "p", 40)
    u = rng.uniform(6, stratified).double().numpy()
    t = expit(norm.ppf(u)) if sampling == "logit_normal" else u
    expected = 3 * t / (1 + 2 * t)
    actual = sample_timesteps(rng, 6, sampling, 3.0, stratified)
    assert actual.shape == (6,)
    numpy.testing.assert_allclose(actual.numpy(), expected, rtol=1e-4)


# -- schedules -------------------------------------------------------------------------------------------------------------

T = torch.tensor([0.15, 0.8])


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_flow_matching_is_diffusers(shift: float) -> None:
    plain, shifted = (FlowMatchEulerDiscreteScheduler(shift=s) for s in (1.0, shift))
    torch.testing.assert_close(shift_timesteps(plain.sigmas[:1000], shift), shifted.sigmas[:1000])
    place = torch.tensor([100, 700])
    t = shifted.sigmas[place]
    noisy = shifted.scale_noise(LATENTS, shifted.timesteps[place], NOISE)
    torch.testing.assert_close(FlowMatch().add_noise(LATENTS, NOISE, t), noisy)
    torch.testing.assert_close(FlowMatch.multiplier * t, shifted.timesteps[place], rtol=1e-5, atol=0)
    for i in range(2):
        shifted.set_begin_index(int(place[i]))
        shifted._step_index = None
        velocity = FlowMatch().target(LATENTS, NOISE, T)[i]
        after = shifted.step(velocity, shifted.timesteps[place[i]], noisy[i], return_dict=False)[0]
        torch.testing.assert_close(
            after, FlowMatch().add_noise(LATENTS, NOISE, shifted.sigmas[place + 1])[i], rtol=1e-4, atol=1e-5
        )


def test_the_ends_of_the_flow_are_data_and_noise() -> None:
    assert torch.equal(FlowMatch().add_noise(LATENTS, NOISE, torch.zeros(2)), LATENTS)
    assert torch.equal(FlowMatch().add_noise(LATENTS, NOISE, torch.ones(2)), NOISE)


# -- loss ------------------------------------------------------------------------------------------------------------------


def test_the_loss_is_an_fp32_mean_that_a_mask_weighs_before_the_mean() -> None:
    pred = LATENTS.bfloat16()
    error = (pred.double() - NOISE.double()).square()
    assert masked_mse(pred, NOISE, None).dtype == torch.float32
    assert masked_mse(pred, NOISE, None).item() == pytest.approx(error.mean().item(), rel=1e-5)
    mask = torch.zeros(2, 1, 3, 4, 4)
    mask[0, :, 1] = 0.5
    expected = 0.5 * error[0, :, 1].sum().item() / error.numel()
    assert masked_mse(pred, NOISE, mask).item() == pytest.approx(expected, rel=1e-5)


def test_steps_of_ddpm_are_the_thousandths_that_quantiles_fall_in() -> None:
    u = torch.tensor([1e-4, 0.0009, 0.001, 0.4999, 0.5001, 0.99949, 0.9996, 1 - 1e-4], dtype=torch.float64)
    assert Ddpm().timesteps(u).tolist() == [0, 0, 1, 499, 500, 999, 999, 999]
