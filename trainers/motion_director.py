"""MotionDirector for AnimateDiff (Zhao et al. 2023, arXiv 2310.08465): learns a clip's motion apart from its look.

A spatial LoRA on the image model learns the look from single frames. A temporal LoRA on the motion modules, trained
together with it on whole clips, then learns only the motion.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..lora_io.animatediff import read_spatial_lora, read_temporal_lora
from .backbones.animatediff.model import AnimateDiff
from .backbones.animatediff.motion_module import PART
from .conditions.columns import LATENTS, MASK, PREVIEW_PROMPT, PROMPT
from .core.config import LoraConfig, changed, knob, naming
from .core.data import Batch, TrainingData
from .core.losses import masked_mse
from .core.plain_lora import LoraRecipe
from .core.recipe import Export, Generation, Phase
from .core.rng import Rng
from .core.start_from import Start, check_starts
from .core.transfer import to_device
from .host.source import carried_modules, model_keys
from .host.weights import lora_patches

SPATIAL, TEMPORAL = "spatial", "temporal"
PHASE = "clips"
MOTION_FOLDER = "animatediff_motion_lora"
CUSTOM = "custom"
PRESET_RANK = {"low": 32, "preferred": 64, "best": 64}
ADAMW = {"learning_rate": 5e-4, "spatial_learning_rate": 1e-4, "weight_decay": 0.01}
PRESET_RATES = {  # Lion needs a tenth of AdamW's learning rates and ten times its weight decay
    "AdamW": ADAMW,
    "AdamW8bit": ADAMW,
    "Lion": {"learning_rate": 5e-5, "spatial_learning_rate": 1e-5, "weight_decay": 0.1},
}
SPATIAL_LAYERS = {"all": "spatial", "self-attention and feed-forward": "spatial_self"}
TEMPORAL_LAYERS = {"all": "temporal", "attention": "temporal_attention"}


class MotionDirector(LoraRecipe):
    """Each step trains the spatial LoRA on one frame, then the temporal one on the clip with the spatial one active."""

    name = "KinoloomTrainMotionDirector"
    title = "Train MotionDirector"
    description = (
        "Learns the motion of clips as a motion LoRA for AnimateDiff, and their look as a separate LoRA for the image "
        "model."
    )
    backbone_class = AnimateDiff
    columns = (LATENTS, PROMPT, MASK)
    previews = (PREVIEW_PROMPT,)

    @dataclass(frozen=True, kw_only=True)
    class Config(LoraConfig):
        preset: str = knob(
            "preferred",
            "Sets rank, the two learning rates and weight_decay, for AdamW and Lion. Encode the clips at size 256 for "
            "low, 384 for preferred, 512 for best. custom uses the values below.",
            choices=(*PRESET_RANK, CUSTOM),
        )
        train: str = knob(
            "both",
            "both separates motion from look. spatial trains only the LoRA of the look, also on photos. temporal "
            "trains only the motion LoRA, which then holds more of the look.",
            choices=("both", SPATIAL, TEMPORAL),
        )
        steps: int = knob(500, "Optimizer steps. About 300 per clip; half of that with Lion.", min=1, max=1_000_000)
        rank: int = changed(
            LoraConfig, "rank", 64, "Size of both LoRAs, if preset is custom. Lower it if the clip is memorised."
        )
        learning_rate: float = changed(
            LoraConfig,
            "learning_rate",
            5e-4,
            "Learning rate of the temporal LoRA, if preset is custom. Lion needs a tenth of AdamW's.",
        )
        spatial_learning_rate: float = changed(
            LoraConfig,
            "learning_rate",
            1e-4,
            "Learning rate of the spatial LoRA, if preset is custom. Lower it if the look is memorised.",
        )
        optimizer: str = changed(
            LoraConfig,
            "optimizer",
            "AdamW",
            "Lion needs half the steps. The presets have learning rates for AdamW and Lion only.",
        )
        max_grad_norm: float = changed(
            LoraConfig,
            "max_grad_norm",
            0.0,
            "Upper limit of the gradient norm. 0, as in the paper, turns clipping off.",
        )
        spatial_loras: int = knob(
            1,
            "1 trains one look for all clips. The number of clips trains one look for each: for clips of different "
            "subjects with the same motion.",
            min=1,
            max=64,
            advanced=True,
        )
        spatial_layers: str = knob(
            "all",
            "Layers of the image model that learn the look. The paper trains self-attention and feed-forward.",
            choices=tuple(SPATIAL_LAYERS),
            advanced=True,
        )
        temporal_layers: str = knob(
            "all",
            "Layers of the motion modules that are trained. attention writes a file with the layers of AnimateDiff's "
            "own motion LoRAs, which more programs read.",
            choices=tuple(TEMPORAL_LAYERS),
            advanced=True,
        )
        spatial_off_prob: float = knob(
            0.2,
            "Share of steps that train the temporal LoRA without the spatial one, so that it also works alone.",
            min=0.0,
            max=1.0,
            step=0.05,
            advanced=True,
        )
        debias_weight: float = knob(
            1.0,
            "Weight of the debiased loss, which compares every frame with a random one and so ignores the look that "
            "frames share. 0 turns it off.",
            min=0.0,
            max=100.0,
            step=0.05,
            advanced=True,
        )
        dropout: float = knob(
            0.1, "Dropout on the output of each LoRA layer.", min=0.0, max=0.9, step=0.05,
            advanced=True,
        )  # fmt: skip
        start_from: str = changed(
            LoraConfig,
            "start_from",
            "",
            "A spatial LoRA to start from, of the same base model, rank and layers. Training both also needs "
            "start_from_motion.",
        )
        start_from_motion: str = knob(
            "",
            "A temporal LoRA to start from, of the same rank and layers.",
            file_of=MOTION_FOLDER,
            advanced=True,
            added=1,
        )
        domain_adapter: str = knob(
            "",
            "AnimateDiff's domain adapter (v3_sd15_adapter), merged before training. Use it if you generate with it.",
            file_of="loras",
            advanced=True,
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            self._check_starts()
            if self.preset == CUSTOM:
                return
            if self.optimizer not in PRESET_RATES:
                raise ValueError(
                    f"optimizer={self.optimizer!r}: the presets have learning rates for {', '.join(PRESET_RATES)}; set "
                    f"preset to {CUSTOM} and set the learning rates"
                )
            defaults = {option.name: option.default for option in fields(self)}
            for name, value in {"rank": PRESET_RANK[self.preset], **PRESET_RATES[self.optimizer]}.items():
                if getattr(self, name) not in (value, defaults[name]):
                    raise ValueError(
                        f"{name}={getattr(self, name)}: expected {value}, which preset {self.preset!r} sets with "
                        f"{self.optimizer}; set preset to {CUSTOM} to choose it yourself"
                    )
                object.__setattr__(self, name, value)

        def _check_starts(self) -> None:
            files = {("start_from", SPATIAL): self.start_from, ("start_from_motion", TEMPORAL): self.start_from_motion}
            for (option, part), file in files.items():
                if file and self.train not in ("both", part):
                    raise ValueError(f"{option}={Path(file).name!r}: expected none with train={self.train!r}")
                if not file and self.train == "both" and any(files.values()):
                    raise ValueError(f"{option}='': expected the {part} LoRA too, because both are trained")
            if self.start_from and self.spatial_loras > 1:
                raise ValueError(
                    f"start_from={Path(self.start_from).name!r}: expected none with spatial_loras={self.spatial_loras}"
                )

        def starts(self) -> dict[str, Start]:
            spatial, temporal = SPATIAL_LAYERS[self.spatial_layers], TEMPORAL_LAYERS[self.temporal_layers]
            found = {
                SPATIAL: Start("start_from", self.start_from, AnimateDiff.lora_targets[spatial], read_spatial_lora),
                TEMPORAL: Start(
                    "start_from_motion", self.start_from_motion, AnimateDiff.lora_targets[temporal], read_temporal_lora
                ),
            }
            return {group: start for group, start in found.items() if start.file}

        def check_model(self, model: Any) -> None:
            modules = nn.ModuleDict({"unet": model.model.diffusion_model, "motion": carried_modules(model)[PART]})
            check_starts(self.starts(), self, modules, model_keys(model))
            if self.domain_adapter:
                with naming("domain_adapter", self.domain_adapter):
                    lora_patches(model.model, Path(self.domain_adapter))

        def check_data(self, data: TrainingData) -> None:
            rows = data.select("clips", "train")
            photos = [row.name for row in (*rows, *data.select("clips", "validation")) if row.shape[1] == 1]
            if photos and self.train == TEMPORAL:
                raise ValueError(f"train={TEMPORAL!r}: {photos[0]} is a single frame, expected clips")
            if self.train != TEMPORAL and self.spatial_loras not in (1, looks := len(data.groups("clips"))):
                raise ValueError(
                    f"spatial_loras={self.spatial_loras}: expected 1, or {looks}, the number of clips to train on"
                )
            if self.spatial_loras > 1 and self.batch_size > 1:
                raise ValueError(
                    f"batch_size={self.batch_size}: expected 1 when each clip has a spatial LoRA of its own"
                )

    def __init__(self, backbone: AnimateDiff, config: Any) -> None:
        super().__init__(backbone, config)
        if config.domain_adapter:
            with naming("domain_adapter", config.domain_adapter):
                backbone.merge(Path(config.domain_adapter))

    @staticmethod
    def phases(config: Any, data: TrainingData) -> list[Phase]:
        return [Phase(PHASE, config.steps, "clips")]

    @staticmethod
    def exports(config: Any, data: TrainingData) -> dict[str, Export]:
        looks = {name: Export("the look, for LoRA loaders", PHASE, format="kohya") for name in spatial_groups(config)}
        motion = {TEMPORAL: Export("the motion, for Load Motion LoRA", PHASE, "lora", "motion_lora", MOTION_FOLDER)}
        return looks | (motion if config.train != SPATIAL else {})

    @classmethod
    def generations(cls, config: Any, data: TrainingData) -> list[Generation]:
        both, motion = "motion_director_both_generate", {"KinoloomLoadMotionLora": TEMPORAL}
        looks = [{"Load LoRA: spatial": name} for name in spatial_groups(config)]
        return [
            *(Generation(both, look | motion) for look in looks),
            Generation("motion_director_new_subject_generate", motion),
            *(Generation(both, look) for look in looks),
        ]

    def start(self, phase: Phase) -> None:
        c = self.config
        layers = {name: SPATIAL_LAYERS[c.spatial_layers] for name in spatial_groups(c)}
        if c.train != SPATIAL:
            layers[TEMPORAL] = TEMPORAL_LAYERS[c.temporal_layers]
        for name, targets in layers.items():
            self.lora.add_group(name, AnimateDiff.lora_targets[targets], c.rank, c.alpha or c.rank, down_std=1 / c.rank)
        for group, start in c.starts().items():
            self.lora.load_group(group, start.tensors(c, self.backbone.module))
        self.lora.train_only({name: ("down", "up") for name in layers})

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        c = self.config
        rates = {TEMPORAL: c.learning_rate} if c.train != SPATIAL else {}
        rates |= {name: c.spatial_learning_rate for name in spatial_groups(c)}
        ratio = c.lora_plus_ratio
        return [group for name, rate in rates.items() for group in self.lora.param_groups(name, rate, ratio)]

    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        """The spatial loss on a random frame, then the temporal loss, with the same latents, timestep and noise."""
        yield from self._losses(batch, rng)
        if "prior" in batch and self.config.prior_weight:
            for name, loss in self._losses(batch["prior"], rng.fork("prior")):
                yield f"prior {name}", self.config.prior_weight * loss

    def _losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        c, latents, schedule = self.config, batch["latents"], self.backbone.schedule
        batch = {**batch, "prompt_embeds": batch["prompt_embeds"][:, 0]}
        noise, frames = rng.noise_like(latents), latents.shape[2]
        t = to_device(schedule.timesteps(rng.uniform(len(latents), c.stratified_timesteps)), latents.device)
        noisy_latents, target = schedule.add_noise(latents, noise, t), schedule.target(latents, noise, t)
        moving = c.train != SPATIAL and frames > 1
        looks, own = spatial_groups(c), own_group(c, batch)
        others = [name for name in looks if name != own]
        drawn = torch.rand((), generator=rng.generator("spatial off"))
        alone = moving and not rng.evaluating and bool(drawn < c.spatial_off_prob)
        self.lora.set_dropout(0.0 if rng.evaluating else c.dropout, rng)
        if looks and not alone and (own or rng.evaluating):
            frame = to_device(pick_frames(rng, "frame", len(latents), frames), latents.device)
            with self.lora.without(TEMPORAL, *others):
                pred = self.backbone.predict(take(noisy_latents, frame), t, batch)
                yield SPATIAL, masked_mse(pred, take(target, frame), _mask_at(batch, frame))
        if moving:
            anchor = to_device(pick_frames(rng, "anchor", len(latents), frames), latents.device)
            with self.lora.without(*(looks if alone else others)), self.lora.frozen(*looks):
                pred = self.backbone.predict(noisy_latents, t, batch)
                yield TEMPORAL, temporal_loss(pred, target, anchor, c.debias_weight, batch.get("mask"))

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Predicts with the spatial LoRA, unless there is one for each clip."""
        looks = spatial_groups(self.config)
        self.lora.set_dropout(0.0, Rng(self.config.seed, PHASE, 0))
        with self.lora.without(*(looks if len(looks) > 1 else [])):
            return self.backbone.predict(noisy_latents, t, batch)

    def metadata(self, name: str) -> dict[str, str]:
        """`model_type` and `rank` as in other MotionDirector tools, and `sd_v1`, which LoRA managers read as SD1.5."""
        image_model = {"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"}
        return {
            **(image_model if name != TEMPORAL else {}),
            "model_type": "motion_director",
            "rank": str(self.config.rank),
            "kinoloom.motion_module": self.backbone.layout.version,
            "kinoloom.domain_adapter": Path(self.config.domain_adapter).name,
        }


def spatial_groups(config: Any) -> list[str]:
    """Names of the spatial LoRAs: one for all clips, or one for each clip."""
    if config.train == TEMPORAL:
        return []
    count = config.spatial_loras
    return [SPATIAL] if count == 1 else [f"{SPATIAL}-{number}" for number in range(1, count + 1)]


def own_group(config: Any, batch: Batch) -> str | None:
    """The spatial LoRA of a batch; where each group of clips has its own, other clips have none."""
    looks, group = spatial_groups(config), int(batch["group"][0])
    if len(looks) <= 1:
        return next(iter(looks), None)
    return looks[group] if group >= 0 else None


def pick_frames(rng: Rng, purpose: str, count: int, frames: int) -> Tensor:
    """A random frame number for each of `count` clips: [count]."""
    picked = [torch.randint(frames, (), generator=rng.generator(purpose, rng.sample + i)) for i in range(count)]
    return torch.stack(picked)


def take(clips: Tensor, frame: Tensor) -> Tensor:
    """One frame of each clip: [B C F H W] and [B] to [B C 1 H W]."""
    return clips[torch.arange(len(clips), device=clips.device), :, frame].unsqueeze(2)


def _mask_at(batch: Batch, frame: Tensor) -> Tensor | None:
    return take(batch["mask"], frame) if "mask" in batch else None


def temporal_loss(pred: Tensor, target: Tensor, anchor: Tensor, debias_weight: float, mask: Tensor | None) -> Tensor:
    """MSE plus the debiased MSE on phi(e)_i = sqrt(2) e_i - e_anchor, which ignores the shared look (paper, eq. 7).

    pred, target [B C F H W], anchor [B]. phi is linear, so it is applied to the difference.
    """
    plain = masked_mse(pred, target, mask)
    if not debias_weight:
        return plain
    error = pred.float() - target.float()
    debiased = math.sqrt(2) * error - take(error, anchor)
    return plain + debias_weight * masked_mse(debiased, torch.zeros_like(debiased), mask)


RECIPE = MotionDirector
