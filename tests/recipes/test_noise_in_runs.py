"""Noise in whole runs: schedules equal ComfyUI's, and a run does not use other generators."""

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from kinoloom.trainers import recipes
from kinoloom.trainers.core.data import TrainingData
from kinoloom.trainers.core.schedules import FlowMatch

from ..rows import random as tensor
from ..runs import finish, load_model, make_config, make_job, slow_but_of_wan

LATENTS, NOISE = tensor(2, 16, 3, 4, 4, name="latents"), tensor(2, 16, 3, 4, 4, name="noise")
T = torch.tensor([0.15, 0.8])


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_but_of_wan(name)) for name in sorted(recipes())])
def test_a_whole_run_leaves_the_process_wide_generators_alone(
    name: str, own: tuple[Any, TrainingData], tmp_path: Path
) -> None:
    (model, data), config = own, make_config(name, checkpointing="on")
    states = []
    for _ in range(2):
        states.append((torch.random.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate()))
        if len(states) == 1:
            finish(make_job(tmp_path, model, data, config, name), model)
    assert states[0] == states[1]


def test_flow_matching_is_comfyuis(tiny_models: Path) -> None:
    sampling = load_model(tiny_models / "diffusion_models" / "tiny_wan.safetensors").get_model_object("model_sampling")
    noisy = FlowMatch().add_noise(LATENTS, NOISE, T)
    sigma = T.view(2, 1, 1, 1, 1)
    torch.testing.assert_close(noisy, sampling.noise_scaling(sigma, NOISE, LATENTS))
    denoised = sampling.calculate_denoised(sigma, FlowMatch().target(LATENTS, NOISE, sigma), noisy)
    torch.testing.assert_close(denoised, LATENTS, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(FlowMatch.multiplier * T, sampling.timestep(T))
