"""Decodes videos with FFmpeg's libraries: frames are upright, deinterlaced and have square pixels."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.filter import Graph
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from comfy.model_management import throw_exception_if_processing_interrupted
from torch import Tensor

from .hdr import TRANSFERS, to_standard
from .sources import over_white

MOV, MATROSKA, AVI = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"  # as FFmpeg names them
WIDEST = 4  # highest aspect ratio of a single pixel, lying or standing
# Only containers: a playlist named .mp4 would make FFmpeg open other files.
FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,gif,apng"


@contextmanager
def opened(file: Path | BytesIO) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream, at the start. ValueError says why the file cannot be read."""
    place = f"file:{file}" if isinstance(file, Path) else BytesIO(file.getbuffer())
    try:
        with av.open(place, options={"format_whitelist": FORMATS, "protocol_whitelist": "file"}) as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & Disposition.attached_pic:
                raise ValueError("holds no video")
            if stream.codec_context is None:
                raise ValueError("is in a video format that FFmpeg cannot decode here")
            stream.thread_type = "AUTO"
            yield container, stream
    except av.ArgumentError as error:
        raise ValueError("not a readable video (it is another kind of file)") from error
    except av.FFmpegError as error:
        raise ValueError(f"not a readable video ({error.strerror})") from error


def packets(container: InputContainer, *streams: VideoStream) -> Iterator[av.Packet]:
    """Packets up to the end of the file, or to damage that cannot be skipped. Raises if the prompt was cancelled."""
    try:
        for packet in container.demux(*streams):
            throw_exception_if_processing_interrupted()
            yield packet
    except av.FFmpegError:
        return


def decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame | None]:
    """Frames in the order in which they are shown, with None in place of a damaged one."""
    rate = stream.guessed_rate or stream.average_rate or 25
    step = max(round(1 / (rate * stream.time_base)), 1)
    last = -math.inf
    for packet in packets(container, stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            yield None
            continue
        for frame in frames:
            shown = frame.dts if container.format.name == AVI else frame.pts  # AVI has no presentation times
            last = max(last + step, 0) if shown is None or shown <= last else shown
            frame.pts, frame.time_base = last, stream.time_base
            yield None if frame.is_corrupt else frame


@dataclass(frozen=True)
class Look:
    """How decoded frames become pictures: size before rotation, rotations, HDR transfer, and if there is an alpha."""

    width: int
    height: int
    turns: tuple[tuple[str, str], ...] = ()
    transfer: int = 0
    clear: bool = False

    @staticmethod
    def of(frame: VideoFrame, stream: VideoStream) -> "Look":
        aspect = stream.sample_aspect_ratio or 1
        if not 1 / WIDEST <= aspect <= WIDEST:
            raise ValueError(f"has pixels with the aspect ratio {aspect}: expected 1/{WIDEST} to {WIDEST}")
        transfer = next((t for t in (frame.color_trc, stream.codec_context.color_trc) if t in TRANSFERS), 0)
        width = max(round(frame.width * aspect), 1)
        clear = not transfer and any(component.is_alpha for component in frame.format.components)
        return Look(width, frame.height, _turns(frame), int(transfer), clear)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright picture."""
        aside = any(name == "transpose" for name, _ in self.turns)
        return (self.height, self.width) if aside else (self.width, self.height)

    def pictures(self, frames: Iterable[VideoFrame], stream: VideoStream) -> Iterator[tuple[int, VideoFrame]]:
        """Each frame's time, in the stream's time base, and the frame in RGB."""
        graph, shape = None, None
        for frame in frames:
            if shape != (frame.width, frame.height, frame.format.name):
                yield from _flushed(graph, stream)
                shape = frame.width, frame.height, frame.format.name
                graph = self._graph(frame, stream)
            graph.push(frame)
            yield from _pulled(graph, stream)
        yield from _flushed(graph, stream)

    def _graph(self, frame: VideoFrame, stream: VideoStream) -> Graph:
        graph = Graph()
        colours = ("format", "rgb48le" if self.transfer else "rgba" if self.clear else "rgb24")
        steps = [("scale", f"{self.width}:{self.height}"), *self.turns, colours]
        if frame.format.name.startswith("yuv"):  # the filter leaves progressive frames unchanged
            steps.insert(0, ("bwdif", "mode=send_frame:deint=interlaced"))
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base
        )
        graph.link_nodes(source, *(graph.add(*step) for step in steps), graph.add("buffersink")).configure()
        return graph

    def pixels(self, picture: VideoFrame) -> Tensor:
        """[H, W, 3] in 0..1."""
        values = picture.to_ndarray()
        if self.transfer:
            return to_standard(values, self.transfer)
        pixels = torch.from_numpy(values).float() / 255
        return over_white(pixels) if self.clear else pixels


def _turns(frame: VideoFrame) -> tuple[tuple[str, str], ...]:
    """The FFmpeg filters that rotate and mirror a frame by its display matrix."""
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return ()
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) > abs(a):
        return (("transpose", str((c < 0) + 2 * (b < 0))),)
    return (("hflip", ""),) * (a < 0) + (("vflip", ""),) * (d < 0)


def _flushed(graph: Graph | None, stream: VideoStream) -> Iterator[tuple[int, VideoFrame]]:
    if graph:
        graph.push(None)
        yield from _pulled(graph, stream)


def _pulled(graph: Graph, stream: VideoStream) -> Iterator[tuple[int, VideoFrame]]:
    while True:
        try:
            picture = graph.pull()
        except (BlockingIOError, EOFError):
            return
        yield round(picture.pts * picture.time_base / stream.time_base), picture
