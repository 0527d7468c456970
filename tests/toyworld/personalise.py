"""Trains LoRAs of toy concepts with the pack's own nodes and trainers, without a server. Import it as studio.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import runs
import torch
from kinoloom.nodes.data.nodes import EncodeClips, PriorClips
from kinoloom.trainers import recipes
from kinoloom.trainers.core.data import TrainingData

from . import world
from .install import CFG, SAMPLER, STEPS, STRIDE
from .studio import AnimateDiffStudio, Studio

PRIORS = 12


@torch.inference_mode()
def encode(studio: Studio, name: str, stride: int = 1, **options: Any) -> TrainingData:
    """A concept's clip, every `stride`th frame of it."""
    scene = world.CONCEPTS[name]
    images = torch.from_numpy(world.concept_clip(name).video).float() / 255
    (encoded,) = EncodeClips.execute(
        studio.vae, studio.clip, scene.concept_look, float(world.FPS), images=images,
        motion_caption=scene.concept_caption, frames_per_clip=len(range(0, world.FRAMES, stride)),
        fps=world.FPS / stride, size=world.SIZE, **options,
    ).args  # fmt: skip
    return encoded


@torch.inference_mode()
def training_data(studio: Studio, name: str) -> TrainingData:
    """A concept's clip and its frames, and clips that the base model makes of ordinary prompts."""
    encoded = encode(studio, name, single_frames=world.FRAMES)
    rng = np.random.default_rng(7)
    ordinary = "\n".join(world.choose(rng).caption for _ in range(PRIORS))
    (with_priors,) = PriorClips.execute(
        studio.model, studio.clip, studio.vae, encoded, ordinary, "", SAMPLER, "simple", steps=STEPS, cfg=CFG,
        seeds_per_prompt=1,
    ).args  # fmt: skip
    return with_priors


def motion_data(studio: AnimateDiffStudio, name: str) -> TrainingData:
    """A concept's clip for AnimateDiff."""
    return encode(studio, name, STRIDE, single_frames=0, token_variants=0)


def train(studio: Studio, data: TrainingData, recipe: str, options: Mapping[str, Any], folder: Path) -> list[Path]:
    """Run a job to its end in `folder`; its LoRA files, of which the last holds all it learned."""
    config = recipes()[recipe].Config(**options)
    job = runs.make_job(folder, studio.model, data, config, recipe)
    job.start({"model": studio.model})
    job.ended.wait()
    if job.status != "finished":
        raise RuntimeError(f"{recipe} ended as {job.status}: {job.error}")
    return [Path(file) for file in job.result_files]
