"""Nodes that start a video from a picture: its latents and first noise, and the noise levels of its sampling."""

import math
from dataclasses import dataclass, fields
from typing import Any

import comfy.latent_formats
import torch
from comfy_api.latest import io
from torch import Tensor

from ...trainers.core import first_frame
from ...trainers.core.config import check, knob
from ..animatediff.modules import KEEP
from ..data.encoding.vae import encode_pixels
from ..data.reading.framing import fit
from ..data.reading.sources import from_tensor
from ..widgets import widgets

CATEGORY = "Kinoloom/adapters"
LAMP, CINEMO = "lamp", "cinemo"
CELL = 8  # pixels of a side that are one latent
LEVELS = first_frame.SCHEDULE.sigmas(1.0)  # noise levels of the timesteps 0..999
OWN_SCHEDULE = f'Use the model of Apply I2V Adapters, or set beta_schedule of Apply Motion Module to "{KEEP}".'


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """Size of the video and its first noise. ValueError names an option, its value and the values that are allowed."""

    width: int = knob(512, "Width of the video in pixels, a multiple of 8.", min=64, max=4096, step=8)
    height: int = knob(320, "Height of the video in pixels, a multiple of 8.", min=64, max=4096, step=8)
    frames: int = knob(16, "Frames of the video, with the image: 16, as in training.", min=2, max=1024)
    first_frame_cond: str = knob(
        LAMP,
        "lamp: the other frames begin as noise. cinemo: they begin as the image with much noise, which keeps its "
        "layout and calms the motion.",
        choices=(LAMP, CINEMO),
    )
    shared_noise_ratio: float = knob(
        0.0, "Share of noise that is the same in all frames. Try 0.05 or 0.2 against flicker.", min=0.0, max=1.0
    )
    use_dct_init: bool = knob(
        False, "Take only the low frequencies from the image, for cinemo: freer motion, steady colours."
    )
    dct_cutoff_ratio: float = knob(
        0.23, "Share of the frequencies along each side that count as low, for use_dct_init.", min=0.0, max=1.0,
        advanced=True,
    )  # fmt: skip
    dct_cutoff_shape: str = knob(
        "rect", "Shape of the low frequencies: a rectangle, or its lower triangle, for use_dct_init.",
        choices=first_frame.SHAPES, advanced=True,
    )  # fmt: skip
    analytic_variance: bool = knob(
        False, "Give the noise the variance of noisy latents at the first noise level, for I2V Sigmas with a "
        "cil_ratio below 1. It needs sigmas.", advanced=True,
    )  # fmt: skip
    seed: int = knob(0, "Seed of the noise.", min=0, max=0xFFFFFFFFFFFFFFFF)

    def __post_init__(self) -> None:
        for option in fields(self):
            check(option, getattr(self, option.name))
        for side in ("width", "height"):
            if getattr(self, side) % CELL:
                raise ValueError(f"{side}={getattr(self, side)}: expected a multiple of {CELL}")
        if self.use_dct_init and self.first_frame_cond != CINEMO:
            raise ValueError(f"use_dct_init=True: expected first_frame_cond={CINEMO}, not {self.first_frame_cond}")


@dataclass(frozen=True)
class FirstNoise:
    """A NOISE: what ComfyUI's sampler multiplies by the first noise level, in the model's latent space [F, 4, h, w]."""

    seed: int
    values: Tensor

    def generate_noise(self, input_latent: dict[str, Any]) -> Tensor:
        """The noise of a LATENT. ValueError if its latents have another shape."""
        found, made = tuple(input_latent["samples"].shape), tuple(self.values.shape)
        if found != made:
            raise ValueError(f"latent_image: found {found}, expected {made}, the LATENT of the same I2V Start")
        return self.values.clone()


class I2vStart(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomI2vStart",
            display_name="I2V Start",
            category=CATEGORY,
            description="Starts a video from an image: latents whose first frame stays the image, and the first "
            "noise of the other frames.",
            search_aliases=["image to video", "first frame", "cinemo", "dctinit", "shared noise"],
            inputs=[
                io.Image.Input("image", tooltip="The first frame. It is cropped to the aspect ratio of the video."),
                io.Vae.Input("vae", tooltip="The VAE of the Stable Diffusion 1.5 checkpoint."),
                *widgets(StartOptions),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="The noise levels of the sampler, such as those of I2V Sigmas. They scale the noise "
                    "exactly. Without them sampling must start at the highest level.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The video's latents, for a sampler. Frame 0 is masked, so it stays."),
                io.Noise.Output(tooltip="The first noise, for SamplerCustomAdvanced. A KSampler makes its own."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        width: int | None = None,
        height: int | None = None,
        first_frame_cond: str | None = None,
        use_dct_init: bool | None = None,
    ) -> bool:
        """ValueError for widgets that do not fit together. Connected inputs are None."""
        dct = use_dct_init if first_frame_cond else None
        given = {"width": width, "height": height, "first_frame_cond": first_frame_cond, "use_dct_init": dct}
        StartOptions(**{name: value for name, value in given.items() if value is not None})
        return True

    @classmethod
    def execute(cls, image: Tensor, vae: Any, sigmas: Tensor | None = None, **options: Any) -> io.NodeOutput:
        chosen = StartOptions(**options)
        level = first_level(sigmas, chosen.analytic_variance)
        latent_format = comfy.latent_formats.SD15()
        picture = latent_format.process_in(encode_picture(image, vae, chosen))
        samples = torch.zeros(chosen.frames, *picture.shape[1:])
        samples[0] = latent_format.process_out(picture)[0]  # so rounded that a sampler returns it to the bit
        mask = torch.ones(chosen.frames, *picture.shape[2:])
        mask[0] = 0
        noise = FirstNoise(chosen.seed, first_noise(picture, chosen, level))
        return io.NodeOutput({"samples": samples, "noise_mask": mask}, noise)


def keep_frames(
    executor: Any, noise: Tensor, latents: Tensor, sampler: Any, sigmas: Tensor, mask: Any = None, *args: Any, **kw: Any
) -> Tensor:
    """A wrapper of ComfyUI's OUTER_SAMPLE: masked latents come back to the bit, which some samplers round."""
    samples = executor(noise, latents, sampler, sigmas, mask, *args, **kw)
    return samples if mask is None else torch.where(mask.to(samples) == 0, latents.to(samples), samples)


def encode_picture(image: Tensor, vae: Any, size: StartOptions) -> Tensor:
    """The unscaled latent [1, 4, h, w] of an image [1, H, W, C], cropped as training clips are."""
    if len(image) != 1:
        raise ValueError(f"image: found a batch of {len(image)}, expected one image")
    pixels = fit(next(from_tensor("image", image, 1.0).frames([0])), size.width, size.height)
    latents = encode_pixels(vae, pixels.unsqueeze(0)).movedim(1, 0)
    found, expected = tuple(latents.shape), (1, 4, size.height // CELL, size.width // CELL)
    if found != expected:
        raise ValueError(f"vae: encodes into {found}, expected {expected}, as that of Stable Diffusion 1.5 does")
    return latents


def first_level(sigmas: Tensor | None, needed: bool) -> float | None:
    """The first noise level, None without `sigmas`. ValueError if it is none of the model's, or missing but needed."""
    if sigmas is None and not needed:
        return None
    if sigmas is None or not len(sigmas):
        raise ValueError(f"sigmas: found {'none' if sigmas is None else 'an empty list'}, expected noise levels")
    level, most = float(sigmas[0]), float(LEVELS[-1])
    if not 0 < level <= most * (1 + 1e-5):
        raise ValueError(f"sigmas: start at {level:.4f}, expected above 0, at most {most:.4f}. {OWN_SCHEDULE}")
    return level


def first_noise(picture: Tensor, options: StartOptions, level: float | None) -> Tensor:
    """The NOISE [F, 4, h, w] for a scaled latent [1, 4, h, w]: 0 in frame 0, so that samplers keep it as it is."""
    shape = (options.frames, *picture.shape[1:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed))
    if options.analytic_variance:
        noise *= first_frame.analytic_deviation(level)
    noise = first_frame.shared_noise(noise, options.shared_noise_ratio)
    if options.first_frame_cond == CINEMO:
        low = first_frame.diffused(picture, noise)
        shape = (*picture.shape[2:], options.dct_cutoff_ratio, options.dct_cutoff_shape)
        noise = first_frame.dct_init(low, noise, first_frame.low_frequencies(*shape)) if options.use_dct_init else low
    noise[0] = 0
    return noise * begin_scale(level)


def begin_scale(level: float | None) -> float:
    """What x_T is multiplied by, for ComfyUI to begin with sqrt(1 + sigma^2) x_T.

    ComfyUI multiplies the noise by that itself at the model's highest level, and by sigma at others.
    """
    if level is None or math.isclose(level, float(LEVELS[-1]), rel_tol=1e-5):
        return 1.0
    return math.sqrt(1 + level**2) / level


class I2vSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomI2vSigmas",
            display_name="I2V Sigmas",
            category=CATEGORY,
            description="The noise levels of DDIM for image-to-video. They may start at less noise, against videos "
            "that hardly move.",
            search_aliases=["ddim_uniform", "conditional image leakage", "cil"],
            inputs=[
                io.Model.Input("model", tooltip="The model that samples."),
                io.Int.Input("steps", default=50, min=1, max=999, tooltip="Sampling steps. Fewer are faster."),
                io.Float.Input(
                    "cil_ratio",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="All timesteps are multiplied by it: 0.9 starts at timestep 883 instead of 981, at "
                    "less noise. Lower it if the video hardly moves.",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustomAdvanced and for I2V Start.")],
        )

    @classmethod
    def validate_inputs(cls, steps: int | None = None, cil_ratio: float | None = None) -> bool:
        """ValueError for widgets with wrong values, alone or together. Connected inputs are None."""
        ratio = 1.0 if cil_ratio is None else cil_ratio
        if not 0 < ratio <= 1:
            raise ValueError(f"cil_ratio={ratio}: expected above 0, at most 1")
        first_frame.ddim_timesteps(1 if steps is None else steps, ratio)
        return True

    @classmethod
    def execute(cls, model: Any, steps: int, cil_ratio: float) -> io.NodeOutput:
        cls.validate_inputs(steps, cil_ratio)
        levels = getattr(model.get_model_object("model_sampling"), "sigmas", torch.zeros(0)).cpu()
        if levels.shape != LEVELS.shape or not torch.allclose(levels, LEVELS, rtol=1e-4, atol=0):
            raise ValueError(f"model: its noise schedule is not Stable Diffusion's own. {OWN_SCHEDULE}")
        return io.NodeOutput(torch.cat([levels[first_frame.ddim_timesteps(steps, cil_ratio)], torch.zeros(1)]))


NODES: list[type[io.ComfyNode]] = [I2vStart, I2vSigmas]
