"""Nodes that make training data."""

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
from comfy_api.latest import InputImpl, io
from server import PromptServer

from ..trainers.core.config import check
from ..trainers.core.data import Row, TrainingData
from . import captions, videos
from .columns import frame_step
from .encode import ROLES, Clip, Options, check_role, encode, plan
from .folder import Reading, listing, plan_folder, resolve_folder
from .framing import check_length
from .priors import PriorOptions, Sampler, add_priors, read_prompts
from .sources import Source, from_tensor
from .widgets import UNCONNECTED, TrainingDataType, require_one, widget

LIKE_GENERATION = "Use what you use for generation."


def vae_and_text_encoder() -> list[io.Input]:
    return [
        io.Vae.Input("vae", tooltip="The VAE of the model that will be trained."),
        io.Clip.Input("clip", tooltip="The text encoder of the model that will be trained."),
    ]


def clip_widgets(frames: str) -> list[io.Input]:
    """The options for cutting and encoding clips; `frames` names what does not tell its own frame rate."""
    return [
        *(widget(option) for option in fields(Options)),
        io.Float.Input(
            "source_fps",
            default=16.0,
            min=0.01,
            max=240.0,
            step=0.01,
            advanced=True,
            tooltip=f"Frame rate of {frames}. Change it if they were not taken at 16 frames per second.",
        ),
    ]


class EncodeClips(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomEncodeClips",
            display_name="Encode Training Clips",
            category="Kinoloom/data",
            description="Encodes one clip and its captions for training. What was encoded before is taken from disk.",
            search_aliases=["dataset", "video lora", "training data"],
            inputs=[
                *vae_and_text_encoder(),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The frames of the clip, or one photo. Connect either this or video.",
                ),
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip="The clip as a video, whose own frame rate is used. Connect either this or images.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Where the loss counts: one mask per frame, or one for "
                    "all. Connect it to train on the subject and not its surroundings.",
                ),
                io.String.Input(
                    "caption",
                    multiline=True,
                    tooltip="What is seen: subject and surroundings. For "
                    "Set-and-Sequence describe the appearance here, with [v] before the subject. Read literally: "
                    "(word:1.2) weighs nothing.",
                ),
                io.String.Input(
                    "motion_caption",
                    multiline=True,
                    default="",
                    tooltip="The caption again "
                    "and what happens, with [u] before the motion. Leave it empty to use caption for all.",
                ),
                *clip_widgets("images"),
            ],
            outputs=[TrainingDataType.Output(display_name="data", tooltip="For a training node.")],
        )

    @classmethod
    def validate_inputs(cls, images: Any = UNCONNECTED, video: Any = UNCONNECTED) -> bool:
        return require_one(images, video)

    @classmethod
    def execute(
        cls,
        vae: Any,
        clip: Any,
        caption: str,
        source_fps: float,
        images: Any = None,
        video: Any = None,
        masks: Any = None,
        motion_caption: str = "",
        **options: Any,
    ) -> io.NodeOutput:
        chosen = Options(**options)
        check_length(chosen.frames_per_clip, frame_step(vae))
        require_one(images, video, None)
        source = video_source(video) if images is None else from_tensor("images", images, source_fps)
        mask = None if masks is None else from_tensor("masks", masks, source.fps)
        try:
            written = captions.resolve(
                caption, "", motion_caption, photo=source.photo, with_frames=chosen.single_frames > 0
            )
            planned = plan(Clip(source, written, mask), chosen, frame_step(vae))
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}") from error
        return io.NodeOutput(encode([planned], "train", chosen, vae, clip))


def video_source(video: Any) -> Source:
    """The VIDEO's file where it is a whole file, else its frames in memory."""
    if isinstance(video, InputImpl.VideoFromFile) and video.get_active_trim_window() == (0.0, 0.0):
        file = video.get_stream_source()
        if isinstance(file, str):
            return videos.video(Path(file))
    parts = video.get_components()
    return from_tensor("video", parts.images, float(parts.frame_rate))


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


def check_folder_options(role: str | None, hold_out: int | None) -> bool:
    """ValueError for widgets that do not fit, alone or together; what arrives by wire is None."""
    if hold_out is not None:
        check(Options.__dataclass_fields__["hold_out"], hold_out)
    check_role(role or "train", hold_out or 0)
    return True


def alpha_as_mask() -> io.Input:
    return io.Boolean.Input(
        "alpha_as_mask",
        default=False,
        advanced=True,
        tooltip="Take the transparency of photos and frames as their mask: only what is opaque counts. A mask file "
        "goes first. Transparent parts are shown white in either case.",
    )


def output(node: type[io.ComfyNode], data: TrainingData, lines: list[str]) -> io.NodeOutput:
    """The data, with lines that are shown on the node."""
    text = "\n".join(lines)
    if node.hidden:  # in a prompt
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)
    return io.NodeOutput(data, ui={"text": (text,)})


class ClipsFromFolder(io.ComfyNode):
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
            ],
            outputs=[TrainingDataType.Output(display_name="data", tooltip="For a training node.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, role: str | None = None, hold_out: int | None = None) -> bool:
        return check_folder_options(role, hold_out)

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, **_: Any) -> float | str:
        """The folder's files; never the same for a folder that arrives by wire, which is None here."""
        if folder is None:
            return float("nan")
        found = listing(resolve_folder(Path(folder_paths.get_input_directory()), folder))
        return hashlib.sha256(repr(found).encode()).hexdigest()

    @classmethod
    def execute(
        cls,
        vae: Any,
        clip: Any,
        folder: str,
        role: str,
        source_fps: float,
        alpha_as_mask: bool = False,
        **options: Any,
    ) -> io.NodeOutput:
        chosen = Options(**options)
        check_length(chosen.frames_per_clip, frame_step(vae))
        root = Path(folder_paths.get_input_directory())
        reading = Reading(source_fps, alpha_as_mask=alpha_as_mask)
        plans, notes = plan_folder(root, folder, reading, chosen, frame_step(vae))
        data = encode(plans, role, chosen, vae, clip)
        return output(cls, data, notes) if notes else io.NodeOutput(data)


class PriorClips(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        options = [(option.metadata["advanced"], widget(option)) for option in fields(PriorOptions)]
        return io.Schema(
            node_id="KinoloomPriorClips",
            display_name="Generate Prior Clips",
            category="Kinoloom/data",
            description="Adds clips that the untrained model generates, at the sizes and lengths of the data. Training "
            "on them as well keeps the model from forgetting other subjects. Made only once.",
            search_aliases=["regularization", "prior preservation", "class images"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be trained, without LoRAs, with your shift."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Its VAE."),
                TrainingDataType.Input("data", tooltip="The encoded clips, which say size and length."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    tooltip="One prompt per line: appearance, then motion, such "
                    "as 'A man in a blue shirt. He walks in a park.' Use ordinary subjects of the same "
                    "kind, without [v] and [u]; about 16 lines. (word:1.2) weighs a word, as in CLIP Text Encode.",
                ),
                io.String.Input("negative", multiline=True, default="", tooltip="Negative prompt. " + LIKE_GENERATION),
                *(made for advanced, made in options if not advanced),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.SAMPLER_NAMES, default="uni_pc", tooltip=LIKE_GENERATION
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="simple", tooltip=LIKE_GENERATION
                ),
                *(made for advanced, made in options if advanced),
            ],
            outputs=[TrainingDataType.Output(display_name="data", tooltip="The data and the prior clips.")],
        )

    @classmethod
    def validate_inputs(cls, prompts: str | None = None) -> bool:
        if prompts is not None:  # does not arrive by wire
            read_prompts(prompts)
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        data: TrainingData,
        prompts: str,
        negative: str,
        sampler_name: str,
        scheduler: str,
        **options: Any,
    ) -> io.NodeOutput:
        chosen = PriorOptions(**options)
        sampler = Sampler(model, clip, sampler_name, scheduler, negative, chosen.steps, chosen.cfg)
        return io.NodeOutput(add_priors(data, sampler, vae, read_prompts(prompts), chosen))


class CombineData(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomCombineData",
            display_name="Combine Training Data",
            category="Kinoloom/data",
            description="Joins training data; what is in both counts once.",
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
        rows.setdefault((row.split, row.role, *sorted(row.columns.items())), row)
    return TrainingData(first.folder, tuple(rows.values()))


NODES: list[type[io.ComfyNode]] = [EncodeClips, ClipsFromFolder, PriorClips, CombineData]
