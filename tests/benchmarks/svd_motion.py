"""Whether an SVD LoRA learns a motion from a few clips, and moves other sprites so, on the toy world.

    python tests/benchmarks/svd_motion.py [--seeds 3] [--concepts star heart moon] [--variants ...] [--output FOLDER]

COMFYUI_DIR says where ComfyUI is. A concept stands for its motion alone: a LoRA is trained on `CLIPS` clips of known
sprites that move so, and scored on sprites that none of them shows, from their first frames. What the scores mean is
said in tests/toyworld/steer.py. Results stay in FOLDER, as motion_transfer.py's do.

Settings were chosen on the concept `arrow`, which is not reported.
"""

from functools import cache
from pathlib import Path
from typing import Any

from scoresheet import Run, Sheet, Variant, main

SHARED = {
    "steps": 300, "batch_size": 4, "rank": 16, "learning_rate": 2e-3, "lr_schedule": "linear", "warmup_steps": 10,
    "validate_every": 0,
}  # fmt: skip
CLIPS = 8
VARIANTS = {
    "base": Variant("base model, no LoRA"),
    "all": Variant("LoRA on all attention", "KinoloomTrainSvdLora", SHARED),
    "temporal": Variant("LoRA on temporal attention", "KinoloomTrainSvdLora", {**SHARED, "target_layers": "temporal"}),
}
SHOWN = ("a sprite", "another", "a third")
SPRITES = 8


@cache
def studio() -> Any:
    from toyworld.studio import SvdStudio

    return SvdStudio()


def measure(run: Run, variant: Variant, folder: Path) -> tuple[dict[str, float], list[Any]]:
    from toyworld import personalise, steer, world

    motion, model = world.CONCEPTS[run.concept].motion, studio().model
    if variant.recipe:
        data = steer.encode(studio(), [steer.on_path(motion, 10_000 * run.seed + i) for i in range(CLIPS)])
        files = personalise.train(studio(), data, variant.recipe, {**variant.options, "seed": run.seed}, folder)
        model = studio().with_loras(*files)
    return steer.score([steer.on_path(motion, seed) for seed in seeds(run)], lambda clip: model, studio(), len(SHOWN))


def seeds(run: Run) -> list[int]:
    return [1_000_000 + 1000 * run.seed + number for number in range(SPRITES)]


SHEET = Sheet("svd_motion", VARIANTS, measure, SHOWN, ("world", "oracle", "install", "studio", "personalise", "steer"))

if __name__ == "__main__":
    main(SHEET, __doc__)
