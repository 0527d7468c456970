"""Trains LoRAs in many variants on toy concepts, scores them, and makes a table: what the benchmarks of quality share."""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]

from comfy_client import make_base  # noqa: E402
from comfy_library import PACK, register_pack, start_comfyui  # noqa: E402

TOYWORLD = TESTS / "toyworld"
EVALUATION_SEEDS = (101, 102)  # of every prompt, on top of the training seed's thousands


@dataclass(frozen=True)
class Variant:
    """`recipe` is the name of a training node; without one it is the base model."""

    title: str
    recipe: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    variant: str
    concept: str
    seed: int

    @property
    def evaluation_seeds(self) -> list[int]:
        return [1000 * self.seed + number for number in EVALUATION_SEEDS]

    def kept(self, output: Path, suffix: str) -> Path:
        return output / f"{self.variant}-{self.concept}-{self.seed}{suffix}"


@dataclass(frozen=True)
class Sheet:
    """`measure(run, variant, folder)` trains and scores one LoRA: its scores, and a video for each of the columns `shown`.

    `clips(concept)`: rows on top of the contact sheet, of the clips that are trained on.
    """

    name: str
    variants: Mapping[str, Variant]
    measure: Callable[[Run, Variant, Path], tuple[dict[str, float], Sequence[Any]]]
    shown: Sequence[str]
    code: Sequence[str]  # modules of the toy world that decide the scores
    digits: Mapping[str, int] = field(default_factory=dict)
    concepts: Sequence[str] = ("star", "heart", "moon")
    clips: Callable[[str], dict[str, Sequence[Any]]] = field(default=lambda concept: {"the clip": [concept_clip(concept)]})

    def scores(self, run: Run, output: Path) -> dict[str, float] | None:
        """What an earlier run measured, if it was made of the same options, models and code."""
        path = run.kept(output, ".json")
        kept = json.loads(path.read_text()) if path.is_file() else {}
        return kept["scores"] if kept.get("made_of") == self.made_of(run) else None

    def made_of(self, run: Run) -> str:
        variant = self.variants[run.variant]
        parts = (variant.recipe, variant.options, EVALUATION_SEEDS, toyworld(tuple(self.code)))
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def concept_clip(concept: str) -> Any:
    from toyworld import world

    return world.concept_clip(concept).video


@cache
def toyworld(code: tuple[str, ...]) -> str:
    """Digest of the models and the code that measures."""
    digest = hashlib.sha256()
    for file in [*(TOYWORLD / f"{name}.py" for name in code), *sorted(TOYWORLD.glob("models/toy_*"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def main(sheet: Sheet, description: str) -> None:
    options = parse_arguments(sheet, description)
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    runs = [Run(v, c, s) for s in range(options.seeds) for c in options.concepts for v in options.variants]
    base = make_base(output / "comfyui", PACK)
    with ProcessPoolExecutor(options.processes, get_context("spawn"), initializer=start, initargs=(base,)) as pool:
        missing = {pool.submit(keep, sheet, run, output): run for run in runs if not sheet.scores(run, output)}
        for done in as_completed(missing):
            print(missing[done], done.exception() or done.result(), flush=True)
    text = table(sheet, runs, output)
    (output / "table.md").write_text(text)
    print(text)
    for concept in options.concepts:
        contact_sheet(sheet, concept, options.variants, output).save(output / f"sheet-{concept}.png")
    if any(done.exception() for done in missing):
        raise SystemExit("not every LoRA could be trained and scored: see above")


def parse_arguments(sheet: Sheet, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--concepts", nargs="+", default=list(sheet.concepts))
    parser.add_argument("--variants", nargs="+", choices=sheet.variants, default=list(sheet.variants))
    parser.add_argument("--processes", type=int, default=2, help="LoRAs trained at the same time, on one thread each")
    parser.add_argument("--output", type=Path, default=PACK / ".runtime" / sheet.name)
    options = parser.parse_args()
    options.variants = list(dict.fromkeys([next(iter(sheet.variants)), *options.variants]))
    return options


def start(base: Path) -> None:
    """In every process: ComfyUI and the pack, on one thread."""
    import torch

    torch.set_num_threads(1)
    start_comfyui(base)
    register_pack()


def keep(sheet: Sheet, run: Run, output: Path) -> dict[str, float]:
    """Measure, and keep scores and videos."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        scores, videos = sheet.measure(run, sheet.variants[run.variant], Path(folder))
    np.savez_compressed(run.kept(output, ".npz"), *videos)
    run.kept(output, ".json").write_text(json.dumps({"made_of": sheet.made_of(run), "scores": scores}))
    return scores


def table(sheet: Sheet, runs: Iterable[Run], output: Path) -> str:
    """Markdown: mean ± standard deviation over all concepts and seeds together."""
    results: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if scores := sheet.scores(run, output):
            results.setdefault(sheet.variants[run.variant].title, []).append(scores)
    names = list(next(iter(results.values()))[0])
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in names)} |", "|---|" + "---|" * len(names)]
    for title, rows in results.items():
        cells = [cell([row[name] for row in rows], sheet.digits.get(name, 2)) for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(values: list[float], digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def contact_sheet(sheet: Sheet, concept: str, variants: Iterable[str], output: Path) -> Any:
    """First seed: a row for each variant, a column for each kind of prompt; the clip itself on top."""
    import numpy as np
    from toyworld import sheet as pictures

    rows = sheet.clips(concept)
    for key in variants:
        path = Run(key, concept, 0).kept(output, ".npz")
        if path.is_file():
            with np.load(path) as videos:
                rows[sheet.variants[key].title] = list(videos.values())
    return pictures.contact_sheet(rows, sheet.shown)
