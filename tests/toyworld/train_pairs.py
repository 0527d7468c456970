"""Trains the toy world's image model and motion modules on, to scenes of two sprites and Stable Diffusion's own schedule."""

import math
from pathlib import Path

import numpy as np
import torch
from comfy.utils import load_torch_file
from kinoloom.trainers.backbones.animatediff.motion_module import Attached
from kinoloom.trainers.core.schedules import Ddpm
from numpy.random import Generator
from torch import nn

from . import deltas, pairs, world
from .train_animatediff import Stage, build_motion, build_unet, encode_clips, text_encoder_of, train

CLIPS = 2400
# In the second stage two thirds of the clips begin with a clean first frame: the model then knows how videos begin with a
# picture, which adapters of full size learn in their 30000 steps.
STAGES = (Stage(700, 14, 0, 1e-3, True), Stage(260, 14, 0, 1e-3, True, started=0.65, warmup=20))


def main(vae_path: Path, text_path: Path, unet_path: Path, motion_path: Path, target: Path, share: float) -> None:
    """Encode stages, train both models on with them and write the differences."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    scenes, latents = encode_clips(vae_path, math.ceil(CLIPS * share), rng, pairs.sample)
    both = nn.ModuleDict({"unet": build_unet(), "motion": build_motion()})
    before = {
        f"{part}.{key}": value.float()
        for part, path in (("unet", unet_path), ("motion", motion_path))
        for key, value in load_torch_file(str(path), safe_load=True).items()
    }
    both.load_state_dict(before)
    attached = Attached(both["unet"], both["motion"]).__enter__()
    encode_text = text_encoder_of(text_path)
    for stage in STAGES:
        train(
            stage, math.ceil(stage.steps * share), both, attached, scenes, latents, encode_text, rng,
            schedule=Ddpm(root=True), describe=describe, every=lambda average: deltas.write(target, before, average),
        )  # fmt: skip
    deltas.write(target, before, both.state_dict())


def describe(scene: world.Scene | pairs.Stage, rng: Generator, *, moving: bool) -> str:
    return (pairs if isinstance(scene, pairs.Stage) else world).describe(scene, rng, moving=moving)
