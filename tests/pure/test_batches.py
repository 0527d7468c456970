"""Batches of stored rows: their order, how samples are joined, and what a data set's digest says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kinoloom.trainers.conditions.columns import LATENTS, MASK, PREVIEW_PROMPT, PROMPT
from kinoloom.trainers.core.data import Batches, Column, PhaseData, TrainingData, collate

from ..rows import write_row

SMALL, LARGE = (16, 1, 2, 2), (16, 3, 2, 4)


def rows_of(folder: Path, *shapes: tuple[int, ...], role: str = "train") -> list:
    return [write_row(folder, f"{role} {i}", "clips", shape, role) for i, shape in enumerate(shapes)]


def order(batches: Batches, epoch: int) -> list[int]:
    count = len(batches)
    return [row for place in range(count) for row in batches[epoch * count + place]["group"].tolist()]


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    folder = tmp_path_factory.mktemp("eight")
    return TrainingData(str(folder), tuple(rows_of(folder, *[SMALL] * 8)))


def test_every_epoch_visits_every_row_once_in_another_order(eight: TrainingData) -> None:
    batches = Batches(eight, "clips", "train", (LATENTS,), seed=5)
    orders = [order(batches, epoch) for epoch in range(4)]
    assert all(sorted(found) == list(range(8)) for found in orders)
    assert len({tuple(found) for found in orders}) == 4
    assert order(batches, 2) == orders[2], "a pure function of the place"


def test_another_seed_joins_and_orders_rows_otherwise(eight: TrainingData) -> None:
    """Which rows share a batch, too."""
    pairs = {
        seed: [
            frozenset(Batches(eight, "clips", "train", (LATENTS,), batch_size=2, seed=seed)[m]["group"].tolist())
            for m in range(8)
        ]
        for seed in (1, 2)
    }
    assert all(set().union(*found[:4]) == set(range(8)) for found in pairs.values())
    assert set(pairs[1][:4]) != set(pairs[2][:4]), "another seed"
    assert set(pairs[1][:4]) != set(pairs[1][4:]), "another epoch"


def test_batches_of_different_shapes_take_turns(tmp_path: Path) -> None:
    data = TrainingData(str(tmp_path), tuple(rows_of(tmp_path, *[SMALL] * 6, *[LARGE] * 6)))
    batches = Batches(data, "clips", "train", (LATENTS,), batch_size=2)
    shapes = [batches[m]["latents"].shape[2] for m in range(6 * 4)]
    for epoch in range(4):
        assert sorted(shapes[6 * epoch : 6 * epoch + 6]) == [1, 1, 1, 3, 3, 3]
    turns = [sum(a != b for a, b in zip(e, e[1:], strict=False)) for e in (shapes[i : i + 6] for i in range(0, 24, 6))]
    assert max(turns) > 1


def test_the_largest_batch_is_of_the_largest_shape(tmp_path: Path) -> None:
    wide = (16, 1, 8, 8)  # larger than LARGE though shorter
    shapes = [SMALL, LARGE, wide, SMALL]
    data = TrainingData(
        str(tmp_path), (*rows_of(tmp_path, *shapes), *rows_of(tmp_path, LARGE, SMALL, role="prior"))
    )
    batch = PhaseData(data, "clips", (LATENTS,), 3, 0, dict).largest()
    assert batch["latents"].shape == (3, *wide) and batch["prior"]["latents"].shape == (3, *LARGE)


def test_each_batch_has_a_prior_of_its_own(tmp_path: Path) -> None:
    data = TrainingData(
        str(tmp_path), (*rows_of(tmp_path, SMALL, SMALL), *rows_of(tmp_path, *[SMALL] * 5, role="prior"))
    )
    phase = PhaseData(data, "clips", (LATENTS,), 1, 0, dict)
    seen = {tuple(phase[index]["prior"]["latents"].flatten()[:3].tolist()) for index in range(5)}
    assert len(seen) == 5


def test_an_unmasked_sample_among_masked_ones_counts_in_full() -> None:
    latents = {"latents": {"latents": torch.zeros(16, 2, 3, 3)}}
    masked = {**latents, "mask": {"mask": torch.zeros(1, 2, 3, 3)}}
    batch = collate([masked, latents], (LATENTS, MASK), (16, 2, 3, 3))
    assert batch["mask"].shape == (2, 1, 2, 3, 3)
    assert not batch["mask"][0].any() and (batch["mask"][1] == 1).all()
    assert "mask" not in collate([latents, latents], (LATENTS, MASK), (16, 2, 3, 3))


def test_a_row_without_a_column_is_named_and_the_node_that_makes_it(tmp_path: Path) -> None:
    rows = [write_row(tmp_path, name, "clips", SMALL, **own) for name, own in (("good", {}), ("bad", {"prompt_embeds": None}))]
    data = TrainingData(str(tmp_path), tuple(rows))
    assert len(Batches(data, "clips", "train", (LATENTS, MASK))) == 2, "a mask is optional"
    with pytest.raises(ValueError, match=f"row 'bad' .*column 'prompt_embeds' is missing.*: use {PROMPT.made_by}$"):
        Batches(data, "clips", "train", (LATENTS, PROMPT))


@pytest.mark.parametrize("first", [True, False])
def test_a_column_that_some_rows_of_a_batch_lack_is_not_dropped_in_silence(first: bool) -> None:
    """Unless its own collate fills it in, as that of masks does."""
    column, depth = Column("depth", "Add Depth", optional=True), {"depth": {"depth": torch.zeros(2)}}
    rows = [depth, {}, {}] if first else [{}, {}, depth]
    with pytest.raises(ValueError, match="^depth: 2 of 3 rows of a batch lack it"):
        collate(rows, (column,), ())
    assert collate([{}, {}], (column,), ()) == {}


def test_prompts_are_padded_at_their_end() -> None:
    short, long = torch.ones(1, 2, 3), torch.full((1, 5, 3), 2.0)
    rows = [{"prompt_embeds": {"prompt_embeds": prompt}} for prompt in (short, long)]
    joined = collate(rows, (PROMPT,), ())["prompt_embeds"]
    assert joined.shape == (2, 1, 5, 3)
    assert torch.equal(joined[0, 0, :2], short[0]) and not joined[0, 0, 2:].any()
    assert torch.equal(joined[1], long)


def test_variants_are_repeated_in_turn_and_the_clean_prompt_is_not() -> None:
    rows = [{"prompt_embeds": {"prompt_embeds": torch.arange(float(count)).view(count, 1, 1)}} for count in (6, 3, 1)]
    joined = collate(rows, (PROMPT,), ())["prompt_embeds"].flatten(1)
    assert joined.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 1, 2, 1], [0] * 6]


def test_previews_have_the_clean_prompt() -> None:
    variants = torch.arange(3.0).view(3, 1, 1).expand(3, 4, 2)
    assert not collate([{"prompt_embeds": {"prompt_embeds": variants}}], (PREVIEW_PROMPT,), ())["prompt_embeds"].any()


def test_rows_of_one_group_have_one_number_in_training_and_validation(tmp_path: Path) -> None:
    named = [("cat", "train"), ("dog", "train"), ("cat", "train"), ("dog", "validation"), ("", "validation")]
    rows = [
        replace(write_row(tmp_path, f"{i}", "clips", SMALL, role), group=group) for i, (group, role) in enumerate(named)
    ]
    data = TrainingData(str(tmp_path), tuple(rows))
    numbers = {role: Batches(data, "clips", role, (LATENTS,)) for role in ("train", "validation")}
    assert data.groups("clips") == ["cat", "dog"]
    assert [int(numbers["train"].of_rows([i])["group"]) for i in range(3)] == [0, 1, 0]
    assert [int(numbers["validation"].of_rows([i])["group"]) for i in range(2)] == [1, -1]


@pytest.mark.parametrize(
    "changed", [{"role": "prior"}, {"unit": "frames"}, {"group": "dog"}, {"name": "other"}, {"columns": {"latents": "other", "prompt_embeds": "train 0"}}]
)
def test_the_digest_changes_with_what_a_row_is_and_is_for(changed: dict, eight: TrainingData) -> None:
    first, *others = eight.rows
    assert TrainingData("elsewhere", eight.rows).digest == eight.digest
    assert TrainingData(eight.folder, (replace(first, **changed), *others)).digest != eight.digest
