"""LoRA for Stable Video Diffusion (Blattmann et al. 2023, arXiv 2311.15127), which animates a first frame."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..lora_io.file import load
from ..lora_io.fitting import require_base
from ..lora_io.keys import check_pairs, from_comfy
from .backbones.svd.model import Svd
from .backbones.svd.objective import SvdConfig, video_losses
from .conditions.columns import IMAGE, LATENTS, MASK, PREVIEW_FRAME
from .core.config import LoraConfig, knob
from .core.data import Batch
from .core.plain_lora import PlainLora, plain_start
from .core.rng import Rng
from .core.start_from import Start, check_starts
from .host.source import model_keys


class SvdLora(PlainLora):
    """The base model's own loss, with LoRAs on the linear layers of its spatial and temporal attention."""

    name = "KinoloomTrainSvdLora"
    title = "Train SVD LoRA"
    description = "Trains a LoRA for Stable Video Diffusion (image to video) on clips."
    backbone_class = Svd
    columns = (LATENTS, IMAGE, MASK)
    previews = (PREVIEW_FRAME,)
    template = "svd_lora_generate"

    @dataclass(frozen=True, kw_only=True)
    class Config(SvdConfig, LoraConfig):
        steps: int = knob(1000, "Optimizer steps. A few clips need 500 to 2000.", min=1, max=1_000_000)
        target_layers: str = knob(
            "all",
            "Attention layers with a LoRA. temporal learns motion and keeps the look. Queries and keys of "
            "cross-attention are left out: with its single token they have no effect.",
            choices=tuple(Svd.lora_targets),
            advanced=True,
        )

        def starts(self) -> dict[str, Start]:
            return plain_start(self, Svd.lora_targets, read_svd_lora)

        def check_model(self, model: Any) -> None:
            check_starts(self.starts(), self, model.model.diffusion_model, model_keys(model))

    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        return video_losses(self.backbone, batch, rng, self.config)

    def metadata(self, name: str) -> dict[str, str]:
        return {"modelspec.architecture": "stable-video-diffusion-img2vid/lora"}


def read_svd_lora(file: Path, layers: Collection[str], bases: Collection[str]) -> dict[str, Tensor]:
    """A LoRA with ComfyUI's key names. ValueError for other formats."""
    tensors, metadata = load(file)
    require_base(metadata, bases)
    try:
        named = from_comfy(tensors)
    except ValueError as error:
        raise ValueError(f"{error}. Convert SVD Model renames LoRAs of other trainers for ComfyUI") from error
    check_pairs(named, "LoRA")
    return named


RECIPE = SvdLora
