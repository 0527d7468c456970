"""The times at which a video's frames are shown: read from its packets if they hold them, else found by decoding."""

import logging
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .decoding import AVI, MATROSKA, MOV, decoded, opened, packets

PACKET_IS_FRAME = ("h264", "hevc", "av1", "vp9")  # codecs that put one frame in a packet, in MOV and MATROSKA
SAY_DURATION = (MOV, MATROSKA, AVI, "flv", "asf")  # containers with a duration in the header
SLACK = 1  # frames that may be missing: durations are rounded, and the last frame's may be unknown


def stamps_of(file: Path | BytesIO, name: str, first: VideoFrame) -> list[int]:
    """Times of all frames in the stream's time base, ascending. `first` is the first frame that can be decoded.

    ValueError if the file is shorter than its header says, or if frames are damaged.
    """
    with opened(file) as (container, stream):
        kind, codec = container.format.name, stream.codec_context.name
        listed = _listed(container, stream)
    told = kind in (MOV, MATROSKA) and codec in PACKET_IS_FRAME and not first.interlaced_frame
    told = told and None not in listed and len(set(listed)) == len(listed)
    if told and min(listed) == first.pts:
        return sorted(listed)
    with opened(file) as (container, stream):
        frames = [frame.pts if frame else None for frame in decoded(container, stream)]
    found = [stamp for stamp in frames if stamp is not None]
    if kind in SAY_DURATION:
        whole = len(listed) if told else len(frames)
    else:  # recordings may be cut anywhere, so damaged frames at the ends are dropped
        whole = frames.index(found[-1]) + 1 - frames.index(found[0])
        if whole < len(frames):
            logging.warning("Kinoloom: %s gives %d of %d frames; its ends are cut.", name, whole, len(frames))
    if len(found) < whole:
        raise ValueError(damaged(len(found), whole))
    return found


def damaged(found: int, promised: int) -> str:
    return (
        f"gives {found} of the {promised} frames it promises: it is damaged. Copy it again from where it came, or "
        "convert it to keep what is left"
    )


def _listed(container: InputContainer, stream: VideoStream) -> list[int | None]:
    """Times of the packets that are shown, starting at the first key frame."""
    stamps, torn, floor, ends = [], False, None, {}
    for packet in packets(container):
        at, place = packet.dts if packet.pts is None else packet.pts, packet.stream_index
        torn = torn or (packet.is_corrupt and place == stream.index)
        if packet.is_corrupt or at is None:
            continue
        end = (at + (packet.duration or 0)) * packet.time_base
        ends[place] = max(ends.get(place, end), end)
        if place == stream.index:
            floor = at if floor is None and packet.is_keyframe else floor
            if floor is not None and at >= floor and not packet.is_discard:
                stamps.append(packet.pts)
    if container.format.name in SAY_DURATION and stamps:
        _check_whole(container, stream, ends, len(stamps), torn)
    return stamps


def _check_whole(
    container: InputContainer, stream: VideoStream, ends: dict[int, Fraction], count: int, torn: bool
) -> None:
    """ValueError if a packet is incomplete, or if the packets end before the duration in the header."""
    end, start = ends[stream.index], (stream.start_time or 0) * stream.time_base
    missing = Fraction(0)
    if stream.duration:
        missing = start + stream.duration * stream.time_base - end
    elif container.duration:
        missing = Fraction(container.duration, av.time_base) - max(ends.values())
    rate = stream.average_rate or (count / (end - start) if end > start else 0)
    if torn or missing * rate > SLACK:
        promised = stream.frames or round((end + missing - start) * rate)
        raise ValueError(damaged(count, max(promised, count + 1)))
