"""Reads tracklet files."""

from collections.abc import Iterable
from pathlib import Path

from ....trainers.conditions.tracklet_sources import from_mot
from ....trainers.conditions.tracklets import Tracklets
from .sources import Source


def load_tracklets(path: Path, width: int, height: int, frames: int | None = None) -> Tracklets:
    """Tracklets from a .json file, or from a .csv of boxes in a width x height video.

    Without `frames` the video of a .csv ends with its last box.
    """
    text = path.read_text(encoding="utf-8-sig")
    return Tracklets.from_json(text) if path.suffix.lower() == ".json" else from_mot(text, width, height, frames)


def read_tracklets(folder: Path, sources: Iterable[Source]) -> dict[str, Tracklets]:
    """Tracklets of clips, by clip name, from files beside them: dance.json or dance.csv for dance.mp4 or dance/."""
    found = {}
    for source in sources:
        path = folder / source.name
        stem = path.name if path.is_dir() else path.stem
        for file in (folder / f"{stem}.json", folder / f"{stem}.csv"):
            if file.is_file():
                try:
                    found[source.name] = load_tracklets(file, source.width, source.height, source.count)
                except ValueError as error:
                    raise ValueError(f"{file.name}: {error}") from error
                break
    return found
