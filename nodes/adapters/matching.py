"""Nodes that give the frames of a video the colours of its first frame."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.samplers
import numpy as np
import torch
from comfy.utils import model_trange
from comfy_api.latest import io
from torch import Tensor

from ...trainers.core.first_frame import adain_last, adain_step
from .start import CATEGORY

LEVELS = 256  # of a colour channel
LAMP_FRACTION = 0.62  # LAMP begins after step 30 of 50
NEEDS_MANY_STEPS = ("dpm_fast_function", "dpm_adaptive_function", "sample_unipc", "sample_unipc_bh2")


class AdainLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomAdainLatent",
            display_name="AdaIN to First Frame",
            category=CATEGORY,
            description="Gives every frame of a sampled video the mean and deviation of its first frame, in each "
            "latent channel: steady colours.",
            search_aliases=["color match", "use_adain_norm"],
            inputs=[io.Latent.Input("samples", tooltip="The latents of one video, from a sampler.")],
            outputs=[io.Latent.Output(tooltip="The matched latents, for VAE Decode. The first frame is unchanged.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any]) -> io.NodeOutput:
        require_video("samples", samples["samples"])
        return io.NodeOutput({**samples, "samples": adain_last(samples["samples"])})


def require_video(field: str, latents: Tensor) -> None:
    """ValueError unless these are frames of one video [F, C, h, w], with deviations."""
    found = tuple(latents.shape)
    if len(found) != 4 or found[2] * found[3] < 2:
        raise ValueError(f"{field}: found latents {found}, expected frames, channels, height, width")


class AdainSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomAdainSampler",
            display_name="AdaIN Sampler",
            category=CATEGORY,
            description="Lets a sampler match the frames of a video to each other after every step, as LAMP does: "
            "stronger than AdaIN to First Frame, and calmer motion.",
            search_aliases=["lamp", "color match", "use_adain_norm"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="From KSampler Select, such as euler. It runs one step at a time."),
                io.Float.Input(
                    "first_frame_from",
                    default=LAMP_FRACTION,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps after which the second frame is matched to the first one too. 1 never "
                    "does it.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def execute(cls, sampler: Any, first_frame_from: float) -> io.NodeOutput:
        function = getattr(sampler, "sampler_function", None)
        name = getattr(function, "__name__", type(sampler).__name__)
        if function is None or name in NEEDS_MANY_STEPS:
            raise ValueError(f"sampler: {name} cannot run one step at a time, expected another, such as euler or ddim")
        stepwise = partial(sample_stepwise, function, first_frame_from)
        return io.NodeOutput(comfy.samplers.KSAMPLER(stepwise, sampler.extra_options, sampler.inpaint_options))


def sample_stepwise(
    function: Callable[..., Tensor],
    first_frame_from: float,
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callable[[dict[str, Any]], None],
    disable: bool | None = None,
    **options: Any,
) -> Tensor:
    """A sampler function of ComfyUI that runs another for one step at a time, and matches the frames after each.

    A sampler that uses results of earlier steps is of first order then. Each step has a seed of its own, so that
    samplers that add noise do not add the same noise again.
    """
    picture, steps = kept_picture(model.latent_image, extra_args.get("denoise_mask")), len(sigmas) - 1
    for step in model_trange(steps, disable=disable):
        own = {**extra_args, "seed": (extra_args.get("seed") or 0) + step}

        def numbered(state: dict[str, Any], step: int = step) -> None:
            callback({**state, "i": step})

        x = function(model, x, sigmas[step : step + 2], extra_args=own, callback=numbered, disable=True, **options)
        scale = math.sqrt(1 + float(sigmas[step + 1]) ** 2)  # x is z + sigma noise
        matched = adain_step(x / scale, picture, step >= first_frame_from * steps - 1e-9)
        x = torch.cat([x[:1], matched[1:] * scale])
    return x


def kept_picture(latents: Tensor | None, mask: Tensor | None) -> Tensor:
    """Frame 0 of a sampler's `latents` [1, C, h, w]. ValueError unless it is masked, as I2V Start does."""
    if latents is None or mask is None or bool(mask[0].any()):
        raise ValueError("latent_image: its first frame is not kept (noise_mask), expected the LATENT of I2V Start")
    require_video("latent_image", latents)
    return latents[:1]


class MatchHistogram(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomMatchHistogram",
            display_name="Match Histogram",
            category=CATEGORY,
            description="Gives every frame of a video the colour distribution of its first frame.",
            search_aliases=["color match", "hist_match", "colour transfer"],
            inputs=[io.Image.Input("images", tooltip="The frames of one video.")],
            outputs=[io.Image.Output(tooltip="The matched frames. The first one is unchanged.")],
        )

    @classmethod
    def execute(cls, images: Tensor) -> io.NodeOutput:
        first, *others = images.cpu().numpy()
        made = [torch.from_numpy(match_histogram(frame, first)).to(images) for frame in others]
        return io.NodeOutput(torch.stack([images[0], *made]))


def match_histogram(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    """An image [H, W, C] in 0..1 with the cumulative distribution of `like` in each channel, over 256 levels.

    A level becomes the level, interpolated, at which as large a share of the pixels of `like` is at or below it.
    """
    channels = []
    for channel in range(image.shape[-1]):
        (places, shares), (_, wanted) = (distribution(each[..., channel]) for each in (image, like))
        present = np.diff(wanted, prepend=0) > 0
        levels = np.interp(shares, wanted[present], np.arange(LEVELS)[present])
        channels.append(levels[places] / (LEVELS - 1))
    return np.stack(channels, -1).astype(image.dtype)


def distribution(channel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The level of each pixel, and the share of pixels at or below each level [256]."""
    levels = (channel.clip(0, 1) * (LEVELS - 1)).round().astype(int)
    return levels, np.bincount(levels.ravel(), minlength=LEVELS).cumsum() / levels.size


NODES: list[type[io.ComfyNode]] = [AdainLatent, AdainSampler, MatchHistogram]
