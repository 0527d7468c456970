"""A step of every method with the meta device standing for a GPU: nothing mixes devices or waits for the device."""

from collections import Counter
from typing import Any

import pytest
import torch
from kinoloom.trainers import recipes
from kinoloom.trainers.core import rng, transfer
from kinoloom.trainers.core.data import PhaseData
from kinoloom.trainers.core.loop import PhaseRun, Session
from kinoloom.trainers.core.rng import derived_generator
from kinoloom.trainers.core.state import State
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..runs import NO_DATA, RUNS, make_backbone, make_config

GPU = torch.device("meta")
COPIES = ("_to_copy", "copy_")
OPTIONS = {"KinoloomTrainMotionDirector": {"dropout": 0.0}, "KinoloomTrainSvdTracklets": {"box_weight": 2.0}}


class Watch(TorchDispatchMode):
    """Counts operations that make the CPU wait for the GPU, and raises if one mixes tensors of both."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = operation._schema.name.partition("::")[2]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(x.device == GPU for x in given)
        if on_gpu and name in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero"):
            raise AssertionError(f"{name} waits for the GPU")
        if name in COPIES and on_gpu and (kwargs.get("device", GPU) != GPU or args[0].device != GPU):
            self.waits[f"{name} from the GPU"] += 1
            return torch.ones(given[0].shape, dtype=kwargs.get("dtype", given[0].dtype))
        if name in COPIES and (kwargs.get("device") == GPU or on_gpu):
            blocking = not (kwargs.get("non_blocking") or args[2:] == (True,))
            self.waits[f"{name} of {tuple(given[-1].shape)} to the GPU"] += blocking and given[-1].device != GPU
        elif on_gpu and (apart := [x for x in given if x.device != GPU and x.ndim]):
            raise AssertionError(f"{name} of tensors on the GPU and on the CPU: {[tuple(x.shape) for x in apart]}")
        return operation(*args, **kwargs)


def on_gpu(model: Any, name: str) -> Any:
    backbone = make_backbone(model, torch.bfloat16, name)
    backbone.module.to(GPU)
    backbone.device = GPU
    return backbone


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA can do and the meta device cannot: pinned memory, generators of its own."""
    monkeypatch.setattr(transfer, "PINNED", (GPU.type,))
    monkeypatch.setattr(
        Tensor, "pin_memory", lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
    )
    own = derived_generator
    monkeypatch.setattr(rng, "derived_generator", lambda *key, device=None: own(*key))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_step_mixes_no_devices_and_reads_the_gpu_once(name: str, model: Any, data: Any, gpu: None) -> None:
    backbone = on_gpu(model, name)
    method = recipes()[name]
    config = make_config(name, **OPTIONS.get(name, {}))
    recipe = method(backbone, config)
    phase = recipe.phases(config, NO_DATA)[-1]
    for each in recipe.phases(config, NO_DATA):
        recipe.start(each)
    batches = PhaseData(data, phase.unit, recipe.columns, config.batch_size, config.seed, backbone.prepare)
    session = Session(lambda event: None, lambda: False, lambda *a: None, lambda *a: None)
    run = PhaseRun(recipe, phase, batches, config, State(), session, torch.amp.GradScaler("cpu", enabled=False))
    with Watch() as watch:
        run.step()
    watch.waits.pop("_to_copy of (128,) to the GPU", None)  # ComfyUI's own table of frequencies in Wan's forward
    assert +watch.waits == {"_to_copy from the GPU": 1}


def test_an_expanded_tensor_goes_to_the_gpu_too(gpu: None) -> None:
    found = transfer.to_device(torch.ones(1, 2).expand(3, 2), GPU, torch.bfloat16)
    assert (found.device, found.shape, found.dtype) == (GPU, (3, 2), torch.bfloat16)
