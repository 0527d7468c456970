"""AnimateDiff in image-to-video form: the first frame of every clip is the clean image, at every noise level."""

from typing import Any

import torch
from torch import Tensor

from ...core.first_frame import SCHEDULE
from ...core.transfer import to_device
from ...host.private import Private
from ...host.text import TextEncoder
from .model import AnimateDiff
from .motion_module import norms_over_frames


class AnimateDiffI2v(AnimateDiff):
    """AnimateDiff whose batches hold `first_frame` [B, 4, h, w], the clean latents in the model's latent space.

    Frame 0 of the model's input is that latent, under the timestep that all frames share. The schedule is Stable
    Diffusion's own, not AnimateDiff's.
    """

    schedule = SCHEDULE

    def __init__(self, models: dict[str, Private], *others: Any) -> None:
        super().__init__(models, *others)
        self.text_encoder: Any = TextEncoder(models["clip"].model) if "clip" in models else None

    def pool_norms(self) -> None:
        """Compute the group norms of ResBlocks and of the output over all frames, for good. The first frame counts too.

        The original's UNet does so, AnimateDiff's v3 does not. Norms of transformers and motion modules stay per frame.
        """
        if not self.layout.norm_over_frames:
            norms_over_frames(self.unet, lambda: self.attached.frames)

    def first_frame(self, start: Tensor) -> Tensor:
        """The latents [B, 4, h, w] of a VAE, in the model's latent space and on its device."""
        return to_device(self.model.process_latent_in(start.float()), self.device)

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: dict[str, Any]) -> Tensor:
        """The noise in `noisy_latents` [B, 4, F, h, w]; of frame 0, the noise whose removal gives the first frame."""
        first = batch["first_frame"].unsqueeze(2)
        pred = super().predict(torch.cat([first, noisy_latents[:, :, 1:]], dim=2), t, batch)
        kept = to_device(self.schedule.alphas_bar, t.device)[t].view(-1, 1, 1, 1, 1)
        own = (noisy_latents[:, :, :1] - kept.sqrt() * first) / (1 - kept).sqrt()
        return torch.cat([own.to(pred), pred[:, :, 1:]], dim=2)
