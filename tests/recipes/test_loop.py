"""The loop around the step: checkpoints by time, running out of memory, pauses, and freeing memory at the end."""

import gc
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kinoloom.lora_io.file import load, save
from kinoloom.trainers import recipes
from kinoloom.trainers.conditions.columns import LATENTS
from kinoloom.trainers.core import data as data_module
from kinoloom.trainers.core.data import PhaseData, TrainingData, column_path
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.host.weights import extremes, not_finite
from kinoloom.trainers.run.checkpoint import RunKey
from kinoloom.trainers.run.job import Job
from torch import Tensor

from ..runs import (
    SHAPES,
    Published,
    assert_same,
    events,
    finish,
    load_model,
    load_tiny,
    make_backbone,
    make_config,
    make_job,
    prompt,
    state_of,
    write_data,
    write_row,
    write_samples,
)

WAN_LORA, SNS, DIRECTOR = "KinoloomTrainWanLora", "KinoloomTrainSetAndSequence", "KinoloomTrainMotionDirector"


# -- checkpoints by the clock ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minutes", "checkpoints"), [(1e-9, [1, 2, 3, 4]), (0.0, []), (10.0, [])])
def test_a_checkpoint_is_made_after_so_many_minutes_and_changes_nothing(
    minutes: float, checkpoints: list[int], model: Any, data: TrainingData, tmp_path: Path
) -> None:
    options = {"steps": 5, "save_every": 100, "validate_every": 0}
    config = make_config(WAN_LORA, save_minutes=minutes, ema_decay=0.5, **options)
    seen: list[int] = []
    published = Published()
    for done in range(1, 6):
        published.at(done, lambda job: job.checkpoint and seen.append(job.checkpoint))
    job = finish(make_job(tmp_path / "a", model, data, config, WAN_LORA, published), model)
    assert seen == checkpoints
    other = finish(make_job(tmp_path / "b", model, data, replace(config, save_minutes=7.0), WAN_LORA), model)
    assert_same(vars(state_of(job)), vars(state_of(other)))
    ours, theirs = (RunKey.of(WAN_LORA, "m", "d", job.config, {}) for job in (job, other))
    assert ours == theirs, "a run may be resumed with another value"


# -- memory ------------------------------------------------------------------------------------------------------------


def hungry(name: str, at: int, always: bool = False) -> type:
    """The method, but its sample number `at` runs out of memory without checkpointing."""

    class Hungry(recipes()[name]):
        def losses(self, batch: Any, rng: Rng) -> Iterator[tuple[str, Tensor]]:
            for number, loss in enumerate(super().losses(batch, rng)):
                yield loss
                if rng.sample == at and not rng.phase.endswith("plan") and (always or not self.backbone.placement.recomputed):
                    torch.empty(1 << 50, dtype=torch.uint8)
                assert number < 10

    return Hungry


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at"), [(WAN_LORA, 0), (WAN_LORA, 3), (SNS, 3), (DIRECTOR, 2)])
def test_a_step_that_runs_out_of_memory_is_tried_again_with_checkpointing(
    name: str, at: int, model: Any, data: TrainingData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory runs out in the middle of a step, after some of its gradients are computed."""
    caplog.set_level(logging.INFO)
    few = {"steps": 2} if name == DIRECTOR else {}
    config = make_config(name, gradient_accumulation=2, validate_every=0, **few)
    plain = finish(make_job(tmp_path / "plain", model, data, config, name), model)
    job = make_job(tmp_path / "hungry", model, data, config, name)
    job.recipe_class = hungry(name, at)
    finish(job, model)
    assert_same(vars(state_of(job)), vars(state_of(plain)))
    assert events(job, "step") == events(plain, "step")
    turned_on = [e["reason"] for e in events(job, "plan") if "ran out of memory" in e["reason"]]
    assert turned_on and turned_on[0] == f"step {at // 2 + 1} ran out of memory without it"
    assert f"Checkpointing on: {turned_on[0]}." in job.log_path.read_text()


def test_a_step_that_runs_out_of_memory_twice_ends_the_run(model: Any, data: TrainingData, tmp_path: Path) -> None:
    job = make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA)
    job.recipe_class = hungry(WAN_LORA, 3, always=True)
    finish(job, model, "failed")
    assert job.error.startswith("out of memory. Set checkpointing to on") and job.done == 3
    assert job.checkpoint == 2 and job.resumable
    assert len([e for e in events(job, "plan") if "ran out" in e["reason"]]) == 1
    job.recipe_class = recipes()[WAN_LORA]
    finish(job, model)


def test_after_a_pause_the_run_makes_room_again(model: Any, data: TrainingData, tmp_path: Path) -> None:
    rooms, paused = [], threading.Event()
    job = make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA, Published().at(2, Job.pause))
    job.make_room = lambda: rooms.append((job.status, job.done))
    publish = job.publish

    def noticing(job: Job, event: dict) -> None:
        publish(job, event)
        if job.status == "paused":
            paused.set()

    job.publish = noticing
    job.start({"model": model})
    assert paused.wait(60) and rooms == [("loading", 0)]
    job.resume()
    assert job.ended.wait(60) and job.status == "finished"
    assert rooms == [("loading", 0), ("paused", 2)]


def test_a_run_that_is_stopped_while_paused_makes_no_room(model: Any, data: TrainingData, tmp_path: Path) -> None:
    rooms, paused = [], threading.Event()
    job = make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA)
    job.make_room = lambda: rooms.append(job.status)
    job.publish = lambda job, event: job.status == "paused" and paused.set()
    job.busy = lambda job: job.done >= 1
    job.start({"model": model})
    assert paused.wait(60)
    job.stop()
    assert job.ended.wait(60) and rooms == ["loading"]


class Seen:
    """Keeps a weak reference to the backbone's module and the recipe of every run."""

    def __init__(self) -> None:
        self.kept: list[weakref.ref] = []

    def recipe(self, name: str) -> type:
        seen = self

        class Noted(recipes()[name]):
            def __init__(self, backbone: Any, config: Any) -> None:
                super().__init__(backbone, config)
                seen.kept += [weakref.ref(backbone.module), weakref.ref(self)]

        return Noted


def break_down(job: Job) -> None:
    raise RuntimeError("a fault in the middle")


ENDS: dict[str, tuple[dict[str, Any], Callable[[Job], None] | None, str]] = {
    "finished": ({}, None, "finished"),
    "stopped": ({}, Job.stop, "stopped"),
    "failed in a step": ({}, break_down, "failed"),
    "diverged": ({"learning_rate": 10.0, "precision": "fp16", "steps": 40}, None, "failed"),
    "failed with checkpointing": ({"checkpointing": "on"}, break_down, "failed"),
}


@pytest.mark.parametrize("end", list(ENDS))
def test_memory_and_thread_of_a_run_are_released_however_it_ends(
    end: str, model: Any, data: TrainingData, tmp_path: Path
) -> None:
    options, act, status = ENDS[end]
    seen = Seen()
    published = Published().at(2, act) if act else Published()
    job = make_job(tmp_path, model, data, make_config(WAN_LORA, **{"validate_every": 0, **options}), WAN_LORA, published)
    job.recipe_class = seen.recipe(WAN_LORA)
    finish(job, model, status)
    name = f"kinoloom {job.spec.run_name}"
    for thread in [thread for thread in threading.enumerate() if thread.name == name]:
        thread.join(60)
        assert not thread.is_alive()
    for handler in logging.getLogger().handlers:
        vars(handler).get("records", []).clear()  # pytest keeps the traceback with the logged error
    gc.collect()
    assert len(seen.kept) == 2 and [reference() for reference in seen.kept] == [None, None]
    waiting = SimpleNamespace(held=False, moved=lambda: None)
    job.line.join(waiting)
    assert job.line.take(waiting), "the next run may begin"


# -- NaN and infinity --------------------------------------------------------------------------------------------------


def spoil(folder: Path, stem: str, column: str, name: str, value: float) -> None:
    """One number of a stored tensor becomes `value`."""
    tensors, _ = load(path := column_path(folder, stem, column))
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors[name].view(-1)[-1] = value
    path.unlink()
    save(path, tensors)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    ("name", "stem", "column", "tensor"),
    [
        (WAN_LORA, "train-clips-1", "prompt_embeds", "prompt_embeds"),
        (WAN_LORA, "prior-clips-0", "latents", "latents"),
        ("KinoloomTrainSvdLora", "train-clips-0", "image", "first_frames"),
    ],
)
def test_bad_numbers_in_data_are_named_before_the_first_step(
    name: str, stem: str, column: str, tensor: str, value: float, tiny_models: Path, tmp_path: Path
) -> None:
    backbone = recipes()[name].backbone_class.name
    data, model = write_data(tmp_path / "d", backbone), load_tiny(tiny_models, backbone)
    spoil(tmp_path / "d", stem, column, tensor, value)
    job = finish(make_job(tmp_path, model, data, make_config(name), name), model, "failed")
    assert f"training data row '{stem}': {tensor} holds NaN or infinity" in job.error
    assert "learning_rate" not in job.error and str(column_path(tmp_path / "d", stem, column)) in job.error
    assert job.done == 0 and not job.result_files and not [f for f in job.advice if f["kind"] == "loss-diverges"]


def test_bad_numbers_in_data_that_is_too_large_to_keep_are_named_when_they_are_met(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learned before is kept."""
    monkeypatch.setattr(data_module, "CACHE_BYTES", 0)
    data = write_data(tmp_path / "d", "wan", roles=["train"])
    config = make_config(WAN_LORA, save_every=100, validate_every=0)
    first = PhaseData(data, "clips", (LATENTS,), 1, config.seed, dict)[0]["group"].item()
    spoil(tmp_path / "d", f"train-clips-{1 - first}", "latents", "latents", math.nan)
    job = finish(make_job(tmp_path, model, data, config, WAN_LORA), model, "failed")
    assert f"training data row 'train-clips-{1 - first}': latents holds NaN" in job.error
    assert job.done == 1 and Path(job.result_files[-1]).name.endswith("-000001.safetensors")


def test_bad_numbers_in_a_held_out_row_and_in_a_sample_are_named(model: Any, tmp_path: Path) -> None:
    data = write_data(tmp_path / "d", "wan", roles=["train", "validation"])
    samples = write_samples(tmp_path / "s", "wan")
    spoil(tmp_path / "s", "first", "prompt_embeds", "prompt_embeds", math.nan)
    job = finish(make_job(tmp_path / "a", model, data, make_config(WAN_LORA), WAN_LORA, samples=samples), model)
    [failed] = events(job, "samplefailed")
    assert "samples: prompt_embeds holds NaN" in failed["error"]
    spoil(tmp_path / "d", "validation-clips-0", "latents", "latents", math.nan)
    job = finish(make_job(tmp_path / "b", model, data, make_config(WAN_LORA), WAN_LORA), model, "failed")
    assert "training data row 'validation-clips-0': latents holds NaN" in job.error


TOO_LARGE = 1e6  # for fp16


@pytest.mark.parametrize(
    ("name", "weight"), [(WAN_LORA, "blocks.1.ffn.2.weight"), (SNS, "blocks.0.cross_attn.v.weight")]
)
def test_a_weight_that_is_too_large_for_the_precision_is_named(
    name: str, weight: str, tiny_models: Path, tmp_path: Path
) -> None:
    """By its name in the file; it is finite there."""
    tensors, metadata = load(tiny_models / "diffusion_models" / "tiny_wan.safetensors")
    key = next(key for key in tensors if key.endswith(weight))
    tensors[key] = tensors[key].float()
    tensors[key].view(-1)[3] = TOO_LARGE
    save(tmp_path / "large.safetensors", tensors, metadata)
    model, data = load_model(tmp_path / "large.safetensors"), write_data(tmp_path / "d", "wan")
    job = make_job(tmp_path, model, data, make_config(name, precision="fp16"), name)
    finish(job, model, "failed")
    assert job.error.startswith(f"precision='fp16': weight {weight} of the model is too large for it")
    assert not job.history or job.history[-1]["event"] == "failed" and job.done == 0, "before the first step"


@pytest.mark.parametrize("backbone", list(SHAPES))
def test_healthy_models_have_no_bad_weight(backbone: str, tiny_models: Path) -> None:
    module = make_backbone(load_tiny(tiny_models, backbone)).module
    assert not not_finite(extremes(module))


def test_numbers_that_are_too_large_are_no_fault_of_a_file(model: Any, tmp_path: Path) -> None:
    rows = [
        write_row(tmp_path / "d", "a", "clips", (16, 1, 4, 4), latents={"latents": torch.full((16, 1, 4, 4), 1e30)}),
        write_row(tmp_path / "d", "b", "clips", (16, 1, 4, 4), prompt_embeds=prompt("b")),
    ]
    data = TrainingData(str(tmp_path / "d"), tuple(rows))
    job = finish(make_job(tmp_path, model, data, make_config(WAN_LORA, save_every=2), WAN_LORA), model, "failed")
    assert "concept became" in job.error and "learning_rate" in job.error
