"""Stable Video Diffusion, image to video: ComfyUI's own UNet, called the way its sampler calls it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.backbone import check_channels, latent_size, prepare_latents
from ...core.config import TrainConfig, knob
from ...core.data import Row
from ...core.losses import concept_and_prior, denoising_loss
from ...core.noise import Edm, Rng
from ...core.recipe import Batch
from ...core.transfer import to_device

LATENT_CHANNELS = 4
SIDE = 64  # pixels: VAE 8 x three halvings in the UNet
CHECKPOINTED = ("VideoResBlock", "SpatialVideoTransformer")
# Cross-attention has one token to look at, whatever its queries and keys are: those two never get a gradient.
ATTENTION = r"\.0\.(attn1\.to_(q|k|v|out\.0)|attn2\.to_(v|out\.0))"


def check(model: Any, parts: dict[str, nn.Module], rows: Iterable[Row]) -> None:
    """ValueError unless `model` (a comfy BaseModel) is Stable Video Diffusion, and the data's rows are for it."""
    check_model(model)
    check_channels(rows, LATENT_CHANNELS)


def check_model(model: Any) -> None:
    """ValueError unless `model` (a comfy BaseModel) is Stable Video Diffusion."""
    if (kind := type(model).__name__) != "SVD_img2vid":
        raise ValueError(f"model: found {kind}, expected Stable Video Diffusion (SVD_img2vid)")


def latent_shape(parts: dict[str, nn.Module], width: int, height: int, frames: int) -> tuple[int, ...]:
    """(C, T, h, w) of a video to sample. ValueError names the number that the model cannot have."""
    return (LATENT_CHANNELS, frames, *latent_size(width, height, SIDE))


class Svd:
    """v predictor v(x_t, sigma, image): x_t [B, 4, T, h, w], sigma [B] > 0.

    A batch holds image_embeds [B, 1024] of CLIP vision, first_frame [B, 4, h, w] as the VAE gives it, and for each clip
    fps, motion_bucket and augmentation [B].
    """

    schedule = Edm()
    lora_targets = {
        "all": rf".*\.(transformer_blocks|time_stack){ATTENTION}",
        "spatial": rf".*\.transformer_blocks{ATTENTION}",
        "temporal": rf".*\.time_stack{ATTENTION}",
    }

    def __init__(
        self, model: Any, parts: dict[str, Any], device: torch.device, dtype: torch.dtype, transformer_options: dict
    ) -> None:
        """`model` is a private comfy BaseModel; `transformer_options` go with every forward, such as the attention."""
        check_model(model)
        self.module: nn.Module = model.diffusion_model
        self.blocks = [module for module in self.module.modules() if type(module).__name__ in CHECKPOINTED]
        self.device, self.dtype = device, dtype
        self.embed, self.process_latent_in = model.embedder, model.process_latent_in
        self.transformer_options = transformer_options
        self.checkpointing = False
        for name, module in self.module.named_modules():
            if type(module).__name__ == "SpatialVideoTransformer":
                module.register_forward_hook(_contiguous_output)
            elif name.endswith(".time_stack.0.attn2"):
                module.register_forward_pre_hook(_contiguous_context, with_kwargs=True)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return prepare_latents(batch, self.device, self.process_latent_in)

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: dict[str, Any]) -> Tensor:
        """Frames are folded into the batch, one after the other; the first frame's latents are never scaled."""
        frames = noisy_latents.shape[2]
        first_frame = to_device(batch["first_frame"], self.device, noisy_latents.dtype)
        first_frames = first_frame.unsqueeze(2).expand_as(noisy_latents)
        x = torch.cat([self.schedule.scale(noisy_latents, t), first_frames], dim=1)
        ids = torch.stack([batch["fps"] - 1, batch["motion_bucket"], batch["augmentation"]], dim=1)
        ids = self.embed(to_device(ids.flatten(), self.device)).view(len(ids), -1)
        image_embeds = to_device(batch["image_embeds"], self.device, self.dtype)
        v = self.module(
            x.transpose(1, 2).flatten(0, 1).to(self.dtype),
            (0.25 * t.log()).repeat_interleave(frames),
            context=image_embeds.unsqueeze(1).repeat_interleave(frames, 0),
            y=ids.to(self.dtype).repeat_interleave(frames, 0),
            num_video_frames=frames,
            transformer_options=dict(self.transformer_options),
        )
        return v.unflatten(0, (-1, frames)).transpose(1, 2)


def _contiguous_output(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    """Core leaves channels last in memory, which later layers keep: group norms then take ten times as long."""
    return out.contiguous()


def _contiguous_context(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One token repeated for every place without a copy, for which a linear layer repeats its weight instead."""
    return args, {**kwargs, "context": kwargs["context"].contiguous()}


@dataclass(frozen=True, kw_only=True)
class SvdConfig(TrainConfig):
    """What every recipe for this model can be told of its objective."""

    noise_mean: float = knob(
        0.7,
        "Noise level where training looks most, as a natural logarithm. Raise it to 2 to learn where things go rather "
        "than detail.",
        min=-5.0,
        max=5.0,
        step=0.1,
        advanced=True,
    )
    noise_std: float = knob(
        1.6,
        "Spread of the noise levels around it. Lower it to 0.8 to leave out those that teach little.",
        min=0.0,
        max=5.0,
        step=0.1,
        advanced=True,
    )
    conditioning_dropout: float = knob(
        0.1,
        "Share of clips trained without the image embedding, of clips without the first frame, and of clips without "
        "both. Keeps cfg at work; 0 turns it off.",
        min=0.0,
        max=0.33,
        step=0.01,
        advanced=True,
    )


def video_losses(backbone: Svd, batch: Batch, rng: Rng, config: SvdConfig) -> Iterator[tuple[str, Tensor]]:
    return concept_and_prior(
        lambda batch, rng: video_loss(backbone, batch, rng, config), batch, rng, config.prior_weight
    )


def video_loss(backbone: Svd, batch: Batch, rng: Rng, config: SvdConfig) -> Tensor:
    """MSE on v of one micro-batch, at noise levels and conditions drawn from `rng`."""
    u = rng.uniform(len(batch["latents"]), config.stratified_timesteps)
    t = backbone.schedule.timesteps(u, config.noise_mean, config.noise_std)
    return denoising_loss(backbone, drawn_conditions(batch, rng, config.conditioning_dropout), rng, t)


def drawn_conditions(batch: Batch, rng: Rng, dropout: float) -> Batch:
    """The batch with one of the first frame's stored noisings for each clip, and conditions left out.

    For p = `dropout`, the embedding becomes zero in a share 2 p of clips, the first frame in a share 2 p, and both of
    them in p. An evaluation takes the first frame without noise, and leaves nothing out.
    """
    count, stored = batch["augmentations"].shape
    chosen, kept = torch.zeros(count, dtype=torch.long), torch.ones(2, count)
    if not rng.evaluating:
        for i in range(count):
            noising, left_out = (rng.generator(name, rng.sample + i) for name in ("noising", "conditioning"))
            chosen[i] = torch.randint(1, stored, (), generator=noising)
            drawn = float(torch.rand((), generator=left_out))
            kept[0, i], kept[1, i] = drawn >= 2 * dropout, not dropout <= drawn < 3 * dropout
    clips = torch.arange(count)
    return {
        **batch,
        "image_embeds": batch["image_embeds"] * kept[0].unsqueeze(1),
        "first_frame": batch["first_frames"][clips, chosen] * kept[1].view(-1, 1, 1, 1),
        "augmentation": batch["augmentations"][clips, chosen],
    }


load = Svd
