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
from comfy_extras.nodes_video_model import SVD_img2vid_Conditioning
from kinoloom.nodes.animatediff.loras import with_motion_lora
from kinoloom.nodes.animatediff.modules import LINEAR, ApplyMotionModule, load_motion_module
from numpy.typing import NDArray
from torch import Tensor

from . import world
from .install import (
    BUCKET,
    CFG,
    IMAGE_VAE,
    MODELS,
    MOTION,
    SAMPLER,
    SHIFT,
    STEPS,
    STRIDE,
    TEXT_ENCODER,
    UNET,
    VAE,
    VIDEO_CFG,
    VIDEO_UNET,
    VISION,
    WAN,
)
from .pack import text_encoder, unet, video_unet, vision

NEGATIVE = ""


class Studio:
    """The base models, loaded when first asked for."""

    shape = (16, (world.FRAMES - 1) // 4 + 1, world.SIZE // 8, world.SIZE // 8)  # of a video's latents

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
        noise = torch.cat([comfy.sample.prepare_noise(torch.zeros(1, *self.shape), seed) for seed in seeds])
        return to_bytes(self.vae.decode(self._sample(model, noise, prompts)))

    def _sample(self, model: Any, noise: Tensor, prompts: Sequence[str]) -> Tensor:
        positive, negative = ([[self._encode(texts), {}]] for texts in (prompts, [NEGATIVE] * len(prompts)))
        return comfy.sample.sample(
            model, noise, STEPS, CFG, SAMPLER, "simple", positive, negative, torch.zeros_like(noise), disable_pbar=True
        )

    def _encode(self, texts: Sequence[str]) -> Tensor:
        return torch.cat([self.clip.encode_from_tokens(self.clip.tokenize(text)) for text in texts])


class AnimateDiffStudio(Studio):
    """The image model with its motion module; videos have half the frame rate, each frame shown twice."""

    shape = (4, world.SIZE // 8, world.SIZE // 8)

    @cached_property
    def model(self) -> Any:
        module = load_motion_module(str(MODELS / MOTION))
        (model,) = ApplyMotionModule.execute(unet.load(MODELS / UNET), module, 16, 4, LINEAR).args
        return model

    @cached_property
    def vae(self) -> Any:
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / IMAGE_VAE)))

    def with_loras(self, *files: Path | str) -> Any:
        """The model with LoRAs at strength 1: motion LoRAs on the motion module, others on the image model."""
        model = self.model
        for file in files:
            weights, metadata = comfy.utils.load_torch_file(str(file), safe_load=True, return_metadata=True)
            if metadata["kinoloom.export"] == "temporal":
                model = with_motion_lora(model, weights, 1.0, str(file))
            else:
                model, _ = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0.0)
        return model

    @torch.inference_mode()
    def generate(self, model: Any, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        """Videos N T H W 3: one run of KSampler each, whose batch is the frames."""
        videos = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            noise = comfy.sample.prepare_noise(torch.zeros(len(range(0, world.FRAMES, STRIDE)), *self.shape), seed)
            frames = to_bytes(self.vae.decode(self._sample(model, noise, [prompt])))
            videos.append(frames.repeat(STRIDE, axis=0)[: world.FRAMES])
        return np.stack(videos)


class SvdStudio(Studio):
    """The image-to-video model; videos have half the frame rate, as AnimateDiff's."""

    shape = (4, world.SIZE // 8, world.SIZE // 8)

    @cached_property
    def model(self) -> Any:
        return video_unet.load_unet(MODELS / VIDEO_UNET)

    @cached_property
    def vae(self) -> Any:
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / IMAGE_VAE)))

    @cached_property
    def clip_vision(self) -> Any:
        return vision.load(MODELS / VISION)

    @torch.inference_mode()
    def animate(self, model: Any, first_frame: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """A video T H W 3 that begins with a picture H W 3: what the nodes for SVD and KSampler give."""
        image = torch.from_numpy(first_frame).float().unsqueeze(0) / 255
        frames = len(range(0, world.FRAMES, STRIDE))
        positive, negative, latent = SVD_img2vid_Conditioning().encode(
            self.clip_vision, image, self.vae, world.SIZE, world.SIZE, frames, BUCKET, world.FPS // STRIDE, 0.0
        )
        noise = comfy.sample.prepare_noise(latent["samples"], seed)
        latents = comfy.sample.sample(
            model, noise, STEPS, VIDEO_CFG, SAMPLER, "karras", positive, negative, latent["samples"], disable_pbar=True
        )
        return to_bytes(self.vae.decode(latents)).repeat(STRIDE, axis=0)[: world.FRAMES]


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    return (images.clamp(0, 1) * 255).round().byte().cpu().numpy()
