"""Trains LoRAs of toy concepts with the pack's own nodes and trainers, without a server. Import it as studio.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import runs
import torch
from kinoloom.nodes.data import EncodeClips, PriorClips
from kinoloom.trainers import recipes
from kinoloom.trainers.core.data import TrainingData

from . import world
from .install import CFG, SAMPLER, STEPS
from .studio import Studio

PRIORS = 12


@torch.inference_mode()
def training_data(studio: Studio, name: str) -> TrainingData:
    """A concept's clip and its frames, and clips that the base model makes of ordinary prompts."""
    scene = world.CONCEPTS[name]
    images = torch.from_numpy(world.concept_clip(name).video).float() / 255
    (encoded,) = EncodeClips.execute(
        studio.vae, studio.clip, scene.concept_look, float(world.FPS), images=images,
        motion_caption=scene.concept_caption, frames_per_clip=world.FRAMES, fps=float(world.FPS), size=world.SIZE,
        single_frames=world.FRAMES,
    ).args  # fmt: skip
    rng = np.random.default_rng(7)
    ordinary = "\n".join(world.choose(rng).caption for _ in range(PRIORS))
    (with_priors,) = PriorClips.execute(
        studio.model, studio.clip, studio.vae, encoded, ordinary, "", SAMPLER, "simple", steps=STEPS, cfg=CFG,
        seeds_per_prompt=1,
    ).args  # fmt: skip
    return with_priors


def train(studio: Studio, data: TrainingData, recipe: str, options: Mapping[str, Any], folder: Path) -> list[Path]:
    """Run a job to its end in `folder`; its LoRA files, of which the last holds all it learned."""
    config = recipes()[recipe].Config(**options)
    job = runs.make_job(folder, studio.model, data, config, recipe)
    job.start(studio.model)
    job.ended.wait()
    if job.status != "finished":
        raise RuntimeError(f"{recipe} ended as {job.status}: {job.error}")
    return [Path(file) for file in job.parts]
