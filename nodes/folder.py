"""Training clips in a folder: videos, folders of numbered frames and photos, with captions and masks beside them."""

from pathlib import Path

from .captions import read_captions
from .encode import Clip, ClipPlan, Options, plan
from .framing import SIDE
from .photos import IMAGE_SUFFIXES, frames_folder, images_in, photo
from .sources import Source, natural_key
from .videos import VIDEO_SUFFIXES, video

MASK = ".mask"


def resolve_folder(root: Path, name: str) -> Path:
    """The folder `name` under `root`, links followed; ValueError if that is not a folder inside it."""
    root = root.resolve()
    if not isinstance(name, str) or "\0" in name:  # may arrive by wire
        raise ValueError(f"folder={name!r}: expected the name of a folder in {root}")
    folder = (root / name).resolve()
    if not folder.is_relative_to(root):
        raise ValueError(f"folder={name!r} leads out of the input folder: copy the clips into {root}")
    if not name.strip() or folder == root or not folder.is_dir():
        raise ValueError(f"folder={name!r}: there is no such folder in {root}")
    return folder


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every file a folder's clips may use: changes when any of them does."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def check_links(folder: Path, root: Path) -> None:
    """ValueError names every link in the folder that leads out of `root`."""
    leaving = [path for path in sorted(folder.rglob("*")) if not path.resolve().is_relative_to(root.resolve())]
    if leaving:
        names = ", ".join(str(path.relative_to(folder)) for path in leaving)
        raise ValueError(f"{folder.name} holds links that lead out of the input folder: {names}. Copy the files")


def plan_folder(
    root: Path, name: str, frames_fps: float, options: Options, step: int, *, side: int = SIDE, captioned: bool = True
) -> list[ClipPlan]:
    """A plan per clip, in natural order. One ValueError names every clip that cannot be used, and why."""
    folder = resolve_folder(root, name)
    check_links(folder, root)
    entries = clips_in(folder)
    plans, problems = [], stray_masks(folder, entries)
    for entry in entries:
        try:
            plans.append(plan(read_clip(entry, frames_fps, options, captioned), options, step, side))
        except ValueError as error:
            problems.append(f"{entry.name}: {error}")
    if problems:
        raise ValueError(f"some clips in {name!r} cannot be used:\n- " + "\n- ".join(problems))
    if not plans:
        raise ValueError(f"folder={name!r} holds no videos, photos or folders of frames")
    return plans


def clips_in(folder: Path) -> list[Path]:
    entries = (path for path in folder.iterdir() if not path.name.startswith(".") and not _is_mask(path))
    return sorted((path for path in entries if _is_clip(path)), key=natural_key)


def stray_masks(folder: Path, clips: list[Path]) -> list[str]:
    stems = {_stem(clip) for clip in clips}
    masks = sorted(path for path in folder.iterdir() if _is_mask(path) and _is_clip(path))
    return [f"{mask.name}: no clip is called {_mask_of(mask)}" for mask in masks if _mask_of(mask) not in stems]


def open_source(path: Path, frames_fps: float) -> Source:
    """A video, a photo, or a folder of frames shown at `frames_fps`. ValueError says why a file cannot be read."""
    if path.is_dir():
        return frames_folder(path, frames_fps)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return photo(path)
    return video(path)


def read_clip(path: Path, frames_fps: float, options: Options, captioned: bool) -> Clip:
    source = open_source(path, frames_fps)
    captions = None
    if captioned:
        captions = read_captions(path, photo=source.photo, with_frames=options.single_frames > 0)
    return Clip(source, captions, read_mask(path, frames_fps))


def read_mask(path: Path, frames_fps: float) -> Source | None:
    """clip.mask.mp4, clip.mask.png or the folder clip.mask; None where there is none."""
    found = [mask for mask in path.parent.iterdir() if _mask_of(mask) == _stem(path) and _is_clip(mask)]
    if len(found) > 1:
        raise ValueError(f"has several masks: {', '.join(sorted(mask.name for mask in found))}")
    if not found:
        return None
    try:
        return open_source(found[0], frames_fps)
    except ValueError as error:
        raise ValueError(f"its mask {found[0].name}: {error}") from error


def _is_clip(path: Path) -> bool:
    if path.is_dir():
        return bool(images_in(path))
    return path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES


def _mask_of(path: Path) -> str:
    """The clip's stem from the mask's name; empty for what is no mask."""
    return _stem(path).removesuffix(MASK) if _stem(path).endswith(MASK) else ""


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _is_mask(path: Path) -> bool:
    return bool(_mask_of(path))
