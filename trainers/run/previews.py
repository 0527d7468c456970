"""Samples of a model in training, as small videos."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...lora_io.file import atomic_write
from ..core.backbone import Backbone, Grid
from ..core.data import Batch, Column, Row, collate, files_of, read_column, require_columns
from ..core.events import Event, Sample, SampleFailed
from ..core.recipe import Phase, Recipe
from ..core.sampling import sample
from ..host.device import release
from ..host.preview import decode_preview, levels


@dataclass(frozen=True)
class Previews:
    """The samples of a run, as plain values: the value of a TRAINING_SAMPLES wire.

    rows: rows of role "preview", without latents. Until the model is known, their shape is that of their first frame's
    latents, or (). negative: the row whose columns replace a preview's in the unconditional batch, which keeps the
    others. width, height, frames: size of each video. Guidance rises
    linearly from `first_cfg` in the first frame to `cfg` in the last.
    """

    folder: str
    rows: tuple[Row, ...]
    negative: Row | None
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

    @property
    def names(self) -> list[str]:
        return [row.name for row in self.rows]

    def fitted(self, columns: tuple[Column, ...], grid: Grid) -> "Previews":
        """The previews with their latent shape. ValueError if a row lacks a column or does not fit `grid`."""
        for row in self.rows:
            require_columns(row, columns, "samples:")
            if row.shape:
                grid.check_channels(row, "samples")
        try:
            shape = grid.latent_shape(self.width, self.height, self.frames)
        except ValueError as error:
            raise ValueError(f"samples: {error}") from error
        return replace(self, rows=tuple(replace(row, shape=shape) for row in self.rows))

    def conditions(self, index: int, columns: tuple[Column, ...]) -> tuple[Batch, Batch]:
        """Batches of one clip: preview number `index`, and the same with the columns of the negative row."""
        row = self.rows[index]
        batches = [self._read(of, columns, row.shape) for of in (row, self.negative) if of]
        return batches[0], batches[0] | batches[-1]

    def _read(self, row: Row, columns: tuple[Column, ...], shape: tuple[int, ...]) -> Batch:
        files = files_of(self.folder, row, columns)
        return collate([{name: read_column(path, "samples") for name, path in files.items()}], columns, shape)

    def guidance(self, frames: int) -> Tensor:
        """The guidance of each of `frames` latent frames, [1, 1, T, 1, 1]."""
        return torch.linspace(self.first_cfg, self.cfg, frames).view(1, 1, -1, 1, 1)


class Sampling:
    """Makes a run's samples when called, as files `<done>-<number>.webp` in `folder`.

    If a sample fails, sampling ends and the run goes on.
    """

    def __init__(
        self,
        previews: Previews,
        recipe: Recipe,
        backbone: Backbone,
        latent_format: Any,
        folder: Path,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.previews, self.recipe, self.backbone, self.latent_format = previews, recipe, backbone, latent_format
        self.folder, self.emit, self.should_stop = folder, emit, should_stop
        self.failed, self.began = False, 0.0

    def __call__(self, phase: Phase, step: int, done: int) -> None:
        """Sample after `step` of a phase and `done` steps of the run."""
        if self.failed:
            return
        self.began, failure = time.perf_counter(), ""
        files = [f"{done:06d}-{number}.webp" for number in range(len(self.previews.rows))]
        try:
            made = [latents for number in range(len(files)) if (latents := self._sample(number)) is not None]
            if len(made) < len(files):
                return
            for name, latents in zip(files, made, strict=True):
                frames = decode_preview(self.latent_format, latents[0])
                write_webp(self.folder / name, frames, self.previews.frames / self.previews.fps)
        except Exception as error:  # most likely sampling ran out of memory
            logging.exception("Kinoloom: a sample failed, and no more are made until the run is started again")
            self.failed, failure = True, f"{type(error).__name__}: {error}"
        if self.failed:
            release()
            self.emit(SampleFailed(phase.name, step, done, failure))
        else:
            seconds = time.perf_counter() - self.began
            self.emit(Sample(phase.name, step, done, files, self.previews.names, seconds))

    def _stopped(self) -> bool:
        """Whether to stop. A pause does not count as the sample's time."""
        asked = time.perf_counter()
        stop = self.should_stop()
        self.began += time.perf_counter() - asked
        return stop

    def _sample(self, index: int) -> Tensor | None:
        previews, recipe, schedule = self.previews, self.recipe, self.backbone.schedule
        shape = previews.rows[index].shape
        generator = torch.Generator().manual_seed(previews.seed + index)  # on the CPU, so equal on every device
        noise = torch.randn(1, *shape, generator=generator).to(self.backbone.device)
        positive, negative = previews.conditions(index, recipe.previews)
        conditions, guidance = (positive, recipe.unconditional(negative)), previews.guidance(shape[1])
        sigmas = levels(schedule, previews.steps, previews.shift)
        return sample(recipe.predict, schedule, noise, sigmas, conditions, guidance, self._stopped)


def write_webp(path: Path, frames: Tensor, seconds: float) -> None:
    """Write frames [F, H, W, 3] in 0..1 as an animation that lasts `seconds`."""
    first, *rest = (Image.fromarray(frame.numpy()) for frame in (frames * 255).round().byte().cpu())
    each = round(1000 * seconds / len(frames))
    options = {"save_all": True, "append_images": rest, "duration": each, "loop": 0, "quality": 85}
    atomic_write(path, lambda temporary: first.save(temporary, "WEBP", **options))
