"""A plain LoRA for Wan 2.1 text-to-video, trained on clips and photos: the baseline method."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..lora_io.wan import read_any_wan_lora
from .backbones.flow.wan import Wan, WanConfig
from .conditions.columns import LATENTS, MASK, PREVIEW_PROMPT, PROMPT
from .core.config import LoraConfig, knob
from .core.data import Batch
from .core.losses import concept_and_prior, denoising_loss, sample_timesteps
from .core.plain_lora import PlainLora, plain_start
from .core.rng import Rng
from .core.start_from import Start, check_starts
from .host.source import model_keys


class WanLora(PlainLora):
    """Flow matching, with LoRAs on every linear layer of every block. A photo is a clip of one frame."""

    name = "KinoloomTrainWanLora"
    title = "Train Wan LoRA"
    description = "Trains a LoRA for a Wan 2.1 text-to-video model on clips, photos, or both."
    backbone_class = Wan
    columns = (LATENTS, PROMPT, MASK)
    previews = (PREVIEW_PROMPT,)
    template = "wan_lora_generate"

    @dataclass(frozen=True, kw_only=True)
    class Config(WanConfig, LoraConfig):
        steps: int = knob(500, "Optimizer steps. One clip needs 300 to 1000.", min=1, max=1_000_000)
        target_layers: str = knob(
            "all",
            "Layers with a LoRA. Attention alone gives a smaller file with a weaker effect.",
            choices=tuple(Wan.lora_targets),
            advanced=True,
        )
        timestep_sampling: str = knob(
            "logit_normal",
            "Distribution of noise levels: logit_normal prefers the middle, uniform trains all equally.",
            choices=("logit_normal", "uniform"),
            advanced=True,
        )
        shift: float = knob(
            1.0,
            "Above 1 trains more on high noise, where motion and layout are decided; below 1, on detail.",
            min=0.1,
            max=20.0,
            step=0.1,
            advanced=True,
        )

        def starts(self) -> dict[str, Start]:
            """A Wan LoRA may start from any file except Set-and-Sequence's motion file, which is not a whole LoRA."""
            refused = ("motion",)
            return plain_start(self, Wan.lora_targets, lambda file, _, bases: read_any_wan_lora(file, refused, bases))

        def check_model(self, model: Any) -> None:
            super().check_model(model)
            check_starts(self.starts(), self, model.model.diffusion_model, model_keys(model))

    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        return concept_and_prior(self._loss, batch, rng, self.config.prior_weight)

    def _loss(self, batch: Batch, rng: Rng) -> Tensor:
        c = self.config
        t = sample_timesteps(rng, len(batch["latents"]), c.timestep_sampling, c.shift, c.stratified_timesteps)
        return denoising_loss(self.backbone, {**batch, "prompt_embeds": batch["prompt_embeds"][:, 0]}, rng, t)


RECIPE = WanLora
