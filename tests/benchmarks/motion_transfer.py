"""Whether a motion LoRA carries a clip's motion to other sprites without its look: MotionDirector on the toy world.

    python tests/benchmarks/motion_transfer.py [--seeds 3] [--concepts star heart moon] [--variants ...] [--output FOLDER]

COMFYUI_DIR says where ComfyUI is. Every variant is trained on every concept with every seed, rank and number of steps being
the same, and its videos come from ComfyUI's KSampler at the same prompts and seeds, with the temporal LoRA alone. What
the scores mean is said in tests/toyworld/transfer.py. Results stay in FOLDER; a second
run makes only what is missing or was made otherwise, then writes table.md and one contact sheet per concept.

Settings were chosen on the concept `arrow`, which is not reported: of two pairs of learning rates, 6e-3 and 3e-3 with half
of that for the spatial LoRA, the one whose motion went over best.
"""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from scoresheet import Run, Sheet, Variant, main

RECIPE = "KinoloomTrainMotionDirector"
SHARED = {
    "preset": "custom", "steps": 200, "batch_size": 4, "rank": 32, "learning_rate": 3e-3, "spatial_learning_rate": 1.5e-3,
    "lr_schedule": "linear", "warmup_steps": 10, "dropout": 0.0, "validate_every": 0,
}  # fmt: skip


def variant(title: str, **options: Any) -> Variant:
    return Variant(title, RECIPE, {**SHARED, **options})


VARIANTS = {
    "base": Variant("base model, no LoRA"),
    "director": variant("MotionDirector"),
    "no-spatial": variant("… without the spatial path", train="temporal"),
    "no-debias": variant("… without the debiased loss", debias_weight=0.0),
    "plain": variant("temporal layers fine-tuned, neither of the two", train="temporal", debias_weight=0.0),
}
SHOWN = ("a square", "a disc", "a triangle")


@cache
def studio() -> Any:
    from toyworld.studio import AnimateDiffStudio

    return AnimateDiffStudio()


@cache
def base_videos(run: Run) -> Any:
    from toyworld import transfer, world

    return transfer.generate(studio(), studio().model, world.CONCEPTS[run.concept], run.evaluation_seeds)


def measure(run: Run, variant: Variant, folder: Path) -> tuple[dict[str, float], list[Any]]:
    from toyworld import personalise, transfer, world

    scene = world.CONCEPTS[run.concept]
    before = videos = base_videos(Run("base", run.concept, run.seed))
    if variant.recipe:
        data = personalise.motion_data(studio(), run.concept)
        files = personalise.train(studio(), data, variant.recipe, {**variant.options, "seed": run.seed}, folder)
        videos = transfer.generate(studio(), studio().with_loras(files[-1]), scene, run.evaluation_seeds)
    return asdict(transfer.score(scene, videos, before)), [video for video, *_ in videos[: len(SHOWN)]]


SHEET = Sheet(
    "motion_transfer", VARIANTS, measure, SHOWN, ("world", "oracle", "transfer", "install", "studio", "personalise")
)

if __name__ == "__main__":
    main(SHEET, __doc__)
