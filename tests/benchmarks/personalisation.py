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

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from scoresheet import Run, Sheet, Variant, main

PLAIN, TWO_STAGES = "KinoloomTrainWanLora", "KinoloomTrainSetAndSequence"
SET_STEPS, SEQUENCE_STEPS = 100, 150
SHARED = {
    "rank": 32, "learning_rate": 4e-3, "batch_size": 4, "gradient_accumulation": 1, "beta2": 0.99, "max_grad_norm": 0.05,
    "validate_every": 0,
}  # fmt: skip
NO_REGULARISERS = {
    "set_dropout": 0.0, "sequence_dropout": 0.0, "token_mask_prob": 0.0, "prior_weight": 0.0, "learning_rate": 5e-4,
}  # fmt: skip


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
SHOWN = ("training", "background", "known motion", "known sprite")


@cache
def studio() -> Any:
    from toyworld.studio import Studio

    return Studio()


@cache
def base_videos(run: Run) -> Any:
    from toyworld import score, world

    return score.generate(studio(), studio().model, world.CONCEPTS[run.concept], run.evaluation_seeds)


def measure(run: Run, variant: Variant, folder: Path) -> tuple[dict[str, float], list[Any]]:
    from toyworld import personalise, score, world

    scene = world.CONCEPTS[run.concept]
    before = videos = base_videos(Run("base", run.concept, run.seed))
    if variant.recipe:
        data = personalise.training_data(studio(), run.concept)
        *_, whole = personalise.train(studio(), data, variant.recipe, {**variant.options, "seed": run.seed}, folder)
        videos = score.generate(studio(), studio().with_loras(whole), scene, run.evaluation_seeds)
    shown = [next(prompt.text for prompt in score.prompts(scene) if prompt.kind == kind) for kind in SHOWN]
    return asdict(score.score(scene, videos, before)), [videos[text][0] for text in shown]


SHEET = Sheet(
    "personalisation",
    VARIANTS,
    measure,
    SHOWN,
    ("world", "oracle", "score", "install", "studio", "personalise"),
    {"motion_error": 1, "leak": 1, "diversity": 1},
)

if __name__ == "__main__":
    main(SHEET, __doc__)
