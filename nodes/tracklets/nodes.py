"""Nodes that draw, load and show tracklets: boxes that follow objects through a clip."""

import hashlib
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw
from torch import Tensor

from ...trainers.conditions.tracklet_painting import paint
from ...trainers.conditions.tracklet_sources import from_masks
from ...trainers.conditions.tracklets import MAX_FRAMES, MAX_SIDE, Tracklets, to_tensors
from ..data.reading.tracklet_files import load_tracklets
from ..wires import TrackletsType

CATEGORY = "Kinoloom/tracklets"
SUFFIXES = (".json", ".csv")


def size_widgets(why: str, step: int) -> list[io.Input]:
    return [
        io.Int.Input("width", default=1024, min=16, max=MAX_SIDE, step=step, tooltip=f"Width of the video {why}"),
        io.Int.Input("height", default=576, min=16, max=MAX_SIDE, step=step, tooltip=f"Height of the video {why}"),
    ]


class DrawTracklets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomTracklets",
            display_name="Draw Tracklets",
            category=CATEGORY,
            description="An editor for boxes that objects follow: draw boxes on the first frame and move them through "
            "the clip. Each move makes a key frame; between key frames boxes are interpolated.",
            search_aliases=["bounding box", "trajectory", "motion control", "boximator", "box animation"],
            has_intermediate_output=True,  # else the editor gets no first frame when the node is cached
            inputs=[
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The first frame, to draw on. An image of Load Image is shown at once, others after a run.",
                ),
                *size_widgets("to generate. Boxes for another aspect ratio are cropped like a centre crop.", 8),
                io.Int.Input(
                    "frames",
                    default=14,
                    min=1,
                    max=MAX_FRAMES,
                    tooltip="Frames of the video to generate. Boxes for another number of frames keep their time.",
                ),
                io.String.Input(
                    "json",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    socketless=True,
                    tooltip="The editor's boxes as JSON. The button JSON shows it. Edit it for exact numbers.",
                ),
            ],
            outputs=[
                TrackletsType.Output(display_name="tracklets", tooltip="The boxes."),
                io.String.Output(display_name="json", tooltip="The same as text, to be saved or shown."),
            ],
        )

    @classmethod
    def validate_inputs(cls, json: str | None = None) -> bool:
        """ValueError for text that is not tracklets. None is a connected input."""
        if json and json.strip():
            Tracklets.from_json(json)
        return True

    @classmethod
    def execute(cls, width: int, height: int, frames: int, json: str, image: Tensor | None = None) -> io.NodeOutput:
        drawn = Tracklets.from_json(json) if json.strip() else Tracklets(width, height, frames)
        made = drawn.fit(width, height).retime(frames)
        shown = [] if image is None else save_frame(image[:1], cls)
        return io.NodeOutput(made, made.to_json(), ui={"kinoloom_frame": shown})


def save_frame(image: Tensor, cls: type[io.ComfyNode]) -> list[dict[str, str]]:
    """Save an image [1, H, W, C] in the temp folder for the editor, and return its place."""
    return ui.ImageSaveHelper.save_images(
        image[..., :3], "kinoloom_tracklets", io.FolderType.temp, cls, compress_level=1
    )


class LoadTracklets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomLoadTracklets",
            display_name="Load Tracklets",
            category=CATEGORY,
            description="Reads boxes from a file in ComfyUI's input folder: the JSON of Draw Tracklets, or a tracker's "
            "CSV in MOT Challenge format.",
            search_aliases=["bounding box", "mot challenge", "tracking csv", "trajectory"],
            inputs=[
                io.Combo.Input("file", options=input_files(), tooltip="A .json or .csv file of the input folder."),
                *size_widgets("that was tracked, in pixels; for CSV only.", 1),
                io.Float.Input(
                    "source_fps",
                    default=24.0,
                    min=0.01,
                    max=240.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Frame rate of the tracked video. Set it if you change fps; for CSV only.",
                ),
                io.Float.Input(
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=240.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Frame rate to convert to, 0 for every frame. Set it if your model generates fewer frames "
                    "per second than the tracked video has; for CSV only.",
                ),
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=MAX_FRAMES,
                    optional=True,
                    advanced=True,
                    tooltip="Frames of the tracked video, 0 up to the last box. Set it if all objects leave before the "
                    "end; for CSV only.",
                ),
            ],
            outputs=[TrackletsType.Output(display_name="tracklets", tooltip="The boxes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_: Any) -> float | str:
        """A hash of the file's content. NaN, which equals nothing, if the file is a connected input."""
        return float("nan") if file is None else hashlib.sha256(input_file(file).read_bytes()).hexdigest()

    @classmethod
    def execute(
        cls, file: str, width: int, height: int, source_fps: float, fps: float, frames: int = 0
    ) -> io.NodeOutput:
        path = input_file(file)
        try:
            tracked = load_tracklets(path, width, height, frames or None)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if fps and path.suffix.lower() == ".csv":
            tracked = tracked.retime(round((tracked.frames - 1) * fps / source_fps) + 1)
        return io.NodeOutput(tracked)


def input_files() -> list[str]:
    folder = Path(folder_paths.get_input_directory())
    return sorted(file.name for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def input_file(name: str) -> Path:
    """The path of a file in the input folder. ValueError if there is none."""
    path = Path(folder_paths.get_annotated_filepath(name))
    if not path.is_file():
        raise ValueError(f"file={name!r}: expected a .json or .csv file in {folder_paths.get_input_directory()}")
    return path


class TrackletsFromMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomTrackletsFromMasks",
            display_name="Tracklets from Masks",
            category=CATEGORY,
            description="Makes boxes from one object's masks, for example of a video segmentation. Chain nodes for "
            "more objects.",
            search_aliases=["bounding box", "segmentation", "mask to box", "sam"],
            inputs=[
                io.Mask.Input("masks", tooltip="One mask of the object per frame. Pixels above 0.5 count."),
                TrackletsType.Input(
                    "tracklets",
                    optional=True,
                    tooltip="Tracklets of the same frames, to which the object is added, for several objects.",
                ),
                io.String.Input(
                    "name", default="", tooltip="The object's name. Leave it empty for object 1, object 2, …"
                ),
            ],
            outputs=[TrackletsType.Output(display_name="tracklets", tooltip="The boxes.")],
        )

    @classmethod
    def execute(cls, masks: Tensor, name: str, tracklets: Tracklets | None = None) -> io.NodeOutput:
        frames, height, width = masks.shape
        before = tracklets or Tracklets(width, height, frames)
        if before.frames != frames:
            raise ValueError(f"masks: {frames} frames: expected {before.frames}, as many as in tracklets")
        number = max((item.id for item in before.tracklets), default=0) + 1
        found = from_masks((masks > 0.5).int() * number).fit(before.width, before.height)
        if not found.tracklets:
            raise ValueError("masks: empty in every frame: expected an object")
        return io.NodeOutput(before.add(found.tracklets[0], name))


class PreviewTracklets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomPaintTracklets",
            display_name="Preview Tracklets",
            category=CATEGORY,
            description="Paints the outlines of the boxes on frames, or on black ones.",
            search_aliases=["draw bounding box", "paint boxes", "visualize trajectory"],
            inputs=[
                TrackletsType.Input("tracklets", tooltip="The boxes."),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The frames to paint on; a single image is used for all. Leave it out for black frames.",
                ),
                io.Int.Input(
                    "line_width",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="In pixels. Training on painted boxes uses 4. Raise it to see the boxes better.",
                ),
                io.Boolean.Input(
                    "skip_first",
                    default=False,
                    tooltip="Paint nothing on the first frame, as for training on painted boxes.",
                ),
                io.Boolean.Input(
                    "labels", default=False, tooltip="Also write ids and names. Turn it off for training."
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The painted frames.")],
        )

    @classmethod
    def execute(
        cls, tracklets: Tracklets, line_width: int, skip_first: bool, labels: bool, images: Tensor | None = None
    ) -> io.NodeOutput:
        if images is None:
            images = torch.zeros(tracklets.frames, tracklets.height, tracklets.width, 3)
        elif len(images) == 1:
            images = images.expand(tracklets.frames, -1, -1, -1)
        frames, height, width = images.shape[:3]
        boxes, mask = to_tensors(tracklets, frames, (width, height))
        painted = paint(images[..., :3], boxes, mask, line_width, skip_first)
        if labels:
            painted = torch.stack([write_labels(painted[t], tracklets, boxes[t], mask[t]) for t in range(frames)])
        return io.NodeOutput(painted)


def write_labels(frame: Tensor, tracklets: Tracklets, boxes: Tensor, mask: Tensor) -> Tensor:
    """A frame [H, W, 3] with id and name in the corner of each present box [20, 8]."""
    height, width = frame.shape[:2]
    picture = Image.fromarray((frame.cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for slot, item in enumerate(tracklets.tracklets):
        if mask[slot]:
            corner = boxes[slot, 0].item() * width + 8, boxes[slot, 1].item() * height + 6
            text, size = f"{item.id} {item.name}", max(height // 30, 10)
            draw.text(corner, text, fill=item.color, font_size=size, stroke_width=2, stroke_fill="black")
    return torch.from_numpy(np.array(picture)).to(frame) / 255


NODES: list[type[io.ComfyNode]] = [DrawTracklets, LoadTracklets, TrackletsFromMasks, PreviewTracklets]
