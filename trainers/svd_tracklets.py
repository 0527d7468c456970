"""Tracklet control of Stable Video Diffusion: objects follow given boxes (TrackDiffusion, arXiv 2312.00651).

Phase 1, self-tracking (Boximator, arXiv 2402.01566), teaches the model to paint each object's box in its colour, which
links box tokens to positions. Phase 2 trains on clean clips: the model stops painting and keeps the link.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..lora_io.file import load
from .backbones.svd.model import Svd
from .backbones.svd.objective import SvdConfig, video_loss
from .conditions.columns import IMAGE, LATENTS, MASK, PREVIEW_BOXES, PREVIEW_FRAME, TRACKLETS
from .conditions.tracklet_control import BASE_LAYERS, NUMBERS, Controlled, TrackletControl, read, widths_of
from .core.config import changed, knob, naming
from .core.data import Batch, TrainingData
from .core.lora import copied, fill
from .core.losses import concept_and_prior
from .core.recipe import Export, Generation, Phase, Recipe
from .core.rng import Rng, derived_generator
from .core.transfer import to_device
from .host.layers import OPERATIONS, make_private
from .host.weights import extremes, require_finite

PAINTED, CLEAN = "self-tracking", "clean"
CONTROL = "tracklets"
MODULE = "tracklet_control"
GROWTH = 0.5  # a soft box is wider than the hard one by up to this share of its side, on each edge


class SvdTracklets(Recipe):
    """Trains the position net, fusers, time mixers and the first and last layer. All other layers are frozen."""

    name = "KinoloomTrainSvdTracklets"
    title = "Train SVD Tracklets"
    description = "Teaches Stable Video Diffusion to move objects along boxes, from clips with tracked objects."
    backbone_class = Svd
    columns = (LATENTS, IMAGE, TRACKLETS, MASK)
    previews = (PREVIEW_FRAME, PREVIEW_BOXES)

    @dataclass(frozen=True, kw_only=True)
    class Config(SvdConfig):
        self_tracking_steps: int = knob(
            20_000,
            "Optimizer steps on clips with painted boxes. At the end sampled videos should show the boxes. If not, "
            "continue with control_file.",
            min=0,
            max=1_000_000,
        )
        clean_steps: int = knob(
            10_000, "Optimizer steps on clean clips, after which the boxes are no longer painted.", min=0, max=1_000_000
        )
        learning_rate: float = changed(
            SvdConfig,
            "learning_rate",
            2e-4,
            "Learning rate of self-tracking. Lower it if the loss jumps. Raise it if no boxes appear. Use 1.0 for "
            "Prodigy.",
        )
        clean_learning_rate: float = changed(
            SvdConfig,
            "learning_rate",
            3e-5,
            "Learning rate of the clean steps. Raise it if boxes stay visible. Use 1.0 for Prodigy.",
        )
        control_file: str = knob(
            "",
            "A control file to continue from: a painting file, for more self-tracking or, if samples show boxes, for "
            "the clean steps.",
            file_of="tracklet_control",
            advanced=True,
        )
        soft_boxes: float = knob(
            0.0,
            "Share of boxes that are widened at random and marked soft: the object is somewhere inside. Use 0.8 for "
            "tracklets with soft key frames. A control trained with 0 treats them as hard.",
            min=0.0,
            max=1.0,
            step=0.05,
        )
        box_weight: float = knob(
            1.0,
            "Weight of the loss inside boxes, relative to outside. Try 2 if small objects are ignored.",
            min=1.0,
            max=100.0,
            step=0.5,
            advanced=True,
        )
        lr_schedule: str = changed(SvdConfig, "lr_schedule", "linear")
        warmup_steps: int = changed(
            SvdConfig,
            "warmup_steps",
            750,
            "Steps of each phase over which the learning rate rises from zero. Use fewer for short runs.",
        )
        validate_every: int = changed(
            SvdConfig,
            "validate_every",
            1000,
            "Steps between measurements of the loss on fixed noise. Each new lowest loss saves a file. 0 turns them "
            "off.",
        )
        save_every: int = changed(
            SvdConfig,
            "save_every",
            1000,
            "Steps between checkpoints. A crash loses at most these. With AdamW each takes 2.5 GB.",
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.self_tracking_steps + self.clean_steps:
                raise ValueError("self_tracking_steps=0 and clean_steps=0: expected steps in one of them")

        def check_model(self, model: Any) -> None:
            if self.control_file:
                with naming("control_file", self.control_file):
                    read_control(Path(self.control_file), model.model.diffusion_model, self.soft_boxes)

    def __init__(self, backbone: Svd, config: Any) -> None:
        super().__init__(backbone, config)
        numbers = NUMBERS + (config.soft_boxes > 0)
        control = TrackletControl(widths_of(backbone.module), numbers=numbers, operations=OPERATIONS)
        make_private(control.initialise(derived_generator(config.seed, "tracklet control")))
        self.control = control.to(backbone.device)
        self.base: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in backbone.module.named_parameters() if re.fullmatch(BASE_LAYERS, name)
        }
        for parameter in self.base.values():
            parameter.data = parameter.data.to(torch.float32, copy=True)  # a copy: the file may be mapped read-only
        if config.control_file:
            self._go_on_from(Path(config.control_file))
        self.controlled = Controlled(backbone.module, self.control).__enter__()  # never left: the model is private
        backbone.module.add_module(MODULE, self.control)

    @torch.no_grad()
    def _go_on_from(self, file: Path) -> None:
        with naming("control_file", self.config.control_file):
            tensors, base = read_control(file, self.backbone.module, self.config.soft_boxes)
            self.control.load(tensors)
            fill(self.base, base, "layers of the model do not match")
            require_finite(extremes(self.control), "the control")

    @staticmethod
    def phases(config: Any, data: TrainingData) -> list[Phase]:
        stages = {PAINTED: "self_tracking_steps", CLEAN: "clean_steps"}
        phases = [
            Phase(name, getattr(config, option), "clips", fewest_rows=100, loss_falls=False, option=option)
            for name, option in stages.items()
        ]
        return [phase for phase in phases if phase.steps]

    @staticmethod
    def exports(config: Any, data: TrainingData) -> dict[str, Export]:
        files = {PAINTED: ("painting", "the control that paints boxes too"), CLEAN: (CONTROL, "the control")}
        return {
            name: Export(f"{description}, for Load Tracklet Control", phase.name, "module", "whole", "tracklet_control")
            for phase in SvdTracklets.phases(config, data)
            for name, description in [files[phase.name]]
        }

    @classmethod
    def generations(cls, config: Any, data: TrainingData) -> list[Generation]:
        return [
            Generation("svd_tracklets_generate", {"KinoloomLoadTrackletControl": name})
            for name in reversed(cls.exports(config, data))
        ]

    def start(self, phase: Phase) -> None:
        self.phase = phase.name
        for parameter in self.base.values():
            parameter.requires_grad_(True)

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        rates = {PAINTED: self.config.learning_rate, CLEAN: self.config.clean_learning_rate}
        return [{"params": [*self.control.parameters(), *self.base.values()], "lr": rates[phase.name]}]

    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        return concept_and_prior(self._loss, batch, rng, self.config.prior_weight)

    def _loss(self, batch: Batch, rng: Rng) -> Tensor:
        c, (count, variants) = self.config, batch["colors"].shape[:2]
        chosen = torch.zeros(count, dtype=torch.long)
        if not rng.evaluating:
            draws = [rng.generator("colors", rng.sample + i) for i in range(count)]
            chosen = torch.stack([torch.randint(variants, (), generator=generator) for generator in draws])
        clips, frames = torch.arange(count), batch["latents"].shape[2]
        colors = batch["colors"][clips, chosen].unsqueeze(1).expand(-1, frames, -1, -1)
        boxes = torch.cat([batch["boxes"][..., :4], colors, batch["boxes"][..., 7:]], dim=-1)
        if not rng.evaluating:
            boxes = soften(boxes, c.soft_boxes, rng)
        self.controlled.boxes, self.controlled.mask = boxes.flatten(0, 1), batch["box_mask"].flatten(0, 1)
        if self.phase == PAINTED:
            painted = self.backbone.process_latent_in(batch["painted"][clips, chosen].float())
            batch = {**batch, "latents": to_device(painted, self.backbone.device)}
        if c.box_weight > 1:
            weight = box_weights(batch["boxes"], batch["box_mask"], batch["latents"].shape[-2:], c.box_weight)
            batch = {**batch, "mask": batch.get("mask", 1) * to_device(weight, self.backbone.device)}
        return video_loss(self.backbone, batch, rng, c)

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """`batch` holds boxes [B, T, 20, 8] and box_mask [B, T, 20], where 0 stands for the learned null token."""
        self.controlled.boxes, self.controlled.mask = (batch[name].flatten(0, 1) for name in ("boxes", "box_mask"))
        return self.backbone.predict(noisy_latents, t, batch)

    def unconditional(self, batch: Batch) -> Batch:
        """Without boxes, too."""
        return {**super().unconditional(batch), "box_mask": torch.zeros_like(batch["box_mask"])}

    def export(self, name: str) -> dict[str, Tensor]:
        """The control, with TrackDiffusion's names in ComfyUI's layout, and the trained layers of the base model."""
        tensors = {**self.control.tensors(), **self.base}
        return {key: value.detach().cpu() for key, value in tensors.items()}

    def metadata(self, name: str) -> dict[str, str]:
        return {"modelspec.architecture": "stable-video-diffusion-img2vid/tracklets"}

    def state_dict(self) -> dict[str, Tensor]:
        return copied(self._trained())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """ValueError if the state is for another architecture."""
        fill(self._trained(), state, "tracklet state: layers do not match")

    def _trained(self) -> dict[str, nn.Parameter]:
        return {**{f"{MODULE}.{name}": p for name, p in self.control.named_parameters()}, **self.base}


def read_control(
    file: Path, unet: nn.Module, soft_boxes: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a control file, and its tensors of the base model. ValueError if it does not fit this UNet."""
    tensors, _ = load(file)
    widths, numbers, base = read(tensors)
    if widths != (here := widths_of(unet)):
        raise ValueError(
            f"made for a model of {len(widths)} transformers of {sorted(set(widths.values()))} channels, this one has "
            f"{len(here)} of {sorted(set(here.values()))}"
        )
    if numbers != NUMBERS + (soft_boxes > 0):
        made = "above 0" if numbers > NUMBERS else "0"
        raise ValueError(f"was trained with soft_boxes {made}, which soft_boxes={soft_boxes} does not fit")
    TrackletControl(widths, numbers=numbers, device="meta").load(tensors)
    own = {name: p for name, p in unet.named_parameters() if re.fullmatch(BASE_LAYERS, name)}
    for name in own.keys() | base.keys():
        found, expected = ((*values[name].shape,) if name in values else "nothing" for values in (base, own))
        if found != expected:
            raise ValueError(f"{name}: found {found}, expected {expected}")
    return tensors, base


def soften(boxes: Tensor, share: float, rng: Rng) -> Tensor:
    """Widen a random share of the boxes [B, T, 20, 8] on every side, and mark them soft: 0 as the last number."""
    generator = rng.generator("soft boxes")
    soft = torch.rand(boxes.shape[:-1], generator=generator) < share
    reach = GROWTH * torch.rand(*boxes.shape[:-1], 4, generator=generator)
    sides = (boxes[..., 2:4] - boxes[..., :2]).repeat(1, 1, 1, 2)
    wide = (boxes[..., :4] + torch.tensor([-1.0, -1.0, 1.0, 1.0]) * reach * sides).clamp(0, 1)
    softened = torch.cat([wide, boxes[..., 4:7], torch.zeros_like(boxes[..., 7:])], dim=-1)
    return torch.where(soft.unsqueeze(-1), softened, boxes)


def box_weights(boxes: Tensor, mask: Tensor, size: tuple[int, int], weight: float) -> Tensor:
    """Loss weights [B, 1, T, h, w] with mean 1 for each clip, `weight` times higher inside boxes than outside."""
    height, width = size
    y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    x1, y1, x2, y2 = (edge.unsqueeze(-1) for edge in boxes[..., :4].unbind(-1))
    inside = ((y >= y1) & (y < y2)).unsqueeze(-1) & ((x >= x1) & (x < x2)).unsqueeze(-2)
    covered = (inside & mask.bool()[..., None, None]).any(2).unsqueeze(1)
    weights = torch.where(covered, weight, 1.0)
    return weights / weights.mean((1, 2, 3, 4), keepdim=True)


RECIPE = SvdTracklets
