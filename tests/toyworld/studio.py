"""The toy world's models in ComfyUI's own loaders, and videos from its KSampler. Import it once ComfyUI is importable."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import numpy as np
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_video_model import SVD_img2vid_Conditioning
from kinoloom.lora_io.adapter_files import read_adapter
from kinoloom.nodes.adapters.apply import EACH_FRAME, ApplyI2vAdapters
from kinoloom.nodes.adapters.loading import load, with_prompt
from kinoloom.nodes.adapters.start import I2vSigmas, I2vStart
from kinoloom.nodes.animatediff.loras import with_motion_lora
from kinoloom.nodes.animatediff.modules import KEEP, LINEAR, ApplyMotionModule, load_motion_module
from kinoloom.trainers.conditions.adapter import Query
from numpy.typing import NDArray
from torch import Tensor

from . import world
from .install import (
    BUCKET,
    CFG,
    IMAGE_VAE,
    MODELS,
    MOTION,
    PAIRS_MOTION,
    PAIRS_UNET,
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
    unpacked,
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


class PairStudio(AnimateDiffStudio):
    """The model of pairs of sprites, at Stable Diffusion's own noise schedule."""

    @cached_property
    def model(self) -> Any:
        folder = unpacked()
        module = load_motion_module(str(folder / PAIRS_MOTION))
        return ApplyMotionModule.execute(unet.load(folder / PAIRS_UNET), module, 16, 4, KEEP).args[0]

    def with_adapters(self, played: Sequence[tuple[Path, float, str]], mode: str) -> Any:
        """The model with adapters, each of a file, with a weight and a prompt."""
        loaded: tuple[Any, ...] = ()
        for path, weight, prompt in played:
            files = read_adapter(path)
            loaded += (with_prompt(files, load(files, files.alpha, Query()), path.name, weight, self.clip, prompt),)
        return ApplyI2vAdapters.execute(self.model, loaded, mode, EACH_FRAME).args[0]

    @torch.inference_mode()
    def animate(
        self, model: Any, picture: NDArray[np.uint8], prompt: str, seed: int, cfg: float, **start: Any
    ) -> tuple[NDArray[np.uint8], bool]:
        """A video T H W 3 of a picture H W 3, and whether its first latent is the picture's to the bit."""
        sigmas = I2vSigmas.execute(model, STEPS, 1.0).args[0]
        image = torch.from_numpy(picture).float().unsqueeze(0) / 255
        size = {"width": world.SIZE, "height": world.SIZE, "frames": len(range(0, world.FRAMES, STRIDE))}
        latent, noise = I2vStart.execute(image, self.vae, sigmas, **size, seed=seed, **start).args
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*([[self._encode([text]), {}]] for text in (prompt, NEGATIVE)))
        guider.set_cfg(cfg)
        sampler = comfy.samplers.sampler_object(SAMPLER)
        made = SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"]
        video = to_bytes(self.vae.decode(made)).repeat(STRIDE, axis=0)[: world.FRAMES]
        return video, torch.equal(made[0], latent["samples"][0])


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
