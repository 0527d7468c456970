"""Whether sprites follow tracklets on paths of a kind that training never showed, on the toy world.

    python tests/benchmarks/svd_steering.py [--seeds 3] [--concepts star heart moon] [--variants ...] [--output FOLDER]

COMFYUI_DIR says where ComfyUI is. A control is trained once a variant and seed, on sprites that go by random corners, and asked
for the path of each concept's motion. What the scores mean is said in tests/toyworld/steer.py. Results stay in
FOLDER, controls in .runtime/svd_steering_controls; what is there is not trained again. `arrow` is for
choosing settings.
"""

import hashlib
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw
from scoresheet import PACK, Run, Sheet, Variant, main

STEPS = 7000
SHARED = {
    "batch_size": 16, "learning_rate": 2e-3, "clean_learning_rate": 2e-3, "lr_schedule": "cosine", "warmup_steps": 20,
    "noise_mean": 2.0, "noise_std": 0.8, "conditioning_dropout": 0.0, "validate_every": 0, "save_every": 1000,
}  # fmt: skip
RECIPE = "KinoloomTrainSvdTracklets"


def variant(title: str, painted: float) -> Variant:
    """With this share of the steps on painted boxes."""
    first = round(STEPS * painted)
    steps = {"self_tracking_steps": first, "clean_steps": STEPS - first}
    return Variant(title, RECIPE, {**SHARED, **steps})


VARIANTS = {
    "base": Variant("no control"),
    "tracklets": variant("tracklets", 0.6),
    "clean": variant("… without self-tracking", 0.0),
}
SHOWN = ("a sprite", "another", "a third")
SPRITES = 8


@cache
def studio() -> Any:
    from toyworld.studio import SvdStudio

    return SvdStudio()


def control(run: Run, variant: Variant, folder: Path) -> Path:
    """The file of a variant and seed; trained unless it is there."""
    from toyworld import personalise, steer

    made_of = hashlib.sha256(SHEET.made_of(run).encode()).hexdigest()[:12]
    kept = PACK / ".runtime" / "svd_steering_controls" / f"{run.variant}-{run.seed}-{made_of}.safetensors"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):  # another process may be training it for another concept
        if not kept.is_file():
            data = steer.training_data(studio(), run.seed)
            files = personalise.train(studio(), data, variant.recipe, {**variant.options, "seed": run.seed}, folder)
            shutil.copyfile(files[-1], kept)
    return kept


def measure(run: Run, variant: Variant, folder: Path) -> tuple[dict[str, float], list[Any]]:
    from toyworld import steer, world

    file = control(run, variant, folder) if variant.recipe else None
    motion = world.CONCEPTS[run.concept].motion

    def model(clip: world.Clip) -> Any:
        return steer.steered(studio(), file, clip) if file else studio().model

    clips = [steer.on_path(motion, 2_000_000 + 1000 * run.seed + number) for number in range(SPRITES)]
    scores, videos = steer.score(clips, model, studio(), len(SHOWN))
    return scores, [outlined(*pair) for pair in zip(clips, videos, strict=False)]


def outlined(clip: Any, video: Any) -> Any:
    """The video with the asked box in white in each frame."""
    from toyworld import steer
    from toyworld.install import STRIDE

    frames = [Image.fromarray(frame) for frame in video]
    asked = steer.bounds(clip.mask[::STRIDE] > 0.5).repeat(STRIDE, axis=0)[: len(frames)]  # each is shown twice
    for frame, (left, top, right, bottom) in zip(frames, asked, strict=True):
        ImageDraw.Draw(frame).rectangle((left - 1, top - 1, right, bottom), outline="white")
    return np.stack(frames)


CODE = ("world", "oracle", "install", "studio", "personalise", "steer", "train_vae")
SHEET = Sheet("svd_steering", VARIANTS, measure, SHOWN, CODE)

if __name__ == "__main__":
    main(SHEET, __doc__)
