"""LoRA for Stable Video Diffusion (Blattmann et al. 2023, arXiv 2311.15127): clips from their first frames."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .backbones.svd import Svd, SvdConfig, video_losses
from .core.config import LoraConfig, knob
from .core.lora import LoraGroups
from .core.noise import Rng
from .core.recipe import Batch, Export, Phase

GROUP = "lora"


class SvdLora:
    """The base model's own objective on the linear layers of its spatial and temporal attention."""

    name = "KinoloomTrainSvdLora"
    title = "Train SVD LoRA"
    description = "Trains a LoRA for Stable Video Diffusion (image to video) on clips."
    backbone = "svd"
    columns = ("latents", "image")

    @dataclass(frozen=True, kw_only=True)
    class Config(SvdConfig, LoraConfig):
        steps: int = knob(1000, "Optimizer steps. A few clips want 500 to 2000.", min=1, max=1_000_000)
        target_layers: str = knob(
            "all",
            "Attention that gets a LoRA. temporal learns how things move and leaves the look alone. Queries and keys "
            "of cross-attention are left out: it looks at one token, so they change nothing.",
            choices=tuple(Svd.lora_targets),
            advanced=True,
        )

    def __init__(self, backbone: Svd, config: Any) -> None:
        self.backbone, self.config = backbone, config
        self.predict = backbone.predict
        self.lora = LoraGroups(backbone.module, config.seed)
        self.state_dict, self.load_state_dict = self.lora.state_dict, self.lora.load_state_dict

    @staticmethod
    def phases(config: Any) -> list[Phase]:
        return [Phase("clips", config.steps, "clips")]

    @staticmethod
    def exports(config: Any) -> dict[str, Export]:
        return {GROUP: Export("the trained LoRA", "clips")}

    def start(self, phase: Phase) -> None:
        c = self.config
        self.lora.add_group(GROUP, self.backbone.lora_targets[c.target_layers], c.rank, c.alpha or c.rank)

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        return self.lora.param_groups(GROUP, self.config.learning_rate, self.config.lora_plus_ratio)

    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        return video_losses(self.backbone, batch, rng, self.config)

    def export(self, name: str) -> dict[str, Tensor]:
        return self.lora.export(name)

    def metadata(self, name: str) -> dict[str, str]:
        return {"modelspec.architecture": "stable-video-diffusion-img2vid/lora"}


RECIPE = SvdLora
