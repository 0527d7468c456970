"""What a run writes: checkpoints and files on disks that are full or gone, and which of them are kept."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kinoloom.lora_io.file import SaveError, atomic_write, load
from kinoloom.nodes.training import registry as jobs
from kinoloom.trainers.core.data import TrainingData
from kinoloom.trainers.run.advice import of_failure
from kinoloom.trainers.run.checkpoint import load_state, write
from kinoloom.trainers.run.job import Job

from ..runs import Published, assert_same, events, finish, make_config, make_job, state_of

WAN_LORA = "KinoloomTrainWanLora"


@pytest.mark.parametrize("numbers", [1, 3_000, 2_000_000])
def test_a_checkpoint_on_a_full_disk_says_so(numbers: int, tmp_path: Path) -> None:
    """/dev/full is a disk without room; torch itself would speak of an unexpected position."""
    content = {"state": {"recipe": {"a": torch.ones(numbers), "b": torch.ones(7)}}, "identity": "{}"}
    with pytest.raises(SaveError, match="cannot write .*state.pt: .*No space left on device") as caught:
        atomic_write(tmp_path / "state.pt", lambda temporary: write(content, "/dev/full"))
    cause = caught.value.__cause__
    assert isinstance(cause, OSError) and cause.errno == errno.ENOSPC
    found = of_failure(caught.value)
    assert found is not None and found.kind == "disk-is-full"


@pytest.mark.parametrize("gone", ["the run's folder", "its results", "its checkpoint"])
def test_a_run_whose_folders_are_removed_goes_on_or_says_what_is_gone(
    gone: str, model: Any, data: TrainingData, tmp_path: Path
) -> None:
    def remove(job: Job) -> None:
        if gone == "its checkpoint":
            return job.state_path.unlink()
        return shutil.rmtree(job.folder if gone == "the run's folder" else tmp_path / "out")

    config = make_config(WAN_LORA, save_every=2, validate_every=2)
    job = make_job(tmp_path, model, data, config, WAN_LORA, Published().at(3, remove))
    finish(job, model, "failed" if gone == "the run's folder" else "finished")
    if gone == "the run's folder":
        assert "history.jsonl" in job.error and job.folder.name in job.error
    else:
        assert Path(job.files["lora"]).is_file() and state_of(job).step == job.total


def test_a_run_in_a_folder_that_cannot_be_written_says_which(model: Any, data: TrainingData, tmp_path: Path) -> None:
    job = make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA)
    (tmp_path / "out").write_text("a file in the place of the folder")
    finish(job, model, "failed")
    assert f"cannot write {tmp_path / 'out'}" in job.error and job.checkpoint > 0
    (tmp_path / "out").unlink()
    finish(job, model)


def test_the_newest_run_is_the_last_one_though_the_clock_went_back(
    model: Any, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "output_folder", lambda folder: tmp_path / "out")
    monkeypatch.setattr(jobs, "publish", Published())
    monkeypatch.setattr(jobs.Registry, "busy", lambda self, job: False)
    monkeypatch.setattr(jobs.Registry, "make_room", lambda self: None)
    registry = jobs.Registry(tmp_path / "jobs")
    started = []
    for clock, seed in ((2e9, 0), (1e9, 1), (1.5e9, 2)):
        monkeypatch.setattr(jobs, "time", SimpleNamespace(time=lambda clock=clock: clock))
        config = make_config(WAN_LORA, seed=seed, steps=1, validate_every=0)
        started.append(registry.start({"model": model}, WAN_LORA, config, data, {}, "run"))
        assert started[-1].ended.wait(600) and started[-1].status == "finished"
        assert registry.newest("run") is started[-1]
    assert [job.spec.run_name for job in started] == ["run", "run-2", "run-3"]


def test_a_run_that_diverges_keeps_its_checkpoint_and_what_it_learned(
    model: Any, data: TrainingData, tmp_path: Path
) -> None:
    """The checkpoint is not the state right before, which would only diverge again."""
    options = {"precision": "fp16", "learning_rate": 10.0, "steps": 40, "validate_every": 0}
    config = make_config(WAN_LORA, save_every=100, **options)
    job = finish(make_job(tmp_path, model, data, config, WAN_LORA), model, "failed")
    assert job.done > 0 and not job.state_path.is_file() and not job.resumable
    assert Path(job.files["lora"]).name == f"run-lora-{job.done:06d}.safetensors"


def test_of_the_files_called_best_the_last_is_kept(model: Any, data: TrainingData, tmp_path: Path) -> None:
    config = make_config(WAN_LORA, validate_every=1, steps=6, learning_rate=3e-3)
    job = finish(make_job(tmp_path, model, data, config, WAN_LORA), model)
    better = [e["step"] for e in events(job, "validation") if e["best"]]
    assert len(better) > 1, "the test needs a run that gets better twice"
    names = sorted(name for name in os.listdir(tmp_path / "out") if "-best-" in name)
    assert names == [f"run-lora-best-{better[-1]:06d}.safetensors"] == [Path(job.files["lora-best"]).name]


def test_a_scale_is_exact_in_a_file_of_half_precision(model: Any, data: TrainingData, tmp_path: Path) -> None:
    alpha = 3.3000001
    job = finish(make_job(tmp_path, model, data, make_config(WAN_LORA, alpha=alpha, steps=1), WAN_LORA), model)
    tensors, _ = load(Path(job.result_files[-1]))
    scales = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
    assert len(scales) == 20
    assert all(scale.dtype == torch.float32 and float(scale) == pytest.approx(alpha, rel=1e-7) for scale in scales)
    assert {t.dtype for key, t in tensors.items() if not key.endswith(".alpha")} == {torch.float16}


def test_the_plan_counts_what_the_optimizer_keeps(model: Any, data: TrainingData, tmp_path: Path) -> None:
    """Prodigy keeps 16 bytes for each number that is trained, AdamW 8, and both have a gradient of 4."""
    needed = {}
    for optimizer in ("AdamW", "Prodigy"):
        config = make_config(WAN_LORA, optimizer=optimizer, learning_rate=1.0, steps=1, validate_every=0)
        job = finish(make_job(tmp_path / optimizer, model, data, config, WAN_LORA), model)
        needed[optimizer] = events(job, "plan")[0]["memory_needed"]
        trainable = sum(tensor.numel() for tensor in state_of(job).recipe.values())
    assert needed["Prodigy"] - needed["AdamW"] == 8 * trainable
    assert needed["AdamW"] > 12 * trainable


def test_a_checkpoint_is_read_back_as_it_was(model: Any, data: TrainingData, tmp_path: Path) -> None:
    job = finish(make_job(tmp_path, model, data, make_config(WAN_LORA), WAN_LORA, Published().at(3, Job.stop)), model,
                 "stopped")  # fmt: skip
    state, identity = load_state(job.state_path)
    atomic_write(tmp_path / "again.pt", lambda temporary: write(
        {"state": vars(state), "identity": "{}"}, temporary))  # fmt: skip
    assert_same(torch.load(tmp_path / "again.pt", weights_only=True)["state"], vars(state))
    assert identity == job.spec.run_key
