"""A run's files for readers: the history with epochs, the tally for the list, the log, the report."""

import json
import logging
import re
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from kinoloom.trainers.core.data import Row
from kinoloom.trainers.core.events import Plan, Saved, Step, Validation, to_json
from kinoloom.trainers.run import log as runlog
from kinoloom.trainers.run.log import last_lines, run_log
from kinoloom.trainers.run.record import Record
from kinoloom.trainers.run.report import COLUMNS, Report, evenly
from kinoloom.trainers.run.tally import PACE_STEPS, Tally

from ..runs import Published, finish, make_config, make_job

WAN = "KinoloomTrainWanLora"
PLAN = Plan(True, 3 << 30, 8 << 30, 0.5, 60.0, "asked for")


def step(done: int, phase: str = "clips", seconds: float = 1.0, loss: float = 0.5) -> Step:
    return Step(phase, done, 100, done, 100, {"lora": loss}, 1e-4, 0.1, seconds)


def test_the_tally_follows_the_history() -> None:
    tally = Tally()
    assert tally.seconds_per_step is None and tally.plan is None
    sample = {"event": "sample", "phase": "set", "step": 1, "done": 1, "files": [], "prompts": [], "seconds": 1.0}
    for entry in (to_json(PLAN), *(to_json(step(i, "set", 9.0, i)) for i in range(1, 40)), sample):
        tally.add(entry)
    assert (tally.phase, tally.done, tally.losses, tally.samples) == ("set", 39, {"lora": 39}, 1)
    assert tally.plan == PLAN
    for i in range(2 * PACE_STEPS):
        tally.add(to_json(step(40 + i, "sequence", 1.0 if i < PACE_STEPS else 3.0)))
        assert tally.seconds_per_step == (1.0 if i < PACE_STEPS else pytest.approx(1 + 2 * (i - 19) / 20))


def test_the_time_left_counts_samples_and_validations() -> None:
    tally = Tally()
    sample = {"event": "sample", "phase": "clips", "step": 0, "done": 0, "files": [], "prompts": [], "seconds": 500.0}
    tally.add(sample)
    assert tally.seconds_for(90) is None
    for entry in (*(step(i, seconds=2.0) for i in range(1, 11)), Validation("clips", 10, 0.4, True, False, 5.0)):
        tally.add(to_json(entry))
    tally.add({**sample, "step": 10, "done": 10, "seconds": 25.0})
    assert tally.seconds_for(90) == 90 * 2 + 9 * (5 + 25)


def test_a_restart_shows_the_same_without_reading_the_history(
    model: Any, data: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    published = Published()
    job = finish(make_job(tmp_path, model, data, make_config(WAN), WAN, published), model)
    shown = job.summary()
    assert shown["plan"]["text"] == str(job.plan) and shown["losses"] and shown["phase"] == "clips"
    assert shown["seconds_per_step"] > 0 and shown["seconds_left"] is None and shown["ended"] > 0
    assert shown["title"] == "Train Wan LoRA"
    assert shown["lora_names"]["lora"].endswith("run-lora-000006.safetensors")
    again = make_job(tmp_path, model, data, make_config(WAN), WAN)
    assert again.summary() == shown
    assert again.history == job.history and again.epoch != 0
    (job.folder / "history.jsonl").unlink()
    assert make_job(tmp_path, model, data, make_config(WAN), WAN).summary() == shown, "nothing else was read"

    placed = [e for e in published if "index" in e]
    strip = [{k: v for k, v in e.items() if k not in ("index", "epoch")} for e in placed]
    assert strip == [job.history[e["index"]] for e in placed] and len(placed) == len(job.history)
    assert {e["epoch"] for e in published if e["event"] != "status"} == {job.epoch}
    lines = last_lines(job.log_path, 200)
    assert any("starts at step 0 of 6" in line for line in lines) and "finished after 6 of 6 steps" in lines[-1]
    assert any("saved" in line and "run-lora-000006.safetensors" in line for line in lines)
    report = (job.folder / "report.html").read_text()
    assert "Train Wan LoRA" in report and "<polyline" in report and "run-lora-000006.safetensors" in report
    assert job.environment["PyTorch"] in report and str(tmp_path) not in report, "no paths of this machine"


def test_a_failed_run_keeps_its_traceback_and_what_to_try(model: Any, data: Any, tmp_path: Path) -> None:
    job = make_job(tmp_path, model, data, make_config(WAN), WAN)

    def missing(job: Any) -> None:
        raise FileNotFoundError(2, "No such file", "clip.mp4")

    job.publish = Published().at(2, missing)
    finish(job, model, "failed")
    assert "clip.mp4" in job.error and "Put the file back" in job.error
    assert "file-is-missing" in [finding["kind"] for finding in job.advice]
    lines = last_lines(job.log_path, 200)
    assert "Traceback (most recent call last):" in lines and any("in missing" in line for line in lines)
    assert "clip.mp4" in (job.folder / "report.html").read_text()
    job.publish = Published()
    finish(job, model)
    assert job.error == "" and "file-is-missing" not in [finding["kind"] for finding in job.advice]
    assert job.done == 6


def make_record(folder: Path) -> Record:
    folder.mkdir()
    return Record(folder, None)  # the history alone


def test_a_cut_of_the_history_is_another_epoch(tmp_path: Path) -> None:
    record = make_record(tmp_path / "job")
    for event in (
        PLAN,
        step(1),
        step(2),
        Saved("lora", "a", 2),
        Validation("clips", 2, 0.4, True, False, 1.0),
        step(3),
    ):
        record.append(event)
    before = record.epoch
    record.rewind(0, 2)
    assert record.epoch > before and record.done == record.tally.done == 2
    assert [e["event"] for e in record.history] == ["step", "step", "saved", "validation"]
    kept = [json.loads(line) for line in (record.folder / "history.jsonl").read_text().splitlines()]
    assert kept == record.history


# -- the log -----------------------------------------------------------------------------------------------------------------


def test_a_log_holds_what_its_own_thread_logs_and_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(runlog, "LIMIT", 4000)
    path = tmp_path / "log.txt"
    assert last_lines(path, 200) == []
    with run_log(path):
        other = threading.Thread(target=logging.warning, args=("of another thread",))
        other.start()
        other.join()
        for i in range(1000):
            logging.info("line %d", i)
        logging.error("a long one %s the end", "x" * 10**6)
    logging.warning("afterwards")
    sizes = [p.stat().st_size for p in tmp_path.iterdir()]
    assert len(sizes) == 2 and sum(sizes) < 2 * 4000 + runlog.LONGEST + 200
    lines = last_lines(path, 20)
    assert len(lines) == 20 and lines[-1].endswith("the end") and lines[-2].endswith("line 999")
    text = "".join(last_lines(path, 10**6))
    assert "another thread" not in text and "afterwards" not in text


# -- the report --------------------------------------------------------------------------------------------------------------


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> &amp; \ud800"


class Page(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        self.text += data


def report(folder: Path, history: list[dict], evil: str = "plain", **summary: Any) -> str:
    shown = {
        "run_name": evil, "title": evil, "status": evil, "error": evil, "done": 3, "total": 9, "created": 0.0,
        "ended": None, "plan": {"text": evil}, "seconds_per_step": 0.5,
        "advice": [{"kind": evil, "text": evil, "link": f"https://{evil}"}, {"kind": evil, "text": evil, "link": f"javascript:{evil}"}, {}],
    }  # fmt: skip
    rows = [Row(evil, evil, evil, (4, 2, 8, 8), {})]
    made = Report({**shown, **summary}, {"trigger_words": evil}, history, rows, evil, {evil: 9}, {evil: evil}, folder)
    return made.html()


def history_of(evil: str, files: list[str]) -> list[dict]:
    events = [
        to_json(Step(evil, i, 9, i, 9, {evil: 1.0 / i, "b": None}, 1e-4, None, 1.0)) for i in range(1, 4)
    ]  # fmt: skip
    sample = {"event": "sample", "phase": evil, "step": 1, "done": 1, "files": files, "prompts": [evil], "seconds": 1.0}
    return [*events, to_json(Validation(evil, 2, 0.4, True, True, 1.0)), sample]


def test_no_value_of_a_user_becomes_markup_in_a_report(tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(b"picture")
    plain, evil = (Page(report(tmp_path, history_of(text, ["a.webp"]), text)) for text in ("plain", EVIL))
    assert evil.tags == plain.tags and "script" not in evil.tags
    assert [name for name, _ in evil.attributes] == [name for name, _ in plain.attributes]
    assert not any(name.startswith("on") for name, _ in evil.attributes)
    assert evil.text.count("<script>alert(1)</script>") == plain.text.count("plain")


def test_a_report_needs_no_other_file_and_takes_none_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "secret.webp").write_bytes(b"secret")
    (tmp_path / "samples" / "a.webp").write_bytes(b"picture")
    page = report(tmp_path / "samples", history_of("set", ["a.webp"]) + history_of("set", ["../secret.webp"]))
    sources = [value for name, value in Page(page).attributes if name in ("src", "href", "content")]
    assert [s for s in sources if s.startswith("data:")] == ["data:image/webp;base64,cGljdHVyZQ=="]
    assert "default-src 'none'" in page and not re.search(r"url\(|@import", page)
    assert page == page.encode("utf-8").decode()


def test_a_report_of_nothing_and_of_much(tmp_path: Path) -> None:
    assert "<svg" not in report(tmp_path, [])
    assert "<svg" in report(tmp_path, [to_json(step(1, loss=0.0))]), "one step, no loss"
    long = [to_json(step(i, loss=1 / i)) for i in range(1, 20_001)]
    samples = [
        {"event": "sample", "phase": "clips", "step": i, "done": i, "files": ["a"], "prompts": ["a"], "seconds": 1.0}
        for i in range(0, 20_001, 100)
    ]
    page = report(tmp_path, [*long, *samples])
    assert len(page) < 300_000 and page.count("<th>step ") == COLUMNS
    assert "<th>step 0</th>" in page and "<th>step 20000</th>" in page
    assert evenly(range(10), 4) == [0, 3, 6, 9] and evenly([1, 2], 4) == [1, 2]
