"""Clips cut out of longer rows: which frames a step sees, and which rows a run takes."""

import pytest
import torch
from kinoloom.trainers.core.backbone import Grid
from kinoloom.trainers.core.cutting import cut_clips
from kinoloom.trainers.core.data import Batch, Row
from kinoloom.trainers.core.recipe import Recipe
from kinoloom.trainers.core.rng import Rng

GRID = Grid(channels=4, side=8, longest=16, limited_by="motion module")


def numbered(frames: int, rows: int = 2, masks: bool = True) -> Batch:
    """Latents and masks whose values are the numbers of their frames; rows are 1000 apart."""
    values = torch.arange(frames)[None, None, :, None, None] + 1000.0 * torch.arange(rows)[:, None, None, None, None]
    latents = values.expand(rows, 4, frames, 3, 5)
    batch = {"latents": latents, "prompt_embeds": torch.ones(rows, 1, 7, 8)}
    return {**batch, "mask": values[..., :1, :1].expand(rows, 1, frames, 3, 5)} if masks else batch


def places(batch: Batch) -> list[list[int]]:
    found = batch["latents"][:, 0, :, 0, 0].long() % 1000
    if "mask" in batch:
        assert torch.equal(batch["mask"][:, 0, :, 2, 4].long() % 1000, found)
    assert all(torch.equal(row, row[:1, :, :1, :1].expand_as(row)) for row in batch["latents"])
    return found.tolist()


def drawn(have: int, frames: int, strides: tuple[int, int], samples: int = 400) -> list[tuple[int, int]]:
    """(start, stride) of many samples, two of a batch."""
    found = []
    for sample in range(0, samples, 2):
        for own in places(cut_clips(numbered(have), frames, strides, Rng(0, "clips", sample))):
            stride = own[1] - own[0]
            assert own == list(range(own[0], own[0] + stride * frames, stride)) and own[-1] < have
            found.append((own[0], stride))
    return found


def test_each_clip_has_a_start_and_stride_of_its_own() -> None:
    found = drawn(40, 6, (2, 5))
    assert {stride for _, stride in found} == {2, 3, 4, 5}
    for stride in (2, 5):  # every start that fits, first and last included
        assert {start for start, own in found if own == stride} <= set(range(40 - 5 * stride))
    ends = {start for start, own in found if own == 5}
    assert {0, 14} <= ends and len(ends) == 15
    assert any(first != second for first, second in zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize(
    ("have", "frames", "strides", "expected"),
    [
        (16, 6, (4, 8), {3}),  # the widest stride that fits
        (16, 6, (2, 9), {2, 3}),
        (7, 6, (1, 4), {1}),
        (12, 6, (2, 2), {2}),
    ],
)
def test_a_stride_is_at_most_what_a_row_allows(
    have: int, frames: int, strides: tuple[int, int], expected: set[int]
) -> None:
    assert {stride for _, stride in drawn(have, frames, strides, samples=100)} == expected


def test_draws_depend_on_the_seed_and_the_sample_alone() -> None:
    batch = numbered(50, rows=3)
    taken = [places(cut_clips(batch, 8, (1, 4), Rng(*key))) for key in ((0, "a", 6), (0, "a", 6), (1, "a", 6))]
    assert taken[0] == taken[1] != taken[2]
    alone = cut_clips(numbered(50, rows=1), 8, (1, 4), Rng(0, "a", 7))
    assert places(alone)[0] == taken[0][1], "the second clip of a batch is the next sample"
    assert places(cut_clips(batch, 8, (1, 4), Rng(0, "a", 6).fork("prior"))) != taken[0]


def test_an_evaluation_takes_the_first_frames_at_the_smallest_stride() -> None:
    for sample in range(3):
        found = places(cut_clips(numbered(40), 5, (3, 6), Rng(0, "a", sample, quantile=0.5)))
        assert found == [[0, 3, 6, 9, 12]] * 2


def test_rows_that_are_short_enough_stay_as_they_are() -> None:
    for have, frames in ((16, 16), (9, 16), (64, 0)):
        batch = numbered(have, masks=False)
        assert cut_clips(batch, frames, (1, 4), Rng(0, "a", 0)) is batch
    cut = cut_clips(numbered(30, masks=False), 1, (2, 2), Rng(0, "a", 0))
    assert cut.keys() == {"latents", "prompt_embeds"} and cut["latents"].shape == (2, 4, 1, 3, 5)


def test_only_a_run_that_cuts_its_rows_takes_longer_ones() -> None:
    row = Row("clip.mp4", "clips", "train", (4, 64, 8, 8), {})
    message = "data: clip.mp4 has 64 frames, but this motion module takes 16 at most"
    for grid in (Recipe.data_grid(None, GRID), GRID.of_cut_rows(0)):
        with pytest.raises(ValueError, match=message):
            grid.check([row])
    GRID.of_cut_rows(16).check([row])
    with pytest.raises(ValueError, match="has latents of 16 channels, expected 4"):
        GRID.of_cut_rows(16).check([Row("clip.mp4", "clips", "train", (16, 8, 8, 8), {})])
    with pytest.raises(ValueError, match="frames=17: expected at most 16 for this motion module"):
        GRID.of_cut_rows(17)
