"""Every training method as a job: it learns, its files work in core, and it can be stopped, killed and resumed exactly."""

import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import pytest
import tiny
import torch
from kinoloom.lora_io.file import SaveError, atomic_write, load, save, write_text
from kinoloom.nodes.animatediff.loras import with_motion_lora
from kinoloom.trainers import recipes
from kinoloom.trainers.core.config import TrainConfig
from kinoloom.trainers.core.data import PhaseData, TrainingData
from kinoloom.trainers.core.loop import Session, train, validation_loss
from kinoloom.trainers.core.memory import count_trainable, make_plan
from kinoloom.trainers.core.optim import make_optimizer
from kinoloom.trainers.core.placement import Placement
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.core.state import State
from kinoloom.trainers.host.source import ModelSource, carried_files
from kinoloom.trainers.run.checkpoint import RunKey, load_state, save_state
from kinoloom.trainers.run.job import Job
from kinoloom.trainers.run.line import Line
from kinoloom.trainers.run.record import ENDED
from kinoloom.trainers.run.training import WARM_UP_STEPS
from torch import Tensor, nn

from ..runs import (
    LAYERS,
    NO_DATA,
    RUNS,
    SHAPES,
    Published,
    assert_same,
    boxes,
    events,
    finish,
    load_model,
    load_tiny,
    make_backbone,
    make_batch,
    make_config,
    make_job,
    prompt,
    slow_but_of_wan,
    state_of,
    write_data,
    write_row,
    write_samples,
)

RECIPES = sorted(recipes())
every_recipe = pytest.mark.parametrize("name", [pytest.param(name, marks=slow_but_of_wan(name)) for name in RECIPES])
every_text_recipe = pytest.mark.parametrize("name", [name for name in RECIPES if recipes()[name].backbone_class.name != "svd"])
WAN_LORA, SNS, DIRECTOR = "KinoloomTrainWanLora", "KinoloomTrainSetAndSequence", "KinoloomTrainMotionDirector"
HUGE = 1e30  # its square is infinite
UNREGULARISED = {
    "set_dropout": 0.0, "sequence_dropout": 0.0, "token_mask_prob": 0.0, "dropout": 0.0, "spatial_off_prob": 0.0,
}  # fmt: skip


def test_every_method_is_in_the_matrix() -> None:
    assert sorted(RUNS) == RECIPES, "tests/runs.py says what makes a run of each method small"


Inputs = tuple[Any, TrainingData]


@pytest.fixture(scope="module")
def whole(inputs: Callable[[str], Inputs], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    """The uninterrupted run of a method, made once."""
    made: dict[str, Job] = {}

    def run(name: str) -> Job:
        if name not in made:
            folder, (model, data) = tmp_path_factory.mktemp("whole"), inputs(name)
            made[name] = finish(make_job(folder, model, data, make_config(name), name), model)
        return made[name]

    return run


def own_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    known = recipes()[name].Config.__dataclass_fields__
    return {option: value for option, value in options.items() if option in known}


def steps_of(name: str) -> list[int]:
    """Optimizer steps done at the end of each phase."""
    ends, done = [], 0
    for phase in recipes()[name].phases(make_config(name), NO_DATA):
        done += phase.steps
        ends.append(done)
    return ends


def places_to_stop() -> list[Any]:
    """After the first step of each phase and at the end of each but the last."""
    places = []
    for name in RECIPES:
        ends = steps_of(name)
        starts = [0, *ends[:-1]]
        places += [
            pytest.param(name, done, id=f"{name}-{done}", marks=slow_but_of_wan(name))
            for done in sorted({s + 1 for s in starts} | {*ends[:-1]})
        ]
    return places


def tensors(path: str) -> dict[str, Tensor]:
    return load(Path(path))[0]


def assert_same_run(ours: Job, theirs: Job) -> None:
    """Weights, optimizer, files and history, to the bit."""
    assert_same(vars(state_of(ours)), vars(state_of(theirs)), "state")
    assert_same(events(ours, "step"), events(theirs, "step"), "steps")
    assert_same(events(ours, "validation"), events(theirs, "validation"), "validations")
    finals = [
        label
        for label in theirs.files
        if Path(theirs.files[label]).name.split("-")[-1] == f"{theirs.done:06d}.safetensors"
    ]
    for label in (*finals, *(label for label in theirs.files if label.endswith("-best"))):
        assert Path(ours.files[label]).name == Path(theirs.files[label]).name
        assert_same(tensors(ours.files[label]), tensors(theirs.files[label]), label)


# -- learning --------------------------------------------------------------------------------------------------------------


@every_recipe
def test_every_phase_lowers_the_loss_on_a_fixed_batch(name: str, model: Any, tmp_path: Path) -> None:
    method = recipes()[name]
    steps = {option: 15 for option in RUNS[name] if "steps" in option}
    config = make_config(name, **own_options(name, UNREGULARISED), **steps, gradient_accumulation=1, validate_every=0)
    backbone = make_backbone(model, method=name)
    recipe = method(backbone, config)
    data = write_data(tmp_path, method.backbone_class.name, roles=["train"], each=1)
    before, after = {}, {}

    def phase_data(phase: Any) -> PhaseData:
        return PhaseData(data, phase.unit, method.columns, 1, 0, backbone.prepare)

    def measure(phase: Any, into: dict) -> None:
        into[phase.name] = validation_loss(recipe, phase_data(phase).validation(), phase, 0)

    def saved(phase: Any, state: State, why: str) -> None:
        if why == "phase":
            measure(phase, after)

    session = Session(lambda event: None, lambda: False, saved, lambda phase, batches: measure(phase, before))
    assert train(recipe, recipe.phases(config, NO_DATA), phase_data, config, State(), session, torch.amp.GradScaler("cpu", enabled=False))
    assert list(before) == list(after) == [phase.name for phase in method.phases(config, NO_DATA)]
    for phase in before:
        assert after[phase] < 0.95 * before[phase], (phase, before, after)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "KinoloomTrainSvdLora"])  # Finetune has its blocks
def test_checkpointing_does_not_change_a_run(
    name: str, model: Any, data: TrainingData, whole: Callable[[str], Job], tmp_path: Path
) -> None:
    job = finish(make_job(tmp_path, model, data, make_config(name, checkpointing="on"), name), model)
    assert [e["checkpointing"] for e in job.history if e["event"] == "plan"][0] is True
    assert not any(e["checkpointing"] for e in whole(name).history if e["event"] == "plan")
    assert_same_run(job, whole(name))


@every_recipe
def test_validation_is_repeatable_and_does_not_change_training(
    name: str, model: Any, data: TrainingData, whole: Callable[[str], Job], tmp_path: Path
) -> None:
    without = finish(make_job(tmp_path / "a", model, data, make_config(name, validate_every=0), name), model)
    assert not events(without, "validation") and not any("best" in label for label in without.files)
    assert_same(state_of(without).recipe, state_of(whole(name)).recipe)

    rates = own_options(name, {"learning_rate": 0.0, "spatial_learning_rate": 0.0, "clean_learning_rate": 0.0})
    steps = {option: 2 for option in RUNS[name] if "steps" in option}
    config = make_config(name, validate_every=1, weight_decay=0.0, **rates, **steps)
    still = finish(make_job(tmp_path / "b", model, data, config, name), model)
    for phase in recipes()[name].phases(config, NO_DATA):
        losses = [e["loss"] for e in events(still, "validation") if e["phase"] == phase.name]
        assert len(losses) == phase.steps and len(set(losses)) == 1, "the same weights have the same loss"
        trained = [tuple(e["losses"].items()) for e in events(still, "step") if e["phase"] == phase.name]
        assert len(set(trained)) == phase.steps, "training sees new noise at each step"


@every_recipe
def test_samples_do_not_change_training(
    name: str, model: Any, data: TrainingData, whole: Callable[[str], Job], tmp_path: Path
) -> None:
    samples = write_samples(tmp_path / "samples", recipes()[name].backbone_class.name)
    job = finish(make_job(tmp_path, model, data, make_config(name), name, samples=samples), model)
    assert not events(job, "samplefailed")
    places = [(e["phase"], e["step"]) for e in events(job, "sample")]
    phases = recipes()[name].phases(job.config, NO_DATA)
    steps = [(phase, n) for phase in phases for n in range(1, phase.steps + 1) if n % 2 == 0 or n == phase.steps]
    assert places == [(phases[0].name, 0), *((phase.name, n) for phase, n in steps)]
    assert_same_run(job, whole(name))


@every_recipe
def test_another_seed_is_another_run(
    name: str, model: Any, data: TrainingData, whole: Callable[[str], Job], tmp_path: Path
) -> None:
    other = finish(make_job(tmp_path, model, data, make_config(name, seed=1), name), model)
    ours, theirs = state_of(other).recipe, state_of(whole(name)).recipe
    assert not any(torch.equal(ours[key], theirs[key]) for key in ours)


# -- files in core ---------------------------------------------------------------------------------------------------------


def patched_by_core(model: Any, path: str, caplog: pytest.LogCaptureFixture) -> Any:
    """With a LoRA file as its loader applies it: core's, or the one for motion LoRAs."""
    caplog.clear()
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    with caplog.at_level(logging.WARNING):
        if export_of(path) == "temporal":
            return with_motion_lora(model, weights, 1.0, path)
        patched, _ = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0)
    assert "not loaded" not in caplog.text
    return patched


def export_of(path: str) -> str:
    return load(Path(path))[1]["kinoloom.export"]


def count_patches(model: Any) -> int:
    return len(model.patches) + sum(len(part.patches) for part in carried_files(model).values())


def velocity(backbone: Any, batch: dict) -> Tensor:
    with torch.no_grad():
        prompts, t = {**batch, "prompt_embeds": batch["prompt_embeds"][:, 0]}, torch.tensor([0.7])
        steps = getattr(backbone.schedule, "timesteps", lambda t: t)
        return backbone.predict(batch["latents"], steps(t), prompts)


@pytest.mark.parametrize(
    ("name", "alpha", "precision"),
    [(WAN_LORA, 0.0, "fp16"), (WAN_LORA, 6.0, "fp32"), (SNS, 0.0, "fp16"), (SNS, 6.0, "fp32"), pytest.param(DIRECTOR, 6.0, "fp32", marks=pytest.mark.slow)],
)
def test_core_loads_every_key_and_has_the_effect_of_training(
    name: str,
    alpha: float,
    precision: str,
    model: Any,
    data: TrainingData,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_config(name, alpha=alpha, save_precision=precision)
    job = finish(make_job(tmp_path, model, data, config, name), model)
    assert list(recipes()[name].exports(config, NO_DATA)) == [label for label in job.files if not label.endswith("-best")]
    for path in job.files.values():
        downs = [
            key for key in tensors(path) if key.endswith(("lora_A.weight", "lora_down.weight", "lora.down.weight"))
        ]
        assert len(downs) == LAYERS.get(export_of(path), 20)
        assert count_patches(patched_by_core(model, path, caplog)) == len(downs)

    backbone = make_backbone(model)
    batch = make_batch(backbone, data)
    plain = velocity(backbone, batch)
    recipe = recipes()[name](backbone, config)
    for phase in recipe.phases(config, NO_DATA):
        recipe.start(phase)
    recipe.load_state_dict(state_of(job).recipe)
    trained = velocity(backbone, batch) - plain
    patched = model
    for path in job.result_files if "temporal" in job.files else job.result_files[-1:]:
        patched = patched_by_core(patched, path, caplog)
    in_core = velocity(make_backbone(patched), batch) - plain
    size = trained.abs().max()
    assert size > 1e-2 * plain.abs().max(), "the run must have an effect to compare"
    torch.testing.assert_close(in_core / size, trained / size, rtol=0, atol=5e-3 if precision == "fp16" else 1e-4)


def test_a_file_says_what_it_is(whole: Callable[[str], Job]) -> None:
    job = whole(WAN_LORA)
    metadata = load(Path(job.result_files[-1]))[1]
    assert metadata["kinoloom.recipe"] == WAN_LORA and metadata["kinoloom.export"] == "lora"
    assert json.loads(metadata["kinoloom.config"]) == vars(job.config)
    assert metadata["kinoloom.base_model"] == job.spec.sources["model"].key
    assert (metadata["kinoloom.step"], metadata["kinoloom.steps"]) == ("6", "6")


# -- stop, crash, resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "done"), places_to_stop())
def test_a_stopped_run_keeps_a_usable_file_and_resumes_to_the_same_bits(
    name: str,
    done: int,
    model: Any,
    data: TrainingData,
    whole: Callable[[str], Job],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    published = Published().at(done, Job.stop)
    stopped = finish(make_job(tmp_path, model, data, make_config(name), name, published), model, "stopped")
    assert (stopped.done, stopped.total) == (done, steps_of(name)[-1])
    assert stopped.resumable and published[-1]["event"] == "status"
    assert Path(stopped.result_files[-1]).name.endswith(f"-{done:06d}.safetensors")
    last = stopped.result_files[-1]
    if recipes()[name].exports(stopped.config, NO_DATA)[export_of(last)].kind != "lora":
        assert not any(value.isnan().any() for value in tensors(last).values())
    else:
        layers = LAYERS.get(export_of(last)) or LAYERS.get(name, 20)
        assert count_patches(patched_by_core(model, last, caplog)) == layers

    resumed = make_job(tmp_path, model, data, make_config(name), name)
    assert (resumed.status, resumed.done, resumed.resumable) == ("stopped", done, True)
    finish(resumed, model)
    assert not resumed.resumable
    assert_same_run(resumed, whole(name))
    dones = [e["done"] for e in resumed.history if e["event"] == "step"]
    assert dones == list(range(1, resumed.total + 1))
    saved = [e["path"] for e in resumed.history if e["event"] == "saved"]
    assert len(saved) == len(set(saved))
    lines = (resumed.folder / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == resumed.history


def test_a_run_may_be_stopped_before_every_step(
    model: Any, data: TrainingData, whole: Callable[[str], Job], tmp_path: Path
) -> None:
    name = "KinoloomTrainSetAndSequence"
    for done in range(1, steps_of(name)[-1]):
        job = make_job(tmp_path, model, data, make_config(name), name, Published().at(done, Job.stop))
        finish(job, model, "stopped")
    assert_same_run(finish(make_job(tmp_path, model, data, make_config(name), name), model), whole(name))


CHILD = """
import importlib.util, json, os, signal, sys, threading
job = json.loads(sys.argv[1])
sys.path[:] = job["path"]
sys.argv = ["child", "--base-directory", job["folder"], *job["options"]]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.cli_args
for name, root in job["packages"].items():
    spec = importlib.util.spec_from_file_location(name, os.path.join(root, "__init__.py"), submodule_search_locations=[root])
    sys.modules[name] = importlib.util.module_from_spec(spec)
from pathlib import Path
from kinoloom.trainers.core.data import TrainingData
from kinoloom.trainers.run.plain import read
from tests import runs
from kinoloom.trainers import recipes
for name, done in job["runs"].items():
    backbone = recipes()[name].backbone_class.name
    model, data = runs.load_tiny(Path(job["models"]), backbone), read(TrainingData, job["data"][backbone], "data")
    reached = threading.Event()
    def hold(job, reached=reached):
        reached.set()
        threading.Event().wait()
    runs.make_job(Path(job["folder"]) / name, model, data, runs.make_config(name), name, runs.Published().at(done, hold)).start({"model": model})
    assert reached.wait(500), name
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_runs_of_a_killed_process_resume_to_the_same_bits(
    inputs: Callable[[str], Inputs], tiny_models: Path, whole: Callable[[str], Job], tmp_path: Path
) -> None:
    """Killed one step before the end, in the last phase, with a checkpoint behind and unsaved history ahead of it.

    What a method keeps in its checkpoint is the same as after a crash, which the next test has of every method.
    """
    kills = {name: steps_of(name)[-1] - 1 for name in (SNS, "KinoloomTrainSvdTracklets")}
    told = {
        "path": sys.path,
        "folder": str(tmp_path),
        "options": [] if torch.cuda.is_available() else ["--cpu"],
        "packages": {"kinoloom": str(Path(__file__).parents[2]), "tests": str(Path(__file__).parents[1])},
        "models": str(tiny_models),
        "data": {recipes()[name].backbone_class.name: asdict(inputs(name)[1]) for name in kills},
        "runs": kills,
    }
    child = subprocess.run([sys.executable, "-c", CHILD, json.dumps(told)], capture_output=True, text=True, timeout=600)
    assert child.returncode == -signal.SIGKILL, child.stderr
    for name in kills:
        model, data = inputs(name)
        job = make_job(tmp_path / name, model, data, make_config(name), name)
        assert (job.status, job.done, job.resumable) == ("interrupted", kills[name], True)
        published = Published()
        job.publish = published
        finish(job, model)
        first = next(e["done"] for e in published if e["event"] == "step")
        assert first <= kills[name], "steps after the checkpoint are made again"
        assert_same_run(job, whole(name))
        assert [e["done"] for e in job.history if e["event"] == "step"] == list(range(1, job.total + 1))
        assert not list(tmp_path.rglob("*.part")) and not list(job.folder.glob(".*"))


@every_recipe
def test_a_crash_after_any_step_resumes_to_the_same_bits(
    name: str, model: Any, data: TrainingData, tmp_path: Path
) -> None:
    """The folder as it is at the end of a step, validations and best files ahead of the checkpoint included.

    Of every step for Wan's methods, which are quick; else of the last, a checkpoint behind it.
    """
    config = make_config(name, save_every=3, validate_every=1)
    published, last = Published(), steps_of(name)[-1]
    for done in range(1, last + 1) if recipes()[name].backbone_class.name == "wan" else [last]:
        published.at(done, lambda job, done=done: shutil.copytree(job.folder, tmp_path / str(done) / "job"))
    straight = finish(make_job(tmp_path / "straight", model, data, config, name, published), model)
    for done in published.actions:
        job = make_job(tmp_path / str(done), model, data, config, name)
        assert (job.status, job.done) == ("interrupted", done)
        assert_same_run(finish(job, model), straight)
        assert [e["done"] for e in job.history if e["event"] == "step"] == list(range(1, job.total + 1))
        for kind in ("validation", "saved"):
            own, others = events(job, kind), events(straight, kind)
            assert own == others, "nothing that was forgotten and done again is in the history twice"


def test_a_torn_last_line_of_the_history_is_dropped(
    model: Any, data: TrainingData, whole: Callable[[str], Job], tmp_path: Path
) -> None:
    job = make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA, Published().at(3, Job.stop))
    finish(job, model, "stopped")
    with open(job.folder / "history.jsonl", "a") as file:
        file.write('{"event": "step", "phase": "clips", "losses": {"concept": 1.0}')
    again = make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA)
    assert again.done == 3 and again.history == job.history
    assert_same_run(finish(again, model), whole(WAN_LORA))


def test_pausing_holds_the_run_between_steps_and_changes_nothing(
    model: Any, data: TrainingData, whole: Callable[[str], Job], tmp_path: Path
) -> None:
    paused, statuses = threading.Event(), []

    def publish(job: Job, event: dict) -> None:
        if event["event"] == "step" and event["done"] == 2:
            job.pause()
        if event["event"] == "status":
            statuses.append(job.status)
            if job.status == "paused":
                paused.set()

    job = make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA)
    job.publish = publish
    job.start({"model": model})
    assert paused.wait(60)
    assert (job.done, job.summary()["pause_requested"], job.ended.is_set()) == (2, True, False)
    job.resume()
    assert job.ended.wait(60)
    assert statuses[-4:] == ["running", "paused", "running", "finished"]
    assert_same_run(job, whole(WAN_LORA))


def test_a_busy_queue_holds_the_run_and_stop_ends_it_there(model: Any, data: TrainingData, tmp_path: Path) -> None:
    paused = threading.Event()
    job = make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA)
    job.publish = lambda job, event: job.status == "paused" and paused.set()
    job.busy = lambda job: job.done >= 1
    job.start({"model": model})
    assert paused.wait(60)
    job.stop()
    assert job.ended.wait(60)
    assert (job.status, job.done) == ("stopped", 1)


def test_a_paused_run_that_waits_lets_others_pass(model: Any, data: TrainingData, tmp_path: Path) -> None:
    first, second = (make_job(tmp_path / name, model, data, make_config(WAN_LORA), WAN_LORA) for name in "ab")
    first.line = second.line = Line()
    first.line.join(second)
    assert first.line.take(second)
    first.start({"model": model})
    first.pause()
    first.line.release()
    finish(second, model)
    assert first.status == "waiting" and first.summary()["in_line"] == "1st in line"
    first.resume()
    assert first.ended.wait(60) and first.status == "finished"


def stopped_run(folder: Path, model: Any, data: TrainingData, **options: Any) -> Job:
    job = make_job(folder, model, data, make_config(WAN_LORA, **options), WAN_LORA, Published().at(2, Job.stop))
    return finish(job, model, "stopped")


@pytest.mark.parametrize("changed", ["rank", "data", "model", "file", "method"])
def test_resuming_something_else_is_refused_by_name(
    changed: str, model: Any, data: TrainingData, tmp_path: Path
) -> None:
    job = stopped_run(tmp_path, model, data)
    before = (job.folder / "state.pt").read_bytes()
    own = job.spec.run_key
    if changed == "model":
        tiny.write_wan(tmp_path / "other.safetensors", seed=1)
        model = load_model(tmp_path / "other.safetensors")
    identities = {
        "rank": lambda: replace(own, config={**own.config, "rank": 8}),
        "data": lambda: replace(own, data=write_data(tmp_path / "d", "wan", each=3).digest),
        "model": lambda: replace(own, base_model=ModelSource.of(model).key),
        "file": lambda: replace(own, files={"identity_file": "0" * 64}),
        "method": lambda: replace(own, recipe="KinoloomTrainOther"),
    }
    named = {
        "rank": r"rank \(was 4, now 8\)",
        "data": "training data",
        "model": "base model",
        "file": "content of identity_file",
        "method": "training method",
    }
    again = make_job(tmp_path, model, data, job.config, WAN_LORA)
    again.spec = replace(again.spec, run_key=identities[changed]())
    finish(again, model, "failed")
    with pytest.raises(
        ValueError, match=f"run 'run' cannot be resumed: changed since it was started: {named[changed]}\\."
    ):
        raise ValueError(again.error)
    assert (job.folder / "state.pt").read_bytes() == before


def test_what_does_not_change_the_result_may_change_on_resume() -> None:
    def identity(**options: Any) -> RunKey:
        return RunKey.of(WAN_LORA, "m", "d", make_config(WAN_LORA, **options), {})

    for option, value in {
        "save_every": 7,
        "save_minutes": 1.5,
        "checkpointing": "on",
        "pause_when_busy": False,
        "trigger_words": "x",
    }.items():
        assert not identity(**{option: value}).changes(identity())
    assert identity(rank=8).changes(identity()) == ["rank (was 4, now 8)"]
    assert identity(shift=2.0).adjusted(identity()) == ["shift (was 1.0, now 2.0)"]
    assert not identity(shift=2.0).changes(identity()) and not identity(rank=8).adjusted(identity())
    identity().require_same(identity(), "run")


# -- things going wrong ----------------------------------------------------------------------------------------------------


def test_a_missing_column_fails_with_the_rows_name(model: Any, tmp_path: Path) -> None:
    rows = tuple(
        write_row(tmp_path / "d", name, "clips", (16, 1, 4, 4), **extra)
        for name, extra in (("good.mp4", {}), ("bad.mp4", {"prompt_embeds": None}))
    )
    job = make_job(tmp_path, model, TrainingData(str(tmp_path / "d"), rows), make_config(WAN_LORA), WAN_LORA)
    finish(job, model, "failed")
    assert "'bad.mp4' was not encoded for this trainer (column 'prompt_embeds' is missing)" in job.error


@every_text_recipe
def test_a_wrong_text_width_fails_with_both_widths(name: str, model: Any, tmp_path: Path) -> None:
    rows = tuple(
        write_row(tmp_path / "d", split, split, (16, 1, 4, 4), prompt_embeds=prompt(split, width=96))
        for split in ("frames", "clips")
    )
    published = Published()
    job = make_job(tmp_path, model, TrainingData(str(tmp_path / "d"), rows), make_config(name), name, published)
    finish(job, model, "failed")
    assert "prompt_embeds: width 96, expected 768" in job.error
    assert {"event": "failed", "error": job.error}.items() <= published[-2].items()
    assert json.loads((job.folder / "job.json").read_text())["error"] == job.error


@every_recipe
def test_data_without_the_split_of_a_phase_says_what_it_has(name: str, model: Any, tmp_path: Path) -> None:
    split = recipes()[name].phases(make_config(name), NO_DATA)[0].unit
    other = {"clips": "frames", "frames": "clips"}[split]
    data = TrainingData(str(tmp_path / "d"), (write_row(tmp_path / "d", "x", other, (16, 1, 4, 4)),))
    job = finish(make_job(tmp_path, model, data, make_config(name), name), model, "failed")
    assert f"no {split} to train on, only: {other} (train)" in job.error


def test_a_deleted_column_file_is_named(model: Any, tmp_path: Path) -> None:
    data = write_data(tmp_path / "d", "wan", roles=["train"])
    (tmp_path / "d" / "train-clips-1.latents.safetensors").unlink()
    job = finish(make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA), model, "failed")
    assert "train-clips-1.latents.safetensors" in job.error


def test_a_damaged_checkpoint_is_named(model: Any, data: TrainingData, tmp_path: Path) -> None:
    job = stopped_run(tmp_path, model, data)
    (job.folder / "state.pt").write_bytes(b"torn")
    again = finish(make_job(tmp_path, model, data, job.config, WAN_LORA), model, "failed")
    assert "state.pt" in again.error


@every_recipe
def test_a_loss_that_overflows_stops_the_run_with_the_last_good_weights(name: str, model: Any, tmp_path: Path) -> None:
    """The first sample is good, the second is not."""
    phase = recipes()[name].phases(make_config(name), NO_DATA)[0]
    shape = SHAPES[recipes()[name].backbone_class.name][phase.unit]
    bad = {"latents": torch.full(shape, HUGE)}
    painted = boxes("bad", shape[1], height=shape[2], width=shape[3]) if "Tracklets" in name else {}
    others = {"tracklets": {**painted, "painted": torch.full((2, *shape), HUGE)}} if painted else {}
    rows = (
        write_row(tmp_path / "d", "good", phase.unit, shape),
        write_row(tmp_path / "d", "bad", phase.unit, shape, latents=bad, **others),
    )
    config = make_config(name, save_every=1, validate_every=0, gradient_accumulation=1)
    data = TrainingData(str(tmp_path / "d"), rows)
    seed = next(
        s
        for s in range(20)
        if PhaseData(data, phase.unit, recipes()[name].columns, 1, s, dict)[0]["latents"].max() < HUGE
    )
    config = replace(config, seed=seed)
    job = finish(make_job(tmp_path, model, data, config, name), model, "failed")
    assert re.search(rf" became (nan|inf) in step 2 of phase '{phase.name}'.*learning_rate", job.error)
    assert job.done == 1 and job.resumable
    state = state_of(job)
    assert (state.phase, state.step) == (0, 1)
    exported = tensors(job.result_files[-1])
    assert Path(job.result_files[-1]).name.endswith("-000001.safetensors")
    assert all(t.isfinite().all() for t in exported.values())
    if "Finetune" in name:
        before = model.model.diffusion_model.state_dict()
        assert any(not torch.equal(value, before[key]) for key, value in state.recipe.items()), "one step was made"
    else:
        from_zero = [t for key, t in exported.items() if "lora_B" in key or ".up" in key or "alpha_" in key]
        assert any(t.abs().max() > 0 for t in from_zero), "one step was made"


def test_overflow_in_fp16_stops_the_run_and_keeps_the_checkpoint(
    model: Any, data: TrainingData, tmp_path: Path
) -> None:
    config = make_config(WAN_LORA, precision="fp16", learning_rate=10.0, steps=40, save_every=1, validate_every=0)
    job = finish(make_job(tmp_path, model, data, config, WAN_LORA), model, "failed")
    assert "concept became" in job.error and "precision bf16 or fp32" in job.error
    assert 0 < job.done < 40 and state_of(job).step == job.done
    assert all(t.isfinite().all() for t in tensors(job.result_files[-1]).values())


@contextmanager
def full_disk(left: int) -> Iterator[None]:
    """No file may grow beyond `left` bytes: writes fail as on a full disk (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "lora": lambda path, n: save(path, {"a": torch.full((n,), 2.0)}),
    "state": lambda path, n: save_state(
        path, State(recipe={"a": torch.full((n,), 2.0)}), RunKey("r", "m", "d", {}, {})
    ),
    "text": lambda path, n: write_text(path, "x" * n),
}


@pytest.mark.parametrize("writer", list(WRITERS))
def test_a_full_disk_keeps_the_previous_file_and_leaves_no_other(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.bin"
    WRITERS[writer](path, 10)
    before = path.read_bytes()
    with full_disk(20_000), pytest.raises(SaveError, match=r"cannot write .*file\.bin"):
        WRITERS[writer](path, 1_000_000)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["file.bin"]
    WRITERS[writer](path, 20)
    assert os.listdir(path.parent) == ["file.bin"] and path.read_bytes() != before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing_behind(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write(temporary: str) -> None:
        Path(temporary).write_text("half")
        raise error

    with pytest.raises(SaveError if error is OSError else error):
        atomic_write(path, write)
    assert os.listdir(tmp_path) == ["file"] and path.read_text() == "before"


def test_a_folder_that_cannot_be_made_is_a_save_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "x")


@pytest.mark.parametrize("left", [100_000, 0], ids=["the checkpoint does not fit", "nothing fits"])
def test_a_run_on_a_full_disk_fails_clearly_and_goes_on_from_its_checkpoint(
    left: int, model: Any, data: TrainingData, whole: Callable[[str], Job], tmp_path: Path
) -> None:
    stopped_run(tmp_path, model, data)
    job = make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA)
    before, published = (job.folder / "state.pt").read_bytes(), Published()
    job.publish = published
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    published.at(3, lambda job: resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard)))
    try:
        finish(job, model, "failed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ("cannot write" if left else "File too large") in job.error
    assert {"event": "failed", "error": job.error}.items() <= published[-2].items(), (
        "the user is told although nothing can be written"
    )
    assert (job.folder / "state.pt").read_bytes() == before
    assert_same_run(finish(make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA), model), whole(WAN_LORA))


def test_a_run_that_cannot_even_begin_on_a_full_disk_says_so_and_begins_later(
    model: Any, data: TrainingData, tmp_path: Path
) -> None:
    job = make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA)
    with full_disk(0), pytest.raises(OSError, match="cannot write"):
        job.start({"model": model})
    assert job.is_over and not finish(job, model).error


def test_who_sees_the_end_finds_it_written_down(model: Any, data: TrainingData, tmp_path: Path) -> None:
    job = make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA)
    job.start({"model": model})
    while job.status not in ENDED:
        time.sleep(0)
    assert job.is_over and (job.folder / "report.html").is_file()


# -- the step --------------------------------------------------------------------------------------------------------------


def first_moments(job: Job) -> list[Tensor]:
    """AdamW's after one step: 0.1 times the gradient that reached it."""
    return [state["exp_avg"] / 0.1 for state in state_of(job).optimizer["state"].values()]


def one_step(folder: Path, model: Any, data: TrainingData, name: str, **options: Any) -> Job:
    """One optimizer step of the method's first phase."""
    first, *others = [option for option in RUNS[name] if option.endswith("steps")]
    steps = {first: 1, **{option: 0 for option in others}}
    options = {"validate_every": 0, "max_grad_norm": 0.0, **own_options(name, UNREGULARISED), **steps, **options}
    return finish(make_job(folder, model, data, make_config(name, **options), name), model)


@every_recipe
def test_accumulating_four_batches_is_one_batch_of_four(name: str, model: Any, tmp_path: Path) -> None:
    """Four equal rows, so that the order does not matter; noise and timesteps differ per sample and are the same."""
    split = recipes()[name].phases(make_config(name), NO_DATA)[0].unit
    small = {} if name == "KinoloomTrainCaLora" else SHAPES[recipes()[name].backbone_class.name]
    shape = small.get("frames", (4, 2, 16, 16))  # no norm over two numbers, which has no slope
    row = write_row(tmp_path / "d", "row", split, shape)
    data = TrainingData(str(tmp_path / "d"), tuple(replace(row, name=str(i)) for i in range(4)))
    accumulated = one_step(tmp_path / "a", model, data, name, gradient_accumulation=4, batch_size=1)
    batched = one_step(tmp_path / "b", model, data, name, gradient_accumulation=1, batch_size=4)
    for ours, theirs in zip(first_moments(accumulated), first_moments(batched), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 + 1e-4 * float(theirs.abs().max()))
    [ours], [theirs] = (events(job, "step") for job in (accumulated, batched))
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    if name == WAN_LORA:
        [other] = events(one_step(tmp_path / "c", model, data, name, gradient_accumulation=1, batch_size=1), "step")
        assert abs(ours["grad_norm"] / other["grad_norm"] - 1) > 0.01, "four samples are not one"


@every_recipe
def test_prior_clips_add_their_weight_times_their_own_gradient(
    name: str, model: Any, data: TrainingData, tmp_path: Path
) -> None:
    none, one, some = (
        first_moments(one_step(tmp_path / str(weight), model, data, name, prior_weight=weight))
        for weight in (0.0, 1.0, 0.3)
    )
    for zero, full, part in zip(none, one, some, strict=True):
        torch.testing.assert_close(part, zero + 0.3 * (full - zero), rtol=1e-4, atol=1e-6)
    assert any((full - zero).abs().max() > 1e-3 for zero, full in zip(none, one, strict=True))


def test_the_gradient_is_clipped_to_its_norm_and_reported_before(
    model: Any, data: TrainingData, tmp_path: Path
) -> None:
    """Of all parameter groups together; Wan LoRA has two."""
    name = WAN_LORA
    free = one_step(tmp_path / "free", model, data, name)
    [event] = events(free, "step")
    norm = torch.cat([m.flatten() for m in first_moments(free)]).double().norm().item()
    assert norm == pytest.approx(event["grad_norm"], rel=1e-5)
    clipped = one_step(tmp_path / "clipped", model, data, name, max_grad_norm=norm / 10)
    assert torch.cat([m.flatten() for m in first_moments(clipped)]).norm().item() == pytest.approx(norm / 10, rel=1e-3)
    assert events(clipped, "step")[0]["grad_norm"] == event["grad_norm"]


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@pytest.mark.parametrize("schedule", TrainConfig.__dataclass_fields__["lr_schedule"].metadata["choices"])
def test_the_learning_rate_warms_up_and_follows_its_schedule(
    schedule: str, model: Any, data: TrainingData, tmp_path: Path
) -> None:
    options = {"lr_schedule": schedule, "warmup_steps": 2, "validate_every": 0, "steps": 6, "lora_plus_ratio": 4.0}
    job = finish(make_job(tmp_path, model, data, make_config(WAN_LORA, **options), WAN_LORA), model)
    rates = [e["learning_rate"] for e in events(job, "step")]
    expected = [1e-2 * (step / 2 if step < 2 else SCHEDULES[schedule]((step - 2) / 4)) for step in range(6)]
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-12)
    groups = state_of(job).optimizer["param_groups"]
    assert [g["initial_lr"] for g in groups] == [1e-2, 4e-2]
    assert groups[1]["lr"] == pytest.approx(4 * groups[0]["lr"], abs=1e-9)


@pytest.mark.parametrize("optimizer", TrainConfig.__dataclass_fields__["optimizer"].metadata["choices"])
def test_every_optimizer_learns_and_resumes_to_the_same_bits(
    optimizer: str, model: Any, data: TrainingData, tmp_path: Path
) -> None:
    rate = {"Prodigy": 1.0, "Lion": 1e-3}.get(optimizer, 1e-2)
    config = make_config(
        WAN_LORA, optimizer=optimizer, learning_rate=rate, steps=5, validate_every=0, beta2=0.98, lr_schedule="linear"
    )
    straight = finish(make_job(tmp_path / "a", model, data, config, WAN_LORA), model)
    ups = [t for key, t in tensors(straight.result_files[-1]).items() if "lora_B" in key]
    assert all(t.abs().max() > 0 for t in ups)
    finish(make_job(tmp_path / "b", model, data, config, WAN_LORA, Published().at(3, Job.stop)), model, "stopped")
    assert_same_run(finish(make_job(tmp_path / "b", model, data, config, WAN_LORA), model), straight)


@pytest.mark.parametrize("optimizer", ["AdamW", "Lion", "Prodigy", "Adafactor"])
def test_optimizers_get_the_options_of_the_config(optimizer: str) -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    config = make_config(WAN_LORA, optimizer=optimizer, beta2=0.77, weight_decay=0.3, learning_rate=0.5)
    [group] = make_optimizer([{"params": [parameter], "lr": 0.25}], config).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.3)
    if optimizer != "Adafactor":
        assert tuple(group["betas"]) == (0.9, 0.77)


def test_the_eight_bit_optimizer_without_its_package_names_it(
    model: Any, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # Python's own way to say that it cannot be imported
    job = make_job(tmp_path, model, data, make_config(WAN_LORA, optimizer="AdamW8bit"), WAN_LORA)
    finish(job, model, "failed")
    assert job.error.startswith("optimizer=AdamW8bit: needs the package bitsandbytes (pip install bitsandbytes)")


def test_the_fp16_scaler_resumes(model: Any, data: TrainingData, tmp_path: Path) -> None:
    config = make_config(WAN_LORA, precision="fp16", validate_every=0)
    straight = finish(make_job(tmp_path / "a", model, data, config, WAN_LORA), model)
    scaler = state_of(straight).scaler
    assert scaler["_growth_tracker"] > 0 or scaler["scale"] != 65536.0, "there is something to restore"
    finish(make_job(tmp_path / "b", model, data, config, WAN_LORA, Published().at(4, Job.stop)), model, "stopped")
    assert_same_run(finish(make_job(tmp_path / "b", model, data, config, WAN_LORA), model), straight)


def test_fp16_gradients_that_never_stop_overflowing_end_the_run(model: Any, data: TrainingData, tmp_path: Path) -> None:
    config = make_config(WAN_LORA, precision="fp16", validate_every=0)
    job = make_job(tmp_path, model, data, config, WAN_LORA, Published().at(3, Job.stop))
    finish(job, model, "stopped")
    state, identity = load_state(job.state_path)
    state.scaler["scale"] = 1e-6  # after thirty-odd overflows in a row
    save_state(job.state_path, state, identity)
    finish(job, model, "failed")
    assert job.error.startswith("gradient became inf in step 4") and job.done == 3


def test_the_best_file_holds_the_weights_of_the_lowest_validation(
    model: Any, data: TrainingData, tmp_path: Path
) -> None:
    """A rate that overshoots: the best is not the last."""
    config = make_config(WAN_LORA, validate_every=1, steps=3, learning_rate=0.3)
    job = finish(make_job(tmp_path / "a", model, data, config, WAN_LORA), model)
    validations = events(job, "validation")
    lowest = min(validations, key=lambda e: e["loss"])
    assert lowest["step"] < 3, "the test needs a run that gets worse"
    so_far = math.inf
    for event in validations:
        assert event["best"] == (event["loss"] < so_far)
        so_far = min(so_far, event["loss"])
    assert Path(job.files["lora-best"]).name == f"run-lora-best-{lowest['step']:06d}.safetensors"
    assert len(list((tmp_path / "a" / "out").glob("*-best-*"))) == 1
    short = finish(make_job(tmp_path / "b", model, data, replace(config, steps=lowest["step"]), WAN_LORA), model)
    assert_same(tensors(job.files["lora-best"]), tensors(short.result_files[-1]))
    assert not torch.equal(*(next(iter(tensors(job.files[label]).values())) for label in ("lora", "lora-best")))


def test_held_out_rows_are_validated_on_and_never_trained_on(model: Any, data: TrainingData, tmp_path: Path) -> None:
    """A held-out clip that overflows makes the validation loss infinite and leaves training alone."""
    bad = write_row(
        tmp_path / "d",
        "bad",
        "clips",
        (16, 3, 4, 4),
        "validation",
        latents={"latents": torch.full((16, 3, 4, 4), HUGE)},
    )
    own = [write_row(tmp_path / "d", row.name, row.unit, row.shape, row.role) for row in data.rows]
    with_bad = TrainingData(str(tmp_path / "d"), (*own, bad))
    job = finish(make_job(tmp_path / "a", model, with_bad, make_config(WAN_LORA), WAN_LORA), model)
    assert [(e["held_out"], e["loss"]) for e in events(job, "validation")] == [(True, None)] * 2
    assert "lora-best" not in job.files
    assert all(t.isfinite().all() for t in tensors(job.result_files[-1]).values())


# -- the plan --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Models and shapes whose blocks need most of the memory, as in real models."""
    path = tmp_path_factory.mktemp("deep") / "deep.safetensors"
    tiny.write_wan(path, blocks=6)
    return {
        "wan": (load_model(path), (16, 3, 16, 16)),
        "animatediff": (load_tiny(tiny_models, "animatediff"), (4, 4, 16, 16)),
        "svd": (load_tiny(tiny_models, "svd"), (4, 4, 16, 16)),
    }


def measured_bytes(loss: Callable[[], Any], module: nn.Module) -> int:
    """All that autograd keeps for backward, each storage once, the weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(kept.values())


def largest_block(losses: Callable[[], Iterator], backbone: Any) -> int:
    """What the block that keeps most, and is recomputed in backward, keeps."""
    calls: dict[nn.Module, tuple[tuple, dict]] = {}

    def leaf(value: Any) -> Any:
        """Without the graph behind it, which would stay in memory."""
        return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    def note(block: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[block] = tuple(map(leaf, args)), {key: leaf(value) for key, value in kwargs.items()}

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in backbone.blocks]
    backbone.placement = Placement()
    list(losses())
    for handle in handles:
        handle.remove()
    runs = [partial(block, *args, **kwargs) for block, (args, kwargs) in calls.items()]
    return max(measured_bytes(run, backbone.module) for run in runs)


@every_recipe
def test_the_plan_knows_the_memory_within_a_factor_of_two_and_decides_by_it(
    name: str, deep: dict[str, tuple[Any, tuple[int, ...]]], tmp_path: Path
) -> None:
    model, shape = deep[recipes()[name].backbone_class.name]
    backbone = make_backbone(model, method=name)
    config = make_config(name)
    recipe = recipes()[name](backbone, config)
    phase = recipe.phases(config, NO_DATA)[0]
    recipe.start(phase)
    data = TrainingData(str(tmp_path), (write_row(tmp_path, "big", phase.unit, shape),))
    batch = PhaseData(data, phase.unit, recipe.columns, 1, 0, backbone.prepare).largest()

    def losses() -> Iterator[tuple[str, Tensor]]:
        return recipe.losses(batch, Rng(0, phase.name, 0))

    trainable = count_trainable(backbone.module)
    assert trainable == sum(p.numel() for g in recipe.param_groups(phase) for p in g["params"])
    made = {choice: make_plan(backbone, choice, losses, 12 * trainable, 1 << 40) for choice in ("off", "on")}
    plans = {choice: plan for choice, (_, plan) in made.items()}
    measured = {}
    for choice in plans:
        backbone.placement = made[choice][0]
        measured[choice] = measured_bytes(lambda: list(losses()), backbone.module) + 12 * trainable
    measured["on"] += largest_block(losses, backbone)
    for choice, plan in plans.items():
        assert plan.checkpointing == (choice == "on")
        assert measured[choice] / 2 < plan.memory_needed < measured[choice] * 2, (choice, plan, measured)
    needed = plans["off"].memory_needed
    assert plans["on"].memory_needed < needed
    roomy, tight = (make_plan(backbone, "auto", losses, 12 * trainable, n)[1] for n in (needed * 2, needed))
    assert (roomy.checkpointing, roomy.memory_needed) == (False, needed)
    assert (tight.checkpointing, tight.memory_needed) == (True, plans["on"].memory_needed)
    _, hopeless = make_plan(backbone, "off", losses, 12 * trainable, 1000)
    assert "may run out of memory" in hopeless.reason and not hopeless.checkpointing


@every_recipe
def test_each_phase_is_planned_and_timed(name: str, whole: Callable[[str], Job]) -> None:
    job = whole(name)
    plans = events(job, "plan")
    steps = [phase.steps for phase in recipes()[name].phases(job.config, NO_DATA)]
    timed_phases = [count for count in steps if count >= WARM_UP_STEPS]
    expected = [untimed for count in steps for untimed in ([True, False] if count >= WARM_UP_STEPS else [True])]
    assert [p["seconds_per_step"] is None for p in plans] == expected
    for timed, count in zip([p for p in plans if p["seconds_per_step"] is not None], timed_phases, strict=True):
        assert timed["seconds_total"] == pytest.approx(timed["seconds_per_step"] * count)
        assert 0 < timed["memory_needed"] < timed["memory_available"]
    seconds = [e["seconds"] for e in job.history if e["event"] == "step"]
    assert all(s > 0 for s in seconds)
    kinds = [e["event"] for e in job.history]
    assert kinds[0] == "plan" and kinds[-1] == "finished" and kinds.count("step") == sum(steps) == job.total
