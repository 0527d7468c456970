"""Prior clips: what the untrained model makes of ordinary prompts, which keeps a LoRA from forgetting them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import comfy.sample
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..trainers.core.config import check, knob
from ..trainers.core.data import Row, TrainingData, column_path
from ..lora_io.file import load
from . import identity
from .captions import MOTION_TOKEN, SUBJECT_TOKEN
from .columns import Columns, data_folder, encode_pixels
from .framing import spread


@dataclass(frozen=True, kw_only=True)
class PriorOptions:
    """How prior clips are sampled."""

    seeds_per_prompt: int = knob(2, "Clips made from each prompt. Raise it if you have few prompts.", min=1, max=64)
    seed: int = knob(0, "Seed of the first clip; the others follow. Change it for other clips.", min=0, max=2**53)
    steps: int = knob(30, "Sampling steps. Use what you use for generation.", min=1, max=1000)
    cfg: float = knob(6.0, "Guidance. Use what you use for generation.", min=0.0, max=100.0, step=0.1)
    single_frames: int = knob(4, "Frames of each prior clip that are also encoded one by one. Only used if the data holds "
                              "single frames, as for Set-and-Sequence.", min=0, max=1025, advanced=True)
    token_variants: int = knob(16, "Versions of each prompt with a tenth of the words missing. Keep it as in the node that "
                               "encoded the clips.", min=0, max=64, advanced=True)

    def __post_init__(self) -> None:
        for option in fields(self):
            check(option, getattr(self, option.name))


@dataclass(frozen=True)
class Sampler:
    """A model, and how it is sampled; `negative` is the negative prompt."""

    model: Any
    text_encoder: Any
    name: str
    scheduler: str
    negative: str
    steps: int
    cfg: float

    def sample(self, prompt: str, seed: int, shape: tuple[int, ...], bar: comfy.utils.ProgressBar) -> Tensor:
        """Raw latents [C, T, h, w]."""
        positive, negative = (self.text_encoder.encode_from_tokens_scheduled(self.text_encoder.tokenize(text))
                              for text in (prompt, self.negative))
        empty = torch.zeros(1, *shape)
        previewer = latent_preview.get_previewer(self.model.load_device, self.model.model.latent_format)

        def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
            bar.update_absolute(bar.current + 1, preview=preview)

        samples = comfy.sample.sample(
            self.model, comfy.sample.prepare_noise(empty, seed), self.steps, self.cfg, self.name, self.scheduler,
            positive, negative, empty, callback=callback, disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
        return samples[0].float().cpu()


def read_prompts(text: str) -> list[str]:
    """One prompt per line. ValueError for a line with a token of the trained subject or motion, or for no line."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    for line in prompts:
        for token in (SUBJECT_TOKEN, MOTION_TOKEN):
            if token in line:
                raise ValueError(f"prior prompt {line!r} contains {token}: prior clips show what the model knows without "
                                 "the trained subject, so describe others")
    if not prompts:
        raise ValueError("prompts is empty: write one prompt per line, such as 'A man in a blue shirt. He walks in a park.'")
    return prompts


def appearance(prompt: str) -> str:
    """The first sentence of "appearance. motion", for single frames."""
    return prompt.split(". ", 1)[0].rstrip(".") + "."


def clip_shapes(data: TrainingData, model: Any) -> list[tuple[int, ...]]:
    """The latent shapes [C, T, h, w] of the clips to train on, which prior clips take in turn."""
    shapes = list(dict.fromkeys(row.shape for row in data.select("clips", "train")))
    form = model.get_model_object("latent_format")
    if not shapes:
        raise ValueError("data holds no clips to train on, so there is no size to generate prior clips at")
    if form.latent_dimensions != 3 or shapes[0][0] != form.latent_channels:
        raise ValueError(f"the data's latents have {shapes[0][0]} channels; this model makes {form.latent_dimensions}-D latents "
                         f"of {form.latent_channels}. Encode the data with the VAE of a video model such as Wan and use that model")
    return shapes


def add_priors(data: TrainingData, sampler: Sampler, vae: Any, prompts: list[str], options: PriorOptions) -> TrainingData:
    """`data` and its prior rows. What was generated before is taken from disk."""
    shapes = clip_shapes(data, sampler.model)
    jobs = [(prompt, options.seed + i) for prompt in prompts for i in range(options.seeds_per_prompt)]
    frames = options.single_frames if data.select("frames", "train") else 0
    columns = Columns(data_folder(), comfy.utils.ProgressBar(1))
    rows = list(_prior_rows(columns, sampler, vae, list(zip(jobs, (shapes * len(jobs))[: len(jobs)], strict=True)), frames, options))
    return TrainingData(str(columns.folder), (*data.rows, *rows))


def _prior_rows(columns: Columns, sampler: Sampler, vae: Any, jobs: list, frames: int, options: PriorOptions) -> Iterator[Row]:
    ...
