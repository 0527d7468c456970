"""Resuming a run: longer, with other rates, or as another run; the state it keeps, and the run that a name means."""

import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kinoloom.lora_io.file import load
from kinoloom.nodes.training import registry as jobs
from kinoloom.trainers import recipes
from kinoloom.trainers.core.config import FIXED, NOT_TRAJECTORY
from kinoloom.trainers.run.job import Job
from kinoloom.trainers.run.line import ordinal

from ..runs import Published, assert_same, events, make_config, slow_but_of_wan, state_of

WAN, SNS, TRACKLETS = "KinoloomTrainWanLora", "KinoloomTrainSetAndSequence", "KinoloomTrainSvdTracklets"
Start = Callable[..., Job]


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Published:
    published = Published()
    monkeypatch.setattr(jobs, "publish", published)
    monkeypatch.setattr(jobs, "announce", lambda message: None)
    return published


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published) -> jobs.Registry:
    """The job registry on folders of its own, without a server that has a queue."""
    monkeypatch.setattr(jobs, "output_folder", lambda folder: tmp_path / "out")
    monkeypatch.setattr(jobs.Registry, "busy", lambda self, job: False)
    monkeypatch.setattr(jobs.Registry, "make_room", lambda self: None)
    return jobs.Registry(tmp_path / "jobs")


@pytest.fixture
def start(registry: jobs.Registry, inputs: Callable) -> Start:
    """Start a run as a Train node does, and wait for its end: `start("dance", WAN, steps=3)`."""

    def run(run_name: str, recipe: str = WAN, files: dict[str, str] | None = None, **options: Any) -> Job:
        model, data = inputs(recipe)
        config = make_config(recipe, **options)
        job = registry.start({"model": model}, recipe, config, data, files or {}, run_name)
        assert job.ended.wait(600)
        return job

    return run


def moved(value: Any) -> Any:
    """Another number within every option's range."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 0.9 * value if value else 0.5


def tensors(job: Job) -> dict:
    return load(Path(job.result_files[-1]))[0]


# -- longer ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "short", "long"),
    [
        (WAN, {"steps": 4}, {"steps": 7}),
        (WAN, {"steps": 3, "optimizer": "Prodigy", "learning_rate": 1.0, "ema_decay": 0.5}, {"steps": 5}),
        (WAN, {"steps": 3, "optimizer": "Adafactor", "warmup_steps": 4}, {"steps": 6}),
        (SNS, {"set_steps": 2, "sequence_steps": 2}, {"sequence_steps": 4}),
        (SNS, {"set_steps": 3, "sequence_steps": 0, "ema_decay": 0.5}, {"set_steps": 4, "sequence_steps": 2}),
        pytest.param("KinoloomTrainMotionDirector", {"steps": 2}, {"steps": 3}, marks=pytest.mark.slow),
        pytest.param(
            TRACKLETS, {"self_tracking_steps": 1, "clean_steps": 1}, {"clean_steps": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_finished_run_made_longer_equals_the_long_run_to_the_bit(
    recipe: str, short: dict, long: dict, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = {**short, "validate_every": 0}
    first = start("dance", recipe, **options)
    done = first.done
    again = start("dance", recipe, **{**options, **long})
    straight = start("at once", recipe, **{**options, **long})
    assert again is first and again.status == "finished" and again.total == again.done == straight.done > done
    assert_same(vars(state_of(again)), vars(state_of(straight)))
    assert_same(tensors(again), tensors(straight))
    ours, theirs = ([(e["done"], e["losses"]) for e in events(job, "step")] for job in (again, straight))
    assert ours == theirs
    assert again.result_files[-1] in {e["path"] for e in again.history if e["event"] == "saved"}
    plans = [e["note"] for e in again.history if e["event"] == "plan"]
    assert plans and all(f"Goes on from step {done} with changed options" in note for note in plans)
    assert f"Goes on from step {done}" in again.log_path.read_text()
    assert start("dance", recipe, **{**options, **long}) is first and first.note == "", "as it is"


def test_a_stopped_run_goes_on_at_another_rate_on_a_new_schedule(start: Start, published: Published) -> None:
    published.at(2, Job.stop)
    options = {"steps": 4, "lr_schedule": "linear", "validate_every": 0}
    job = start("dance", **options, learning_rate=1e-2)
    assert (job.status, job.done) == ("stopped", 2)
    published.actions.clear()
    assert start("dance", **{**options, "steps": 8}, learning_rate=4e-3) is job
    rates = [e["learning_rate"] for e in events(job, "step")]
    assert rates == pytest.approx([1e-2, 7.5e-3, *(4e-3 * (8 - step) / 8 for step in range(2, 8))])
    note = [e["note"] for e in job.history if e["event"] == "plan"][0]
    assert "steps (was 4, now 8)" in note and "learning_rate (was 0.01, now 0.004)" in note
    assert "linear learning rate schedule is computed again" in note and note in job.summary()["plan"]["text"]


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=slow_but_of_wan(name)) for name in sorted(recipes())])
def test_every_option_that_may_change_does_while_the_run_goes_on(
    recipe: str, start: Start, published: Published
) -> None:
    known = recipes()[recipe].Config.__dataclass_fields__
    first = {"validate_every": 0, **({"preset": "custom"} if "preset" in known else {})}
    published.at(1, Job.stop)
    job = start("dance", recipe, **first)
    published.actions.clear()
    before = vars(job.config)
    changed = {"lr_schedule": "cosine", "precision": "bf16", "timestep_sampling": "uniform", "spatial_loras": 1}
    changed |= {"noise_levels": "uniform", "self_conditioning_prob": 0.0, "box_weight": 2.0, "max_grad_norm": 0.3, "warmup_steps": 1}
    for name, option in known.items():
        if name in (*FIXED, *NOT_TRAJECTORY, "preset") or option.metadata["choices"] or isinstance(option.default, str):
            continue
        value = before[name]
        changed.setdefault(name, moved(value))
    changed = {name: value for name, value in changed.items() if name in known}
    assert start("dance", recipe, **first, **changed) is job and job.status == "finished", job.error
    assert job.done == job.steps_of(job.config)


@pytest.mark.parametrize(
    ("recipe", "before", "after", "message"),
    [
        (WAN, {"steps": 4}, {"steps": 3}, r"steps=3: run 'dance' has made 4 of these steps already"),
        (SNS, {"set_steps": 2, "sequence_steps": 2}, {"sequence_steps": 1}, r"sequence_steps=1: .* has made 2"),
        (SNS, {"set_steps": 2, "sequence_steps": 2}, {"sequence_steps": 0}, r"sequence_steps=0: .* has made 2"),
        (
            SNS,
            {"set_steps": 2, "sequence_steps": 2},
            {"set_steps": 3, "sequence_steps": 9},
            r"set_steps=3: run 'dance' is past phase 'set', which had 2 steps",
        ),
        (TRACKLETS, {"self_tracking_steps": 0, "clean_steps": 1}, {"self_tracking_steps": 5}, "past phase 'self-"),
    ],
)
def test_shorter_than_done_or_longer_in_a_phase_that_is_over_is_refused(
    recipe: str, before: dict, after: dict, message: str, start: Start, registry: jobs.Registry
) -> None:
    job = start("dance", recipe, **before)
    written = (job.folder / "job.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        start("dance", recipe, **{**before, **after})
    assert list(registry.jobs.values()) == [job] and (job.folder / "job.json").read_bytes() == written


def test_a_stopped_run_cannot_become_shorter_than_its_checkpoint(start: Start, published: Published) -> None:
    published.at(3, Job.stop)
    job = start("dance", steps=6)
    published.actions.clear()
    with pytest.raises(ValueError, match="steps=2: run 'dance' has made 3 of these steps already, expected at least 3"):
        start("dance", steps=2)
    assert start("dance", steps=3) is job and (job.status, job.done, job.total) == ("finished", 3, 3)


def test_another_rate_alone_or_another_rank_is_another_run_once_a_run_is_finished(start: Start) -> None:
    first = start("dance", steps=2)
    for options in ({"learning_rate": 1e-3}, {"rank": 2}, {"rank": 2, "steps": 4}):
        other = start("dance", **{"steps": 2, **options})
        assert other is not first and other.spec.run_name.startswith("dance-") and other.status == "finished"


def test_a_run_that_goes_on_is_not_changed_under_way(start: Start, registry: jobs.Registry, inputs: Callable) -> None:
    model, data = inputs(WAN)
    job = registry.start({"model": model}, WAN, make_config(WAN, steps=500), data, {}, "dance")
    try:
        with pytest.raises(ValueError, match=r"run 'dance' is \w+: stop it before .* steps \(was 500, now 600\)"):
            registry.start({"model": model}, WAN, make_config(WAN, steps=600), data, {}, "dance")
    finally:
        job.stop()
        assert job.ended.wait(60)
    assert job.config.steps == 500


# -- which run a name means --------------------------------------------------------------------------------------------------


def test_a_run_that_got_a_number_and_a_run_of_that_name_are_two(start: Start, registry: jobs.Registry) -> None:
    first, own = start("dance", steps=1), start("dance-2", steps=1, seed=3)
    third = start("dance", steps=1, rank=2)
    assert [job.spec.run_name for job in (first, own, third)] == ["dance", "dance-2", "dance-3"]
    assert registry.newest("Dance") is third and registry.newest("dance-2") is own and third.spec.asked_as == "dance"
    assert start("dance", steps=1, rank=2) is third and start("dance-3", steps=1, rank=2) is third
    assert start("dance-3", steps=1, seed=9).spec.run_name == "dance-3-2", "not the run that dance became"
    assert start("dance", steps=1) is first and start("dance-2", steps=1, seed=3) is own
    registry.delete(own)
    assert (registry.times_voided("dance"), registry.times_voided("dance-2")) == (0, 1)
    registry.delete(third)
    assert (registry.times_voided("dance"), registry.times_voided("dance-2")) == (1, 1)


def test_a_numbered_run_of_an_earlier_version_is_found_by_what_it_is_made_of(
    start: Start, registry: jobs.Registry, published: Published
) -> None:
    start("dance", steps=1)
    published.at(2, Job.stop)
    second = start("dance", steps=4, rank=2)
    published.actions.clear()
    second.spec = replace(second.spec, asked_as="")  # as its record said
    second.write()
    again = jobs.Registry(registry.folder)
    kept = again.jobs[second.spec.id]
    assert kept.spec.asked_as == "" and again.newest("dance") is not kept
    registry.jobs = again.jobs
    assert start("dance", steps=4, rank=2) is kept and (kept.status, kept.done) == ("finished", 4)
    assert kept.spec.asked_as == "dance" and again.newest("dance") is kept


def test_a_node_says_the_name_that_its_run_got(start: Start) -> None:
    start("dance", steps=1)
    job = start("dance", steps=1, rank=2)
    assert job.headline.startswith("dance-2: ") and job.summary()["asked_as"] == "dance"


# -- the line ----------------------------------------------------------------------------------------------------------------


def test_runs_wait_in_line_first_come_first_served_and_can_be_reordered(
    registry: jobs.Registry, inputs: Callable, published: Published
) -> None:
    model, data = inputs(WAN)
    gate, begun = threading.Event(), []
    published.at(1, lambda job: (begun.append(job.spec.run_name), gate.wait(600)))
    config = make_config(WAN, steps=1, validate_every=0)

    def queue(name: str) -> Job:
        return registry.start({"model": model}, WAN, config, data, {}, name)

    first = queue("a")
    while not begun:
        assert not first.ended.wait(0.05)
    others = {name: queue(name) for name in "bcde"}
    assert [job.summary()["in_line"] for job in others.values()] == [f"{n} in line" for n in ("1st", "2nd", "3rd", "4th")]
    assert others["c"].headline == "c: waiting, 2nd in line" and first.in_line == ""
    before = len(published)
    registry.move(others["d"], -1)
    registry.move(others["d"], -1)
    registry.move(others["d"], -1)  # it is the first already
    assert others["d"].in_line == "1st in line" and len(published) > before, "those who look are told"
    registry.move(others["e"], 1)
    others["b"].stop()
    assert others["b"].ended.wait(600) and others["b"].status == "stopped"
    assert [others[name].in_line for name in "dce"] == ["1st in line", "2nd in line", "3rd in line"]
    with pytest.raises(ValueError, match="run 'a' is running: the run is not waiting in line"):
        registry.move(first, 1)
    gate.set()
    assert all(others[name].ended.wait(600) for name in "dce")
    assert begun == ["a", "d", "c", "e"]


@pytest.mark.parametrize(
    ("number", "text"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (11, "11th"), (12, "12th"), (22, "22nd"), (113, "113th")]
)
def test_ordinals(number: int, text: str) -> None:
    assert ordinal(number) == text


# -- nothing to go on from ---------------------------------------------------------------------------------------------------


def test_a_run_that_ended_before_its_first_checkpoint_says_so_and_starts_again(
    start: Start, registry: jobs.Registry, published: Published
) -> None:
    def copy(job: Job) -> None:
        shutil.copytree(job.folder, registry.folder.parent / "killed" / job.spec.id)

    published.at(1, copy)
    start("dance", steps=3, save_every=50)
    published.actions.clear()
    killed = jobs.Registry(registry.folder.parent / "killed")
    (job,) = killed.jobs.values()
    assert (job.status, job.done, job.resumable) == ("interrupted", 1, False)
    assert "before its first checkpoint" in job.summary()["dead_end"]
    with pytest.raises(ValueError, match="run 'dance' is interrupted. It ended before its first checkpoint"):
        killed.resume(job)
    killed.restart(job)
    assert job.ended.wait(60) and (job.status, job.done, job.dead_end) == ("finished", 3, "")
    assert [e["done"] for e in job.history if e["event"] == "step"] == [1, 2, 3]
    with pytest.raises(ValueError, match="run 'dance' is finished"):
        killed.restart(job)


# -- the state of a finished run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "size", "kept"),
    [("auto", 0, True), ("auto", 10**9, True), ("auto", 10**9 + 1, False), ("always", 10**10, True), ("never", 0, False)],
)
def test_a_finished_run_keeps_its_state_as_keep_state_says(keep: str, size: int, kept: bool, start: Start) -> None:
    job = start("dance", steps=1, keep_state="always")
    assert job.state_bytes == job.summary()["state_bytes"] > 0
    job.config = replace(job.config, keep_state=keep)
    if size:
        os.truncate(job.state_path, size)  # a sparse file
    job.drop_state()
    assert job.state_path.is_file() == kept and bool(job.state_bytes) == kept
    job.status = "stopped"
    job.state_path.write_bytes(b"")
    job.drop_state()
    assert job.state_path.is_file(), "a run that is not finished goes on from it"


def test_a_run_whose_state_is_gone_is_not_made_longer(start: Start, registry: jobs.Registry) -> None:
    short = start("short", steps=1, keep_state="never")
    assert short.state_bytes == 0 and short.status == "finished" and Path(short.result_files[-1]).is_file()
    freed = start("freed", steps=1)
    registry.free(freed)
    assert freed.summary()["state_bytes"] == 0
    for name in ("short", "freed"):
        with pytest.raises(ValueError, match=f"run '{name}' cannot be made longer than its 1 steps: its state was not"):
            start(name, steps=2)
    assert start("short", steps=1, keep_state="never") is short, "as it is"


def test_freeing_waits_for_the_end_and_leaves_nothing_to_resume(
    start: Start, registry: jobs.Registry, published: Published
) -> None:
    refused = []

    def free_and_stop(job: Job) -> None:
        with pytest.raises(ValueError, match="run 'dance' is running: stop it before its state is freed"):
            registry.free(job)
        refused.append(job)
        job.stop()

    published.at(2, free_and_stop)
    job = start("dance", steps=4)
    assert refused and job.resumable
    registry.free(job)
    assert not job.resumable and "Its state is gone" in job.dead_end
    with pytest.raises(ValueError, match="saved nothing"):
        registry.restart(job)
