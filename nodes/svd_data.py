"""Training clips for Stable Video Diffusion: latents, and the first frame as the model is given it."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import comfy.utils
import cv2
import folder_paths
import torch
from comfy_api.latest import io
from server import PromptServer
from torch import Tensor

from ..lora_io.file import load
from ..trainers.backbones.svd import SIDE
from ..trainers.core.config import knob
from ..trainers.core.data import Row, TrainingData, column_path
from ..trainers.core.noise import derived_generator
from ..trainers.core.tracklets import MAX_OBJECTS, PALETTE, Tracklets, paint, rgb, to_tensors
from . import clips, identity
from .columns import Columns, data_folder, encode_pixels
from .data import ClipsFromFolder, folder_and_role, video_source
from .encode import Clip, ClipPlan, Options, assign_roles, log_sizes, plan, row_name
from .folder import plan_folder, resolve_folder
from .framing import fit
from .tracklets import load as load_tracklets
from .widgets import TrackletsType, TrainingDataType, widget

DEALS = 4  # of colours to the objects of a clip, one of which a training step draws
NOISINGS = 16  # of each first frame, one of which a training step draws
LOG_NOISE = (-3.0, 0.5)  # mean and spread of ln(augmentation) (arXiv 2311.15127)
FLOW_WIDTH, FLOW_LEAST = 256, 16  # pixels, at which motion is measured; OpenCV crashes on lower pictures
LARGEST_BUCKET = 255
CAPTIONS = ("single_frames", "token_variants")  # options of models that read text or train on single frames


@dataclass(frozen=True, kw_only=True)
class SvdOptions(Options):
    """How clips are cut and sized for Stable Video Diffusion."""

    frames_per_clip: int = knob(
        14, "Frames in one training clip: 14 for svd, 25 for svd_xt. Lower it if memory runs out.", min=2, max=256
    )
    fps: float = knob(
        7.0,
        "Frame rate the clips are brought to, which the model is told. Sample with the same fps in "
        "SVD_img2vid_Conditioning. 0 keeps each file's rate.",
        min=0.0,
        max=240.0,
        step=0.01,
    )
    single_frames: int = knob(0, "Not used: every clip is trained as a whole.", min=0, max=0)
    token_variants: int = knob(0, "Not used: the model reads no text.", min=0, max=0)


def encode(
    plans: list[ClipPlan],
    role: str,
    options: SvdOptions,
    motion_bucket: int,
    vae: Any,
    clip_vision: Any,
    tracked: dict[str, Tracklets],
) -> tuple[TrainingData, list[str]]:
    """The clips as training data, and a line about the motion of each. `tracked` has tracklets by a clip's name."""
    for planned in plans:
        if planned.clip.source.photo:
            raise ValueError(f"{planned.clip.source.name}: is a photo, expected clips of several frames")
        if found := tracked.get(planned.clip.source.name):
            check_tracklets(found, planned.clip.source)
    plans = assign_roles(plans, role, options.hold_out)
    each = [2 + bool(p.clip.mask) + (p.clip.source.name in tracked) for p in plans]
    files = sum(count * len(p.windows) for count, p in zip(each, plans, strict=True))
    columns = Columns(data_folder(), comfy.utils.ProgressBar(files))
    vae_id, vision_id = identity.of_vae(vae), identity.of_patcher(clip_vision.patcher)
    rows, lines = [], []
    for planned in plans:
        source, size = planned.clip.source, (planned.width, planned.height)
        fps = max(round(options.fps or source.fps), 1)
        for window, own in zip(map(list, planned.windows), planned.roles, strict=True):

            def image(
                frames: list[Tensor], key: str = f"{source.digest} {window}", size: tuple = size, fps: int = fps
            ) -> dict:
                pixels = torch.stack([fit(frame, *size) for frame in frames])
                return {
                    **first_frame(pixels[:1], vae, clip_vision, key),
                    "fps": torch.tensor(float(fps)),
                    "motion_bucket": torch.tensor(float(motion_bucket or estimate_motion_bucket(pixels))),
                }

            (latents,) = columns.latents(vae, vae_id, source, [window], *size)
            key = (vae_id, vision_id, source.digest), (*size, fps, motion_bucket)
            (first,) = columns.of_windows("image", source, [window], *key, image)
            named, shape = {"latents": latents, "image": first}, columns.shape(latents)
            if planned.clip.mask:
                (named["mask"],) = columns.masks(planned.clip.mask, [window], *size, 1, shape[-2:])
            if source.name in tracked:
                named["tracklets"] = tracklet_column(columns, vae, vae_id, source, window, size, tracked[source.name])
            rows.append(Row(row_name(source, window), "clips", own, shape, named))
            bucket = int(load(column_path(columns.folder, first, "image"))[0]["motion_bucket"])
            lines.append(f"{rows[-1].name}: motion bucket {bucket}{'' if motion_bucket else ' (estimated)'}, {fps} fps")
    log_sizes(plans)
    for line in lines:
        logging.info("Kinoloom: %s", line)
    return TrainingData(str(columns.folder), tuple(rows)), lines


def check_tracklets(tracklets: Tracklets, source: clips.Source) -> None:
    """ValueError unless the boxes were made for all frames of this clip, in its shape."""
    if tracklets.frames != source.count:
        raise ValueError(
            f"{source.name}: tracklets are for {tracklets.frames} frames, expected {source.count}, all of the clip's"
        )
    shape, expected = tracklets.width / tracklets.height, source.width / source.height
    if abs(shape - expected) > 0.02 * expected:
        raise ValueError(
            f"{source.name}: tracklets are for {tracklets.width}x{tracklets.height}, expected the aspect ratio of "
            f"{source.width}x{source.height}, the clip's size"
        )


def tracklet_column(
    columns: Columns, vae: Any, vae_id: str, source: clips.Source, window: list[int], size: tuple, tracklets: Tracklets
) -> str:
    """boxes [T, 20, 8] and box_mask [T, 20]; colors [K, 20, 3], dealt out anew K times, and painted [K, 4, T, h, w]:
    latents of the clip with boxes painted in all frames but the first."""
    boxes, mask = (value[window] for value in to_tensors(tracklets, source.count, size))

    def make(frames: list[Tensor]) -> dict[str, Tensor]:
        pixels = torch.stack([fit(frame, *size) for frame in frames])
        palette = torch.tensor([rgb(color) for color in PALETTE])
        colors, painted = [], []
        for deal in range(DEALS):
            generator = derived_generator("colors", source.digest, deal)
            colors.append(palette[torch.randperm(len(palette), generator=generator)[:MAX_OBJECTS]])
            colored = torch.cat([boxes[..., :4], colors[-1].expand(len(boxes), -1, -1), boxes[..., 7:]], dim=-1)
            painted.append(encode_pixels(vae, paint(pixels, colored, mask, skip_first=True)))
        dealt = {"colors": torch.stack(colors), "painted": torch.stack(painted)}
        return {"boxes": boxes, "box_mask": mask, **dealt}

    key = (vae_id, source.digest, tracklets.to_json())
    return columns.of_windows("tracklets", source, [window], key, size, make)[0]


def first_frame(pixels: Tensor, vae: Any, clip_vision: Any, key: str) -> dict[str, Tensor]:
    """What the model is told of a first frame [1, H, W, 3] in 0..1: its embedding, and its latents under noise.

    augmentations [1 + N], of which the first is 0, is the noise's spread over pixels in -1..1.
    """
    generator = derived_generator("augmentation", key, tuple(pixels.shape))
    mean, std = LOG_NOISE
    levels = torch.exp(mean + std * torch.randn(NOISINGS, generator=generator))
    levels = torch.cat([torch.zeros(1), levels])
    latents = [
        encode_pixels(vae, pixels + level / 2 * torch.randn(pixels.shape, generator=generator)) for level in levels
    ]
    return {
        "image_embeds": clip_vision.encode_image(pixels).image_embeds[0].float().cpu(),
        "first_frames": torch.cat(latents, dim=1).movedim(0, 1).contiguous(),
        "augmentations": levels,
    }


def estimate_motion_bucket(pixels: Tensor) -> int:
    """1..255 for frames [F, H, W, 3]: 127 where an average pixel moves by 1 % of the diagonal from frame to frame.

    Stability AI has not said how its own numbers come about; this is dense optical flow (Kroeger et al., arXiv
    1603.03590).
    """
    height, width = pixels.shape[1:3]
    size = (FLOW_WIDTH, max(FLOW_LEAST, round(height * FLOW_WIDTH / width)))
    grey = [
        cv2.resize(cv2.cvtColor((frame.cpu().numpy() * 255).astype("uint8"), cv2.COLOR_RGB2GRAY), size)
        for frame in pixels
    ]
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    moved = [
        float(((flow.calc(before, after, None) ** 2).sum(-1) ** 0.5).mean())
        for before, after in zip(grey, grey[1:], strict=False)
    ]
    diagonal = (size[0] ** 2 + size[1] ** 2) ** 0.5
    return min(max(round(127 * 100 * sum(moved) / len(moved) / diagonal), 1), LARGEST_BUCKET)


def read_tracklets(folder: Path, sources: Iterable[clips.Source]) -> dict[str, Tracklets]:
    """Tracklets beside clips, by the clip's name: dance.json or dance.csv for dance.mp4 and for the folder dance."""
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


def inputs() -> Iterable[io.Input]:
    """The widgets that both nodes end with."""
    yield from (widget(option) for option in fields(SvdOptions) if option.name not in CAPTIONS)
    yield io.Int.Input(
        "motion_bucket",
        default=0,
        min=0,
        max=LARGEST_BUCKET,
        tooltip="How much moves, which the model is told: 127 is usual. 0 estimates it for each clip, and shows it.",
    )
    yield io.Float.Input(
        "source_fps",
        default=7.0,
        min=0.01,
        max=240.0,
        step=0.01,
        advanced=True,
        tooltip="Frame rate of images and folders of frames, which do not tell their own.",
    )


def encoders() -> list[io.Input]:
    return [
        io.Vae.Input("vae", tooltip="The VAE of the SVD checkpoint."),
        io.ClipVision.Input("clip_vision", tooltip="CLIP vision of the SVD checkpoint."),
    ]


def output(node: type[io.ComfyNode], data: TrainingData, lines: list[str]) -> io.NodeOutput:
    text = "\n".join(lines)
    if node.hidden:  # in a prompt
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)
    return io.NodeOutput(data, ui={"text": (text,)})


class EncodeSvdClips(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomEncodeSvdClips",
            display_name="Encode Training Clips (SVD)",
            category="Kinoloom/data",
            description="Encodes one clip for training Stable Video Diffusion. What was encoded before is taken from "
            "disk.",
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
                    tooltip="Boxes of the objects in the clip, over all of its frames. For Train SVD Tracklets.",
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
        motion_bucket: int,
        source_fps: float,
        images: Any = None,
        video: Any = None,
        tracklets: Tracklets | None = None,
        **options: Any,
    ) -> io.NodeOutput:
        chosen = SvdOptions(**options)
        if (images is None) == (video is None):
            raise ValueError("connect either images or video")
        source = video_source(video) if images is None else clips.from_tensor("images", images, source_fps)
        try:
            planned = plan(Clip(source, None), chosen, 1, SIDE)
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}") from error
        tracked = {source.name: tracklets} if tracklets else {}
        return output(cls, *encode([planned], "train", chosen, motion_bucket, vae, clip_vision, tracked))


class SvdClipsFromFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomSvdClipsFromFolder",
            display_name="Training Clips from Folder (SVD)",
            category="Kinoloom/data",
            description="Encodes the videos and folders of numbered frames in a folder of ComfyUI's input folder for "
            "training Stable Video Diffusion. It needs no captions. Tracklets of dance.mp4 are dance.json, or "
            "dance.csv as trackers write it (MOT Challenge).",
            search_aliases=["dataset", "image to video training data", "load folder"],
            inputs=[
                *encoders(),
                *folder_and_role(),
                *inputs(),
            ],
            outputs=[TrainingDataType.Output(display_name="data", tooltip="For an SVD training node.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_: Any) -> str:
        return ClipsFromFolder.fingerprint_inputs(folder)

    @classmethod
    def execute(
        cls, vae: Any, clip_vision: Any, folder: str, role: str, motion_bucket: int, source_fps: float, **options: Any
    ) -> io.NodeOutput:
        chosen = SvdOptions(**options)
        root = Path(folder_paths.get_input_directory())
        plans = plan_folder(root, folder, source_fps, chosen, 1, side=SIDE, captioned=False)
        tracked = read_tracklets(resolve_folder(root, folder), [planned.clip.source for planned in plans])
        return output(cls, *encode(plans, role, chosen, motion_bucket, vae, clip_vision, tracked))


NODES = [EncodeSvdClips, SvdClipsFromFolder]
