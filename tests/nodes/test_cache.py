"""The cache of encodings: size, limit, the order of deletion, files that are kept, and leftovers of killed saves."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.utils
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from kinoloom.lora_io.file import sweep
from kinoloom.nodes.data.encoding import cache
from kinoloom.nodes.data.encoding.cache import data_folder
from kinoloom.nodes.data.encoding.columns import Columns, open_columns
from kinoloom.nodes.folders import output_folder
from kinoloom.nodes.training import registry as jobs
from kinoloom.nodes.training import routes
from kinoloom.trainers.conditions.columns import LATENTS, MASK
from kinoloom.trainers.core.data import Row, TrainingData, column_path
from kinoloom.trainers.run.previews import Previews

from ..coroutines import result_of
from ..encoders import own_folders
from ..runs import make_config, make_job

WAN = "KinoloomTrainWanLora"
PACK = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Folders of the test's own, and a server that has used nothing yet."""
    monkeypatch.setattr(cache, "_used", set())
    with own_folders(tmp_path):
        yield


def restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the cache knows, this is another life of the server."""
    monkeypatch.setattr(cache, "_used", set())


def columns() -> Columns:
    return Columns(data_folder(), comfy.utils.ProgressBar(1))


def make(name: str) -> str:
    """A column of about a megabyte."""
    return columns().cached(LATENTS, (name,), name, lambda: {"latents": torch.zeros(16, 1, 128, 128)})


def kept() -> set[str]:
    return {path.name.split(".")[0] for path in data_folder().glob("*.safetensors")}


def age(stem: str, days: float) -> None:
    then = time.time() - days * 86400
    os.utime(column_path(data_folder(), stem, "latents"), (then, then))


def test_what_was_used_longest_ago_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    stems = [make(name) for name in "abcd"]
    for stem, days in zip(stems, (4, 3, 2, 1), strict=True):
        age(stem, days)
    restart(monkeypatch)
    assert make("a") == stems[0]  # used again, by a server that is gone too
    restart(monkeypatch)
    size = column_path(data_folder(), stems[0], "latents").stat().st_size
    assert cache.prune(data_folder(), 4 * size) == 0 and len(kept()) == 4
    assert cache.prune(data_folder(), 3 * size) == size and kept() == {stems[0], *stems[2:]}
    assert cache.prune(data_folder(), 1.5 * size) == 2 * size and kept() == {stems[0]}


def test_what_this_server_s_values_name_never_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    made, found = make("made"), make("found")
    restart(monkeypatch)
    made, old = make("made"), make("old")
    restart(monkeypatch)
    assert make("found") == found and make("new") not in (made, old)
    for stem in kept():
        age(stem, 400)  # whatever the clock or the file system says
    cache.prune(data_folder(), 0)
    assert kept() == {found, make("new")}


@pytest.mark.parametrize(
    ("status", "needed"),
    [
        *((status, True) for status in ("waiting", "loading", "running", "paused", "stopped", "failed", "interrupted")),
        ("finished", False),
    ],
)
def test_runs_that_are_not_finished_keep_their_clips_and_samples(
    status: str, needed: bool, inputs: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stems = {name: make(name) for name in ("clip", "prompt", "negative", "other")}
    rows = (Row("clip", "clips", "train", (16, 1, 8, 8), {"latents": stems["clip"]}),)
    data = TrainingData(str(data_folder()), rows)
    job = make_job(tmp_path / "user" / "__kinoloom" / "jobs", *inputs(WAN), make_config(WAN), WAN)
    shown, away = (Row("p", "clips", "preview", (), {"prompt_embeds": stems[name]}) for name in ("prompt", "negative"))
    numbers = dict.fromkeys(("width", "height", "frames", "fps", "steps", "cfg", "first_cfg", "shift", "seed"), 1)
    previews = Previews(str(data_folder()), (shown,), away, **numbers, sample_every=1)
    job.spec = replace(job.spec, data=data, previews=previews)
    job.status = status
    job.write()
    restart(monkeypatch)
    before = cache.state(data_folder())
    cache.prune(data_folder(), 0)
    assert kept() == ({stems["clip"], stems["prompt"], stems["negative"]} if needed else set())
    after = cache.state(data_folder())
    assert before["bytes"] - after["bytes"] == before["free_bytes"] and after["free_bytes"] == 0


@pytest.mark.parametrize("text", ['{"spec": "%s"', "[" * 100_000 + "%s", '["%s"]', '{"status": 7, "x": "%s"}', "\udcff%s"])
def test_a_record_that_cannot_be_read_keeps_what_it_names(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stem, other = make("clip"), make("other")
    folder = data_folder().parent / "jobs" / "damaged"
    folder.mkdir(parents=True)
    (folder / "job.json").write_bytes((text % stem).encode(errors="surrogateescape"))
    restart(monkeypatch)
    cache.prune(data_folder(), 0)
    assert kept() == {stem} != {other}


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_no_run_wrote_in_the_place_of_a_record_stops_nothing(put: Callable[[Path], None]) -> None:
    make("clip")
    folder = data_folder().parent / "jobs" / "other"
    folder.mkdir(parents=True)
    put(folder / "job.json")
    assert cache.state(data_folder())["bytes"] > 0


def test_nothing_that_is_handed_out_goes_while_another_thread_frees() -> None:
    over, stems = threading.Event(), []

    def free() -> None:
        while not over.is_set():
            cache.prune(data_folder(), 0)

    thread = threading.Thread(target=free)
    thread.start()
    try:
        for number in range(60):
            stems += [columns().cached(MASK, (number,), "m", lambda: {"mask": torch.zeros(9)}) for _ in range(2)]
    finally:
        over.set()
        thread.join()
    assert kept() == set(stems) and len(kept()) == 60


def test_encoding_keeps_the_cache_to_its_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert cache.limit_of(data_folder()) == 50.0
    old = make("old")
    open_columns(1)
    assert kept() == {old}
    cache.set_limit(data_folder(), 0.0005)
    restart(monkeypatch)
    with caplog.at_level(logging.INFO):
        made = open_columns(1).cached(MASK, (1,), "m", lambda: {"mask": torch.zeros(9)})
    assert kept() == {made} and "of unused encoded clips were deleted" in caplog.text


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "[1]", '{"limit_gb": -1}', '{"limit_gb": NaN}', '{"gb": 1}'])
def test_a_damaged_limit_is_the_default(text: str, caplog: pytest.LogCaptureFixture) -> None:
    data_folder().mkdir(parents=True)
    (data_folder().parent / "cache.json").write_text(text)
    assert cache.limit_of(data_folder()) == 50.0 and "cache.json is damaged" in caplog.text


# -- over HTTP -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask() -> Callable[..., tuple[int, Any]]:
    table = web.RouteTableDef()
    routes.add_routes(table)

    async def request(method: str, path: str, options: dict) -> tuple[int, Any]:
        app = web.Application()
        app.add_routes(table)
        async with TestClient(TestServer(app)) as client:
            answer = await client.request(method, path, **options)
            return answer.status, await answer.json()

    return lambda method, path, **options: result_of(request(method, path, options))


def test_size_limit_and_freeing_over_http(ask: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask("GET", "/kinoloom/cache") == (200, {"bytes": 0, "free_bytes": 0, "limit_gb": 50.0})
    old = make("old")
    restart(monkeypatch)
    new = make("new")
    size = column_path(data_folder(), new, "latents").stat().st_size
    assert ask("GET", "/kinoloom/cache")[1] == {"bytes": 2 * size, "free_bytes": size, "limit_gb": 50.0}
    assert ask("POST", "/kinoloom/cache", json={"limit_gb": 7})[1]["limit_gb"] == 7 and kept() == {old, new}
    assert ask("POST", "/kinoloom/cache/free")[1] == {"bytes": size, "free_bytes": 0, "limit_gb": 7}
    assert kept() == {new}
    restart(monkeypatch)
    assert ask("POST", "/kinoloom/cache", json={"limit_gb": 0})[1]["bytes"] == 0 and not kept()


@pytest.mark.parametrize("path", ["/kinoloom/cache", "/kinoloom/cache/free"])
def test_other_pages_may_not_change_the_cache(ask: Callable, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    stem = make("old")
    restart(monkeypatch)
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}):
        assert ask("POST", path, json={"limit_gb": 0}, headers=headers)[0] == 403
    assert ask("POST", path, data=b"x" * (1 << 17))[0] == 413
    assert kept() == {stem} and cache.limit_of(data_folder()) == 50.0


@pytest.mark.parametrize(
    "body", ['{"limit_gb": -1}', '{"limit_gb": "9"}', '{"limit_gb": true}', "{}", '{"limit_gb": 1e999}', "[]", "{",
             '{"limit_gb": 1' + "0" * 400 + "}"],
)  # fmt: skip
def test_limits_that_are_none_are_refused(ask: Callable, body: str) -> None:
    status, answer = ask("POST", "/kinoloom/cache", data=body)
    assert status == 400 and answer["error"]
    assert cache.limit_of(data_folder()) == 50.0


# -- what killed saves leave ---------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {pack!r})
from pathlib import Path
from lora_io.file import atomic_write
def write(path):
    Path(path).write_bytes(b"x" * 9)
    os.kill(os.getpid(), signal.SIGKILL)
atomic_write(Path({path!r}), write)
"""


def killed_save(path: Path) -> Path:
    """The temporary file of a save in a process that was killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code = KILLED.format(pack=str(PACK), path=str(path))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (left,) = path.parent.glob(".*.part")
    return left


def test_killed_saves_are_swept_when_the_server_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    own = data_folder().parent
    places = [own / "data", own / "jobs" / "1", own / "jobs" / "1" / "samples", output_folder("loras") / "swept"]
    young = killed_save(own / "jobs" / "2" / "state.pt")
    left = [place / young.name for place in places]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(young.read_bytes())
        os.utime(path, (time.time() - 7200,) * 2)
    monkeypatch.setattr(jobs, "_registry", None)
    jobs.start_registry()
    assert not any(path.exists() for path in left) and young.exists()


def test_files_of_others_are_not_swept(tmp_path: Path) -> None:
    names = ("a.safetensors.part", ".download.part", f".a.{'0' * 31}g.part", f"a.{'0' * 32}.part", ".part")
    for name in names:
        (tmp_path / name).write_text("theirs")
    (tmp_path / f".folder.{'0' * 32}.part").mkdir()
    (tmp_path / f".link.{'0' * 32}.part").symlink_to(tmp_path / names[0])
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)
    before = sorted(tmp_path.iterdir())
    sweep(tmp_path)
    sweep(tmp_path / "absent")
    assert sorted(tmp_path.iterdir()) == before
