"""The data nodes of Stable Video Diffusion."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ...trainers.backbones.svd.model import SIDE
from ..lists import by_place, for_each, only, only_each
from ..widgets import widget
from ..wires import TrackletsType, TrainingDataType
from .encoding.svd_rows import LARGEST_BUCKET, SvdOptions, encode
from .inputs import EncodeNode, FolderNode, alpha_as_mask, clip_sources, encoders, folder_and_role, output
from .reading.cutting import Clip, plan
from .reading.folder import Reading, plan_folder, resolve_folder
from .reading.tracklet_files import read_tracklets

CAPTIONS = ("single_frames", "token_variants")  # options of models that take text or train on single frames


def inputs() -> Iterable[io.Input]:
    """The last widgets of both nodes."""
    yield from (widget(option) for option in fields(SvdOptions) if option.name not in CAPTIONS)
    yield io.Int.Input(
        "motion_bucket",
        default=0,
        min=0,
        max=LARGEST_BUCKET,
        tooltip="Amount of motion, a condition of the model: 127 is usual. 0 estimates it for each clip and shows it.",
    )
    yield io.Float.Input(
        "source_fps",
        default=7.0,
        min=0.01,
        max=240.0,
        step=0.01,
        advanced=True,
        tooltip="Frame rate of images and folders of frames.",
    )


class EncodeSvdClips(EncodeNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomEncodeSvdClips",
            display_name="Encode Training Clips (SVD)",
            category="Kinoloom/data",
            description="Encodes a clip, or a list of clips, for training Stable Video Diffusion. Encoded clips are "
            "cached on disk.",
            is_input_list=True,
            search_aliases=["dataset", "image to video training data", "stable video diffusion"],
            inputs=[
                *encoders(),
                io.Image.Input(
                    "images", optional=True, tooltip="The frames of the clip. Connect either this or video."
                ),
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip="The clip as a video, whose own frame rate is used. Connect either this or images.",
                ),
                TrackletsType.Input(
                    "tracklets",
                    optional=True,
                    tooltip="Boxes of the objects in all frames of the clip. For Train SVD Tracklets.",
                ),
                *inputs(),
            ],
            outputs=[TrainingDataType.Output(display_name="data", tooltip="For an SVD training node.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        vae: Any,
        clip_vision: Any,
        motion_bucket: Any,
        source_fps: Any,
        images: Any = None,
        video: Any = None,
        tracklets: Any = None,
        **options: Any,
    ) -> io.NodeOutput:
        chosen = SvdOptions(**only_each(options))
        sources = clip_sources(images, video, only("source_fps", source_fps))
        plans = for_each(lambda source: plan(Clip(source, None), chosen, 1, SIDE), sources, lambda source: source.name)
        boxes = [] if tracklets is None else by_place("tracklets", tracklets, len(sources), shared=False)
        tracked = {source.name: drawn for source, drawn in zip(sources, boxes, strict=False)}
        encoders = only("vae", vae), only("clip_vision", clip_vision)
        bucket = only("motion_bucket", motion_bucket)
        return output(cls, *encode(plans, "train", chosen, bucket, *encoders, tracked))


class SvdClipsFromFolder(FolderNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomSvdClipsFromFolder",
            display_name="Training Clips from Folder (SVD)",
            category="Kinoloom/data",
            description="Encodes the videos and folders of numbered frames in a folder of ComfyUI's input folder for "
            "training Stable Video Diffusion. It needs no captions. Tracklets of dance.mp4 are dance.json, or a "
            "tracker's dance.csv (MOT Challenge).",
            search_aliases=["dataset", "image to video training data", "load folder"],
            inputs=[
                *encoders(),
                *folder_and_role(),
                *inputs(),
                alpha_as_mask(),
            ],
            outputs=[TrainingDataType.Output(display_name="data", tooltip="For an SVD training node.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        vae: Any,
        clip_vision: Any,
        folder: str,
        role: str,
        motion_bucket: int,
        source_fps: float,
        alpha_as_mask: bool = False,
        **options: Any,
    ) -> io.NodeOutput:
        chosen = SvdOptions(**options)
        root = Path(folder_paths.get_input_directory())
        reading = Reading(source_fps, captioned=False, alpha_as_mask=alpha_as_mask)
        plans, notes = plan_folder(root, folder, reading, chosen, 1, SIDE)
        tracked = read_tracklets(resolve_folder(root, folder), [planned.clip.source for planned in plans])
        data, lines = encode(plans, role, chosen, motion_bucket, vae, clip_vision, tracked)
        return output(cls, data, notes + lines)


NODES = [EncodeSvdClips, SvdClipsFromFolder]
