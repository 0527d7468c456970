"""Samples clips with ComfyUI's sampler."""

from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from .prompts import tokenize

Conditioning = list[list]


@dataclass(frozen=True)
class Sampler:
    """A model and its sampler settings. `name` is ComfyUI's name of the sampler, `negative` the negative prompt."""

    model: Any
    text_encoder: Any
    name: str
    scheduler: str
    negative: str
    steps: int
    cfg: float

    def conditioning(self, prompt: str) -> Conditioning:
        """The conditioning of a prompt as from CLIP Text Encode, prompt weights included."""
        tokens = tokenize(self.text_encoder, prompt, literal=False, name="prompt")
        return self.text_encoder.encode_from_tokens_scheduled(tokens, show_pbar=False)

    def sample(
        self,
        positive: Conditioning,
        negative: Conditioning,
        seed: int,
        shape: tuple[int, ...],
        bar: comfy.utils.ProgressBar,
    ) -> Tensor:
        """Sampled latents [C, T, h, w], as the VAE decodes them."""
        empty = torch.zeros(1, *shape)
        previewer = latent_preview.get_previewer(self.model.load_device, self.model.model.latent_format)

        def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
            bar.update_absolute(bar.current + 1, preview=preview)

        samples = comfy.sample.sample(
            self.model,
            comfy.sample.prepare_noise(empty, seed),
            self.steps,
            self.cfg,
            self.name,
            self.scheduler,
            positive,
            negative,
            empty,
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return samples[0].float().cpu()
