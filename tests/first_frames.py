"""Pictures as first frames of videos: what I2V Start makes of one, sampled by core, and the same in plain loops."""

from collections.abc import Callable
from typing import Any

import torch
from comfy_extras.nodes_custom_sampler import BasicGuider, SamplerCustomAdvanced
from kinoloom.nodes.adapters.start import I2vSigmas, I2vStart
from kinoloom.trainers.core import first_frame
from rows import random
from torch import Tensor

FRAMES, WIDTH, HEIGHT = 4, 96, 64
SHAPE = (FRAMES, 4, HEIGHT // 8, WIDTH // 8)
OPTIONS = {
    "width": WIDTH, "height": HEIGHT, "frames": FRAMES, "first_frame_cond": "lamp", "shared_noise_ratio": 0.0,
    "use_dct_init": False, "dct_cutoff_ratio": 0.23, "dct_cutoff_shape": "rect", "analytic_variance": False, "seed": 5,
}  # fmt: skip
Predict = Callable[[Tensor, Tensor], Tensor]
POSITIVE = [[random(1, 77, 768, name="positive"), {}]]
NEGATIVE = [[random(1, 77, 768, name="negative"), {}]]


def picture(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(1))


def start(vae: Any, image: Tensor | None = None, **options: Any) -> tuple[dict[str, Tensor], Any]:
    return I2vStart.execute(picture() if image is None else image, vae, **{**OPTIONS, **options}).result


def levels(model: Any, steps: int = 6, cil_ratio: float = 1.0) -> Tensor:
    return I2vSigmas.execute(model, steps, cil_ratio).result[0]


def sample(model: Any, noise: Any, sampler: Any, sigmas: Tensor, latent: dict[str, Tensor]) -> Tensor:
    guider = BasicGuider.execute(model, POSITIVE).result[0]
    return SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).result[0]["samples"]


def plain_ddim(predict: Predict, x: Tensor, timesteps: list[int], after: Callable[[Tensor, int], Tensor]) -> Tensor:
    """DDIM on x_t of the frames that are not the picture, as its paper writes it, in the model's latent space."""
    alphas = first_frame.SCHEDULE.alphas_bar.double()
    for step, t in enumerate(timesteps):
        kept = alphas[t]
        following = alphas[timesteps[step + 1]] if step + 1 < len(timesteps) else torch.tensor(1.0)
        noise = predict(x.float(), torch.tensor([t])).double()
        clean = (x - (1 - kept).sqrt() * noise) / kept.sqrt()
        x = after(following.sqrt() * clean + (1 - following).sqrt() * noise, step)
    return x


def by_unet(model: Any) -> Predict:
    """Each frame alone."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        context = POSITIVE[0][0].expand(len(x), -1, -1)
        return model.model.diffusion_model(x, t.expand(len(x)), context=context)

    return predict


def unchanged(x: Tensor, step: int) -> Tensor:
    return x


def lamps_matching(clean: Tensor, begin: float) -> Callable[[Tensor, int], Tensor]:
    """Frame 1 to the picture after step `begin`, and the others to it by then, one by one."""

    def match(x: Tensor, step: int) -> Tensor:
        x = x.clone()
        if step > begin:
            x[:1] = first_frame.adain(x[:1], clean)
        for frame in range(1, len(x)):
            x[frame] = first_frame.adain(x[frame : frame + 1], x[:1])[0]
        return x

    return match


def by_hand(latent: dict[str, Tensor], deviation: float = 1.0, **options: Any) -> Tensor:
    """x_T of the frames that are not the picture."""
    chosen = {**OPTIONS, **options}
    clean = latent["samples"][:1] * 0.18215
    noise = deviation * torch.randn(SHAPE, generator=torch.Generator().manual_seed(chosen["seed"]))
    shared = chosen["shared_noise_ratio"]
    noise = shared * noise[:1] + (1 - shared) * noise[1:]
    if chosen["first_frame_cond"] == "lamp":
        return noise
    far = 0.0787140 * clean + 0.9968973 * noise
    if not chosen["use_dct_init"]:
        return far
    mask = torch.zeros(SHAPE[2:], dtype=torch.bool)
    for y in range(int(SHAPE[2] * chosen["dct_cutoff_ratio"])):
        for x in range(int(SHAPE[3] * chosen["dct_cutoff_ratio"])):
            inside = y / SHAPE[2] + x / SHAPE[3] < chosen["dct_cutoff_ratio"]
            mask[y, x] = inside or chosen["dct_cutoff_shape"] == "rect"
    return first_frame.dct_init(far, noise, mask)
