"""One motion of clips as an adapter that animates a still image, after an early form of Li et al. (arXiv 2512.20000).

An I2V-Adapter (arXiv 2312.16693) makes every frame look at the first one, a motion LoRA learns the motion, and CA-LoRA
ties both to the words of a prompt. Several adapters, each with its own prompt, then animate one image.

Defaults that differ from the original's: 3000 steps at a learning rate of 1e-4 in place of 30000 at 1e-5, which move
AdamW's weights as far in a tenth of the time; stride 1 in place of 4, because clips are encoded at few frames per
second; AdamW in fp32 in place of its form in 8 bits, which needs another library.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..lora_io.adapter_files import motion_lora, read_adapter
from .backbones.animatediff.image_to_video import AnimateDiffI2v
from .conditions.adapter import Adapter, Query
from .conditions.adapter_positions import MODES, NONE
from .conditions.adapters_at_work import Adapted, Playing
from .conditions.columns import LATENTS, MASK, PREVIEW_PROMPT, PREVIEW_START, PROMPT
from .conditions.new_adapter import check_bases, fixed_factors, freeze_bases, initialise, shapes_of
from .conditions.word import KEY, LearnedWord, WordConfig
from .core.backbone import Grid
from .core.config import knob, naming
from .core.cutting import cut_clips
from .core.data import Batch, TrainingData
from .core.lora import copied, fill
from .core.losses import concept_and_prior, masked_mse
from .core.recipe import Export, Generation, ModelInput, Phase, Recipe
from .core.rng import Rng
from .core.transfer import to_device
from .host.layers import OPERATIONS, make_private
from .host.weights import extremes, require_finite

PHASE = "clips"
MOTION, WORD, ADAPTER = "motion", "word", "adapter"
FOLDER, MOTION_FOLDER, WORD_FOLDER = "i2v_adapters", "animatediff_motion_lora", "embeddings"
SAVED_PRECISION = 1e-3  # bf16 files keep entries of bases, at most 1, to this
NEGATIVE = "negative"  # in a batch: its prompt is the negative one


class CaLora(Recipe):
    """Trains the noise of all frames but the first, which the model sees clean."""

    name = "KinoloomTrainCaLora"
    title = "Train CA-LoRA"
    description = (
        "Learns one motion from about ten clips, as an adapter for AnimateDiff that animates a still image. Several "
        "adapters can animate one image together, each with its own prompt."
    )
    backbone_class = AnimateDiffI2v
    columns = (LATENTS, PROMPT, MASK)
    previews = (PREVIEW_PROMPT, PREVIEW_START)
    models = (
        ModelInput(),
        ModelInput("clip", "The model's text encoder, if word_to_learn is set.", True, "word_to_learn"),
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(WordConfig):
        steps: int = knob(
            3000, "Optimizer steps. The original makes 5000 to 30000, at 1e-5 in place of 1e-4.", min=1, max=1_000_000
        )
        rank: int = knob(32, "Size of the LoRAs. Raise it if the motion is not learned.", min=1, max=256)
        frames: int = knob(
            16,
            "Frames that a step trains on: 16 for AnimateDiff. Longer clips are cut, at another place in each step. 0 "
            "takes whole clips.",
            min=0,
            max=128,
        )
        stride_min: int = knob(
            1, "Smallest stride: 1 takes every frame of a clip, 2 every second one.", min=1, max=64, advanced=True
        )
        stride_max: int = knob(
            1,
            "Largest stride. Each step draws one, as far as the clip is long enough: 16 frames at stride 4 need 61. "
            "Raise it to learn faster motion.",
            min=1, max=64, advanced=True,
        )  # fmt: skip
        alpha: float = knob(
            1.0, "LoRA scale is alpha / rank. 0 means alpha = rank, a scale of 1.", min=0.0, max=1024.0, step=0.5,
            advanced=True,
        )  # fmt: skip
        train_image: bool = knob(True, "Train the I2V-Adapter, which makes the frames look like the first one.")
        train_temporal: bool = knob(True, "Train the motion LoRA on the motion modules.")
        train_cross: bool = knob(True, "Train CA-LoRA, which ties the motion to the words of the prompt.")
        image_query: bool = knob(
            False, "Train the queries of the I2V-Adapter too. Its output is always trained.", advanced=True
        )
        cross_query: bool = knob(False, "Train CA-LoRA on the queries of cross-attention too.", advanced=True)
        cross_out: bool = knob(True, "Train CA-LoRA on the output of cross-attention too.", advanced=True)
        motion_embed: bool = knob(
            False, "Learn a vector for each frame number in each temporal attention. Then sample as many frames as a "
            "step trains on.",
            advanced=True,
        )  # fmt: skip
        positions: str = knob(
            NONE,
            "Adds time and place to the queries of cross-attention, so that words can act at a time or a place. The "
            "original's examples have rope_3d.",
            choices=MODES,
            advanced=True,
        )
        query_stride: int = knob(
            1, "2 or 4 computes cross-attention once for a block of 2 x 2 or 4 x 4 places: coarser.", min=1, max=8,
            advanced=True,
        )  # fmt: skip
        pooled_norms: bool = knob(
            True,
            "Compute the image model's group norms over all frames of a clip, as the original does. Off computes them "
            "for each frame, as AnimateDiff v3 does.",
            advanced=True,
        )
        oa_bin: int = knob(
            -1,
            "Orthogonal adapters: give each motion a number of its own, from 0 on, so that their LoRAs write in "
            "orthogonal directions. Rank 32 has 10 numbers. -1 turns it off.",
            min=-1, max=4095, advanced=True,
        )  # fmt: skip
        oa_bases: str = knob(
            "",
            "For oa_bin: the path of a folder of the original's bases, if other adapters were trained with them. Empty "
            "uses bases that all adapters of this pack share.",
            advanced=True,
        )
        start_from: str = knob(
            "", "An adapter to start from, with the same parts, rank and alpha.", file_of=FOLDER, advanced=True
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if not (self.train_image or self.train_temporal or self.train_cross):
                raise ValueError("train_image, train_temporal and train_cross are all off: expected one of them on")
            needs = {"image_query": "train_image", "motion_embed": "train_temporal", "cross_query": "train_cross"}
            for option, needed in needs.items():
                if getattr(self, option) and not getattr(self, needed):
                    raise ValueError(f"{option}=True: expected {needed} on")
            if self.stride_max < self.stride_min:
                raise ValueError(f"stride_max={self.stride_max}: expected at least stride_min={self.stride_min}")
            if self.frames == 1:
                raise ValueError("frames=1: expected 0, or 2 and more")
            if self.oa_bases and self.oa_bin < 0:
                raise ValueError(f"oa_bases={self.oa_bases!r}: expected oa_bin of 0 or more")

        def check_model(self, model: Any) -> None:
            """`model` is a MODEL."""
            if self.oa_bin >= 0:
                check_bases(self, model.model.diffusion_model)

        @property
        def query(self) -> Query:
            return Query(self.positions, self.query_stride)

        def check_data(self, data: TrainingData) -> None:
            for role in ("train", "validation", "prior"):
                for row in data.select("clips", role):
                    if row.shape[1] < 2:
                        raise ValueError(f"data: {row.name} is a single frame, expected clips")

    def __init__(self, backbone: AnimateDiffI2v, config: Any) -> None:
        super().__init__(backbone, config)
        unet, motion = backbone.unet, backbone.module.get_submodule("motion")
        if config.pooled_norms:
            backbone.pool_norms()
        shapes = shapes_of(config, unet, motion)
        adapter = Adapter(shapes, config.alpha or config.rank, config.query, operations=OPERATIONS)
        make_private(initialise(adapter, unet, config.seed))
        if config.oa_bin >= 0:
            freeze_bases(adapter, config)
        self.adapter = adapter.to(backbone.device)
        self.word = LearnedWord(backbone.text_encoder, config) if config.word_to_learn else None
        if config.start_from:
            self._start_from(Path(config.start_from))
        self.adapted = Adapted(unet, motion, [Playing(self.adapter)]).__enter__()  # never left: the model is private
        backbone.module.add_module(ADAPTER, self.adapter)

    @torch.no_grad()
    def _start_from(self, file: Path) -> None:
        with naming("start_from", self.config.start_from):
            found, bases = read_adapter(file), self._fixed()
            before = copied(bases)
            fill(self._trained(), found.tensors, "its parts are not those of this run")
            for key, own in bases.items():
                if (own - before[key]).abs().max() > SAVED_PRECISION:
                    raise ValueError(f"it was not trained with oa_bin={self.config.oa_bin}: {key} differs")
                own.copy_(before[key])
            if found.alpha not in (None, self.adapter.alpha):
                raise ValueError(f"its alpha is {found.alpha:g}, expected {self.adapter.alpha:g} as in this run")
            require_finite(extremes(self.adapter), "the adapter")

    def _fixed(self) -> dict[str, nn.Parameter]:
        return fixed_factors(self.adapter) if self.config.oa_bin >= 0 else {}

    @classmethod
    def data_grid(cls, config: Any, grid: Grid) -> Grid:
        return grid.of_cut_rows(config.frames)

    @staticmethod
    def phases(config: Any, data: TrainingData) -> list[Phase]:
        return [Phase(PHASE, config.steps, "clips")]

    @staticmethod
    def exports(config: Any, data: TrainingData) -> dict[str, Export]:
        motion = Export("the motion LoRA alone, for Load Motion LoRA", PHASE, "lora", "whole", MOTION_FOLDER)
        adapter = Export("the adapter, for Load I2V Adapter", PHASE, "module", "whole", FOLDER)
        word = Export("the learned word, for prompts: embedding:<name>", PHASE, "module", "whole", WORD_FOLDER)
        made = {MOTION: config.train_temporal, WORD: config.word_to_learn, ADAPTER: True}
        return {name: export for name, export in {MOTION: motion, WORD: word, ADAPTER: adapter}.items() if made[name]}

    @classmethod
    def generations(cls, config: Any, data: TrainingData) -> list[Generation]:
        return [Generation("ca_lora_generate", {"KinoloomLoadI2vAdapter": ADAPTER})]

    def start(self, phase: Phase) -> None:
        self.adapter.requires_grad_(True)
        for fixed in self._fixed().values():
            fixed.requires_grad_(False)

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        trained = [parameter for parameter in self._trained().values() if parameter.requires_grad]
        return [{"params": trained, "lr": self.config.learning_rate}]

    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        """Of the clips, and of prior clips, whose own captions never have the learned word."""
        return concept_and_prior(self._loss, self._worded(batch), rng, self.config.prior_weight)

    def _worded(self, batch: Batch) -> Batch:
        return self.word.instead_of_captions(batch) if self.word else batch

    def _loss(self, batch: Batch, rng: Rng) -> Tensor:
        """MSE on the noise of frames 1 and later; the noise of each frame is its own."""
        batch = cut_clips(batch, self.config.frames, (self.config.stride_min, self.config.stride_max), rng)
        latents, schedule = batch["latents"], self.backbone.schedule
        noise = rng.noise_like(latents)
        t = to_device(schedule.timesteps(rng.uniform(len(latents), self.config.stratified_timesteps)), latents.device)
        given = {**batch, "prompt_embeds": batch["prompt_embeds"][:, 0], "first_frame": latents[:, :, 0]}
        pred = self._predict(schedule.add_noise(latents, noise, t), t, given)
        mask = batch["mask"][:, :, 1:] if "mask" in batch else None
        return masked_mse(pred[:, :, 1:], noise[:, :, 1:], mask)

    def predict(self, noisy_latents: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """`batch` holds `start` [B, 4, h, w], the first frame's latents as the VAE gives them."""
        given = batch if NEGATIVE in batch else self._worded(batch)
        return self._predict(noisy_latents, t, {**given, "first_frame": self.backbone.first_frame(batch["start"])})

    def _predict(self, noisy_latents: Tensor, t: Tensor, batch: Batch) -> Tensor:
        self.adapted.frames = noisy_latents.shape[2]
        self.adapted.positive = [NEGATIVE not in batch] * len(noisy_latents)
        return self.backbone.predict(noisy_latents, t, batch)

    def unconditional(self, batch: Batch) -> Batch:
        """The negative prompt, which CA-LoRA does not act on."""
        return {**super().unconditional(batch), NEGATIVE: True}

    def export(self, name: str) -> dict[str, Tensor]:
        """The adapter with the original's names; the motion LoRA with its scale in `up`, as AnimateDiff's have it.

        The word's row [1, 768] under the word, as diffusers has it; core takes any name of a single tensor.
        """
        tensors = {key: value.detach().cpu() for key, value in self._trained().items()}
        if name == ADAPTER:
            return tensors
        if name == WORD:
            return {self.config.word_to_learn: tensors[KEY]}
        return motion_lora(tensors, self.adapter.alpha)

    def metadata(self, name: str) -> dict[str, str]:
        c = self.config
        kind = {MOTION: "motion-lora", WORD: "textual-inversion", ADAPTER: "i2v-adapter"}[name]
        word = self.word.metadata(c.trigger_words) if self.word and name != MOTION else {}
        own = {
            "kinoloom.alpha": str(self.adapter.alpha),
            "kinoloom.rank": str(c.rank),
            "kinoloom.positions": c.positions,
            "kinoloom.query_stride": str(c.query_stride),
            "kinoloom.pooled_norms": str(c.pooled_norms),
            "kinoloom.oa_bin": str(c.oa_bin),
            "kinoloom.frames": str(c.frames),
        }
        return {
            **word,
            **(own if name == ADAPTER else {}),  # the motion LoRA has its scale in `up`
            "modelspec.architecture": f"stable-diffusion-v1/{kind}",
            "ss_base_model_version": "sd_v1",
            "kinoloom.motion_module": self.backbone.layout.version,
            "kinoloom.schedule": "scaled_linear",
        }

    def state_dict(self) -> dict[str, Tensor]:
        return copied(self._trained())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """ValueError if the state is for another architecture."""
        fill(self._trained(), state, "adapter state: layers do not match")

    def _trained(self) -> dict[str, nn.Parameter]:
        return {**self.adapter.tensors(), **({KEY: self.word.row} if self.word else {})}


RECIPE = CaLora
