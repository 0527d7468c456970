"""Encodes clips for Stable Video Diffusion: latents, and the first frame's embedding and noised latents."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import torch
from torch import Tensor

from ....lora_io.file import load
from ....trainers.conditions.columns import IMAGE, TRACKLETS
from ....trainers.conditions.tracklet_painting import paint
from ....trainers.conditions.tracklets import MAX_OBJECTS, PALETTE, Tracklets, rgb, to_tensors
from ....trainers.core.config import knob
from ....trainers.core.data import Row, TrainingData, column_path
from ....trainers.core.rng import derived_generator
from ..reading.cutting import ClipPlan, Options, assign_roles, log_sizes, row_name
from ..reading.framing import fit
from ..reading.sources import Source
from . import model_keys
from .columns import Columns, open_columns
from .vae import encode_pixels

COLOURINGS = 4  # random colour assignments stored for each clip; a training step draws one
NOISINGS = 16  # noise strengths stored for each first frame; a training step draws one
LOG_NOISE = (-3.0, 0.5)  # mean and standard deviation of ln(augmentation) (arXiv 2311.15127)
FLOW_WIDTH, FLOW_LEAST = 256, 16  # width and least height in pixels for optical flow; OpenCV crashes on less
LARGEST_BUCKET = 255


@dataclass(frozen=True, kw_only=True)
class SvdOptions(Options):
    """Options of cutting and resizing for Stable Video Diffusion."""

    frames_per_clip: int = knob(
        14, "Frames in one training clip: 14 for svd, 25 for svd_xt. Lower it if memory runs out.", min=2, max=256
    )
    fps: float = knob(
        7.0,
        "Frame rate to which clips are resampled, a condition of the model. Sample with the same fps in "
        "SVD_img2vid_Conditioning. 0 keeps each file's rate.",
        min=0.0,
        max=240.0,
        step=0.01,
    )
    single_frames: int = knob(0, "Not used: every clip is trained as a whole.", min=0, max=0)
    token_variants: int = knob(0, "Not used: the model takes no text.", min=0, max=0)


def encode(
    plans: list[ClipPlan],
    role: str,
    options: SvdOptions,
    motion_bucket: int,
    vae: Any,
    clip_vision: Any,
    tracked: dict[str, Tracklets],
) -> tuple[TrainingData, list[str]]:
    """The clips as training data, and a line about the motion of each. `tracked` maps a clip's name to tracklets."""
    for planned in plans:
        if planned.clip.source.photo:
            raise ValueError(f"{planned.clip.source.name}: is a photo, expected clips of several frames")
        if found := tracked.get(planned.clip.source.name):
            check_tracklets(found, planned.clip.source)
    plans = assign_roles(plans, role, options.hold_out)
    each = [2 + bool(p.clip.mask) + (p.clip.source.name in tracked) for p in plans]
    columns = open_columns(sum(count * len(p.windows) for count, p in zip(each, plans, strict=True)))
    encoder = Encoder(columns, vae, clip_vision, options.fps, motion_bucket)
    rows, lines = [], []
    for planned in plans:
        for row, line in encoder.rows(planned, tracked.get(planned.clip.source.name)):
            rows.append(row)
            lines.append(line)
    log_sizes(plans)
    for line in lines:
        logging.info("Kinoloom: %s", line)
    return TrainingData(str(columns.folder), tuple(rows)), lines


@dataclass(frozen=True)
class Encoder:
    """Makes rows of clips. `fps` 0 keeps the rate of each, `motion_bucket` 0 estimates that of each."""

    columns: Columns
    vae: Any
    clip_vision: Any
    fps: float
    motion_bucket: int

    @cached_property
    def vae_id(self) -> str:
        return model_keys.of_vae(self.vae)

    @cached_property
    def vision_id(self) -> str:
        return model_keys.of_patcher(self.clip_vision.patcher)

    def rows(self, planned: ClipPlan, tracklets: Tracklets | None) -> Iterator[tuple[Row, str]]:
        """A row for each window of a clip, and a line about its motion."""
        source, size = planned.clip.source, (planned.width, planned.height)
        fps = max(round(self.fps or source.fps), 1)
        boxes = to_tensors(tracklets, source.count, size) if tracklets else ()
        for window, role in zip(map(list, planned.windows), planned.roles, strict=True):
            (latents,) = self.columns.latents(self.vae, self.vae_id, source, [window], *size)
            image, bucket = self._image(source, window, size, fps)
            named, shape = {"latents": latents, "image": image}, self.columns.shape(latents)
            if planned.clip.mask:
                (named["mask"],) = self.columns.masks(planned.clip.mask, [window], *size, 1, shape[-2:])
            if tracklets:
                key = (self.vae_id, source.digest, tracklets.to_json())
                make = painter(self.vae, source.digest, size, *(value[window] for value in boxes))
                (named["tracklets"],) = self.columns.of_windows(TRACKLETS, source, [window], key, size, make)
            name = row_name(source, window)
            estimated = "" if self.motion_bucket else " (estimated)"
            yield Row(name, "clips", role, shape, named), f"{name}: motion bucket {bucket}{estimated}, {fps} fps"

    def _image(self, source: Source, window: list[int], size: tuple[int, int], fps: int) -> tuple[str, int]:
        """File stem of the first frame's column, and the motion bucket in it."""

        def make(frames: list[Tensor]) -> dict[str, Tensor]:
            pixels = torch.stack([fit(frame, *size) for frame in frames])
            return {
                **first_frame(pixels[:1], self.vae, self.clip_vision, f"{source.digest} {window}"),
                "fps": torch.tensor(float(fps)),
                "motion_bucket": torch.tensor(float(self.motion_bucket or estimate_motion_bucket(pixels))),
            }

        key = (self.vae_id, self.vision_id, source.digest), (*size, fps, self.motion_bucket)
        (stem,) = self.columns.of_windows(IMAGE, source, [window], *key, make)
        return stem, int(load(column_path(self.columns.folder, stem, "image"))[0]["motion_bucket"])


def check_tracklets(tracklets: Tracklets, source: Source) -> None:
    """ValueError unless the tracklets have this clip's number of frames and aspect ratio."""
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


def painter(vae: Any, digest: str, size: tuple, boxes: Tensor, mask: Tensor) -> Callable[[list[Tensor]], dict]:
    """A function that makes the tracklets column from a clip's frames.

    The column holds boxes [T, 20, 8], box_mask [T, 20], K random colour assignments as colors [K, 20, 3], and painted
    [K, 4, T, h, w], the latents with boxes painted in those colours on all frames but the first.
    """

    def make(frames: list[Tensor]) -> dict[str, Tensor]:
        pixels = torch.stack([fit(frame, *size) for frame in frames])
        palette = torch.tensor([rgb(color) for color in PALETTE])
        colors, painted = [], []
        for colouring in range(COLOURINGS):
            generator = derived_generator("colors", digest, colouring)
            colors.append(palette[torch.randperm(len(palette), generator=generator)[:MAX_OBJECTS]])
            colored = torch.cat([boxes[..., :4], colors[-1].expand(len(boxes), -1, -1), boxes[..., 7:]], dim=-1)
            painted.append(encode_pixels(vae, paint(pixels, colored, mask, skip_first=True)))
        return {"boxes": boxes, "box_mask": mask, "colors": torch.stack(colors), "painted": torch.stack(painted)}

    return make


def first_frame(pixels: Tensor, vae: Any, clip_vision: Any, key: str) -> dict[str, Tensor]:
    """The conditions from a first frame [1, H, W, 3] in 0..1: its embedding and its noised latents.

    augmentations [1 + N], of which the first is 0, are the standard deviations of the noise for pixels in -1..1.
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
    """The motion bucket 1..255 of frames [F, H, W, 3]: 127 if pixels move 1 % of the diagonal per frame on average.

    It is measured by dense optical flow (Kroeger et al., arXiv 1603.03590). Stability AI's measure is not published.
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
