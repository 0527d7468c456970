"""Videos that start from a picture: their first noise, their timesteps, and statistics taken over from the picture.

Latents are in the model's latent space. A video is [F, C, h, w], its frame 0 the picture's latent z_0 [1, C, h, w].
Everything is computed in fp32.
"""

import math

import torch
from torch import Tensor

from .schedules import Ddpm

SCHEDULE = Ddpm(root=True)  # Stable Diffusion's own
DIFFUSED_TO = 975  # timestep of Cinemo's first noise
DATA_VARIANCE = 0.566  # of latents, for the analytic variance (Zhao et al. 2024, arXiv 2406.15735, equation 5)
SMALL = 1e-8  # added to a variance
SHAPES = ("rect", "tri")


def ddim_timesteps(steps: int, cil_ratio: float = 1.0) -> Tensor:
    """DDIM's timesteps from high to low [steps] (diffusers' "leading", steps_offset 1), times the ratio and rounded.

    50 steps and ratio 1 are 981, 961, ..., 1. A ratio below 1 starts at less noise, against still videos (Zhao et al.
    2024, arXiv 2406.15735). ValueError if there are more steps than timesteps.
    """
    most = min(SCHEDULE.steps // math.ceil(1 / cil_ratio), SCHEDULE.steps - 1)
    if not 1 <= steps <= most:
        raise ValueError(f"steps={steps}: expected 1..{most} for cil_ratio={cil_ratio:g}")
    grid = torch.arange(steps, dtype=torch.float64).flip(0) * (SCHEDULE.steps // steps) + 1
    return (cil_ratio * grid + 0.5).long()


def analytic_deviation(sigma: float) -> float:
    """Standard deviation of the noisy latents x_M with sigma^2 = (1 - a_M) / a_M, if z_0 has mean 0."""
    kept = 1 / (1 + sigma**2)
    return math.sqrt(kept * DATA_VARIANCE + 1 - kept)


def shared_noise(noise: Tensor, ratio: float) -> Tensor:
    """Frames 1.. of `noise` [F, C, h, w] as r N_0 + (1 - r) N_f, which has less variance (LAMP, arXiv 2310.10769)."""
    return torch.cat([noise[:1], ratio * noise[:1] + (1 - ratio) * noise[1:]])


def diffused(picture: Tensor, noise: Tensor) -> Tensor:
    """sqrt(a) z_0 + sqrt(1 - a) N_f at timestep 975 (Ma et al. 2024, Cinemo), like `noise` [F, C, h, w]."""
    return SCHEDULE.add_noise(picture.float(), noise.float(), torch.tensor([DIFFUSED_TO]))


def low_frequencies(height: int, width: int, ratio: float, shape: str) -> Tensor:
    """The DCT coefficients of a frame that are taken from the picture, as booleans [height, width].

    "rect" are the first int(height ratio) rows and int(width ratio) columns; "tri" those of them with
    y / height + x / width < ratio.
    """
    y, x = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    inside = (y < int(height * ratio)) & (x < int(width * ratio))
    return inside if shape == "rect" else inside & (y / height + x / width < ratio)


def dct_init(low: Tensor, high: Tensor, mask: Tensor) -> Tensor:
    """The coefficients of `mask` [h, w] from `low`, the others from `high`, both [F, C, h, w] (Cinemo's DCTInit).

    The original transforms time as well. Its mask is the same at all temporal frequencies, so that cancels.
    """
    rows, columns = (_dct(size).to(high.device) for size in mask.shape)
    high = high.float()
    difference = mask.to(high.device) * (rows @ (low.float() - high) @ columns.T)
    return high + rows.T @ difference @ columns


def _dct(size: int) -> Tensor:
    """The matrix of the orthonormal DCT-II, frequencies by places [size, size]."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * place[:, None] * (place + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def adain(x: Tensor, like: Tensor) -> Tensor:
    """`x` with the mean and deviation of `like` in each frame and channel, both [F, C, h, w] (arXiv 1703.06868)."""
    if not len(x):
        return x
    (mean, deviation), (wanted_mean, wanted) = _statistics(x.float()), _statistics(like.float())
    return (x - mean) / deviation * wanted + wanted_mean


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((-2, -1), keepdim=True), (x.var((-2, -1), keepdim=True) + SMALL).sqrt()


def adain_last(video: Tensor) -> Tensor:
    """Frames 1.. with the statistics of frame 0, which stays as it is."""
    return torch.cat([video[:1], adain(video[1:], video[:1]).to(video.dtype)])


def adain_step(video: Tensor, picture: Tensor, with_first: bool) -> Tensor:
    """LAMP's matching after a step (arXiv 2310.10769): frames 2.. to frame 1, and before that frame 1 to z_0 if asked.

    `video` is x_t = sqrt(a) z + sqrt(1 - a) noise. Frame 0 stays as it is.
    """
    second = adain(video[1:2], picture) if with_first else video[1:2]
    return torch.cat([video[:1], second, adain(video[2:], second)])
