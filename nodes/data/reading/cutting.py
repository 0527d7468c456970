"""Cuts clips for training: size in pixels, windows of frames, and roles (train or validation)."""

import logging
from dataclasses import dataclass, fields, replace

from ....trainers.core.config import check, knob
from .captions import Captions
from .framing import SIDE, WINDOW_MODES, bucket, nearest_lengths, resample, spread, windows
from .sources import Source, mirrored

ROLES = ("train", "validation", "prior")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of cutting and resizing, each a widget."""

    frames_per_clip: int = knob(
        33,
        "Frames in one training clip: 4n+1 for Wan (17, 33, 49, 81), 16 for AnimateDiff. Raise it for slow motion, "
        "lower it if memory runs out or the videos are short. Train CA-LoRA picks its frames out of longer clips.",
        min=1,
        max=1025,
    )
    fps: float = knob(
        16.0,
        "Frame rate the clips are brought to. Keep it at the model's own rate, 16 for Wan, 8 for AnimateDiff; 0 keeps "
        "each file's rate.",
        min=0.0,
        max=240.0,
        step=0.01,
    )
    size: int = knob(
        512,
        "Side of a square with as many pixels as a clip gets; the aspect ratio stays the file's. "
        "Lower it if memory runs out.",
        min=16,
        max=2048,
        step=16,
    )
    window_mode: str = knob(
        "first",
        "Which part of a long video is used: its first frames, evenly spread windows, or "
        "overlapping windows one stride apart.",
        choices=WINDOW_MODES,
    )
    single_frames: int = knob(
        81,
        "Frames of each clip that are also encoded one by one, as Set-and-Sequence needs. "
        "Set it to 0 for a plain LoRA.",
        min=0,
        max=4096,
    )
    window_count: int = knob(
        4, "Number of windows per video in the mode uniform. Raise it for long videos.", min=1, max=1024, advanced=True
    )
    window_stride: int = knob(
        40,
        "Frames from one window to the next in the mode sliding. Lower it for more overlap.",
        min=1,
        max=4096,
        advanced=True,
    )
    token_variants: int = knob(
        16,
        "Versions of each caption with a tenth of the words missing, which keep the LoRA "
        "from clinging to single words. Set it to 0 if the trainer does not mask tokens.",
        min=0,
        max=64,
        advanced=True,
    )
    hold_out: int = knob(
        0,
        "Number of clips, the last ones, that are kept for validation and never trained on. Use 1 "
        "or more if there are clips to spare.",
        min=0,
        max=4096,
        advanced=True,
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            check(option, getattr(self, option.name))


@dataclass(frozen=True)
class Clip:
    source: Source
    captions: Captions | None  # None if the model takes no text
    mask: Source | None = None


@dataclass(frozen=True)
class ClipPlan:
    """The training windows of one clip: their size in pixels and the source frames of each."""

    clip: Clip
    width: int
    height: int
    windows: tuple[tuple[int, ...], ...]
    roles: tuple[str, ...] = ()


def plan(clip: Clip, options: Options, step: int, side: int = SIDE) -> ClipPlan:
    """The windows of one clip, with sides that are multiples of `side`. ValueError says why a clip does not fit."""
    source = clip.source
    indices = resample(source, options.fps)
    length = 1 if source.photo else options.frames_per_clip
    if len(indices) < length:
        fps = options.fps or source.fps
        raise ValueError(
            f"has {len(indices)} frames at {fps:g} per second, but a clip takes {length}: set "
            f"frames_per_clip to {nearest_lengths(len(indices), step)[0]}, or remove it"
        )
    if clip.mask:
        check_mask(clip.mask, source)
    taken = windows(len(indices), length, options.window_mode, options.window_count, options.window_stride)
    width, height = bucket(source.width, source.height, options.size**2, side)
    return ClipPlan(clip, width, height, tuple(tuple(indices[i] for i in window) for window in taken))


def check_mask(mask: Source, source: Source) -> None:
    if mask.count not in (1, source.count):
        raise ValueError(
            f"has {source.count} frames, its mask {mask.name} has {mask.count}: expected {source.count} or 1"
        )
    if abs(mask.width / mask.height - source.width / source.height) > 0.02 * source.width / source.height:
        raise ValueError(
            f"is {source.width}x{source.height}, its mask {mask.name} is {mask.width}x{mask.height}: "
            "expected the same aspect ratio"
        )


def check_role(role: str, hold_out: int) -> None:
    if role not in ROLES:
        raise ValueError(f"role={role!r}: expected one of {', '.join(ROLES)}")
    if hold_out and role != "train":
        raise ValueError(f"hold_out={hold_out}: only clips with role train can be held out, these have role {role}")


def assign_roles(plans: list[ClipPlan], role: str, hold_out: int) -> list[ClipPlan]:
    """Give every window `role`, except the last `hold_out` windows of all clips, which become validation windows."""
    total = sum(len(planned.windows) for planned in plans)
    check_role(role, hold_out)
    if hold_out >= total:
        raise ValueError(f"hold_out={hold_out}: nothing would be left to train on, there are {total} clips")
    roles = [role] * (total - hold_out) + ["validation"] * hold_out
    ends = [sum(len(planned.windows) for planned in plans[: i + 1]) for i in range(len(plans))]
    return [
        replace(planned, roles=tuple(roles[end - len(planned.windows) : end]))
        for planned, end in zip(plans, ends, strict=True)
    ]


def with_mirrored(plans: list[ClipPlan]) -> list[ClipPlan]:
    """The plans, and after them those of mirrored copies of the clips, which have no validation windows."""
    copies = []
    for planned in plans:
        kept = [pair for pair in zip(planned.windows, planned.roles, strict=True) if pair[1] != "validation"]
        if kept:
            windows, roles = zip(*kept, strict=True)
            clip = planned.clip
            copy = replace(clip, source=mirrored(clip.source), mask=clip.mask and mirrored(clip.mask))
            copies.append(replace(planned, clip=copy, windows=windows, roles=roles))
    return plans + copies


def frames_by_role(planned: ClipPlan, count: int) -> dict[str, list[int]]:
    """Up to `count` single frames per role, evenly spread over its windows. Validation frames are never trained on."""
    taken: set[int] = set()
    chosen = {}
    for role in dict.fromkeys(planned.roles):
        covered = {i for window, own in zip(planned.windows, planned.roles, strict=True) if own == role for i in window}
        chosen[role] = spread(sorted(covered - taken), count) if count else []
        taken |= covered
    return chosen


def row_name(source: Source, indices: list[int]) -> str:
    if source.photo:
        return source.name
    frames = f"frame {indices[0]}" if len(indices) == 1 else f"frames {indices[0]}-{indices[-1]}"
    return f"{source.name} {frames}"


def log_sizes(plans: list[ClipPlan]) -> None:
    for planned in plans:
        source = planned.clip.source
        if planned.width > source.width or planned.height > source.height:
            logging.warning(
                "Kinoloom: %s is enlarged from %dx%d to %dx%d. Lower size if it looks soft.",
                source.name,
                source.width,
                source.height,
                planned.width,
                planned.height,
            )
