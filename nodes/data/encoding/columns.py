"""The columns of a data set as cached files, each named by its cache key: the hash of all its inputs."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ....trainers.conditions.columns import LATENTS, MASK, PROMPT
from ....trainers.core.data import Column, column_path, write_column
from ..reading.framing import center_crop, fit, latent_mask
from ..reading.sources import Source
from . import cache
from .prompts import TOKEN_MASK_PROB, describe, encode_prompt, shown, tokenize
from .vae import encode_pixels


def open_columns(files: int) -> "Columns":
    """The columns for one run of a node with `files` files. First deletes files above the cache's limit."""
    cache.keep_to_limit(cache.data_folder())
    return Columns(cache.data_folder(), comfy.utils.ProgressBar(files))


@dataclass(frozen=True)
class Columns:
    """The column files of one run of a node. Every file that is made or found advances `bar`."""

    folder: Path
    bar: comfy.utils.ProgressBar = field(repr=False)

    def find(self, column: Column, *key: object) -> tuple[str, bool]:
        """The file stem for a cache key, and whether the file exists. Raises if the prompt was cancelled."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        stem = hashlib.sha256(repr((column.name, column.version, *key)).encode()).hexdigest()
        return stem, cache.use(column_path(self.folder, stem, column.name))

    def cached(
        self, column: Column, key: tuple, name: str, make: Callable[[], dict[str, Tensor]], text: str = ""
    ) -> str:
        """The file stem of a column. Makes the file if it does not exist. ValueError names `name` if it has NaN.

        `text` is what the column encodes, if it is a text.
        """
        stem, found = self.find(column, *key)
        if not found:
            made = make()
            require_finite(name, made)
            write_column(self.folder, stem, column.name, made, text)
        self.bar.update(1)
        return stem

    def shape(self, stem: str, column: Column = LATENTS) -> tuple[int, ...]:
        """The shape of a column's tensor of the same name, such as latents [C, T, h, w], from the file's header."""
        with safe_open(str(column_path(self.folder, stem, column.name)), framework="pt") as opened:
            return tuple(opened.get_slice(column.name).get_shape())

    def prompts(
        self, text_encoder: Any, text_encoder_id: str, texts: dict[str, str], variants: int, *, literal: bool
    ) -> dict[str, str]:
        """The file stem of each text's encoding. `texts` maps a text to its name in errors. All are checked first."""
        described = {
            text: describe(tokenize(text_encoder, text, literal=literal, name=name)) for text, name in texts.items()
        }

        def one(text: str) -> str:
            key = (text_encoder_id, text, described[text], variants, TOKEN_MASK_PROB)
            name = f"{texts[text]} {shown(text)}"
            encode = partial(encode_prompt, text_encoder, text, variants, literal=literal)
            return self.cached(PROMPT, key, name, encode, text)

        return {text: one(text) for text in texts}

    def latents(
        self, vae: Any, vae_id: str, source: Source, windows: list[list[int]], width: int, height: int
    ) -> list[str]:
        def make(frames: list[Tensor]) -> dict[str, Tensor]:
            return {"latents": encode_pixels(vae, torch.stack([fit(frame, width, height) for frame in frames]))}

        return self.of_windows(LATENTS, source, windows, (vae_id, source.digest), (width, height), make)

    def masks(
        self, source: Source, windows: list[list[int]], width: int, height: int, step: int, latent_size: tuple[int, int]
    ) -> list[str]:
        def make(frames: list[Tensor]) -> dict[str, Tensor]:
            # cropped like frames of `width` x `height`
            crops = [center_crop(frame[..., :1], width, height) for frame in frames]
            small = [F.adaptive_avg_pool2d(crop, latent_size)[0, 0] for crop in crops]
            return {"mask": latent_mask(torch.stack(small), step)}

        rest = (width, height, step, latent_size)
        return self.of_windows(MASK, source, windows, (source.digest,), rest, make)

    def of_windows(
        self,
        column: Column,
        source: Source,
        windows: list[list[int]],
        before: tuple,
        after: tuple,
        make: Callable[[list[Tensor]], dict[str, Tensor]],
    ) -> list[str]:
        """A file per window of source frames; its cache key is (*before, window, *after)."""
        missing = [window for window in windows if not self.find(column, *before, window, *after)[1]]
        read = reader(source, missing)

        def one(window: list[int]) -> str:
            name = f"{source.name} frames {window[0]}-{window[-1]}"
            return self.cached(column, (*before, window, *after), name, lambda: make(read(window)))

        return [one(window) for window in windows]


def reader(source: Source, windows: list[list[int]]) -> Callable[[list[int]], list[Tensor]]:
    """A function that reads the frames of a window. Single frames in ascending order take one pass over the source."""

    def fresh(window: list[int]) -> list[Tensor]:
        return list(source.frames(_places(source, window)))

    if any(len(window) > 1 for window in windows):
        return fresh
    singles = sorted({window[0] for window in windows})
    ahead = zip(singles, source.frames(_places(source, singles)), strict=True)

    def one(window: list[int]) -> list[Tensor]:
        frame = next((frame for index, frame in ahead if [index] == window), None)
        return fresh(window) if frame is None else [frame]

    return one


def require_finite(name: str, tensors: dict[str, Tensor]) -> None:
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{name}: {', '.join(bad)} came out as NaN or infinite values: expected finite ones. Try the model "
            "that encodes it in bf16 or fp32"
        )


def _places(source: Source, indices: list[int]) -> list[int]:
    """The frame indices, all 0 for a source of one frame, such as a still mask."""
    return [0] * len(indices) if source.count == 1 else indices
