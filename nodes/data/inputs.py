"""Inputs that data nodes share, and functions that read them."""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import InputImpl, io
from server import PromptServer

from ...trainers.core.config import check
from ...trainers.core.data import TrainingData
from ..lists import for_each, listed
from ..widgets import UNCONNECTED, require_one
from .reading import videos
from .reading.cutting import ROLES, Options, check_role
from .reading.folder import listing, resolve_folder
from .reading.sources import Source, from_tensor


def clip_sources(images: Any, video: Any, fps: float) -> list[Source]:
    """The clips and photos of the connected input. Items of a list are numbered."""
    require_one(images, video, None)
    name, given = ("images", listed(images)) if video is None else ("video", listed(video))
    if not given:
        raise ValueError(f"{name}: the list is empty, expected one clip or more")
    places = list(enumerate(given, 1))
    found = for_each(
        lambda place: from_tensor(name, place[1], fps) if video is None else video_source(place[1]),
        places,
        lambda place: name if len(given) == 1 else f"{name} #{place[0]}",
    )
    if len(found) > 1:
        found = [replace(source, name=f"{source.name} #{number}") for number, source in enumerate(found, 1)]
    for source in found:
        for note in source.notes:
            logging.warning("Kinoloom: %s: %s", source.name, note)
    return found


def video_source(video: Any) -> Source:
    """The source of a VIDEO: its file, trimmed to its start and end, or its frames in memory."""
    if isinstance(video, InputImpl.VideoFromFile):
        file = video.get_stream_source()
        try:
            source = videos.video(Path(file) if isinstance(file, str) else file, *video.get_active_trim_window())
        except ValueError as error:
            name = Path(file).name if isinstance(file, str) else "video"
            raise ValueError(f"{name}: {error}") from error
        return source
    parts = video.get_components()
    return from_tensor("video", parts.images, float(parts.frame_rate))


def encoders() -> list[io.Input]:
    return [
        io.Vae.Input("vae", tooltip="The VAE of the SVD checkpoint."),
        io.ClipVision.Input("clip_vision", tooltip="CLIP vision of the SVD checkpoint."),
    ]


def folder_and_role() -> list[io.Input]:
    return [
        io.Combo.Input(
            "folder",
            options=folder_paths.get_input_subfolders(),
            tooltip="The folder with the clips, inside ComfyUI's input folder.",
        ),
        io.Combo.Input(
            "role",
            options=list(ROLES),
            default="train",
            tooltip="train: learn the clips. validation: only measure the loss on them. prior: "
            "clips of other subjects, so that the model does not forget them.",
        ),
    ]


def alpha_as_mask() -> io.Input:
    return io.Boolean.Input(
        "alpha_as_mask",
        default=False,
        advanced=True,
        tooltip="Use the transparency of photos and frames as their mask: only opaque pixels count. A mask file takes "
        "precedence. Transparent parts become white in either case.",
    )


def flip() -> io.Input:
    return io.Boolean.Input(
        "flip",
        default=False,
        tooltip="Train on a mirrored copy of every clip too, best if there are few. Leave it off if left and right "
        "matter: for motion to one side, captions that name a side, or writing. Validation clips are not mirrored.",
    )


def output(node: type[io.ComfyNode], data: TrainingData, lines: list[str]) -> io.NodeOutput:
    """The node's output: the data, and lines of text that the node shows."""
    text = "\n".join(lines)
    if node.hidden:  # set while a prompt runs
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)
    return io.NodeOutput(data, ui={"text": (text,)})


class EncodeNode(io.ComfyNode):
    """A node that encodes the clips of its inputs images or video."""

    @classmethod
    def validate_inputs(cls, images: Any = UNCONNECTED, video: Any = UNCONNECTED) -> bool:
        return require_one(images, video)


class FolderNode(io.ComfyNode):
    """A node that encodes the clips of a folder."""

    @classmethod
    def validate_inputs(cls, role: str | None = None, hold_out: int | None = None) -> bool:
        """ValueError for widgets with wrong values, alone or together. Connected inputs are None."""
        if hold_out is not None:
            check(Options.__dataclass_fields__["hold_out"], hold_out)
        check_role(role or "train", hold_out or 0)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, **_: Any) -> float | str:
        """A fingerprint of the folder's files. NaN, which equals nothing, if the folder is a connected input."""
        if folder is None:
            return float("nan")
        found = listing(resolve_folder(Path(folder_paths.get_input_directory()), folder))
        return hashlib.sha256(repr(found).encode()).hexdigest()
