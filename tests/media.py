"""Small videos and photos for the tests that read files."""

from pathlib import Path

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
