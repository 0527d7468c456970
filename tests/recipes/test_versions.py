"""Runs that earlier versions left behind, and records that nobody can read: the rest of the list is as ever."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinoloom.lora_io.file import load
from kinoloom.nodes.training import registry as jobs
from kinoloom.nodes.training.generation import generation
from kinoloom.nodes.training.routes import files
from kinoloom.trainers.core.events import Plan, Step, to_json
from kinoloom.trainers.core.state import State
from kinoloom.trainers.run import plain, versions
from kinoloom.trainers.run.checkpoint import RunKey, load_state, save_state
from kinoloom.trainers.run.job import Job
from kinoloom.trainers.run.record import from_json, read_record
from kinoloom.trainers.run.unreadable import Unreadable

from ..runs import finish, make_config, make_job, write_data, write_samples

WAN = "KinoloomTrainWanLora"
RECORDED = Path(__file__).parent / "recorded"  # <version>/<status>: what a run of rank 1 on Wan's data left behind
VERSIONS = sorted(path.name for path in RECORDED.iterdir())


@pytest.fixture
def recorded(tiny_models: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """The folder of a recorded run, as it lay at its version, its files and data beside it."""

    def put(version: str, status: str) -> Path:
        folder = tmp_path / "jobs" / "job"
        shutil.copytree(RECORDED / version / status, folder)
        (tmp_path / "out").mkdir()
        for path in folder.glob("*.safetensors"):
            path.rename(tmp_path / "out" / path.name)
        write_data(tmp_path / "data", "wan")
        write_samples(tmp_path / "samples", "wan")
        places = {"OUT": tmp_path / "out", "DATA": tmp_path / "data", "SAMPLES": tmp_path / "samples"}
        for path in folder.glob("*.json*"):
            text = path.read_text()
            for name, place in {**places, "MODELS": tiny_models}.items():
                text = text.replace(f"@{name}@", str(place))
            path.write_text(text)
        return folder

    return put


def listed(folder: Path) -> list[dict[str, Any]]:
    """Every run of a folder as the list shows it, in JSON that a browser reads."""
    runs = jobs.Registry(folder).newest_first()
    return json.loads(json.dumps([run.summary() for run in runs], allow_nan=False))


@pytest.mark.parametrize("status", ["stopped", "finished"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_of_an_earlier_version_is_listed_and_shown(version: str, status: str, recorded: Callable) -> None:
    folder = recorded(version, status)
    (shown,) = listed(folder.parent)
    done = {"stopped": 3, "finished": 6}[status]
    assert (shown["status"], shown["done"], shown["total"]) == (status, done, 6)
    assert shown["resumable"] == (status == "stopped") and "Checkpointing off" in shown["plan"]["text"]
    job = jobs.Registry(folder.parent).get("job")
    kept = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert len(kept) == len(job.history) and [{**now, **then} for now, then in zip(job.history, kept, strict=True)] == job.history
    assert job.spec.previews and job.config.rank == 1
    assert f"run-lora-{done:06d}.safetensors" in job.report() and len(job.losses()) == done


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_of_an_earlier_version_goes_on_to_the_same_weights(
    version: str, recorded: Callable, model: Any, data: Any, tmp_path: Path
) -> None:
    folder = recorded(version, "stopped")
    config = make_config(WAN, rank=1)
    resumed = finish(make_job(folder.parent, model, data, config, WAN), model)
    whole = finish(make_job(tmp_path / "whole", model, data, config, WAN), model)
    assert resumed.done == 6 and [e["done"] for e in resumed.history if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    ours, theirs = (load(Path(job.files["lora"]))[0] for job in (resumed, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)  # to the bit on the machine that recorded it
    assert json.loads((folder / "job.json").read_text())["version"] == versions.VERSION


@pytest.mark.parametrize("place", ["run-lora-best-000002.safetensors", "out/mine.safetensors"])
def test_a_new_best_deletes_no_file_but_the_runs_own(
    place: str, recorded: Callable, model: Any, data: Any, tmp_path: Path
) -> None:
    folder = recorded(VERSIONS[0], "stopped")
    (tmp_path / place).write_text("of another")
    change(folder, "files", "lora-best", to=str(tmp_path / place))
    state, run_key = load_state(folder / "state.pt")
    save_state(folder / "state.pt", replace(state, best=float("inf")), run_key)
    job = finish(make_job(folder.parent, model, data, make_config(WAN, rank=1), WAN), model)
    assert Path(job.files["lora-best"]).name == "run-lora-best-000006.safetensors"
    assert (tmp_path / place).read_text() == "of another"


def rename_rank(kind: str, content: dict[str, Any]) -> None:
    """The step that a version needs which calls `lora_rank` rank."""
    for config in {"record": [content.get("spec", {}), content.get("spec", {}).get("run_key", {})]}.get(kind, [content]):
        if "lora_rank" in config.get("config", {}):
            config["config"]["rank"] = config["config"].pop("lora_rank")
    if kind == "event" and "number" in content:
        content["step"] = content.pop("number")


def test_one_step_brings_a_renamed_option_up_to_date(
    recorded: Callable, model: Any, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the record, in the checkpoint and in the history; without that step the run is listed and can be deleted."""
    folder = recorded(VERSIONS[0], "stopped")
    for name, old, new in (("job.json", '"rank"', '"lora_rank"'), ("history.jsonl", '"step":', '"number":')):
        (folder / name).write_text((folder / name).read_text().replace(old, new))
    state, run_key = load_state(folder / "state.pt")
    run_key.config["lora_rank"] = run_key.config.pop("rank")
    content = torch.load(folder / "state.pt", weights_only=True)
    torch.save({**content, "run_key": json.dumps(asdict(run_key)), "version": versions.VERSION}, folder / "state.pt")

    (lost,) = listed(folder.parent)
    assert (lost["status"], lost["run_name"]) == ("unreadable", "run") and "'lora_rank'" in lost["error"]
    monkeypatch.setattr(versions, "VERSION", versions.VERSION + 1)
    monkeypatch.setattr(versions, "STEPS", [*versions.STEPS, rename_rank])
    (found,) = listed(folder.parent)
    assert (found["status"], found["done"]) == ("stopped", 3)
    job = finish(make_job(folder.parent, model, data, make_config(WAN, rank=1), WAN), model)
    assert [e["step"] for e in job.history if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]


def change(folder: Path, *path: str, to: Any) -> None:
    """Set one value of a job.json."""
    content = json.loads((folder / "job.json").read_text())
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    (folder / "job.json").write_text(json.dumps(content))


def write(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "job.json").write_text(text) and None


def replace_by_link(folder: Path) -> None:
    shutil.move(folder, folder.parents[1] / "elsewhere")
    folder.symlink_to(folder.parents[1] / "elsewhere")


def replace_record_by_link(folder: Path) -> None:
    (folder / "job.json").unlink()
    (folder / "job.json").symlink_to("/dev/zero")


def make_huge(folder: Path) -> None:
    with open(folder / "job.json", "ab") as file:
        file.truncate(plain.LARGEST_FILE + 1)


BAD = {
    "deep": (write("[" * 100_000), "not readable as JSON"),
    "deep object": (write('{"spec":' * 50_000), "not readable as JSON"),
    "not a number": (lambda f: change(f, "spec", "config", "rank", to=float("nan")), "spec.config.rank"),
    "infinite": (lambda f: change(f, "spec", "created", to=float("inf")), "spec.created"),
    "huge number": (lambda f: change(f, "total", to=10**400), "total"),
    "cut": (write('{"spec": {"id": "b'), "not readable as JSON"),
    "empty": (write(""), "not readable as JSON"),
    "list": (write("[]"), "expected a JSON object"),
    "binary": (lambda f: (f / "job.json").write_bytes(b"\xff\xfe\x00") and None, "not readable as JSON"),
    "huge": (make_huge, "at most"),
    "files": (lambda f: change(f, "files", to="x"), "files='x': expected dict"),
    "file": (lambda f: change(f, "files", to={"lora": 3}), "files.lora"),
    "losses": (lambda f: change(f, "tally", "losses", to=[1]), "tally.losses"),
    "plan": (lambda f: change(f, "tally", "plan", to={"text": "<b>"}), "tally.plan.checkpointing: missing"),
    "status": (lambda f: change(f, "status", to=None), "status"),
    "rows": (lambda f: change(f, "spec", "data", "rows", to=[[]]), r"data.rows[0]"),
    "id outside": (lambda f: change(f, "spec", "id", to="../../keep"), "spec.id='../../keep'"),
    "another's id": (lambda f: change(f, "spec", "id", to="a"), "spec.id='a'"),
    "name outside": (lambda f: change(f, "spec", "run_name", to="../x"), "spec.run_name"),
    "option": (lambda f: change(f, "spec", "config", "gone", to=1), "unknown option 'gone'"),
    "narrowed": (lambda f: change(f, "spec", "config", "optimizer", to="SGD"), "optimizer='SGD'"),
    "method": (lambda f: change(f, "spec", "recipe", to="KinoloomTrainGone"), "'KinoloomTrainGone'"),
    "later version": (lambda f: change(f, "version", to=99), "version=99"),
    "version": (lambda f: change(f, "version", to=True), "version"),
    "far future": (lambda f: change(f, "spec", "created", to=1e15), "created"),
    "link": (replace_by_link, "not a link"),
    "linked record": (replace_record_by_link, "no link"),
    "linked history": (lambda f: (f / "history.jsonl").symlink_to("/dev/zero"), "history.jsonl"),
    "folder": (lambda f: (f / "job.json").unlink() or (f / "job.json").mkdir(), "job.json"),
}  # fmt: skip


@pytest.fixture(scope="module")
def one_run(inputs: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished record."""
    folder = tmp_path_factory.mktemp("one")
    job = make_job(folder, *inputs(WAN), make_config(WAN), WAN)
    job.status, job.tally.plan = "finished", Plan(True, 1, 2, None, None, "asked for")
    job.write()
    return job.folder


def put_runs(one_run: Path, folder: Path, *names: str) -> None:
    for name in names:
        shutil.copytree(one_run, folder / name)
        change(folder / name, "spec", "id", to=name)


@pytest.mark.parametrize("damage", BAD)
def test_a_record_that_cannot_be_read_is_listed_and_deleted_and_touches_no_other(
    damage: str, one_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "announce", lambda message: None)
    act, reason = BAD[damage]
    folder = tmp_path / "jobs"
    put_runs(one_run, folder, "a", "b", "c")
    (tmp_path / "keep").mkdir()
    act(folder / "b")
    shown = {run["id"]: run for run in listed(folder)}
    assert {name: run["status"] for name, run in shown.items()} == {"a": "finished", "b": "unreadable", "c": "finished"}
    assert reason in shown["b"]["error"] and len(shown["b"]["error"]) < 500
    assert shown["b"].keys() == shown["a"].keys()
    registry = jobs.Registry(folder)
    registry.delete(registry.find("b"))
    assert registry.find("b") is None and sorted(path.parent.name for path in folder.glob("*/job.json")) == ["a", "c"]
    assert not (folder / "b").exists() and not (folder / "b").is_symlink()
    assert (tmp_path / "keep").is_dir() and (damage != "link" or (tmp_path / "elsewhere" / "job.json").is_file())
    assert {run["id"] for run in listed(folder)} == {"a", "c"}


LINES = [
    "[" * 100_000, "null", "3", '"step"', "{}", '{"event": []}', '{"event": "unknown"}', '{"event": "step"}',
    json.dumps({**to_json(Step("clips", 1, 2, 1, 2, {"lora": 1.0}, 1e-4, 0.1, 1.0)), "losses": {"lora": "x"}}),
    '{"event": "validation", "phase": "clips", "step": 1, "loss": NaN, "best": false, "held_out": true, "seconds": 1}',
    '{"event": "sample", "phase": "clips", "step": 1, "done": 1, "files": "a", "prompts": [], "seconds": 1}',
    '{"event": "saved", "export": "lora", "path": null, "step": 1}', "\x00\x01", '{"event": "step", "losses"',
]  # fmt: skip


@pytest.mark.parametrize("status", ["running", "stopped"])
def test_lines_of_a_history_that_cannot_be_read_are_left_out_and_counted(
    status: str, one_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_runs(one_run, tmp_path, "a")
    change(tmp_path / "a", "status", to=status)
    good = [to_json(Step("clips", i, 3, i, 3, {"lora": 1.0, "b": None}, None, 0.1, 1.0)) for i in (1, 2, 3)]
    lines = [json.dumps(good[0]), *LINES, json.dumps(good[1]), json.dumps({**good[2], "of a later version": 1})]
    (tmp_path / "a" / "history.jsonl").write_text("\n".join(lines))
    job = jobs.Registry(tmp_path).get("a")
    assert job.history == good and f"{len(LINES)} lines" in caplog.text
    assert job.status == {"running": "interrupted", "stopped": "stopped"}[status]
    assert "<polyline" in job.report() and json.dumps(job.summary(), allow_nan=False)


@pytest.mark.parametrize("place", ["x" * 5000, "\0", "a\0b"])
def test_a_file_whose_place_cannot_be_looked_at_is_not_there(place: str, one_run: Path, tmp_path: Path) -> None:
    """Such as one on a drive that is disconnected, for which the system has an error too."""
    put_runs(one_run, tmp_path, "a", "b")
    change(tmp_path / "a", "files", to={"lora": place})
    change(tmp_path / "a", "spec", "outputs", "loras", to=place)
    assert [run["files"] for run in listed(tmp_path)] == [{}, {}]
    job = jobs.Registry(tmp_path).get("a")
    assert job.report() and files(job)["files"] == []
    with pytest.raises(ValueError, match="no file left"):
        generation(job)


def test_every_event_comes_back_from_json_as_it_was() -> None:
    plan, step = Plan(True, 1, 2, None, 0.5, "x"), Step("a", 1, 2, 3, 4, {"b": 0.5}, 1.0, None, 2.0)
    assert [from_json(json.loads(json.dumps(to_json(event)))) for event in (plan, step)] == [plan, step]


@pytest.mark.parametrize("damage", ["text", "cut", "another zip", "no state", "run_key"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    path, whole = tmp_path / "state.pt", tmp_path / "whole.pt"
    save_state(whole, State(step=3), RunKey(WAN, "m", "d", {"rank": 1}, {}))
    content = torch.load(whole, weights_only=True)
    if damage in ("text", "cut"):
        path.write_bytes(b"text" if damage == "text" else whole.read_bytes()[:-100])
    elif damage == "another zip":
        shutil.make_archive(str(tmp_path / "state"), "zip", tmp_path)
        (tmp_path / "state.zip").rename(path)
    else:
        torch.save({**content, "run_key": "[]"} if damage == "run_key" else {"run_key": "{}"}, path)
    with pytest.raises(ValueError, match=r"checkpoint .*state\.pt: damaged|run_key: expected"):
        load_state(path)
    assert load_state(whole)[0].step == 3


def test_a_missing_default_is_filled_in(one_run: Path, tmp_path: Path) -> None:
    put_runs(one_run, tmp_path, "a")
    content = json.loads((tmp_path / "a" / "job.json").read_text())
    for name in ("environment", "advice", "ended_at", "version"):
        del content[name]
    (tmp_path / "a" / "job.json").write_text(json.dumps(content))
    kept = read_record(tmp_path / "a")
    assert (kept.environment, kept.advice, kept.ended_at) == ({}, [], None)
    assert isinstance(jobs.Registry(tmp_path).find("a"), Job) and not isinstance(kept, Unreadable)
