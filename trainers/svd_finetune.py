"""Fine-tuning Stable Video Diffusion itself (Blattmann et al. 2023, arXiv 2311.15127): its temporal layers, or all."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backbones.svd.model import Svd
from .backbones.svd.objective import SvdConfig, video_losses
from .conditions.columns import IMAGE, LATENTS, MASK, PREVIEW_FRAME
from .core.config import changed, knob
from .core.data import Batch, TrainingData
from .core.lora import copied, fill
from .core.recipe import Export, Phase, Recipe
from .core.rng import Rng

UNET = "unet"
LAYERS = {
    "temporal attention": r".*\.time_stack\.0\..*",
    "temporal": r".*\.(time_stack|time_pos_embed|time_mixer)\..*",
    "all": r".*",
}


class SvdFinetune(Recipe):
    """The base model's own loss. Trained weights are fp32; all others stay frozen in half precision."""

    name = "KinoloomTrainSvdFinetune"
    title = "Train SVD Fine-tune"
    description = "Fine-tunes Stable Video Diffusion (image to video) on clips, and saves a whole model."
    backbone_class = Svd
    columns = (LATENTS, IMAGE, MASK)
    previews = (PREVIEW_FRAME,)

    @dataclass(frozen=True, kw_only=True)
    class Config(SvdConfig):
        steps: int = knob(5000, "Optimizer steps. Some dozen clips need 2000 to 10000.", min=1, max=1_000_000)
        layers: str = knob(
            "temporal attention",
            "Trained layers: temporal attention (a quarter of the model), all temporal layers, or all layers. all "
            "gives the best results. It takes 24 GB with AdamW, 16 bytes per weight; AdamW8bit and Adafactor take "
            "less.",
            choices=tuple(LAYERS),
        )
        learning_rate: float = changed(
            SvdConfig,
            "learning_rate",
            1e-5,
            "Lower it if the loss jumps or colours drift. Raise it if nothing is learned. Use 1.0 for Prodigy.",
        )
        validate_every: int = changed(
            SvdConfig,
            "validate_every",
            500,
            "Steps between measurements of the loss on fixed noise. Each new lowest loss saves a model. 0 turns them "
            "off.",
        )
        save_every: int = changed(
            SvdConfig,
            "save_every",
            500,
            "Steps between checkpoints. A crash loses at most these. With AdamW each takes 12 bytes per weight.",
        )
        save_minutes: float = changed(SvdConfig, "save_minutes", 60.0)

    def __init__(self, backbone: Svd, config: Any) -> None:
        super().__init__(backbone, config)
        named = backbone.module.named_parameters()
        self.trained: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in named if re.fullmatch(LAYERS[config.layers], name)
        }

    @staticmethod
    def phases(config: Any, data: TrainingData) -> list[Phase]:
        return [Phase("clips", config.steps, "clips", fewest_rows=12)]

    @staticmethod
    def exports(config: Any, data: TrainingData) -> dict[str, Export]:
        return {UNET: Export("the model, for Load Diffusion Model", "clips", "model", "whole", "diffusion_models")}

    def start(self, phase: Phase) -> None:
        for parameter in self.trained.values():
            if parameter.dtype.itemsize < 2:
                raise ValueError(
                    f"model: stored as {parameter.dtype}, expected fp16, bf16 or fp32, as all weights are saved again"
                )
            parameter.data = parameter.data.to(torch.float32, copy=True)  # a copy: the file may be mapped read-only
            parameter.requires_grad_(True)

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        return [{"params": list(self.trained.values()), "lr": self.config.learning_rate}]

    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        return video_losses(self.backbone, batch, rng, self.config)

    def export(self, name: str) -> dict[str, Tensor]:
        """All weights, with ComfyUI's key names."""
        return {key: value.detach().cpu() for key, value in self.backbone.module.state_dict().items()}

    def metadata(self, name: str) -> dict[str, str]:
        return {"modelspec.architecture": "stable-video-diffusion-img2vid"}

    def state_dict(self) -> dict[str, Tensor]:
        return copied(self.trained)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """ValueError if the state is for other layers."""
        fill(self.trained, state, "fine-tune state: layers do not match")


RECIPE = SvdFinetune
