"""Checks of the fields of tracklets. Errors name the field, its place and the expected values."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def inside(place: str, separator: str = ".") -> Iterator[None]:
    """Put `place` in front of the text of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}{separator}{error}") from None


def expect(right: bool, name: str, value: Any, expected: str) -> None:
    if not right:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def whole(name: str, value: Any, low: int, high: int) -> None:
    right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    expect(right, name, value, f"a whole number {low}..{high}")


def number(name: str, cell: str, whole: bool = False) -> Any:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    expect(math.isfinite(value) and not (whole and value % 1), name, cell, "a whole number" if whole else "a number")
    return int(value) if whole else value
