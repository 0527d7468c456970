"""A clip's captions: one of its appearance for single frames, one that also describes its motion for the clip."""

import logging
from dataclasses import dataclass
from pathlib import Path

MOTION_TOKEN, SUBJECT_TOKEN = "[u]", "[v]"
KINDS = {"plain": (".txt", ".caption"), "static": (".static.txt",), "motion": (".motion.txt",)}


@dataclass(frozen=True)
class Captions:
    """static: the appearance, for single frames. motion: the appearance and what happens, for the clip."""

    static: str
    motion: str


def resolve(plain: str, static: str, motion: str, *, photo: bool, with_frames: bool) -> Captions:
    """Captions from the user's texts. A missing caption is replaced by the other one.

    A plain caption is used as the static one. ValueError if there is no caption, or if the caption of single frames
    holds the motion token, because they show no motion.
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
            "better with two: a static one (appearance, may hold %s) and a motion one (appearance and what "
            "happens, with %s).",
            ", ".join(names),
            SUBJECT_TOKEN,
            MOTION_TOKEN,
        )


def read_captions(path: Path, table: str = "", *, photo: bool, with_frames: bool) -> Captions:
    """A clip's captions, from the text files beside it or from `table`, its text in metadata.jsonl or metadata.csv.

    The text files are clip.txt or clip.mp4.txt, clip.static.txt and clip.motion.txt; a folder of frames may
    hold caption.txt, caption.static.txt and caption.motion.txt instead. ValueError if two differ.
    """
    stem = path.name if path.is_dir() else path.stem
    texts = {}
    for kind, suffixes in KINDS.items():
        beside = [path.with_name(name + suffix) for name in dict.fromkeys((stem, path.name)) for suffix in suffixes]
        inside = [path / f"caption{suffix}" for suffix in suffixes] if path.is_dir() else []
        found = {file.name: _read(file).strip() for file in beside if file.is_file()}
        if kind == "plain" and table:
            found["metadata"] = table
        found = found or {file.name: _read(file).strip() for file in inside if file.is_file()}
        if len(set(found.values())) > 1:
            raise ValueError(f"has captions that differ: {', '.join(found)}. Keep one")
        texts[kind] = next(iter(found.values()), "")
    if not any(texts.values()):
        raise ValueError(f"has no caption: write one into {stem}.txt")
    return resolve(**texts, photo=photo, with_frames=with_frames)


def captioned(file: Path) -> str:
    """The stem or name of the clip that a caption file belongs to; "" if the file is not a caption."""
    suffixes = sorted((suffix for own in KINDS.values() for suffix in own), key=len, reverse=True)
    return next((file.name.removesuffix(suffix) for suffix in suffixes if file.name.endswith(suffix)), "")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text") from error
