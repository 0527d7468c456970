"""Files of tracklets."""

from pathlib import Path

from ....trainers.conditions.tracklets import Tracklets, from_mot


def load_tracklets(path: Path, width: int, height: int, frames: int | None = None) -> Tracklets:
    """A .json file as it is; a .csv of a width x height video, which ends with the last box if not told its frames."""
    text = path.read_text(encoding="utf-8-sig")
    return Tracklets.from_json(text) if path.suffix.lower() == ".json" else from_mot(text, width, height, frames)
