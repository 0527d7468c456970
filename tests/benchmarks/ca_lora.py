"""Whether two motion adapters move two sprites of one picture, each in its own way: CA-LoRA on the toy world.

    python tests/benchmarks/ca_lora.py [--seeds 3] [--concepts "square and disc" ...] [--variants ...] [--output FOLDER]

COMFYUI_DIR says where ComfyUI is. An adapter is trained on ten clips of single sprites of one kind with a motion that
the base model has never seen, another on another kind with another motion. Then pictures with a sprite of each kind
are animated, and each sprite's path is compared with both motions. What the scores mean is said in
tests/toyworld/animate.py. Rows that sample in other ways share the adapters. Results stay in FOLDER; a second run
makes only what is missing or was made otherwise, then writes table.md and one contact sheet per concept.

Settings were chosen on "triangle and ring", which is not reported.
"""

import fcntl
import hashlib
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from scoresheet import PACK, Run, Sheet, Variant, main, toyworld

RECIPE = "KinoloomTrainCaLora"
SHARED = {
    "steps": 120, "frames": 0, "batch_size": 4, "rank": 32, "alpha": 0.0, "learning_rate": 2e-3, "lr_schedule": "linear",
    "warmup_steps": 10, "validate_every": 0, "pooled_norms": False,
}  # fmt: skip
CFG, WEIGHT = 1.0, 0.5  # of each of two adapters; one alone has 1
START = {"first_frame_cond": "cinemo", "use_dct_init": True}
ADAPTERS = PACK / ".runtime" / "ca_lora_adapters"
PICTURES = 3  # of every run


def variant(title: str, mode: str = "residual", start: dict[str, Any] = START, **options: Any) -> Variant:
    return Variant(title, RECIPE, {"mode": mode, "start": start, "train": {**SHARED, **options}})


VARIANTS = {
    "base": Variant("base model, no adapter"),
    "residual": variant("two adapters, residual"),
    "one": variant("one adapter", "alone"),
    "weights": variant("two adapters, weights", "weights"),
    "bins": variant("… residual, with orthogonal bins", oa_bin=0),
    "no-cross": variant("… residual, without CA-LoRA", train_cross=False),
    "no-image": variant("… residual, without the I2V-Adapter", train_image=False),
    "lamp": variant("… residual, without cinemo and DCTInit", start={}),
}
SHOWN = tuple(f"picture {number + 1}" for number in range(3))
CODE = ("world", "oracle", "pairs", "pair_oracle", "lessons", "animate", "install", "studio", "personalise")


@cache
def studio() -> Any:
    from toyworld.studio import PairStudio

    return PairStudio()


def adapter(lesson: Any, options: dict[str, Any], seed: int) -> Path:
    """The file of an adapter, trained once for all rows that use it."""
    from toyworld import animate, personalise

    made_of = repr((lesson, sorted(options.items()), seed, toyworld(CODE)))
    folder = ADAPTERS / hashlib.sha256(made_of.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "adapter.safetensors").is_file():
            shutil.rmtree(folder / "run", ignore_errors=True)
            data = animate.training_data(studio(), lesson)
            files = personalise.train(studio(), data, RECIPE, {**options, "seed": seed}, folder / "run")
            shutil.copy(next(file for file in files if "adapter" in file.name), folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def measure(run: Run, variant: Variant, folder: Path) -> tuple[dict[str, float], list[Any]]:
    from toyworld import animate
    from toyworld.lessons import CONCEPTS

    lessons, chosen = CONCEPTS[run.concept], variant.options
    pictures = animate.pictures(lessons, run.seed, PICTURES)
    files = []
    for number, lesson in enumerate(lessons if variant.recipe else ()):
        bins = {"oa_bin": number} if "oa_bin" in chosen["train"] else {}
        files.append(adapter(lesson, {**chosen["train"], **bins}, run.seed))
    if not files:
        return scores(run, pictures, [()], "residual", START)
    weights = (1.0, 1.0) if chosen["mode"] == "alone" else (WEIGHT, WEIGHT)
    played = list(zip(files, weights, lessons, strict=True))
    casts = [(one,) for one in played] if chosen["mode"] == "alone" else [tuple(played)]
    mode = "residual" if chosen["mode"] == "alone" else chosen["mode"]
    return scores(run, pictures, casts, mode, chosen["start"])


def scores(
    run: Run, pictures: list[Any], casts: list[tuple[Any, ...]], mode: str, start: dict[str, Any]
) -> tuple[dict[str, float], list[Any]]:
    """Means over all pictures, each animated with every cast of adapters. A sprite without one of a cast's adapters has
    only the score of the other's motion.
    """
    from statistics import mean

    from toyworld import animate
    from toyworld.lessons import CONCEPTS

    lessons, videos = CONCEPTS[run.concept], []
    found: dict[str, list[float]] = {"own": [], "other": [], "look": [], "first": []}
    for cast in casts:
        for number, picture in enumerate(pictures):
            played = [(file, weight, picture.prompt(lesson)) for file, weight, lesson in cast]
            model = studio().with_adapters(played, mode)
            seed = 1000 * run.seed + number
            video, kept = studio().animate(model, picture.image, picture.look, seed, CFG, **start)
            playing = [lesson for _, _, lesson in cast] or list(lessons)
            pairs_of = zip(animate.score(video, picture, lessons), lessons, reversed(lessons), strict=True)
            for one, own, other in pairs_of:
                found["own"] += [one.own] * (own in playing)
                found["other"] += [one.other] * (other in playing)
                found["look"].append(one.look)
            found["first"].append(float(kept))
            videos.append(video)
    names = {"own": "own_motion", "other": "other's_motion", "look": "look_kept", "first": "first_frame_kept"}
    return {names[key]: float(mean(values)) for key, values in found.items()}, videos[: len(SHOWN)]


def clips(concept: str) -> dict[str, list[Any]]:
    """Of each adapter, the first clips that it is trained on."""
    from toyworld import lessons

    return {
        f"clips of the {lesson.shape}": [video for video, _ in lessons.clips(lesson)[: len(SHOWN)]]
        for lesson in lessons.CONCEPTS[concept]
    }


REPORTED = ("square and disc", "cross and square", "disc and bar")
SHEET = Sheet("ca_lora", VARIANTS, measure, SHOWN, CODE, concepts=REPORTED, clips=clips)

if __name__ == "__main__":
    main(SHEET, __doc__)
