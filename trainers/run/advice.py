"""Advice on a run: problems seen in its history, data and samples, each with a remedy.

Training curves are noisy, so a check that is not certain stays silent.
"""

import errno
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
from PIL import Image, ImageSequence

from ..core.about import project
from ..core.config import TrainConfig
from ..core.data import Row, TrainingData
from ..core.events import Sample, Step, Validation, entries
from ..core.loop import Diverged
from ..core.memory import is_out_of_memory
from ..core.recipe import Phase, Recipe

CERTAIN, LIKELY = 3.0, 1.5  # standard errors
FEWEST_STEPS = 100  # no advice on the loss before this step
FEWEST_GRADIENTS = 10
FEWEST_VALUES = 40  # values of a loss needed to compare its first and last quarter
FLAT, FLAT_VALIDATION = 0.01, 0.005  # smaller falls of a loss, relative to its start, count as flat
GROWN, JUMPED = 1.5, 2.5
WINDOW = 50  # steps
OVERFIT = 0.03  # rise of the held-out loss over its lowest
NO_GRADIENT = 1e-7
TOO_OFTEN = 4  # upper limit of a clip's repeats, relative to those of a single clip at the method's defaults
FEWEST_FRAMES = 3  # latent frames of a clip that can show a motion
SAME = 0.5  # largest mean difference, in grey levels of 255, between samples that look alike
MOVES = 16  # a pixel moves if it changes by more grey levels
STILL = 0.005  # a sample stands still if fewer of its pixels move
LOOKED_AT = 64  # pixels per side to which samples are reduced


@dataclass(frozen=True)
class Finding:
    """A problem and its remedy (`text`). `kind` is the anchor of the README section about it."""

    kind: str
    text: str

    def to_json(self) -> dict[str, str]:
        return {"kind": self.kind, "text": self.text, "link": f"{project('Repository')}#{self.kind}"}


@dataclass(frozen=True)
class Seen:
    """Measures of the samples. moving: share of the last one's pixels that change over time, None without samples.
    change: mean grey levels between the first and the last sample, None without two."""

    moving: float | None = None
    change: float | None = None


def advise(
    recipe: type[Recipe], config: TrainConfig, data: TrainingData, history: Sequence[dict], seen: Seen
) -> list[Finding]:
    """All findings, at most one of each kind."""
    phases = {phase.name: phase for phase in recipe.phases(config, data)}
    found = [*_data(recipe, config, data), *_samples(phases, data.rows, history, seen)]
    for name, phase in phases.items():
        own = [e for e in history if e.get("phase") == name]
        steps = entries(own, Step)
        validations = [e for e in entries(own, Validation) if e["loss"] is not None]
        found += _curves(phase, steps, validations)
    return list({finding.kind: finding for finding in reversed(found)}.values())[::-1]


def _data(recipe: type[Recipe], config: TrainConfig, data: TrainingData) -> Iterator[Finding]:
    kind, usual_config = "too-little-data", recipe.Config()
    usual = {phase.name: _samples_shown(phase, usual_config) for phase in recipe.phases(usual_config, data)}
    for phase in recipe.phases(config, data):
        chosen = data.select(phase.unit, "train")
        if not chosen or not phase.steps:
            continue
        frames = [row.shape[1] for row in chosen if row.shape[1] > 1]
        shown = _samples_shown(phase, config) / len(chosen)
        if len(chosen) < phase.fewest_rows:
            yield Finding(
                kind,
                f"{len(chosen)} {phase.unit} to train on; this method wants {phase.fewest_rows} or more. Add clips.",
            )
        elif phase.name in usual and shown > TOO_OFTEN * usual[phase.name]:
            yield Finding(
                kind,
                f"Each of {len(chosen)} {phase.unit} is shown {shown:.0f} times in phase {phase.name}, but the "
                f"defaults show a single one {usual[phase.name]} times: it is learned by heart. Add clips, or make "
                "fewer steps.",
            )
        elif phase.unit == "clips" and frames and max(frames) < FEWEST_FRAMES:
            yield Finding(
                kind,
                f"The longest clip has {max(frames)} latent frames, too few to show a motion. Raise "
                "frames_per_clip in the node that encodes the clips.",
            )


def _samples_shown(phase: Phase, config: TrainConfig) -> int:
    return phase.steps * config.batch_size * config.gradient_accumulation


def _samples(phases: dict[str, Phase], rows: Sequence[Row], history: Sequence[dict], seen: Seen) -> Iterator[Finding]:
    sampled = entries(history, Sample)
    if not sampled:
        return
    total = sum(phase.steps for phase in phases.values())
    made = sampled[-1]["done"] - sampled[0]["done"]
    if seen.change is not None and seen.change < SAME and made >= max(FEWEST_STEPS, total / 4):
        yield Finding(
            "nothing-is-learned",
            f"The last sample looks like the first one, {made} steps earlier. Raise learning_rate, and check that "
            "the sample prompts name the trained concept.",
        )
    phase = phases.get(sampled[-1]["phase"])
    videos = phase is not None and any(
        row.shape[1] > 1 for row in rows if row.role == "train" and row.unit == phase.unit
    )
    if videos and seen.moving is not None and seen.moving < STILL:
        yield Finding(
            "samples-stand-still",
            "Nothing moves in the last sample. If samples have more than one frame, train longer, name the motion in "
            "the captions and prompts, and check that the clips move.",
        )


def _curves(phase: Phase, steps: list[dict], validations: list[dict]) -> Iterator[Finding]:
    series = _by_name(steps)
    where = f"in phase {phase.name}"
    if any(_diverges(values) for values in series.values()):
        yield Finding(
            "loss-diverges",
            f"The loss grows {where}. Stop, and start again with a third of the learning_rate, or with warmup_steps.",
        )
    elif best := _overfits(validations, series):
        yield Finding(
            "run-overfits",
            f"Since step {best} {where} the loss on held-out clips rises while the training loss falls: the clips are "
            "learned by heart. Use the file called best, make fewer steps, lower rank, or add clips.",
        )
    elif _no_gradient(steps):
        yield Finding(
            "nothing-is-learned",
            f"No weight changes {where}: gradients or the learning rate are zero. Raise learning_rate, and check that "
            "no mask hides a whole clip.",
        )
    elif phase.loss_falls and len(steps) >= FEWEST_STEPS and _flat(validations, series):
        yield Finding(
            "loss-does-not-fall",
            f"The loss does not fall {where}. Raise learning_rate two to five times; if it was raised "
            "already, lower it.",
        )


def _by_name(steps: list[dict]) -> dict[str, list[float]]:
    """The values of each named loss that has enough. A method may leave out a loss in some steps."""
    series: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        for name, value in step["losses"].items():
            if value is not None:
                series[name].append(value)
    return {name: values for name, values in series.items() if len(values) >= FEWEST_VALUES}


def _rise(early: list[float], late: list[float]) -> tuple[float, float]:
    """The growth of the mean and its standard error, both relative to the early mean."""
    error = (stdev(early) ** 2 / len(early) + stdev(late) ** 2 / len(late)) ** 0.5
    before = fmean(early) or 1.0
    return (fmean(late) - fmean(early)) / abs(before), error / abs(before)


def _quarters(values: list[float]) -> tuple[list[float], list[float]]:
    """The first and the last quarter of the values."""
    return values[: len(values) // 4], values[-(len(values) // 4) :]


def _diverges(values: list[float]) -> bool:
    rise, error = _rise(*_quarters(values))
    if rise > GROWN - 1 and rise > (CERTAIN + 1) * error:
        return True
    windows = [median(values[start : start + WINDOW]) for start in range(len(values) % WINDOW, len(values), WINDOW)]
    return len(windows) >= 3 and windows[-1] > JUMPED * min(windows[:-1])


def _overfits(validations: list[dict], series: dict[str, list[float]]) -> int | None:
    """The step since which the held-out loss rises. None if it does not rise, or if the training loss rises too."""
    held_out = [e for e in validations if e["held_out"]]
    losses = [e["loss"] for e in held_out]
    if len(losses) < 5 or min(losses) <= 0 or not series:
        return None
    smooth = [fmean(losses[max(i - 1, 0) : i + 2]) for i in range(len(losses))]
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    rise = fmean(losses[-3:]) / smooth[lowest] - 1
    noise = stdev(a - b for a, b in zip(losses, smooth, strict=True)) / fmean(losses)
    if lowest > len(losses) - 4 or rise < max(OVERFIT, 3 * noise):
        return None
    for values in series.values():
        half = len(values) // 2
        if _rise(values[:half], values[half:])[0] > 0:
            return None
    return held_out[lowest]["step"]


def _no_gradient(steps: list[dict]) -> bool:
    norms = [e["grad_norm"] for e in steps if e["grad_norm"] is not None]
    if len(norms) < FEWEST_GRADIENTS:
        return False
    return max(norms) < NO_GRADIENT or all(e["learning_rate"] == 0 for e in steps)


def _flat(validations: list[dict], series: dict[str, list[float]]) -> bool:
    """Whether the loss certainly does not fall. Uses the loss on fixed noise if there are enough measurements."""
    if not series:
        return False
    losses = [e["loss"] for e in validations if not e["held_out"]]
    if len(losses) < 4 or losses[0] <= 0:
        return all(-rise + CERTAIN * error < FLAT for rise, error in (_rise(*_quarters(v)) for v in series.values()))
    begun = [_rise(values[: len(values) // 10 + 10], values[len(values) // 2 :]) for values in series.values()]
    fell_before = any(rise < -LIKELY * error for rise, error in begun)  # before the first measurement on fixed noise
    return 1 - fmean(losses[len(losses) // 2 :]) / losses[0] < FLAT_VALIDATION and not fell_before


def look_at(folder: Path, history: Sequence[dict]) -> Seen:
    """Measures the first and the last sample in `folder`. Missing and damaged files are ignored."""
    sampled = entries(history, Sample)
    if not sampled:
        return Seen()
    first, last = ([folder / Path(name).name for name in sampled[place]["files"]] for place in (0, -1))
    pictures = [frames for path in last if (frames := _read(path)) is not None]
    moving = [float((p.max(axis=0) - p.min(axis=0) > MOVES).mean()) for p in pictures]
    pairs = [(_read(one), _read(other)) for one, other in zip(first, last, strict=False) if one != other]
    change = [float(np.abs(a - b).mean()) for a, b in pairs if a is not None and b is not None and a.shape == b.shape]
    return Seen(max(moving, default=None), max(change, default=None))


def _read(path: Path) -> np.ndarray | None:
    try:
        return _frames(path, path.stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=64)
def _frames(path: Path, modified: int) -> np.ndarray:
    """The frames of an image file, grey and reduced, [T, h, w]. `modified` is only a key of the cache."""
    with Image.open(path) as image:
        small = [frame.convert("L") for frame in ImageSequence.Iterator(image)]
    for frame in small:
        frame.thumbnail((LOOKED_AT, LOOKED_AT))
    return np.stack([np.asarray(frame, dtype=np.float32) for frame in small])


def of_failure(error: BaseException) -> Finding | None:
    """The remedy for an error that a user can fix, else None."""
    causes = list(_causes(error))
    codes = {cause.errno for cause in causes if isinstance(cause, OSError)}
    text = " ".join(map(str, causes)).lower()
    if any(is_out_of_memory(cause) for cause in causes):
        return Finding(
            "out-of-memory",
            "Set checkpointing to on, lower size or frames_per_clip in the node that encodes the clips, or load the "
            "model in fp8.",
        )
    if isinstance(error, Diverged):
        return Finding(
            "loss-diverges",
            "Start again with a third of the learning_rate, with warmup_steps, or with precision bf16 or fp32. The "
            "run's files hold the training so far.",
        )
    if codes & {errno.ENOSPC, errno.EDQUOT} or "no space left" in text or "not enough space on the disk" in text:
        return Finding("disk-is-full", "Make room on the disk, then run again: the run goes on from its checkpoint.")
    if any(isinstance(cause, FileNotFoundError) for cause in causes):
        return Finding(
            "file-is-missing",
            "Put the file back, or choose it again in the workflow. Clips are encoded again if an input of the node "
            "that encodes them changes.",
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
