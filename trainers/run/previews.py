"""Samples of a model in training, as small videos."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...lora_io.file import atomic_write
from ..core.backbone import Backbone
from ..core.data import Batch, collate, column_path, read_column
from ..core.events import Event, Sample, SampleFailed
from ..core.recipe import Phase, Recipe
from ..core.sampling import sample
from ..host.device import release
from ..host.preview import decode_preview, levels

PROMPTS, FIRST_FRAMES = "prompt_embeds", "sample"  # the columns that samples are made of
LEFT_OUT = ("image_embeds", "first_frame", "box_mask")  # set to zero in the unconditional batch of first frames


@dataclass(frozen=True)
class Samples:
    """The samples of a run, as plain values: the value of a TRAINING_SAMPLES wire.

    column: PROMPTS or FIRST_FRAMES. names: labels for the user, such as prompts. stems: their files in that column.
    negative: the negative prompt's file; for first frames the unconditional batch is zeros. Guidance rises linearly
    from `first_cfg` in the first frame to `cfg` in the last. shape: latent (C, T, h, w), once the model is known.
    """

    folder: str
    column: str
    names: tuple[str, ...]
    stems: tuple[str, ...]
    negative: str
    width: int
    height: int
    frames: int
    fps: float
    steps: int
    cfg: float
    first_cfg: float
    shift: float
    seed: int
    sample_every: int
    shape: tuple[int, ...] = ()

    def conditions(self, index: int) -> tuple[Batch, Batch]:
        """The conditional and the unconditional batch of sample number `index`."""
        positive = self._read(self.stems[index])
        if self.column == PROMPTS:
            return tuple({**b, PROMPTS: b[PROMPTS][:, 0]} for b in (positive, self._read(self.negative)))
        return positive, {**positive, **{name: torch.zeros_like(positive[name]) for name in LEFT_OUT}}

    def _read(self, stem: str) -> Batch:
        return collate([read_column(column_path(self.folder, stem, self.column), "samples")])

    def guidance(self) -> Tensor:
        """The guidance of each latent frame, [1, 1, T, 1, 1]."""
        return torch.linspace(self.first_cfg, self.cfg, self.shape[1]).view(1, 1, -1, 1, 1)


class Sampling:
    """Makes a run's samples when called, as files `<done>-<number>.webp` in `folder`.

    If a sample fails, sampling ends and the run goes on.
    """

    def __init__(
        self,
        samples: Samples,
        recipe: Recipe,
        backbone: Backbone,
        latent_format: Any,
        folder: Path,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.samples, self.recipe, self.backbone, self.latent_format = samples, recipe, backbone, latent_format
        self.folder, self.emit, self.should_stop = folder, emit, should_stop
        self.failed, self.began = False, 0.0

    def __call__(self, phase: Phase, step: int, done: int) -> None:
        """Sample after `step` of a phase and `done` steps of the run."""
        if self.failed:
            return
        self.began, failure = time.perf_counter(), ""
        files = [f"{done:06d}-{number}.webp" for number in range(len(self.samples.names))]
        try:
            made = [self._sample(number) for number in range(len(files))]
            if any(latents is None for latents in made):
                return
            for name, latents in zip(files, made, strict=True):
                frames = decode_preview(self.latent_format, latents[0])
                write_webp(self.folder / name, frames, self.samples.frames / self.samples.fps)
        except Exception as error:  # most likely sampling ran out of memory
            logging.exception("Kinoloom: a sample failed, and no more are made until the run is started again")
            self.failed, failure = True, f"{type(error).__name__}: {error}"
        if self.failed:
            release()
            self.emit(SampleFailed(phase.name, step, done, failure))
        else:
            seconds = time.perf_counter() - self.began
            self.emit(Sample(phase.name, step, done, files, list(self.samples.names), seconds))

    def _stopped(self) -> bool:
        """Whether to stop. A pause does not count as the sample's time."""
        asked = time.perf_counter()
        stop = self.should_stop()
        self.began += time.perf_counter() - asked
        return stop

    def _sample(self, index: int) -> Tensor | None:
        samples, schedule = self.samples, self.backbone.schedule
        generator = torch.Generator().manual_seed(samples.seed + index)  # on the CPU, so equal on every device
        noise = torch.randn(1, *samples.shape, generator=generator).to(self.backbone.device)
        sigmas = levels(schedule, samples.steps, samples.shift)
        conditions, guidance = samples.conditions(index), samples.guidance()
        return sample(self.recipe.predict, schedule, noise, sigmas, conditions, guidance, self._stopped)


def write_webp(path: Path, frames: Tensor, seconds: float) -> None:
    """Write frames [F, H, W, 3] in 0..1 as an animation that lasts `seconds`."""
    first, *rest = (Image.fromarray(frame.numpy()) for frame in (frames * 255).round().byte().cpu())
    each = round(1000 * seconds / len(frames))
    options = {"save_all": True, "append_images": rest, "duration": each, "loop": 0, "quality": 85}
    atomic_write(path, lambda temporary: first.save(temporary, "WEBP", **options))
