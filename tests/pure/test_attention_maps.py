"""Attention maps of words, on layers of a few numbers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kinoloom.trainers.conditions import attention_maps
from kinoloom.trainers.conditions.attention_maps import AttentionMaps, frames_of, shares
from torch import Tensor

from ..rows import random

WORDS = ("", "water", "falls", "water", "", "")


def site(place: str = "up_blocks.3", heads: int = 2) -> Any:
    return SimpleNamespace(place=f"{place}.attentions.0.transformer_blocks.0", base=SimpleNamespace(heads=heads))


def expected(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """The mean softmax [L, M] of q [B, L, C] over k [B, M, C], one query and one head at a time."""
    total, width = torch.zeros(q.shape[1], k.shape[1]), q.shape[2] // heads
    for clip in range(len(q)):
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            for place in range(q.shape[1]):
                powers = [(q[clip, place, own] @ key[own] / width**0.5).exp() for key in k[clip]]
                total[place] += torch.stack(powers) / sum(powers)
    return total / (heads * len(q))


@pytest.mark.parametrize("entries", [1, 100, 1 << 24])
def test_shares_are_those_of_a_softmax_however_it_is_cut(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(attention_maps, "LARGEST_PART", entries)
    q, k = random(2, 12, 8, name="q"), random(2, 5, 8, name="k")
    torch.testing.assert_close(torch.cat(list(shares(q, k, 2))), expected(q, k, 2))
    assert torch.cat(list(shares(q.half(), k.half(), 2))).dtype == torch.float32


def test_a_word_takes_the_sum_of_its_places_and_a_map_the_mean_of_layers() -> None:
    maps = AttentionMaps([WORDS])
    maps.start(2, 3, 4)
    for name in ("first", "second"):
        q, k = random(1, 2, 3, 4, 8, name=f"{name} q"), random(1, 6, 8, name=f"{name} k")
        maps.see(site(), q, {0: k}, {})
    both = [expected(random(1, 24, 8, name=f"{n} q"), random(1, 6, 8, name=f"{n} k"), 2) for n in ("first", "second")]
    mean = (sum(both) / 2).view(2, 3, 4, 6)
    torch.testing.assert_close(maps.of_word(0, "water", "high", (3, 4)), mean[..., 1] + mean[..., 3])
    torch.testing.assert_close(maps.of_word(0, "falls", "high", (3, 4)), mean[..., 2])
    assert maps.of_word(0, "falls", "low", (3, 4)) is None and maps.of_word(0, "fall", "high", (3, 4)) is None
    assert maps.words_of(0) == ["water", "falls"]


def test_keys_of_every_frame_are_added_up() -> None:
    """In modes that rotate keys an adapter has n keys for each frame."""
    maps, q, k = AttentionMaps([WORDS]), random(1, 2, 1, 2, 8, name="q"), random(1, 12, 8, name="k")
    maps.start(2, 1, 2)
    maps.see(site(), q, {0: k}, {})
    each = expected(q.flatten(1, 3), k, 2).view(2, 1, 2, 12)
    torch.testing.assert_close(maps.of_word(0, "falls", "high", (1, 2)), each[..., 2] + each[..., 8])


def test_adapters_of_one_softmax_are_told_apart() -> None:
    maps, q = AttentionMaps([("a", ""), (), ("", "", "b")]), random(1, 2, 1, 2, 8, name="q")
    keys = {number: random(1, count, 8, name=f"k {number}") for number, count in ((0, 2), (1, 4), (2, 3))}
    maps.start(2, 1, 2)
    maps.see(site(), q, keys, {})
    each = expected(q.flatten(1, 3), torch.cat(list(keys.values()), 1), 2).view(2, 1, 2, 9)
    torch.testing.assert_close(maps.of_word(0, "a", "high", (1, 2)), each[..., 0])
    torch.testing.assert_close(maps.of_word(2, "b", "high", (1, 2)), each[..., 8])
    assert not any(number == 1 for number, *_ in maps.sums)


def test_frames_stand_where_a_window_has_them() -> None:
    """A frame of several windows has their mean; a window may have the first frame in front."""
    maps, k = AttentionMaps([WORDS]), random(1, 6, 8, name="k")
    maps.start(5, 1, 1)
    frames = {(0, 1, 2): [0, 1, 2], (0, 2, 3, 4): [2, 3, 4]}
    for places, own in frames.items():
        q = random(1, len(places), 1, 1, 8, name=f"q {places}")
        maps.see(site(), q, {0: k}, {"context_window": SimpleNamespace(index_list=own)})
    found = {places: expected(random(1, len(places), 1, 1, 8, name=f"q {places}").flatten(1, 3), k, 2)[:, 2] for places in frames}
    sums, counts = torch.zeros(5), torch.zeros(5)
    for places, values in found.items():
        for place, value in zip(places, values, strict=True):
            sums[place] += value
            counts[place] += 1
    torch.testing.assert_close(maps.of_word(0, "falls", "high", (1, 1)).flatten(), sums / counts)
    assert frames_of(None, 3).tolist() == [0, 1, 2]


def test_grids_of_a_level_join_in_the_size_that_is_asked_for() -> None:
    """A node may shrink a level for some steps."""
    maps, k = AttentionMaps([WORDS]), torch.zeros(1, 6, 8)
    k[0, 2], large, small = 1.0, torch.zeros(1, 1, 2, 4, 8), torch.zeros(1, 1, 1, 2, 8)
    large[0, 0, 1, 3], small[0, 0, 0, 0] = 20, 20
    maps.start(1, 2, 4)
    for q in (large, small):
        maps.see(site(), q, {0: k}, {})
    one, none = 1.0, 1 / 6
    mean = [[one + none, one + none, none + none, none + none], [one + none, one + none, none + none, none + one]]
    torch.testing.assert_close(maps.of_word(0, "falls", "high", (2, 4))[0], torch.tensor(mean) / 2)


def test_levels_are_those_of_the_unet_and_the_middle_is_left_out() -> None:
    maps, (q, k) = AttentionMaps([WORDS]), (random(1, 2, 1, 2, 8, name="q"), random(1, 6, 8, name="k"))
    maps.start(2, 1, 2)
    found = {}
    for place in ("down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.1", "up_blocks.2", "up_blocks.3"):
        maps.start(2, 1, 2)
        maps.see(site(place), q, {0: k}, {})
        found[place] = [level for _, level, _ in maps.sums]
    high, middle, low = ["high"], ["middle"], ["low"]
    assert list(found.values()) == [high, middle, low, [], low, middle, high]


def test_maps_that_are_too_large_are_refused_before_the_run() -> None:
    maps = AttentionMaps([("", *["word"] * 70, "")] * 4)
    maps.start(16, 40, 64)
    with pytest.raises(ValueError, match=r"^attention maps of 280 words in 64 frames of 128x96 latents have 1102 MiB, expected at most 512\."):
        maps.start(64, 96, 128)
