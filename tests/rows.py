"""Synthetic rows on disk, as the encode nodes write them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from kinoloom.trainers.core.data import Row, TrainingData, write_column
from kinoloom.trainers.core.rng import derived_generator
from torch import Tensor

TEXT_WIDTH, TEXT_LENGTH, TOKENS = 768, 12, 5
SHAPES = {
    "wan": {"frames": (16, 1, 4, 4), "clips": (16, 3, 4, 4)},
    "animatediff": {"frames": (4, 1, 8, 16), "clips": (4, 3, 8, 16)},  # the deepest level is then 1x2
    "svd": {"clips": (4, 3, 8, 8)},
}


def random(*shape: int, name: str) -> Tensor:
    return torch.randn(shape, generator=derived_generator("test", name))


def prompt(name: str, *, variants: int = 2, tokens: int = TOKENS, width: int = TEXT_WIDTH) -> dict[str, Tensor]:
    """The column `prompt_embeds` as the encode nodes write it."""
    return {
        "prompt_embeds": random(1 + variants, tokens, width, name=f"{name} prompt"),
        "prompt_length": torch.tensor(TEXT_LENGTH),
        "prompt_tokens": torch.tensor([tokens, *[tokens - 1] * variants]),
        "token_mask_prob": torch.tensor(0.1 if variants else 0.0),
    }


def image(name: str, *, height: int, width: int) -> dict[str, Tensor]:
    """The column `image` as the SVD encode nodes write it, with two noisings of the first frame."""
    return {
        "image_embeds": random(1024, name=f"{name} embeds"),
        "first_frames": random(3, 4, height, width, name=f"{name} first frame"),
        "augmentations": torch.tensor([0.0, 0.03, 0.08]),
        "fps": torch.tensor(7.0),
        "motion_bucket": torch.tensor(127.0),
    }


def boxes(name: str, frames: int, *, height: int, width: int) -> dict[str, Tensor]:
    """The column `tracklets`, of two objects and two deals of colours."""
    corner = 0.4 * random(frames, 20, 2, name=f"{name} corner").sigmoid()
    side = 0.2 + 0.4 * random(frames, 20, 2, name=f"{name} side").sigmoid()
    places = torch.cat([corner, corner + side, torch.zeros(frames, 20, 3), torch.ones(frames, 20, 1)], dim=-1)
    mask = torch.zeros(frames, 20)
    mask[:, :2] = 1
    return {
        "boxes": places * mask.unsqueeze(-1),
        "box_mask": mask,
        "colors": random(2, 20, 3, name=f"{name} colors").sigmoid(),
        "painted": random(2, 4, frames, height, width, name=f"{name} painted"),
    }


def write_row(
    folder: Path, name: str, unit: str, shape: tuple[int, ...], role: str = "train", **columns: dict[str, Tensor]
) -> Row:
    """One sample of random latents; a keyword replaces or adds a column, None leaves it out."""
    default = {"latents": {"latents": random(*shape, name=name)}, "prompt_embeds": prompt(name)}
    if shape[0] == 4:
        size = {"height": shape[-2], "width": shape[-1]}
        default |= {"image": image(name, **size), "tracklets": boxes(name, shape[1], **size)}
    written = {column: tensors for column, tensors in {**default, **columns}.items() if tensors is not None}
    for column, tensors in written.items():
        write_column(folder, name, column, tensors)
    return Row(name, unit, role, shape, {column: name for column in written})


def write_data(
    folder: Path, backbone: str, *, roles: Iterable[str] = ("train", "prior"), each: int = 2
) -> TrainingData:
    """`each` samples of every unit and role."""
    rows = [
        write_row(folder, f"{role}-{unit}-{i}", unit, shape, role)
        for role in roles
        for unit, shape in SHAPES[backbone].items()
        for i in range(each)
    ]
    return TrainingData(str(folder), tuple(rows))
