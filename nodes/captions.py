"""The captions of a clip: what is seen (for single frames) and what is seen to move (for the clip)."""

import logging
from dataclasses import dataclass
from pathlib import Path

MOTION_TOKEN, SUBJECT_TOKEN = "[u]", "[v]"


@dataclass(frozen=True)
class Captions:
    """static: appearance, for frames as a set. motion: the same and what happens, for the clip."""

    static: str
    motion: str


def resolve(plain: str, static: str, motion: str, *, photo: bool, with_frames: bool) -> Captions:
    """Captions from what the user wrote; one that is missing is replaced by the other.

    A plain caption stands for the static one. ValueError if there is no caption, or if the motion token gets into the
    caption of single frames, which show no motion.
    """
    plain, static, motion = plain.strip(), static.strip(), motion.strip()
    still = static or plain or motion
    moving = still if photo else motion or plain or static
    if not still:
        raise ValueError("has no caption")
    if (with_frames or photo) and MOTION_TOKEN in still:
        raise ValueError(
            f"its appearance caption contains the motion token {MOTION_TOKEN}, but single frames show no "
            "motion: add a caption without it for the frames, or set single_frames to 0"
        )
    return Captions(still, moving)


def serves_both(captions: Captions, *, photo: bool, with_frames: bool) -> bool:
    return with_frames and not photo and captions.static == captions.motion


def warn_serves_both(names: list[str]) -> None:
    if names:
        logging.warning(
            "Kinoloom: one caption serves the clip and its single frames: %s. Set-and-Sequence learns "
            "better with two: a static one (appearance, may hold %s) and a motion one (the same and what "
            "happens, with %s).",
            ", ".join(names),
            SUBJECT_TOKEN,
            MOTION_TOKEN,
        )


def read_captions(path: Path, *, photo: bool, with_frames: bool) -> Captions:
    """Captions beside a clip: clip.txt, or clip.static.txt and clip.motion.txt; in a folder of frames, caption.*"""
    stem = path.name if path.is_dir() else path.stem
    texts = {}
    for kind in ("txt", "static.txt", "motion.txt"):
        inside = [path / f"caption.{kind}"] if path.is_dir() else []
        texts[kind] = next((_read(file) for file in (path.with_name(f"{stem}.{kind}"), *inside) if file.is_file()), "")
    if not any(text.strip() for text in texts.values()):
        raise ValueError(f"has no caption: write one into {stem}.txt")
    return resolve(*texts.values(), photo=photo, with_frames=with_frames)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text") from error
