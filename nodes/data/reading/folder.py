"""Reads a folder of training clips: videos, photos and folders of frames, with captions and masks beside them."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.utils
from torch import Tensor

from .captions import read_captions
from .contents import Contents, read_contents, stem, unused
from .cutting import Clip, ClipPlan, Options, plan
from .framing import SIDE
from .images import read_alpha, read_image
from .metadata import read_metadata
from .photos import is_image, is_transparent, open_images, read_mask
from .sources import Source
from .videos import video


@dataclass(frozen=True)
class Reading:
    """How the clips of a folder are read.

    frames_fps: frame rate of a folder of frames. captioned: whether clips need captions. alpha_as_mask: whether
    transparency is used as the mask of photos and frames that have no mask file.
    """

    frames_fps: float
    captioned: bool = True
    alpha_as_mask: bool = False


def resolve_folder(root: Path, name: str) -> Path:
    """The folder `name` under `root`, with links resolved. ValueError if it is not a folder inside `root`."""
    root = root.resolve()
    if not isinstance(name, str) or "\0" in name:  # the widget may be an input
        raise ValueError(f"folder={name!r}: expected the name of a folder in {root}")
    folder = (root / name).resolve()
    if not folder.is_relative_to(root):
        raise ValueError(f"folder={name!r} leads out of the input folder: copy the clips into {root}")
    if not name.strip() or folder == root or not folder.is_dir():
        raise ValueError(f"folder={name!r}: there is no such folder in {root}")
    return folder


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of every file that a folder's clips may use."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def check_links(folder: Path, root: Path) -> None:
    """ValueError names every symbolic link in the folder that leads out of `root`."""
    leaving = [path for path in sorted(folder.rglob("*")) if not path.resolve().is_relative_to(root.resolve())]
    if leaving:
        names = ", ".join(str(path.relative_to(folder)) for path in leaving)
        raise ValueError(f"{folder.name} holds links that lead out of the input folder: {names}. Copy the files")


def plan_folder(
    root: Path, name: str, reading: Reading, options: Options, step: int, side: int = SIDE
) -> tuple[list[ClipPlan], list[str]]:
    """A plan per clip, in natural order, and notes for the user about unused files and changed colours.

    One ValueError names every clip that cannot be used and says why.
    """
    folder = resolve_folder(root, name)
    check_links(folder, root)
    contents = read_contents(folder)
    table = read_metadata(folder) if reading.captioned else {}
    problems, notes = unused(folder, contents, table)
    plans, bar = [], comfy.utils.ProgressBar(len(contents.clips))
    for path in contents.clips:
        try:
            clip = read_clip(path, contents, table, reading, options.single_frames > 0)
            plans.append(plan(clip, options, step, side))
        except ValueError as error:
            problems.append(f"{path.name}: {error}")
        else:
            for source in (clip.source, clip.mask):
                for note in source.notes if source else ():
                    notes.setdefault(note, []).append(source.name)
        bar.update(1)
    lines = [f"{note}: {', '.join(dict.fromkeys(names))}" for note, names in notes.items()]
    if problems:
        raise ValueError(f"some clips in {name!r} cannot be used:\n- " + "\n- ".join(problems))
    if not plans:
        raise ValueError("\n- ".join([f"folder={name!r} holds no videos, photos or folders of frames", *lines]))
    if lines:
        logging.warning("Kinoloom: in the folder %s\n- %s", name, "\n- ".join(lines))
    return plans, lines


def open_source(path: Path, frames_fps: float, read: Callable[[Path], Tensor] = read_image) -> Source:
    """A video, a photo, or a folder of frames at `frames_fps`. ValueError says why a file cannot be read."""
    return open_images(path, frames_fps, read) if path.is_dir() or is_image(path) else video(path)


def read_clip(path: Path, contents: Contents, table: dict[str, str], reading: Reading, with_frames: bool) -> Clip:
    source = open_source(path, reading.frames_fps)
    captions = None
    if reading.captioned:
        captions = read_captions(path, table.get(path.name, ""), photo=source.photo, with_frames=with_frames)
    return Clip(source, captions, _mask(path, contents.masks.get(stem(path), []), reading))


def _mask(path: Path, found: list[Path], reading: Reading) -> Source | None:
    """A clip's mask: clip.mask.mp4, clip.mask.png or the folder clip.mask. None if there is none."""
    if len(found) > 1:
        raise ValueError(f"has several masks: {', '.join(mask.name for mask in found)}")
    try:
        if found:
            return open_source(found[0], reading.frames_fps, read_mask)
    except ValueError as error:
        raise ValueError(f"its mask {found[0].name}: {error}") from error
    if reading.alpha_as_mask and (path.is_dir() or is_image(path)) and is_transparent(path):
        return open_images(path, reading.frames_fps, read_alpha)
    return None
