"""Advice: each finding on a run that has the trouble, and silence on runs that are well, noisy ones included."""

import errno
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinoloom.lora_io.file import SaveError
from kinoloom.trainers import recipes
from kinoloom.trainers.core.data import Row, TrainingData
from kinoloom.trainers.core.loop import Diverged
from kinoloom.trainers.run import advice
from kinoloom.trainers.run.advice import Finding, Seen, advise, look_at, of_failure
from kinoloom.trainers.run.job import _explain
from PIL import Image

WAN, SNS, FINE_TUNE = "KinoloomTrainWanLora", "KinoloomTrainSetAndSequence", "KinoloomTrainSvdFinetune"
TRACKLETS = "KinoloomTrainSvdTracklets"


def row(number: int = 0, unit: str = "clips", frames: int = 5, role: str = "train") -> Row:
    return Row(f"{role} {number}", unit, role, (16, frames, 8, 8), {})


def curve(
    losses: list[float], phase: str = "clips", grad_norm: float | None = 0.1, rate: float = 1e-4
) -> list[dict[str, Any]]:
    """Steps with these losses."""
    shared = {"event": "step", "phase": phase, "grad_norm": grad_norm, "learning_rate": rate, "seconds": 1.0}
    return [
        {**shared, "step": i + 1, "done": i + 1, "steps": len(losses), "total": len(losses), "losses": {"loss": loss}}
        for i, loss in enumerate(losses)
    ]


def measured(losses: list[float], held_out: bool = False, phase: str = "clips") -> list[dict[str, Any]]:
    """Validations every 100 steps."""
    best = [loss == min(losses[: i + 1]) for i, loss in enumerate(losses)]
    return [
        {"event": "validation", "phase": phase, "step": 100 * (i + 1), "loss": v, "best": b, "held_out": held_out}
        for i, (v, b) in enumerate(zip(losses, best, strict=True))
    ]


def noisy(levels: list[float], spread: float, seed: int) -> list[float]:
    """Each level times lognormal noise, like losses at random timesteps."""
    draw = random.Random(seed)
    return [level * draw.lognormvariate(0, spread) for level in levels]


def falling(count: int, start: float = 1.0, end: float = 0.5, over: int = 100) -> list[float]:
    return [end + (start - end) * 2 ** (-i / over) for i in range(count)]


def sampled(done: int, files: list[str], phase: str = "clips") -> dict[str, Any]:
    return {
        "event": "sample", "phase": phase, "step": done, "done": done, "files": files, "prompts": ["a"] * len(files), "seconds": 1.0
    }  # fmt: skip


def kinds(
    history: list[dict], name: str = WAN, rows: list[Row] | None = None, seen: Seen | None = None, **options: Any
) -> list[str]:
    recipe = recipes()[name]
    found = advise(recipe, recipe.Config(**options), TrainingData("", tuple(rows or [row()])), history, seen or Seen())
    assert len({finding.kind for finding in found}) == len(found)
    return [finding.kind for finding in found]


# -- the curves --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.4, 0.8])
@pytest.mark.parametrize("count", [20, 120, 500, 3000])
def test_falling_losses_are_well_however_noisy(count: int, spread: float) -> None:
    for seed in range(10):
        steps = curve(noisy(falling(count), spread, seed))
        validations = measured(noisy(falling(count // 100, over=2), 0.01, seed))
        assert kinds(steps) == kinds(steps + validations) == []


@pytest.mark.parametrize("spread", [0.2, 0.8])
def test_losses_too_noisy_to_tell_give_no_advice(spread: float) -> None:
    assert not any(kinds(curve(noisy(falling(300, 1.0, 0.95), spread, seed))) for seed in range(50))


def test_a_loss_that_fell_before_the_first_measurement_is_well() -> None:
    for seed in range(20):
        steps = curve(noisy(falling(600, 1.0, 0.4, over=15), 0.3, seed))
        assert kinds(steps + measured(noisy([0.4] * 6, 0.002, seed))) == []


@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_a_loss_that_does_not_fall(spread: float) -> None:
    found = [kinds(curve(noisy([1.0] * 500, spread, s)) + measured(noisy([0.8] * 5, 1e-3, s))) for s in range(20)]
    assert found.count(["loss-does-not-fall"]) >= 17
    assert kinds(curve([1.0] * 150)) == ["loss-does-not-fall"], "without validations"
    assert kinds(curve([1.0] * 90)) == [], "too early to say"


def test_a_loss_that_falls_by_its_validations_alone_is_well() -> None:
    assert kinds(curve(noisy([1.0] * 500, 0.4, 3)) + measured([0.8, 0.79, 0.785, 0.78, 0.777])) == []


def test_one_falling_loss_of_two_is_well() -> None:
    steps = curve([1.0] * 300)
    for entry, value in zip(steps, falling(300), strict=True):
        entry["losses"]["prior"] = value
    assert kinds(steps) == []


def test_tracklets_whose_loss_hardly_falls_are_well() -> None:
    rows = [row(i) for i in range(200)]
    painted = recipes()[TRACKLETS].phases(recipes()[TRACKLETS].Config(), TrainingData("", ()))[0].name
    assert kinds(curve([1.0] * 300, painted), TRACKLETS, rows) == []


@pytest.mark.parametrize(
    "losses",
    [[0.1] * 50 + [0.4] * 50, falling(300) + [3.0] * 100, [0.1 * 1.02**i for i in range(200)]],
    ids=["doubled", "jumped", "grows"],
)
def test_a_loss_that_grows(losses: list[float]) -> None:
    for seed in range(10):
        assert kinds(curve(noisy(losses, 0.2, seed))) == ["loss-diverges"]


def test_spikes_are_no_divergence() -> None:
    losses = noisy(falling(500), 0.3, 0)
    losses[70] = losses[333] = losses[-1] = 30.0
    assert kinds(curve(losses)) == []


def test_no_gradient_or_no_rate() -> None:
    assert kinds(curve([1.0] * 50, grad_norm=0.0)) == ["nothing-is-learned"]
    assert kinds(curve([1.0] * 50, rate=0.0)) == ["nothing-is-learned"]
    assert kinds(curve([1.0] * 50, grad_norm=1e-4)) == []
    assert kinds(curve(falling(50), grad_norm=None)) == [], "fp16 whose scale is still too high"
    assert kinds(curve([1.0] * 5, grad_norm=0.0)) == []


def test_overfit_by_held_out_loss() -> None:
    rises = [1.0, 0.9, 0.85, 0.84, 0.87, 0.91, 0.96, 1.0]
    for seed in range(20):
        steps = curve(noisy(falling(800), 0.3, seed))
        assert kinds(steps + measured(noisy(rises, 0.005, seed), held_out=True)) == ["run-overfits"]
        assert kinds(steps + measured(noisy(rises, 0.005, seed))) == [], "on training clips it is no overfitting"
        still = noisy(falling(8, 1.0, 0.8, over=1), 0.02, seed)
        assert kinds(steps + measured(still, held_out=True)) == [], "noise about a level"
    recipe = recipes()[WAN]
    history = curve(falling(800)) + measured(rises, held_out=True)
    (finding,) = advise(recipe, recipe.Config(), TrainingData("", (row(),)), history, Seen())
    assert "step 400" in finding.text


def test_phases_are_judged_apart() -> None:
    first, second = [p.name for p in recipes()[SNS].phases(recipes()[SNS].Config(), TrainingData("", ()))]
    rows = [row(), row(1, "frames", 1)]
    history = curve(falling(600, 0.1, 0.05), first) + curve(falling(900, 1.0, 0.6), second)
    assert kinds(history, SNS, rows) == [], "another phase has another loss"
    assert kinds(history[:600] + curve([1.0] * 900, second), SNS, rows) == ["loss-does-not-fall"]


# -- the data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(recipes()))
def test_the_defaults_on_data_that_suits_a_method_are_well(name: str) -> None:
    recipe = recipes()[name]
    count = max(phase.fewest_rows for phase in recipe.phases(recipe.Config(), TrainingData("", ())))
    rows = [row(i) for i in range(count)] + [row(i, "frames", 1) for i in range(3)]
    assert kinds([], name, rows) == []


def test_too_little_data() -> None:
    assert kinds([], FINE_TUNE, [row(i) for i in range(3)]) == ["too-little-data"]
    assert kinds([], FINE_TUNE, [row(i, role="prior") for i in range(30)] + [row()]) == ["too-little-data"]
    assert kinds([], steps=20_000) == ["too-little-data"]
    assert kinds([], rows=[row(i) for i in range(20)], steps=20_000) == []
    assert kinds([], rows=[row(frames=2)]) == ["too-little-data"]
    assert kinds([], rows=[row(frames=1)]) == [], "photos teach a look"


# -- the samples -------------------------------------------------------------------------------------------------------------


def test_findings_from_samples() -> None:
    history = [sampled(0, ["a"]), sampled(250, ["b"])]
    assert kinds(history, seen=Seen(moving=0.0)) == ["samples-stand-still"]
    assert kinds(history, rows=[row(frames=1)], seen=Seen(moving=0.0)) == [], "photos stand still"
    assert kinds(history, seen=Seen(moving=0.1, change=0.1)) == ["nothing-is-learned"]
    assert kinds(history, seen=Seen(moving=0.1, change=3.0)) == []
    assert kinds([sampled(0, ["a"]), sampled(50, ["b"])], seen=Seen(change=0.1)) == [], "too early"
    first = recipes()[SNS].phases(recipes()[SNS].Config(), TrainingData("", ()))[0].name
    rows = [row(), row(1, "frames", 1)]
    assert kinds([sampled(9, ["a"], first)], SNS, rows, Seen(moving=0.0)) == [], "a stage on frames makes stills"


def write_webp(path: Path, speed: int, shift: int = 0, size: int = 64) -> None:
    """A bright square of a tenth of the side that moves by `speed` pixels a frame over a noisy ground."""
    ground = np.random.default_rng(0).integers(0, 90, (size, size, 3), dtype=np.uint8)
    frames = []
    for i in range(6):
        frame = ground.copy()
        left = shift + speed * i
        frame[20 : 20 + size // 10, left : left + size // 10] = 230
        frames.append(Image.fromarray(frame))
    frames[0].save(path, save_all=True, append_images=frames[1:], quality=75)


def test_samples_are_measured_from_their_files(tmp_path: Path) -> None:
    write_webp(tmp_path / "still.webp", 0)
    write_webp(tmp_path / "moves.webp", 2)
    write_webp(tmp_path / "other.webp", 2, shift=30)
    assert look_at(tmp_path, []) == Seen()
    still = look_at(tmp_path, [sampled(0, ["still.webp"])])
    assert still.moving < advice.STILL and still.change is None
    one = look_at(tmp_path, [sampled(0, ["still.webp", "moves.webp"]), sampled(9, ["moves.webp", "other.webp"])])
    assert one.moving > advice.STILL and one.change > advice.SAME
    (tmp_path / "torn.webp").write_bytes(b"RIFF")
    gone = look_at(tmp_path, [sampled(0, ["torn.webp"]), sampled(9, ["gone.webp"])])
    assert gone == Seen(), "what cannot be read does not end a run"


# -- failures, and where it is explained -----------------------------------------------------------------------------------


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (torch.OutOfMemoryError("tried 3 GiB"), "out-of-memory", ("checkpointing", "tried 3 GiB")),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "out-of-memory", ("lower size",)),
        (Diverged("loss became nan in step 3. Try less."), "loss-diverges", ("Try less.",)),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.mp4"), "file-is-missing", ("x.mp4", "Put the file back")),
        (OSError(errno.ENOSPC, "No space left on device"), "disk-is-full", ("No space left", "Make room")),
        (chained(SaveError("cannot write a"), OSError(errno.ENOSPC, "full")), "disk-is-full", ("cannot write a",)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_failure_says_what_to_try(error: Exception, kind: str, says: tuple[str, ...]) -> None:
    finding = of_failure(error)
    assert finding is not None and finding.kind == kind
    text = _explain(error, finding)
    assert all(part in text for part in says) and text.count(finding.text) <= 1


def test_other_failures_stay_as_they_are() -> None:
    assert of_failure(ValueError("rank=0: expected 1..256")) is None
    assert _explain(ValueError("rank=0: expected 1..256")) == "rank=0: expected 1..256"
    assert _explain(KeyError("x")) == "KeyError: 'x'"


def test_every_finding_has_a_section_in_the_readme() -> None:
    root = Path(__file__).parents[2]
    source = Path(advice.__file__).read_text(encoding="utf-8")
    used = set(re.findall(r'(?:Finding\(|kind =|kind, usual_config =)\s*"([a-z-]+)"', source))
    assert len(used) == 9
    headings = re.findall(r"^#+ (.+)$", (root / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert used <= {heading.lower().replace(" ", "-") for heading in headings}
    link = Finding("run-overfits", "").to_json()["link"]
    assert link == "https://github.com/kinoloom/kinoloom#run-overfits"
