"""How well a LoRA learns one subject and its motion from one clip: a score sheet on the toy world, for every method.

    python tests/benchmarks/personalisation.py [--seeds 3] [--concepts star heart moon] [--variants ...] [--output FOLDER]

COMFYUI_DIR says where ComfyUI is. Every variant is trained on every concept with every seed, with the same rank, number of
steps and samples of the concept per step (prior clips come on top), and its videos come from ComfyUI's sampler at the same
prompts and seeds. What the scores mean is said in tests/toyworld/score.py. Results stay in FOLDER, one
file per LoRA; a second run makes only what is missing or was made otherwise, then writes table.md and one contact sheet
per concept.

Hyperparameters were chosen on the concept `arrow`, which is not reported. Of the learning rates 5e-4, 1.5e-3 and 4e-3 each
method has the one at which identity + motion + adherence was highest there; without a regulariser it stays the paper's.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]

from comfy_client import make_base  # noqa: E402
from comfy_library import PACK, register_pack, start_comfyui  # noqa: E402

PLAIN, TWO_STAGES = "KinoloomTrainWanLora", "KinoloomTrainSetAndSequence"
TOYWORLD = TESTS / "toyworld"
SET_STEPS, SEQUENCE_STEPS = 100, 150
SHARED = {
    "rank": 32, "learning_rate": 4e-3, "batch_size": 4, "gradient_accumulation": 1, "beta2": 0.99, "max_grad_norm": 0.05,
    "validate_every": 0,
}  # fmt: skip
NO_REGULARISERS = {
    "set_dropout": 0.0, "sequence_dropout": 0.0, "token_mask_prob": 0.0, "prior_weight": 0.0, "learning_rate": 5e-4,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """`recipe` is the name of a training node; without one it is the base model."""

    title: str
    recipe: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def two_stages(title: str, **options: Any) -> Variant:
    steps = {"set_steps": SET_STEPS, "sequence_steps": SEQUENCE_STEPS}
    return Variant(title, TWO_STAGES, {**SHARED, **steps, **options})


VARIANTS = {
    "base": Variant("base model, no LoRA"),
    "plain": Variant(
        "Wan LoRA on the clip",
        PLAIN,
        {**SHARED, "steps": SET_STEPS + SEQUENCE_STEPS, "shift": 3.0, "prior_weight": 0.0, "learning_rate": 5e-4},
    ),
    "two-stages": two_stages("Set-and-Sequence, no regularisers", **NO_REGULARISERS),
    "paper": two_stages("Set-and-Sequence"),
    "no-dropout": two_stages("… without up-factor dropout", set_dropout=0.0, sequence_dropout=0.0),
    "no-masking": two_stages("… without token masking", token_mask_prob=0.0),
    "no-prior": two_stages("… without prior clips", prior_weight=0.0),
}
EVALUATION_SEEDS = (101, 102)  # of every prompt, on top of the training seed's thousands
DIGITS = {"motion_error": 1, "leak": 1, "diversity": 1}
SHOWN = ("training", "background", "known motion", "known sprite")


@dataclass(frozen=True)
class Run:
    variant: str
    concept: str
    seed: int

    def kept(self, output: Path, suffix: str) -> Path:
        return output / f"{self.variant}-{self.concept}-{self.seed}{suffix}"

    def scores(self, output: Path) -> dict[str, float] | None:
        """What an earlier run measured, if it was made of the same options, models and code."""
        path = self.kept(output, ".json")
        kept = json.loads(path.read_text()) if path.is_file() else {}
        return kept["scores"] if kept.get("made_of") == made_of(VARIANTS[self.variant]) else None


def made_of(variant: Variant) -> str:
    return hashlib.sha256(repr((variant.recipe, variant.options, EVALUATION_SEEDS, toyworld())).encode()).hexdigest()


@cache
def toyworld() -> str:
    """Digest of the models and the code that measures."""
    code = [TOYWORLD / f"{name}.py" for name in ("world", "oracle", "score", "install", "studio", "personalise")]
    digest = hashlib.sha256()
    for file in [*code, *sorted(TOYWORLD.glob("models/*.safetensors"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    runs = [Run(v, c, s) for s in range(options.seeds) for c in options.concepts for v in options.variants]
    base = make_base(options.output / "comfyui", PACK)
    context = get_context("spawn")
    with ProcessPoolExecutor(options.processes, context, initializer=start, initargs=(base,)) as pool:
        missing = {pool.submit(measure, run, options.output): run for run in runs if not run.scores(options.output)}
        for done in as_completed(missing):
            print(missing[done], done.exception() or done.result(), flush=True)
    text = table(options.output, runs)
    (options.output / "table.md").write_text(text)
    print(text)
    for concept in options.concepts:
        contact_sheet(options.output, concept, options.variants).save(options.output / f"sheet-{concept}.png")
    if any(done.exception() for done in missing):
        raise SystemExit("not every LoRA could be trained and scored: see above")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--concepts", nargs="+", default=["star", "heart", "moon"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=2, help="LoRAs trained at the same time, on one thread each")
    parser.add_argument("--output", type=Path, default=PACK / ".runtime" / "personalisation")
    options = parser.parse_args()
    options.variants = list(dict.fromkeys(["base", *options.variants]))
    return options


def start(base: Path) -> None:
    """In every process: ComfyUI and the pack, on one thread."""
    import torch

    torch.set_num_threads(1)
    start_comfyui(base)
    register_pack()


@cache
def studio() -> Any:
    from toyworld.studio import Studio

    return Studio()


@cache
def base_videos(concept: str, seed: int) -> Any:
    from toyworld import score, world

    return score.generate(studio(), studio().model, world.CONCEPTS[concept], evaluation_seeds(seed))


def evaluation_seeds(seed: int) -> list[int]:
    return [1000 * seed + number for number in EVALUATION_SEEDS]


def measure(run: Run, output: Path) -> dict[str, float]:
    """Train and score one LoRA, and keep scores and videos."""
    import numpy as np
    from toyworld import personalise, score, world

    scene, variant = world.CONCEPTS[run.concept], VARIANTS[run.variant]
    before = videos = base_videos(run.concept, run.seed)
    if variant.recipe:
        data = personalise.training_data(studio(), run.concept)
        with tempfile.TemporaryDirectory() as folder:
            options = {**variant.options, "seed": run.seed}
            *_, whole = personalise.train(studio(), data, variant.recipe, options, Path(folder))
            videos = score.generate(studio(), studio().with_loras(whole), scene, evaluation_seeds(run.seed))
    scores = asdict(score.score(scene, videos, before))
    shown = [next(prompt.text for prompt in score.prompts(scene) if prompt.kind == kind) for kind in SHOWN]
    np.savez_compressed(run.kept(output, ".npz"), *(videos[text][0] for text in shown))
    run.kept(output, ".json").write_text(json.dumps({"made_of": made_of(variant), "scores": scores}))
    return scores


def table(output: Path, runs: Iterable[Run]) -> str:
    """Markdown: mean ± standard deviation over all concepts and seeds together."""
    results: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if scores := run.scores(output):
            results.setdefault(VARIANTS[run.variant].title, []).append(scores)
    names = list(next(iter(results.values()))[0])
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in names)} |", "|---|" + "---|" * len(names)]
    for title, rows in results.items():
        cells = [cell([row[name] for row in rows], DIGITS.get(name, 2)) for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(values: list[float], digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def contact_sheet(output: Path, concept: str, variants: Iterable[str]) -> Any:
    """First seed: a row for each variant, a column for each kind of prompt; the clip itself on top."""
    import numpy as np
    from toyworld import sheet, world

    rows = {"the clip": [world.concept_clip(concept).video]}
    for key in variants:
        path = Run(key, concept, 0).kept(output, ".npz")
        if path.is_file():
            with np.load(path) as videos:
                rows[VARIANTS[key].title] = list(videos.values())
    return sheet.contact_sheet(rows, SHOWN)


if __name__ == "__main__":
    main()
