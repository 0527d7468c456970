"""The toy world's models in ComfyUI's own loaders, and videos from its KSampler. Import it once ComfyUI is importable."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from numpy.typing import NDArray
from torch import Tensor

from . import world
from .install import CFG, MODELS, SAMPLER, SHIFT, STEPS, TEXT_ENCODER, VAE, WAN
from .pack import text_encoder

NEGATIVE = ""


class Studio:
    """The base models, loaded when first asked for."""

    @cached_property
    def model(self) -> Any:
        """A MODEL, its noise schedule shifted as the base was trained."""
        (model,) = ModelSamplingSD3().patch(comfy.sd.load_diffusion_model(str(MODELS / WAN)), SHIFT)
        return model

    @cached_property
    def vae(self) -> Any:
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / VAE)))

    @cached_property
    def clip(self) -> Any:
        return text_encoder.load(MODELS / TEXT_ENCODER)

    def with_loras(self, *files: Path | str) -> Any:
        """The model with LoRAs at strength 1, as Load LoRA (Model Only) makes it."""
        model = self.model
        for file in files:
            weights = comfy.utils.load_torch_file(str(file), safe_load=True)
            model, _ = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0.0)
        return model

    @torch.inference_mode()
    def generate(self, model: Any, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        """Videos N T H W 3: what the KSampler node gives for each prompt and its seed, all in one batch."""
        positive, negative = ([[self._encode(texts), {}]] for texts in (prompts, [NEGATIVE] * len(prompts)))
        shape = (1, 16, (world.FRAMES - 1) // 4 + 1, world.SIZE // 8, world.SIZE // 8)
        noise = torch.cat([comfy.sample.prepare_noise(torch.zeros(shape), seed) for seed in seeds])
        latents = comfy.sample.sample(
            model, noise, STEPS, CFG, SAMPLER, "simple", positive, negative, torch.zeros_like(noise), disable_pbar=True
        )
        return (self.vae.decode(latents).clamp(0, 1) * 255).round().byte().cpu().numpy()

    def _encode(self, texts: Sequence[str]) -> Tensor:
        return torch.cat([self.clip.encode_from_tokens(self.clip.tokenize(text)) for text in texts])
