"""Nodes that encode training data."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ...trainers.core.data import Row, TrainingData
from ..lists import by_place, for_each, only, only_each
from ..widgets import widget
from ..wires import TrainingDataType
from .encoding.text_rows import encode
from .encoding.vae import frame_step
from .inputs import EncodeNode, FolderNode, alpha_as_mask, clip_sources, flip, folder_and_role, output
from .priors import PriorClips
from .reading import captions
from .reading.cutting import Clip, ClipPlan, Options, plan
from .reading.folder import Reading, plan_folder
from .reading.framing import check_length
from .reading.sources import Source, from_tensor


def vae_and_text_encoder() -> list[io.Input]:
    return [
        io.Vae.Input("vae", tooltip="The VAE of the model that will be trained."),
        io.Clip.Input("clip", tooltip="The text encoder of the model that will be trained."),
    ]


def clip_widgets(frames: str) -> list[io.Input]:
    """The widgets for cutting and encoding clips. `frames` names the inputs that have no frame rate of their own."""
    return [
        *(widget(option) for option in fields(Options)),
        io.Float.Input(
            "source_fps",
            default=16.0,
            min=0.01,
            max=240.0,
            step=0.01,
            advanced=True,
            tooltip=f"Frame rate of {frames}. Change it if it is not 16 frames per second.",
        ),
    ]


class EncodeClips(EncodeNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomEncodeClips",
            display_name="Encode Training Clips",
            category="Kinoloom/data",
            description="Encodes a clip, or a list of clips and photos, with captions for training. Encoded clips are "
            "cached on disk.",
            is_input_list=True,
            search_aliases=["dataset", "video lora", "training data"],
            inputs=[
                *vae_and_text_encoder(),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The frames of the clip, or one photo. Each item of a list, such as the output of Load "
                    "Image-Text (from Folder), is a clip or photo. Connect either this or video.",
                ),
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip="The clip as a video, whose own frame rate is used. Connect either this or images.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White where the loss counts: one mask per frame, or one for all. Connect it to train on "
                    "the subject and not its surroundings.",
                ),
                io.String.Input(
                    "caption",
                    multiline=True,
                    tooltip="The appearance: subject and surroundings. For Set-and-Sequence write [v] before the "
                    "subject. Captions are read literally: (word:1.2) is not a weight. A list holds one caption for "
                    "each clip.",
                ),
                io.String.Input(
                    "motion_caption",
                    multiline=True,
                    default="",
                    tooltip="The caption again and the motion, with [u] before the motion. If empty, caption is used.",
                ),
                *clip_widgets("images"),
                flip(),
            ],
            outputs=[TrainingDataType.Output(display_name="data", tooltip="For a training node.")],
        )

    @classmethod
    def execute(
        cls,
        vae: Any,
        clip: Any,
        caption: Any,
        source_fps: Any,
        images: Any = None,
        video: Any = None,
        masks: Any = None,
        motion_caption: Any = "",
        flip: Any = False,
        **options: Any,
    ) -> io.NodeOutput:
        vae, text_encoder, chosen = only("vae", vae), only("clip", clip), Options(**only_each(options))
        step = frame_step(vae)
        check_length(chosen.frames_per_clip, step)
        sources = clip_sources(images, video, only("source_fps", source_fps))
        texts = (by_place(*given, len(sources)) for given in (("caption", caption), ("motion_caption", motion_caption)))
        clips = list(zip(sources, *texts, by_place("masks", masks, len(sources)), strict=True))

        def planned(given: tuple[Source, str, str, Any]) -> ClipPlan:
            source, still, moving, masked = given
            mask = None if masked is None else from_tensor("masks", masked, source.fps)
            with_frames = chosen.single_frames > 0
            written = captions.resolve(still, "", moving, photo=source.photo, with_frames=with_frames)
            return plan(Clip(source, written, mask), chosen, step)

        plans = for_each(planned, clips, lambda given: given[0].name)
        return io.NodeOutput(encode(plans, "train", chosen, vae, text_encoder, flip=only("flip", flip)))


class ClipsFromFolder(FolderNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomClipsFromFolder",
            display_name="Training Clips from Folder",
            category="Kinoloom/data",
            description="Encodes the videos, photos and folders of numbered frames in a folder of ComfyUI's input "
            "folder. Captions are text files of the same name: dance.txt, or dance.static.txt and "
            "dance.motion.txt. Masks are dance.mask.mp4, dance.mask.png or the folder dance.mask.",
            search_aliases=["dataset", "video lora", "training data", "load folder"],
            inputs=[
                *vae_and_text_encoder(),
                *folder_and_role(),
                *clip_widgets("folders of frames"),
                alpha_as_mask(),
                flip(),
            ],
            outputs=[TrainingDataType.Output(display_name="data", tooltip="For a training node.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        vae: Any,
        clip: Any,
        folder: str,
        role: str,
        source_fps: float,
        alpha_as_mask: bool = False,
        flip: bool = False,
        **options: Any,
    ) -> io.NodeOutput:
        chosen = Options(**options)
        check_length(chosen.frames_per_clip, frame_step(vae))
        root = Path(folder_paths.get_input_directory())
        reading = Reading(source_fps, alpha_as_mask=alpha_as_mask)
        plans, notes = plan_folder(root, folder, reading, chosen, frame_step(vae))
        data = encode(plans, role, chosen, vae, clip, flip=flip)
        return output(cls, data, notes) if notes else io.NodeOutput(data)


class CombineData(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomCombineData",
            display_name="Combine Training Data",
            category="Kinoloom/data",
            description="Joins training data. Clips that are in both are used once.",
            search_aliases=["merge datasets", "concatenate training data"],
            inputs=[
                TrainingDataType.Input("data_1", tooltip="Training data."),
                TrainingDataType.Input("data_2", tooltip="Training data to add. Chain nodes to join more than two."),
            ],
            outputs=[TrainingDataType.Output(display_name="data", tooltip="For a training node.")],
        )

    @classmethod
    def execute(cls, data_1: TrainingData, data_2: TrainingData) -> io.NodeOutput:
        return io.NodeOutput(combine(data_1, data_2))


def combine(first: TrainingData, second: TrainingData) -> TrainingData:
    if first.folder != second.folder:
        raise ValueError(f"training data in {first.folder} and in {second.folder} cannot be combined: encode it again")
    rows: dict[tuple, Row] = {}
    for row in (*first.rows, *second.rows):
        rows.setdefault((row.unit, row.role, row.group, *sorted(row.columns.items())), row)
    return TrainingData(first.folder, tuple(rows.values()))


NODES: list[type[io.ComfyNode]] = [EncodeClips, ClipsFromFolder, PriorClips, CombineData]
