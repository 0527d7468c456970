"""Encodings on disk, made once: a column's file is named by the hash of all that went into it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ..trainers.core.data import column_path, write_column
from .framing import center_crop, fit, latent_mask
from .prompts import TOKEN_MASK_PROB, encode_prompt
from .sources import Source

# Raise a number when what its column holds changes.
VERSIONS = {"latents": 1, "prompt_embeds": 1, "mask": 1, "image": 2, "tracklets": 1, "sample": 1}


def data_folder() -> Path:
    return Path(folder_paths.get_system_user_directory("kinoloom")) / "data"


def frame_step(vae: Any) -> int:
    """Frames per latent step after the first: 4 for Wan, 1 for an image VAE."""
    return vae.temporal_compression_decode() or 1


def encode_pixels(vae: Any, frames: Tensor) -> Tensor:
    """[F, H, W, 3] in 0..1 to the VAE's raw latents [C, T, h, w]."""
    latents = vae.encode(frames)
    if not latents.isfinite().all():
        raise ValueError(f"vae: encodes into values that are no numbers, in {vae.vae_dtype}: expected bf16 or fp32")
    return (latents[0] if latents.ndim == 5 else latents.movedim(0, 1)).float().cpu()


@dataclass(frozen=True)
class Columns:
    """The column files of one run of a node, which advances `bar` with every file made or found."""

    folder: Path
    bar: comfy.utils.ProgressBar = field(repr=False)

    def find(self, column: str, *key: object) -> tuple[str, bool]:
        """File stem for what `key` describes, and whether the file is there."""
        stem = hashlib.sha256(repr((column, VERSIONS[column], *key)).encode()).hexdigest()
        return stem, column_path(self.folder, stem, column).is_file()

    def cached(self, column: str, key: tuple, make: Callable[[], dict[str, Tensor]]) -> str:
        comfy.model_management.throw_exception_if_processing_interrupted()
        stem, found = self.find(column, *key)
        if not found:
            write_column(self.folder, stem, column, make())
        self.bar.update(1)
        return stem

    def shape(self, stem: str) -> tuple[int, ...]:
        """Shape [C, T, h, w] of a latents column, from the file's header."""
        with safe_open(str(column_path(self.folder, stem, "latents")), framework="pt") as opened:
            return tuple(opened.get_slice("latents").get_shape())

    def prompt(self, clip: Any, clip_id: str, caption: str, variants: int) -> str:
        key = (clip_id, caption, variants, TOKEN_MASK_PROB)
        return self.cached("prompt_embeds", key, lambda: encode_prompt(clip, caption, variants))

    def latents(
        self, vae: Any, vae_id: str, source: Source, windows: list[list[int]], width: int, height: int
    ) -> list[str]:
        def make(frames: list[Tensor]) -> dict[str, Tensor]:
            return {"latents": encode_pixels(vae, torch.stack([fit(frame, width, height) for frame in frames]))}

        return self.of_windows("latents", source, windows, (vae_id, source.digest), (width, height), make)

    def masks(
        self, source: Source, windows: list[list[int]], width: int, height: int, step: int, latent_size: tuple[int, int]
    ) -> list[str]:
        def make(frames: list[Tensor]) -> dict[str, Tensor]:
            # the crop is that of frames of `width` x `height`
            crops = [center_crop(frame[..., :1], width, height) for frame in frames]
            small = [F.adaptive_avg_pool2d(crop, latent_size)[0, 0] for crop in crops]
            return {"mask": latent_mask(torch.stack(small), step)}

        rest = (width, height, step, latent_size)
        return self.of_windows("mask", source, windows, (source.digest,), rest, make)

    def of_windows(
        self,
        column: str,
        source: Source,
        windows: list[list[int]],
        before: tuple,
        after: tuple,
        make: Callable[[list[Tensor]], dict[str, Tensor]],
    ) -> list[str]:
        """A file per window of source frames; `before` and `after` stand around the window in its key.

        Single frames are read in one pass over the source, whose every pass begins at its first frame.
        """
        missing = [window for window in windows if not self.find(column, *before, window, *after)[1]]
        if all(len(window) == 1 for window in missing):
            passes = iter([source.frames(_places(source, [window[0] for window in missing]))] * len(missing))
        else:
            passes = (source.frames(_places(source, window)) for window in missing)

        def one(window: list[int]) -> dict[str, Tensor]:
            frames = next(passes)
            return make([next(frames) for _ in window])

        return [self.cached(column, (*before, window, *after), lambda w=window: one(w)) for window in windows]


def _places(source: Source, indices: list[int]) -> list[int]:
    """A source of one frame, such as a still mask, serves every moment."""
    return [0] * len(indices) if source.count == 1 else indices
