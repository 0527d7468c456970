"""The start of a video from a picture against plain sums and loops."""

import math
from itertools import product

import numpy
import pytest
import torch
from diffusers import DDIMScheduler
from kinoloom.trainers.core.first_frame import (
    SCHEDULE,
    adain,
    adain_last,
    adain_step,
    analytic_deviation,
    dct_init,
    ddim_timesteps,
    diffused,
    low_frequencies,
    shared_noise,
)
from torch import Tensor

from ..rows import random as tensor


def kept(t: int) -> float:
    """a_t of Stable Diffusion's schedule, step by step."""
    product = 1.0
    for i in range(t + 1):
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999
        product *= 1 - root * root
    return product


@pytest.mark.parametrize(
    ("t", "value"), [(1, 0.998296), (883, 0.016842), (975, 0.006196), (981, 0.005776), (999, 0.004660)]
)
def test_the_schedule_is_stable_diffusions(t: int, value: float) -> None:
    assert float(SCHEDULE.alphas_bar[t]) == pytest.approx(kept(t), rel=1e-6) == pytest.approx(value, abs=6e-7)


# -- timesteps -------------------------------------------------------------------------------------------------------------


def test_fifty_steps_go_down_from_981() -> None:
    assert ddim_timesteps(50).tolist() == list(range(981, 0, -20))


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50, 333, 999])
def test_the_grid_is_diffusers(steps: int) -> None:
    theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    theirs.set_timesteps(steps)
    assert torch.equal(ddim_timesteps(steps), theirs.timesteps)
    torch.testing.assert_close(SCHEDULE.alphas_bar, theirs.alphas_cumprod, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("steps", "ratio", "first", "last"), [(50, 0.9, 883, 1), (50, 0.94, 922, 1), (25, 0.77, 740, 1), (30, 0.3, 287, 0)]
)
def test_a_lower_ratio_has_timesteps_times_the_ratio(steps: int, ratio: float, first: int, last: int) -> None:
    grid = ddim_timesteps(steps, ratio).tolist()
    assert (len(grid), grid[0], grid[-1]) == (steps, first, last)
    strides = [a - b for a, b in zip(grid, grid[1:], strict=False)]
    assert {abs(stride - 1000 // steps * ratio) < 1 for stride in strides} == {True} and min(strides) > 0


@pytest.mark.parametrize(
    ("steps", "ratio", "most"), [(1000, 1.0, 999), (0, 1.0, 999), (501, 0.5, 500), (501, 0.9, 500), (11, 0.01, 10)]
)
def test_a_grid_needs_as_many_timesteps_as_steps(steps: int, ratio: float, most: int) -> None:
    with pytest.raises(ValueError, match=rf"^steps={steps}: expected 1..{most} for cil_ratio={ratio:g}"):
        ddim_timesteps(steps, ratio)
    grid = ddim_timesteps(most, ratio)
    assert 0 <= grid[-1] and grid[0] < 1000 and (grid.diff() < 0).all()


# -- the first noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [883, 981, 400])
def test_the_analytic_variance_is_that_of_noisy_latents(t: int) -> None:
    sigma = math.sqrt((1 - kept(t)) / kept(t))
    assert analytic_deviation(sigma) ** 2 == pytest.approx(0.566 * kept(t) + 1 - kept(t), rel=1e-9)


@pytest.mark.parametrize(("ratio", "deviation"), [(0.0, 1.0), (0.05, 0.951), (0.2, 0.825), (1.0, 1.0)])
def test_shared_noise_is_a_mean_that_loses_variance(ratio: float, deviation: float) -> None:
    noise = tensor(3, 4, 64, 64, name="noise")
    made = shared_noise(noise, ratio)
    for c, y, x, f in ((0, 0, 0, 1), (3, 63, 2, 2), (1, 5, 60, 1)):
        expected = ratio * noise[0, c, y, x].item() + (1 - ratio) * noise[f, c, y, x].item()
        assert made[f, c, y, x].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(made[0], noise[0])
    assert made[1:].std().item() == pytest.approx(deviation, abs=0.02)


def test_cinemos_noise_is_the_picture_at_timestep_975() -> None:
    picture, noise = tensor(1, 4, 3, 5, name="picture"), tensor(2, 4, 3, 5, name="noise")
    expected = 0.078714 * picture.double() + 0.996897 * noise.double()
    torch.testing.assert_close(diffused(picture, noise).double(), expected, rtol=0, atol=5e-6)
    assert diffused(picture.half(), noise.half()).dtype == torch.float32


def dct(x: numpy.ndarray) -> numpy.ndarray:
    """The orthonormal DCT over all dimensions, as sums."""
    made = numpy.zeros_like(x)
    for frequency in numpy.ndindex(*x.shape):
        for place in numpy.ndindex(*x.shape):
            made[frequency] += x[place] * math.prod(map(wave, frequency, place, x.shape))
    return made


def inverse_dct(x: numpy.ndarray) -> numpy.ndarray:
    made = numpy.zeros_like(x)
    for place in numpy.ndindex(*x.shape):
        for frequency in numpy.ndindex(*x.shape):
            made[place] += x[frequency] * math.prod(map(wave, frequency, place, x.shape))
    return made


def wave(frequency: int, place: int, size: int) -> float:
    scale = math.sqrt((1 if frequency == 0 else 2) / size)
    return scale * math.cos(math.pi * (2 * place + 1) * frequency / (2 * size))


@pytest.mark.parametrize(("shape", "ratio"), [("rect", 0.5), ("tri", 0.75), ("rect", 0.0), ("tri", 1.0)])
def test_dct_init_mixes_frequencies_of_space_and_time(shape: str, ratio: float) -> None:
    """Against a DCT over frames, rows and columns: the one over frames makes no difference."""
    low, high = tensor(3, 1, 4, 5, name="low"), tensor(3, 1, 4, 5, name="high")
    of_low, of_high = dct(low[:, 0].double().numpy()), dct(high[:, 0].double().numpy())
    mixed = of_high.copy()
    for f, y, x in product(range(3), range(4), range(5)):
        if y < int(4 * ratio) and x < int(5 * ratio) and (shape == "rect" or y / 4 + x / 5 < ratio):
            mixed[f, y, x] = of_low[f, y, x]
    made = dct_init(low, high, low_frequencies(4, 5, ratio, shape))
    torch.testing.assert_close(made[:, 0].double(), torch.from_numpy(inverse_dct(mixed)), rtol=0, atol=2e-6)


def test_low_frequencies_of_the_original_size() -> None:
    rect, tri = (low_frequencies(40, 64, 0.23, shape) for shape in ("rect", "tri"))
    assert rect[:9, :14].all() and rect.sum() == 9 * 14
    assert tri.sum() == 78 and not (tri & ~rect).any() and tri[0, :14].all() and not tri[8, 13]
    assert low_frequencies(8, 8, 0.1, "rect").sum() == 0 and low_frequencies(8, 8, 1.0, "rect").all()


def test_all_or_no_frequencies_are_one_of_the_two() -> None:
    low, high = tensor(2, 4, 40, 64, name="low"), tensor(2, 4, 40, 64, name="high")
    assert torch.equal(dct_init(low, high, torch.zeros(40, 64, dtype=torch.bool)), high)
    torch.testing.assert_close(dct_init(low, high, torch.ones(40, 64, dtype=torch.bool)), low, rtol=0, atol=2e-5)
    mixed = dct_init(low, high, low_frequencies(40, 64, 0.23, "rect"))
    torch.testing.assert_close(mixed.mean((-2, -1)), low.mean((-2, -1)), rtol=0, atol=1e-6)


# -- AdaIN -----------------------------------------------------------------------------------------------------------------


def plain_adain(x: Tensor, like: Tensor) -> Tensor:
    """One frame [C, h, w] to another, channel by channel."""
    made = torch.zeros_like(x, dtype=torch.float64)
    for channel in range(len(x)):
        own, other = x[channel].double(), like[channel].double()
        mean, wanted = own.sum() / own.numel(), other.sum() / other.numel()
        variance, wanted_variance = (
            ((values - middle) ** 2).sum() / (values.numel() - 1) + 1e-8
            for values, middle in ((own, mean), (other, wanted))
        )
        made[channel] = (own - mean) / variance.sqrt() * wanted_variance.sqrt() + wanted
    return made


VIDEO, PICTURE = 3 * tensor(5, 4, 6, 7, name="video") + 2, tensor(1, 4, 6, 7, name="picture") - 1


def test_adain_takes_mean_and_unbiased_deviation_of_each_channel() -> None:
    made = adain(VIDEO, PICTURE)
    for frame in range(5):
        torch.testing.assert_close(made[frame].double(), plain_adain(VIDEO[frame], PICTURE[0]), rtol=0, atol=1e-5)
    flat = adain(torch.ones(1, 4, 6, 7), PICTURE)
    assert flat.isfinite().all(), "a frame without deviation"


def test_the_last_match_is_to_frame_0_once() -> None:
    made = adain_last(VIDEO)
    assert torch.equal(made[0], VIDEO[0])
    for frame in range(1, 5):
        torch.testing.assert_close(made[frame].double(), plain_adain(VIDEO[frame], VIDEO[0]), rtol=0, atol=1e-5)
    assert torch.equal(adain_last(VIDEO[:1]), VIDEO[:1])
    assert adain_last(VIDEO.half()).dtype == torch.float16


@pytest.mark.parametrize("with_first", [False, True])
def test_a_step_matches_to_frame_1_as_it_is_by_then(with_first: bool) -> None:
    made = adain_step(VIDEO, PICTURE, with_first)
    second = plain_adain(VIDEO[1], PICTURE[0]) if with_first else VIDEO[1].double()
    torch.testing.assert_close(made[1].double(), second, rtol=0, atol=1e-5)
    for frame in range(2, 5):
        torch.testing.assert_close(made[frame].double(), plain_adain(VIDEO[frame], second), rtol=0, atol=1e-5)
    assert torch.equal(made[0], VIDEO[0])
    for frames in (1, 2):
        torch.testing.assert_close(adain_step(VIDEO[:frames], PICTURE, with_first), made[:frames], rtol=0, atol=1e-6)
