"""Small videos and photos for the tests that read files."""

import subprocess
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
from PIL import Image

LOSSLESS = {
    "codec": "libx264",
    "macro_block_size": 1,
    "quality": None,
    "output_params": ["-crf", "0", "-preset", "ultrafast"],
}


def write_frames(path: Path, frames: list[np.ndarray], fps: int) -> Path:
    """A lossless video of frames [H, W, 3], 8 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, **LOSSLESS)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path


def write_video(path: Path, count: int, *, fps: int = 16, size: tuple[int, int] = (64, 48)) -> Path:
    """Frame i is grey 4 * i."""
    return write_frames(path, [np.full((size[1], size[0], 3), 4 * i, np.uint8) for i in range(count)], fps)


def write_image(path: Path, grey: int, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)
    return path


def lit(time: int, size: int = 64) -> np.ndarray:
    """A black frame in which column number `time` is white."""
    frame = np.zeros((size, size, 3), np.uint8)
    frame[:, time % size] = 255
    return frame


def write_timed(path: Path, times: list[int], unit: int = 50) -> Path:
    """A video whose frames are shown at `times` of `unit` milliseconds, each lit at its own time."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "0", "preset": "ultrafast"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv444p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for time in times:
            frame = av.VideoFrame.from_ndarray(lit(time), format="rgb24")
            frame.pts, frame.time_base = unit * time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def ffmpeg(*arguments: object) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)], check=True)
