"""Lists a folder's training clips and their masks, and explains why other files are not used."""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from .captions import captioned
from .metadata import TABLES
from .photos import IMAGE_SUFFIXES, images_in, is_image
from .sources import natural_key
from .videos import VIDEO_SUFFIXES

MASK = ".mask"
TRACKLETS = (".json", ".csv")
SYSTEM = ("thumbs.db", "desktop.ini")
OF_ITS_OWN = "choose it as a folder of its own, and join both with Combine Training Data"


@dataclass(frozen=True)
class Contents:
    """masks: by their clip's stem. rest: captions, tracklets and unused files."""

    clips: list[Path]
    masks: dict[str, list[Path]]
    rest: list[Path]


def read_contents(folder: Path) -> Contents:
    clips, masks, rest = [], defaultdict(list), []
    for path in sorted(folder.iterdir(), key=natural_key):
        if path.name.startswith(".") or path.name.lower() in SYSTEM:
            continue
        if not _is_clip(path):
            rest.append(path)
        elif stem(path).endswith(MASK) and stem(path) != MASK:
            masks[stem(path).removesuffix(MASK)].append(path)
        else:
            clips.append(path)
    return Contents(clips, dict(masks), rest)


def stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def unused(folder: Path, contents: Contents, table: dict[str, str]) -> tuple[list[str], dict[str, list[str]]]:
    """Unused files: problems (masks, and files with a caption, one sentence each) and other names by reason."""
    stems = {stem(clip) for clip in contents.clips}
    names = stems | {clip.name for clip in contents.clips}
    problems = [
        f"{mask.name}: no clip is called {of}" for of, own in contents.masks.items() if of not in stems for mask in own
    ]
    rest = [path for path in contents.rest if captioned(path) not in names and not _known(path, stems)]
    strays = {captioned(path) for path in rest} - {""}
    reasons: dict[str, list[str]] = defaultdict(list)
    for path in rest:
        if captioned(path):
            reasons["no clip has this name"].append(path.name)
        elif path.stem.endswith(MASK) or path.name in table or strays & {path.name, path.stem}:
            problems.append(f"{path.name}: {_why(path)}")
        else:
            reasons[_why(path)].append(path.name)
    for name in table.keys() - {path.name for path in (*contents.clips, *contents.rest)}:
        if os.path.exists(folder / name):
            problems.append(f"{name}: has a caption in the folder's metadata, but is not a clip in this folder")
        else:
            reasons["in the folder's metadata, but no such file"].append(name)
    for clip in contents.clips:
        if clip.is_dir():
            reasons["no frame of the clip it lies in"] += [f"{clip.name}/{name}" for name in _no_frames(clip)]
    return problems, {f"not used, {reason}": named for reason, named in reasons.items() if named}


def _known(path: Path, stems: set[str]) -> bool:
    return path.name in TABLES or (path.suffix in TRACKLETS and path.stem in stems)


def _is_clip(path: Path) -> bool:
    if path.is_dir():
        return bool(images_in(path)) and not _is_collection(path)
    return path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES


def _is_collection(folder: Path) -> bool:
    """Whether images in this folder have captions of their own: then they are photos, not the frames of one clip."""
    names = {name for image in images_in(folder) for name in (image.stem, image.name)} - {"caption"}
    return any(file.name in TABLES or captioned(file) in names for file in folder.iterdir())


def _no_frames(folder: Path) -> list[str]:
    files = (path for path in folder.iterdir() if not path.name.startswith(".") and path.name.lower() not in SYSTEM)
    return sorted(path.name for path in files if not is_image(path) and captioned(path) != "caption")


def _why(path: Path) -> str:
    if not path.is_dir():
        return f"{path.suffix or 'a file without suffix'} is not read: save photos as PNG or JPEG, videos as MP4"
    if images_in(path):
        return f"a folder of photos with captions of their own: {OF_ITS_OWN}"
    if any(_is_clip(found) for found in path.rglob("*")):
        return f"a folder with clips in it: {OF_ITS_OWN}"
    return "a folder without clips"
