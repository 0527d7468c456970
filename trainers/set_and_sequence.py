"""Set-and-Sequence for Wan 2.1 (Abdal et al. 2025, arXiv 2502.14844): the look from a set of frames, then the motion.

The paper's symbols for each layer: A1 is lora_down, B1 is the identity's lora_up, B2 is the motion's lora_up.
The weights are W + A1 B1 after stage 1 and W + A1 B1 + A1 B2 after stage 2.
"""

import hashlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..lora_io.wan import MOTION_STAGES, read_any_wan_lora, read_wan_lora
from .backbones.flow.wan import Wan, WanConfig
from .conditions.columns import LATENTS, MASK, PREVIEW_PROMPT, PROMPT, choose_prompts
from .core.config import LoraConfig, changed, knob, naming
from .core.data import Batch, TrainingData
from .core.lora import layer_shapes
from .core.losses import concept_and_prior, denoising_loss, sample_timesteps
from .core.plain_lora import LoraRecipe
from .core.recipe import Export, Generation, Phase
from .core.rng import Rng
from .core.start_from import Start, check_starts
from .host.source import model_keys

SET, SEQUENCE = "set", "sequence"
IDENTITY, MOTION, COMBINED = "identity", "motion", "combined"


class SetAndSequence(LoraRecipe):
    """Stage 1 ("set") trains A1 and B1 on single frames; stage 2 ("sequence") trains only B2 on the clip."""

    name = "KinoloomTrainSetAndSequence"
    title = "Train Set-and-Sequence"
    description = (
        "Learns one moving subject from one clip: its look from the frames, then its motion from the sequence."
    )
    backbone_class = Wan
    columns = (LATENTS, PROMPT, MASK)
    previews = (PREVIEW_PROMPT,)

    @dataclass(frozen=True, kw_only=True)
    class Config(WanConfig, LoraConfig):
        rank: int = changed(LoraConfig, "rank", 32)
        set_steps: int = knob(
            600, "Optimizer steps of stage 1, the look. 0 skips it and needs an identity file.", min=0, max=1_000_000
        )
        sequence_steps: int = knob(
            900,
            "Optimizer steps of stage 2, the motion. 0 stops after the look. Complex motion needs up to 2500.",
            min=0,
            max=1_000_000,
        )
        start_from: str = changed(
            LoraConfig,
            "start_from",
            "",
            "A LoRA from which stage 1 starts: an identity file or a plain LoRA, of the same base model and rank.",
        )
        identity_file: str = knob(
            "",
            "The identity LoRA for stage 2, instead of training stage 1 (set_steps 0). Wan LoRAs of other trainers "
            "work too.",
            file_of="loras",
            advanced=True,
        )
        trigger_words: str = changed(
            LoraConfig,
            "trigger_words",
            "[v], [u]",
            "Trigger words, saved in the file's metadata for other tools to show.",
        )
        gradient_accumulation: int = changed(
            LoraConfig, "gradient_accumulation", 8, "Samples per step are batch_size times this; the paper uses 8."
        )
        beta2: float = changed(LoraConfig, "beta2", 0.99, "Decay of the optimizer's second moment.")
        max_grad_norm: float = changed(LoraConfig, "max_grad_norm", 0.05)
        set_dropout: float = knob(
            0.8,
            "Share of up-factor entries masked in each pass of stage 1. Lower it if the look is learned too slowly.",
            min=0.0,
            max=0.99,
            step=0.05,
            advanced=True,
        )
        sequence_dropout: float = knob(0.5, "The same for stage 2.", min=0.0, max=0.99, step=0.05, advanced=True)
        token_mask_prob: float = knob(
            0.1,
            "Share of prompt tokens masked in each pass, so that the LoRA does not depend on single words. 0 turns it "
            "off.",
            min=0.0,
            max=0.9,
            step=0.05,
            advanced=True,
        )
        self_conditioning_prob: float = knob(
            0.0,
            "Only 0 is allowed: Wan has no input for self-conditioning. The option exists for the paper's settings.",
            min=0.0,
            max=1.0,
            advanced=True,
        )
        set_shift: float = knob(
            1.0,
            "Timestep shift of stage 1. Above 1 trains more on high noise.",
            min=0.1,
            max=20.0,
            step=0.1,
            advanced=True,
        )
        sequence_shift: float = knob(
            3.0,
            "Timestep shift of stage 2. Motion is decided at high noise.",
            min=0.1,
            max=20.0,
            step=0.1,
            advanced=True,
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.self_conditioning_prob:
                raise ValueError(
                    f"self_conditioning_prob={self.self_conditioning_prob}: expected 0, because Wan has no input for "
                    "self-conditioning"
                )
            if not self.set_steps and not self.identity_file:
                raise ValueError("set_steps=0: expected above 0, or an identity_file to start stage 2 from")
            if self.set_steps and self.identity_file:
                raise ValueError(
                    f"identity_file={self.identity_file!r}: expected none when set_steps={self.set_steps} trains a "
                    "new identity; set set_steps to 0"
                )
            if self.start_from and self.identity_file:
                raise ValueError(
                    f"start_from={Path(self.start_from).name!r}: expected none beside an identity_file, which "
                    "replaces stage 1"
                )
            if not self.set_steps and not self.sequence_steps:
                raise ValueError("sequence_steps=0: expected above 0 when set_steps is 0, or there is nothing to train")

        def starts(self) -> dict[str, Start]:
            """Stage 1 may start from an identity file or a plain LoRA."""
            if not self.start_from:
                return {}

            def read(file: Path, _: Any, bases: Collection[str]) -> dict[str, Tensor]:
                return read_any_wan_lora(file, MOTION_STAGES, bases)

            return {IDENTITY: Start("start_from", self.start_from, Wan.lora_targets["all"], read)}

        def check_model(self, model: Any) -> None:
            super().check_model(model)
            check_starts(self.starts(), self, model.model.diffusion_model, model_keys(model))
            if self.identity_file:
                read_identity(self, model.model.diffusion_model, model_keys(model))

    def __init__(self, backbone: Wan, config: Any) -> None:
        super().__init__(backbone, config)
        self.dropout, self.shift = config.set_dropout, config.set_shift

    @staticmethod
    def phases(config: Any, data: TrainingData) -> list[Phase]:
        stages = [
            Phase(SET, config.set_steps, "frames", option="set_steps"),
            Phase(SEQUENCE, config.sequence_steps, "clips", option="sequence_steps"),
        ]
        return [stage for stage in stages if stage.steps]

    @staticmethod
    def exports(config: Any, data: TrainingData) -> dict[str, Export]:
        identity = {IDENTITY: Export("the look alone", SET)}
        stage_two = {
            MOTION: Export("the motion alone; works only together with the identity of the same run", SEQUENCE),
            COMBINED: Export("look and motion in one file", SEQUENCE),
        }
        return (identity if config.set_steps else {}) | (stage_two if config.sequence_steps else {})

    @classmethod
    def generations(cls, config: Any, data: TrainingData) -> list[Generation]:
        identity, motion = "Load LoRA: identity", "Load LoRA: motion"
        loaded = {identity: IDENTITY, motion: MOTION}, {motion: COMBINED}, {identity: IDENTITY}
        return [Generation("set_and_sequence_generate", loaders) for loaders in loaded]

    def start(self, phase: Phase) -> None:
        if IDENTITY not in self.lora.active:
            self.lora.add_group(
                IDENTITY, Wan.lora_targets["all"], self.config.rank, self.config.alpha or self.config.rank
            )
            for group, start in self.config.starts().items():
                self.lora.load_group(group, start.tensors(self.config, self.backbone.module))
        if phase.name == SEQUENCE:
            self._start_sequence()
        stages = {
            SET: (self.config.set_dropout, self.config.set_shift),
            SEQUENCE: (self.config.sequence_dropout, self.config.sequence_shift),
        }
        self.dropout, self.shift = stages[phase.name]

    def _start_sequence(self) -> None:
        """Freeze A1 and B1, rounded as in the identity file, and add a zero B2 that shares A1."""
        if self.config.identity_file:
            self.lora.load_group(IDENTITY, read_identity(self.config, self.backbone.module))
        elif self.config.save_precision == "fp16":
            for name in ("down", "up"):
                for factor in self.lora.factors(IDENTITY, name).values():
                    factor.data = factor.data.half().float()
        self.lora.set_masks(IDENTITY, None)
        self.lora.add_group(
            MOTION,
            Wan.lora_targets["all"],
            self.config.rank,
            self.config.alpha or self.config.rank,
            share_down=IDENTITY,
        )

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        group = IDENTITY if phase.name == SET else MOTION
        return self.lora.param_groups(group, self.config.learning_rate, self.config.lora_plus_ratio)

    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        return concept_and_prior(self._loss, batch, rng, self.config.prior_weight)

    def _loss(self, batch: Batch, rng: Rng) -> Tensor:
        c = self.config
        self._draw_masks(rng)
        t = sample_timesteps(rng, len(batch["latents"]), "logit_normal", self.shift, c.stratified_timesteps)
        prompts = choose_prompts(batch, rng, 0.0 if rng.evaluating else c.token_mask_prob)
        return denoising_loss(self.backbone, {**batch, "prompt_embeds": prompts}, rng, t)

    def _draw_masks(self, rng: Rng) -> None:
        """B' = B * M / (1 - p) with P(M = 0) = p, one mask M per layer and pass (paper eq. 10), for the trained B."""
        keep = 1 - self.dropout
        generator = rng.generator("masks", device=self.backbone.device)

        def mask(up: Tensor) -> Tensor:
            return torch.empty_like(up).bernoulli_(keep, generator=generator).div_(keep)

        self.lora.set_masks(self._trained_group(), None if rng.evaluating or not self.dropout else mask)

    def _trained_group(self) -> str:
        return MOTION if MOTION in self.lora.active else IDENTITY

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: Batch) -> Tensor:
        self.lora.set_masks(self._trained_group(), None)
        return self.backbone.predict(noisy_latents, t, batch)

    def export(self, name: str) -> dict[str, Tensor]:
        identity = self.lora.export(IDENTITY)
        if name == IDENTITY:
            return identity
        motion = self.lora.tensors(MOTION)
        if name == MOTION:
            return {**identity, **motion}
        return {
            **identity,
            **{key: identity[key] + up for key, up in motion.items() if key.endswith(".lora_up.weight")},
        }

    def metadata(self, name: str) -> dict[str, str]:
        """`sns.stage` names the export, `sns.basis_side` says that A is lora_down. Each identity has its own hash."""
        return {
            "sns.version": "1",
            "sns.stage": name,
            "sns.basis_side": "down",
            "sns.identity_sha256": self._identity_hash(),
        }

    def _identity_hash(self) -> str:
        dtype = torch.float16 if self.config.save_precision == "fp16" else torch.float32
        digest = hashlib.sha256()
        for key, tensor in sorted(self.lora.tensors(IDENTITY).items()):
            digest.update(key.encode() + tensor.to(dtype).numpy().tobytes())
        return digest.hexdigest()


def read_identity(config: Any, module: nn.Module, bases: Collection[str] = ()) -> dict[str, Tensor]:
    """The factors of the identity file. ValueError if it is not an identity for the layers of the Wan `module`."""
    path, rank = Path(config.identity_file), config.rank
    with naming("identity_file", config.identity_file):
        layers = layer_shapes(module, Wan.lora_targets["all"])
        tensors = read_wan_lora(path, layers, rank, MOTION_STAGES, bases)
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} or {float(rank)}
    for alpha in alphas:  # with another scale alpha / rank, A1 B1 would be another identity
        if not math.isclose(alpha, config.alpha or rank, rel_tol=1e-3):
            raise ValueError(
                f"identity_file={path.name!r}: was trained with alpha {alpha:g} at rank {rank}, but alpha="
                f"{config.alpha:g} (0 means alpha = rank): set alpha to {alpha:g}"
            )
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}


RECIPE = SetAndSequence
