"""Pictures of videos side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from . import world


def contact_sheet(
    rows: Mapping[str, Sequence[NDArray[np.uint8]]], columns: Sequence[str] = ("",), *, frames: int = 4, scale: int = 1
) -> Image.Image:
    """One labelled row for each entry, in it evenly spaced frames of each video, under the columns' names."""
    cell, margin, header, gap = world.SIZE * scale, 250, 22, 10
    width = frames * cell + gap
    sheet = Image.new("RGB", (margin + len(columns) * width, header + len(rows) * (cell + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(columns):
        draw.text((margin + i * width, 4), name, fill="black", font_size=13)
    picks = np.linspace(0, world.FRAMES - 1, frames).round().astype(int)
    for row, (name, videos) in enumerate(rows.items()):
        top = header + row * (cell + 4)
        draw.text((4, top + cell // 2 - 8), name, fill="black", font_size=13)
        for i, video in enumerate(videos):
            strip = Image.fromarray(np.concatenate(video[picks], 1)).resize(
                (frames * cell, cell), Image.Resampling.NEAREST
            )
            sheet.paste(strip, (margin + i * width, top))
    return sheet
