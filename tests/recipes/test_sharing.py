"""Several ComfyUIs on one folder of runs: each run and each name belongs to one of them at a time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import execution
import folder_paths
import pytest
from kinoloom.lora_io.file import SaveError
from kinoloom.nodes import folders
from kinoloom.nodes.adapters import loading as adapter_files
from kinoloom.nodes.animatediff import loras as motion_loras
from kinoloom.nodes.tracklets import control
from kinoloom.nodes.training import ending
from kinoloom.nodes.training import registry as jobs
from kinoloom.trainers import recipes
from kinoloom.trainers.run.claim import claim_of
from kinoloom.trainers.run.job import Job

import nodes

from ..runs import NO_DATA, Published, finish, make_config, make_job

WAN = "KinoloomTrainWanLora"


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue without work, no websocket, and files that go to tmp_path."""
    queue = execution.PromptQueue(SimpleNamespace(queue_updated=lambda: None))
    told = SimpleNamespace(prompt_queue=queue, send_sync=lambda *message: None)
    monkeypatch.setattr(jobs.PromptServer, "instance", told, raising=False)
    monkeypatch.setattr(jobs, "output_folder", lambda folder: tmp_path / "out")


class Held:
    """A registry whose runs wait before they end, until the test lets them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.registry = jobs.Registry(folder)
        monkeypatch.setattr(jobs, "publish", self.publish)

    def publish(self, job: Job, event: dict) -> None:
        if event["event"] == "step" and event["done"] == 2:
            self.reached.set()
            assert self.go.wait(100)


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(tmp_path / "jobs", monkeypatch)
    yield made
    made.go.set()
    for job in made.registry.jobs.values():
        job.ended.wait(100)


Start = Callable[..., Job]


@pytest.fixture
def start(model: Any, data: Any) -> Start:
    def begin(registry: jobs.Registry, name: str = "dance", **options: Any) -> Job:
        return registry.start({"model": model}, WAN, make_config(WAN, **options), data, {}, name)

    return begin


def test_a_run_that_goes_on_elsewhere_is_shown_and_left_alone(held: Held, start: Start, tmp_path: Path) -> None:
    job = start(held.registry)
    assert held.reached.wait(100)
    other = jobs.Registry(tmp_path / "jobs")
    (seen,) = other.jobs.values()
    shown = seen.summary()
    assert (shown["status"], shown["elsewhere"], shown["done"], shown["total"]) == ("running", True, 2, 6)
    assert not shown["dead_end"] and len(seen.history) == len(job.history)
    for act in (other.resume, other.restart, other.delete, Job.stop, Job.pause):
        with pytest.raises(ValueError, match="run 'dance' is in use by another ComfyUI"):
            other.change(seen, act)
    for options in ({}, {"rank": 2}):
        with pytest.raises(ValueError, match="run 'dance' is in use by another ComfyUI"):
            start(other, "Dance", **options)
    with pytest.raises(ValueError, match="in use"):
        seen.start(None)
    assert job.folder.is_dir() and not job.summary()["elsewhere"]

    held.go.set()
    assert job.ended.wait(100) and job.status == "finished"
    other.look(now=True)
    shown = seen.summary()
    assert (shown["status"], shown["elsewhere"], shown["done"]) == ("finished", False, 6)
    assert start(other) is seen and seen.history == job.history, "the finished run is everybody's"
    other.delete(seen)
    held.registry.look(now=True)
    assert held.registry.jobs == {} and [path.name for path in (tmp_path / "jobs").iterdir()] == ["names.lock"]


def test_a_run_may_be_continued_by_the_other_in_turn(held: Held, start: Start, tmp_path: Path) -> None:
    job = start(held.registry)
    assert held.reached.wait(100)
    job.stop()
    held.go.set()
    assert job.ended.wait(100) and (job.status, job.done) == ("stopped", 2)
    other = jobs.Registry(tmp_path / "jobs")
    theirs = start(other)
    assert theirs.spec.id == job.spec.id
    assert theirs.ended.wait(100) and theirs.status == "finished"
    again = start(held.registry)
    assert again is job and (job.status, job.done) == ("finished", 6), "what the other did is known before anything starts"
    assert job.history == theirs.history


def test_a_name_is_given_to_one_of_two_that_start_at_once(start: Start, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(jobs, "publish", Published())
    registries = [jobs.Registry(tmp_path / "jobs") for _ in range(4)]
    made: list[Job] = []
    refused: list[str] = []

    def begin(registry: jobs.Registry) -> None:
        try:
            made.append(start(registry))
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin, args=(registry,)) for registry in registries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for job in made:
        assert job.ended.wait(100)
    assert len({job.spec.id for job in made}) == 1 and all("in use" in text for text in refused)
    assert len(list((tmp_path / "jobs").glob("*/job.json"))) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dance"]


def test_a_folder_that_another_wrote_is_not_a_runs(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever model folder it is in."""
    monkeypatch.setattr(jobs, "publish", Published())
    monkeypatch.setattr(jobs, "output_folder", lambda folder: tmp_path / folder)
    (tmp_path / folders.MOTION_LORAS / "dance").mkdir(parents=True)
    job = start(jobs.Registry(tmp_path / "jobs"))
    assert (job.spec.run_name, job.spec.asked_as) == ("dance-2", "dance")
    assert job.spec.outputs == {folders.LORAS: str(tmp_path / folders.LORAS / "dance-2")}
    assert job.ended.wait(100)


HOLDER = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_is_taken_over_once_its_owner_is_gone(model: Any, data: Any, tmp_path: Path, start: Start) -> None:
    job = make_job(tmp_path, model, data, make_config(WAN), WAN, Published().at(2, Job.stop))
    finish(job, model, "stopped")
    job.status = "running"
    job.write()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(job.claim.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        registry = jobs.Registry(tmp_path)
        seen = registry.get("job")
        assert (seen.status, seen.elsewhere) == ("running", True)
        with pytest.raises(ValueError, match="in use by another ComfyUI"):
            registry.resume(seen)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    registry.look(now=True)
    assert (seen.status, seen.elsewhere, seen.done, seen.resumable) == ("interrupted", False, 2, True)
    registry.resume(seen)
    assert seen.ended.wait(100) and (seen.status, seen.done) == ("finished", 6)


def test_a_run_that_ends_while_it_is_asked_for_again_is_not_started_anew(
    held: Held, model: Any, data: Any, start: Start
) -> None:
    """Its state is gone by then, so it would begin from nothing."""
    job = start(held.registry, keep_state="never")
    assert held.reached.wait(100)
    config, asked = make_config(WAN, keep_state="never"), threading.Event()

    class Config(type(config)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name == "steps" and asked.is_set():  # the registry has found the run under way
                held.go.set()
                assert job.ended.wait(100)
            return super().__getattribute__(name)

    watched = Config(**vars(config))
    claimed = held.registry._claim

    def claim(*given: Any) -> Any:
        found = claimed(*given)
        asked.set()
        return found

    held.registry._claim = claim  # type: ignore[method-assign]
    assert held.registry.start({"model": model}, WAN, watched, data, {}, "dance") is job
    assert job.ended.is_set() and job.status == "finished" and not job.state_path.exists()
    assert [e["event"] for e in job.history].count("finished") == 1


def test_runs_of_one_registry_train_one_after_the_other(held: Held, start: Start) -> None:
    first, second = start(held.registry, "first"), start(held.registry, "second", seed=2)
    assert held.reached.wait(100)
    assert (first.status, second.status, second.done) == ("running", "waiting", 0)
    held.go.set()
    assert first.ended.wait(100) and second.ended.wait(100)
    assert (first.status, second.status) == ("finished", "finished")


def test_shutting_down_stops_and_saves_what_goes_on(held: Held, start: Start) -> None:
    job, waiting = start(held.registry), start(held.registry, "waits")
    assert held.reached.wait(100)
    threading.Timer(0.1, held.go.set).start()
    held.registry.shutdown()
    assert (job.status, job.done, job.resumable, waiting.status) == ("stopped", 2, True, "stopped")
    assert json.loads((job.folder / "job.json").read_text())["status"] == "stopped"
    assert not claim_of(job.folder).elsewhere


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_the_server_saves_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(signal, name)
    done: list[str] = []
    original = signal.signal(number, lambda *arguments: done.append("before"))
    try:
        ending.save_first(name, lambda: done.append("saved"))
        os.kill(os.getpid(), number)
        assert done == ["saved", "before"]
        signal.signal(number, signal.SIG_IGN)
        ending.save_first(name, lambda: done.append("ignored"))
        os.kill(os.getpid(), number)
        assert done == ["saved", "before"]
    finally:
        signal.signal(number, original)


def test_make_room_has_the_queue_unload_its_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a flag if no node waits for a run; else by that node, which is asked for it."""
    registry = jobs.Registry(tmp_path / "jobs")
    queue = jobs.PromptServer.instance.prompt_queue
    asked: list[bool] = []

    def holds() -> bool:
        asked.append(registry.room_wanted.is_set())
        return len(asked) % 2 == 1

    monkeypatch.setattr(jobs, "holds_models", holds)
    registry.make_room()
    assert asked == [True, True] and not registry.room_wanted.is_set()
    assert queue.get_flags() == {"unload_models": True}
    with registry.waiting():
        registry.make_room()
    assert asked == [True] * 4 and queue.get_flags() == {}


# -- what a disk, a clock and a hand do ----------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_refused_before_work(start: Start, tmp_path: Path) -> None:
    registry = jobs.Registry(tmp_path / "jobs")
    (tmp_path / "jobs").write_text("a file, where the folder should be")
    with pytest.raises(OSError):
        start(registry)
    assert registry.jobs == {}


def test_a_record_that_cannot_be_written_starts_nothing(
    model: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = finish(make_job(tmp_path, model, data, make_config(WAN), WAN, Published().at(2, Job.stop)), model, "stopped")
    (job.folder / "job.json").unlink()
    (job.folder / "job.json").mkdir()
    with pytest.raises(SaveError, match=r"job\.json"):
        job.start({"model": model})
    assert job.status == "stopped" and job.ended.is_set() and not claim_of(job.folder).elsewhere
    (job.folder / "job.json").rmdir()
    assert finish(job, model).done == 6


def test_a_full_disk_under_the_history_is_said_and_the_run_goes_on_later(model: Any, data: Any, tmp_path: Path) -> None:
    def fill(job: Job) -> None:
        (job.folder / "history.jsonl").unlink()
        (job.folder / "history.jsonl").symlink_to("/dev/full")

    job = finish(make_job(tmp_path, model, data, make_config(WAN), WAN, Published().at(3, fill)), model, "failed")
    assert "No space left on device" in job.error and job.resumable
    (job.folder / "history.jsonl").unlink()
    job.publish = Published()
    assert finish(job, model).done == 6


@pytest.mark.parametrize("gone", ["folder", "history.jsonl", "state.pt", "job.json"])
def test_files_that_are_removed_under_a_run(gone: str, model: Any, data: Any, tmp_path: Path) -> None:
    """Deleting the run's folder ends the run with an error that names it; a deleted file is written again."""

    def take(job: Job) -> None:
        shutil.rmtree(job.folder) if gone == "folder" else (job.folder / gone).unlink(missing_ok=True)

    job = make_job(tmp_path, model, data, make_config(WAN), WAN, Published().at(3, take))
    finish(job, model, "failed" if gone == "folder" else "finished")
    assert gone != "folder" or "history.jsonl" in job.error
    assert gone == "folder" or Path(job.files["lora"]).is_file()


def test_a_clock_that_goes_back_leaves_the_newest_run_the_newest(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "publish", Published())
    registry = jobs.Registry(tmp_path / "jobs")
    first = start(registry)
    assert first.ended.wait(100)
    monkeypatch.setattr(jobs.time, "time", lambda: 1000.0)
    second = start(registry, seed=1, rank=2)
    assert second.ended.wait(100)
    assert second.spec.created > first.spec.created and registry.newest("dance") is second


# -- where files go ------------------------------------------------------------------------------------------------------------


def options_of(node: Any, name: str) -> list[str]:
    (found,) = (given.options for given in node.define_schema().inputs if given.id == name)
    return found


LISTED = {
    folders.LORAS: lambda: nodes.LoraLoader.INPUT_TYPES()["required"]["lora_name"][0],
    folders.DIFFUSION_MODELS: lambda: nodes.UNETLoader.INPUT_TYPES()["required"]["unet_name"][0],
    folders.MOTION_LORAS: lambda: options_of(motion_loras.LoadMotionLora, "lora_name"),
    folders.TRACKLET_CONTROL: lambda: options_of(control.LoadTrackletControl, "file"),
    folders.I2V_ADAPTERS: lambda: options_of(adapter_files.LoadI2vAdapter, "file"),
    folders.EMBEDDINGS: lambda: folder_paths.get_filename_list(folders.EMBEDDINGS),
}  # what the loader of each folder offers


WORD = {"word_to_learn": "fog_new", "initializer_token": "fog"}


def test_every_file_of_every_method_goes_where_a_loader_looks() -> None:
    """Of all choices of its options; a folder that nobody registers would fail when the run saves."""
    written = set()
    for recipe in recipes().values():
        choices = [(name, choice) for name, f in recipe.Config.__dataclass_fields__.items() for choice in f.metadata["choices"]]
        words = [WORD] if WORD.keys() <= recipe.Config.__dataclass_fields__.keys() else []
        for options in ({}, *words, *({name: choice} for name, choice in choices)):
            with suppress(ValueError):  # a choice that needs another option too
                exports = recipe.exports(recipe.Config(**options), NO_DATA)
                written |= {export.folder for export in exports.values()}
    chosen = {option.metadata["file_of"] for recipe in recipes().values() for option in fields(recipe.Config)} - {""}
    assert written | chosen <= folders.FOLDERS.keys()
    assert all(folder_paths.get_folder_paths(folder) for folder in folders.FOLDERS)
    assert written == LISTED.keys() == {*folders.WRITTEN}
    for folder in written:
        path = folders.output_folder(folder) / "looked-for.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert str(Path("kinoloom", path.name)) in LISTED[folder](), folder
        path.unlink()


def test_a_finished_run_whose_file_was_deleted_says_so(start: Start, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(jobs, "publish", Published())
    registry = jobs.Registry(tmp_path / "jobs")
    monkeypatch.setattr(jobs, "_registry", registry)
    job = start(registry)
    assert job.ended.wait(100)
    assert job.spec.outputs == {"loras": str(tmp_path / "out" / job.spec.run_name)}, "as its exports say"
    kept, (path,) = dict(job.files), job.result_files
    assert jobs.trained_file(path) == path
    Path(path).unlink()
    with pytest.raises(ValueError, match=r"dance-lora-000006\.safetensors.*deleted.*another run name"):
        jobs.trained_file(path)
    assert job.files == kept and path not in job.summary()["files"].values() and "lora" not in job.summary()["lora_names"]
    assert Path(path).name not in job.report().split("<h2>Files</h2>")[-1].split("</table>")[0]
