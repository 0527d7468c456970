"""Paints the outlines of boxes on the frames of a clip."""

import torch
from torch import Tensor


def paint(frames: Tensor, boxes: Tensor, mask: Tensor, width: int = 4, skip_first: bool = False) -> Tensor:
    """A copy of frames [T, H, W, 3] in 0..1 with the outlines of all present boxes, `width` pixels thick, drawn inside.

    `skip_first` paints nothing on the first frame, for self-tracking (Boximator, arXiv 2402.01566).
    """
    painted = frames.clone()
    high, wide = frames.shape[1:3]
    scale = torch.tensor([wide, high, wide, high])
    for frame, slot in mask.nonzero().tolist():
        if frame == 0 and skip_first:
            continue
        x1, y1, x2, y2 = (boxes[frame, slot, :4].cpu() * scale).round().int().tolist()
        inside = torch.zeros(high, wide, dtype=torch.bool)
        inside[y1:y2, x1:x2] = True
        inside[y1 + width : max(y2 - width, 0), x1 + width : max(x2 - width, 0)] = False
        painted[frame, inside] = boxes[frame, slot, 4:7].to(painted)
    return painted
