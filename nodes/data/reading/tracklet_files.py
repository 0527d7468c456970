"""Reads tracklet files."""

from pathlib import Path

from ....trainers.conditions.tracklet_sources import from_mot
from ....trainers.conditions.tracklets import Tracklets


def load_tracklets(path: Path, width: int, height: int, frames: int | None = None) -> Tracklets:
    """Tracklets from a .json file, or from a .csv of boxes in a width x height video.

    Without `frames` the video of a .csv ends with its last box.
    """
    text = path.read_text(encoding="utf-8-sig")
    return Tracklets.from_json(text) if path.suffix.lower() == ".json" else from_mot(text, width, height, frames)
