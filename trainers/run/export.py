"""Writes a recipe's exports as files."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ...lora_io import keys
from ...lora_io.file import save
from ...lora_io.metadata import describe
from ..core.data import Column, TrainingData, texts_of
from ..core.events import Saved
from ..core.recipe import Phase, Recipe
from ..host.source import base_key
from .plain import public_config
from .record import Record

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def export_files(recipe: Recipe, phase: Phase, record: Record, best: bool) -> Iterator[Saved]:
    """Write every export of `phase`, with the number of steps in its name, and add it to `record.files`.

    Loaders cache by path, so no path is written twice. Of the best files only the last is kept.
    """
    spec, config = record.spec, recipe.config
    for name, export in recipe.exports(config, spec.data).items():
        if export.phase != phase.name:
            continue
        label = f"{name}-best" if best else name
        start = f"{spec.run_name}-{label}-"
        if export.folder == "embeddings":
            start = start.replace(" ", "_")  # a name in a prompt ends at a space
        path = Path(spec.outputs[export.folder]) / f"{start}{record.done:06d}.safetensors"
        metadata = describe(
            recipe=spec.recipe,
            export=name,
            config=public_config(config),
            step=record.done,
            steps=record.total,
            base_model=base_key(spec.sources),
            base_model_name=spec.base_name,
            backbone=type(recipe).backbone_class.name,
            extra={**described(spec.data, recipe.columns), **recipe.metadata(name)},
        )
        tensors = keys.FORMATS[export.format](recipe.export(name))
        save(path, {key: _cast(tensor, DTYPES[config.save_precision]) for key, tensor in tensors.items()}, metadata)
        earlier, record.files[label] = record.files.get(label), str(path)
        if best and earlier:
            _drop(Path(earlier), path, start)
        yield Saved(name, str(path), record.done, best)


def described(data: TrainingData, columns: tuple[Column, ...]) -> dict[str, str]:
    """What a file says about the clips that it was trained on: their captions, and latent shapes (C, T, h, w)."""
    shapes = sorted({row.shape for row in data.rows if row.role == "train"})
    captions = texts_of(data, columns)
    return {"kinoloom.latents": json.dumps(shapes), **({"kinoloom.captions": json.dumps(captions)} if captions else {})}


def _drop(earlier: Path, path: Path, start: str) -> None:
    """Delete the file that `path` replaces, if it is a file of this run."""
    if earlier != path and earlier.parent == path.parent and earlier.name.startswith(start):
        with suppress(OSError):  # already deleted, or open in a loader
            earlier.unlink()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast matrices. Scalars such as alpha stay exact."""
    return tensor.to(dtype) if tensor.ndim else tensor
