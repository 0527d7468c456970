"""Trains LoRAs of toy concepts with the pack's own nodes and trainers, without a server. Import it as studio.py."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kinoloom.nodes.data import EncodeClips, PriorClips
from kinoloom.trainers import recipes
from kinoloom.trainers.core.data import TrainingData

from . import score, world
from .studio import CFG, STEPS, Studio

PLAIN, TWO_STAGES = "KinoloomTrainWanLora", "KinoloomTrainSetAndSequence"
PRIORS = 12
SINGLE_FRAMES = {"train": world.FRAMES, "prior": 4}


def training_data(studio: Studio, name: str) -> TrainingData:
    """A concept's clip and its frames, and clips that the base model makes of ordinary prompts."""
    scene = world.CONCEPTS[name]
    images = torch.from_numpy(world.concept_clip(name).video).float() / 255
    options = {"frames_per_clip": world.FRAMES, "fps": float(world.FPS), "size": world.SIZE}
    encoded = EncodeClips.execute(
        studio.vae, studio.clip, score.look_caption(scene), float(world.FPS), images=images,
        motion_caption=score.motion_caption(scene), single_frames=SINGLE_FRAMES["train"], **options,
    )  # fmt: skip
    rng = np.random.default_rng(7)
    ordinary = [replace(world.choose(rng), texture="plain").caption for _ in range(PRIORS)]
    with_priors = PriorClips.execute(
        studio.model, studio.clip, studio.vae, encoded.args[0], "\n".join(ordinary), "", "euler", "simple",
        steps=STEPS, cfg=CFG, seeds_per_prompt=1, single_frames=SINGLE_FRAMES["prior"],
    )  # fmt: skip
    return with_priors.args[0]


def train(studio: Studio, data: TrainingData, recipe: str, options: Mapping[str, Any], folder: Path) -> Path:
    """Run a job to its end in `folder`; the LoRA file that holds all it learned."""
    import runs

    if recipe == PLAIN:
        data = TrainingData(data.folder, tuple(row for row in data.rows if row.split == "clips"))
    config = recipes()[recipe].Config(**options)
    job = runs.make_job(folder, studio.model, data, config, recipe)
    job.start(studio.model)
    job.ended.wait()
    if job.status != "finished":
        raise RuntimeError(f"{recipe} ended as {job.status}: {job.error}")
    return Path(job.parts[-1])
