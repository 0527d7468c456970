"""Positions in an adapter's cross-attention against the formulas, one number at a time."""

import math
from typing import Any

import pytest
import torch
from kinoloom.trainers.conditions.adapter_positions import (
    AFTER,
    BEFORE,
    MODES,
    of_frames,
    rotated_queries,
    with_positions,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ..plain_positions import before_queries, of_queries, of_tokens
from ..rows import random

X = random(2, 3, 2, 3, 16, name="positions")  # a quarter of the channels is two pairs
K, V = random(2, 4, 16, name="keys"), random(2, 4, 16, name="values")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Angles of rising frequencies reach 10^5, and fp32 keeps seven digits of them.
SINUSOIDAL = {"rtol": 0, "atol": 2e-2}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_follows_its_formula(mode: str) -> None:
    sinusoidal = mode in ("naive", "temporal", "temporal_sine")
    torch.testing.assert_close(with_positions(mode, X).double(), before_queries(mode, X), **(SINUSOIDAL if sinusoidal else CLOSE))
    torch.testing.assert_close(rotated_queries(mode, X).double(), of_queries(mode, X), **CLOSE)
    for name, mine in zip("kv", of_frames(mode, K, V, 3), strict=True):
        torch.testing.assert_close(mine.double(), of_tokens(mode, name, {"k": K, "v": V}[name], 3), **CLOSE)


def test_a_mode_acts_in_one_place_only() -> None:
    """On x before W_Q, or on queries, keys and values after the projections; "none" nowhere."""
    for mode in MODES:
        changed = not torch.equal(with_positions(mode, X), X), not torch.equal(rotated_queries(mode, X), X)
        assert changed == (mode in BEFORE, mode in AFTER), mode
    assert {*BEFORE, *AFTER, "none"} == {*MODES}


def test_frequencies_of_sinusoids_rise() -> None:
    """The original lacks the minus sign of the usual formula: the first pair turns by 1 each frame, the last by most."""
    added = with_positions("temporal", torch.zeros(1, 2, 1, 1, 16))[0, 1, 0, 0]
    assert float(added[0]) == pytest.approx(math.sin(1.0)) and float(added[1]) == pytest.approx(math.cos(1.0))
    assert float(added[-2]) == pytest.approx(math.sin(10000 ** (14 / 16)), abs=1e-3)


@pytest.mark.parametrize("mode", ["temporal", "temporal_sine"])
def test_the_first_frame_gets_no_sinusoid(mode: str) -> None:
    added = with_positions(mode, X) - X
    assert not added[:, 0].any() and added[:, 1:].abs().max() > 0.1
    assert torch.equal(with_positions(mode, X)[:, 0], X[:, 0])


def test_rotary_modes_add_the_rotated_tensor() -> None:
    """x + R(x): where nothing is turned, x doubles. That is the first frame, and the last quarter of rope_3d."""
    torch.testing.assert_close(with_positions("rope_1d", X)[:, 0], 2 * X[:, 0])
    turned = with_positions("rope_3d", X)
    torch.testing.assert_close(turned[..., 12:], 2 * X[..., 12:])
    torch.testing.assert_close(turned[:, 0, 0, 0], 2 * X[:, 0, 0, 0])
    assert (turned[:, 1:, 1:, 1:, :12] - 2 * X[:, 1:, 1:, 1:, :12]).abs().amax(dim=(0, 1, 2, 3)).min() > 1e-3


def test_half_precision_keeps_its_type() -> None:
    for mode in MODES:
        half = X.half()
        assert with_positions(mode, half).dtype == rotated_queries(mode, half).dtype == torch.float16
        torch.testing.assert_close(with_positions(mode, half).float(), with_positions(mode, half.float()), rtol=2e-3, atol=4e-3)


class Elsewhere(TorchDispatchMode):
    """Collects the operations whose result is on another device than "meta"."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type != "meta":
            self.found.append(str(function))
        return made


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_copied_to_the_device_at_each_step(mode: str) -> None:
    x, k = X.to("meta"), K.to("meta")
    for seen in (Elsewhere(), Elsewhere()):
        with seen:
            with_positions(mode, x), rotated_queries(mode, x), of_frames(mode, k, k, 3)
    assert not seen.found, "also the tables of the first step"


@pytest.mark.parametrize("mode", MODES)
def test_training_works_after_a_sampler(mode: str) -> None:
    x = random(1, 2, 2, 2, 24, name="other size").requires_grad_()
    with torch.inference_mode():
        with_positions(mode, x.detach()), rotated_queries(mode, x.detach())
    rotated_queries(mode, with_positions(mode, x)).sum().backward()
    assert x.grad.abs().min() > 0
