"""Inputs that are lists: one value for each clip, or one value for all clips."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def listed(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def joined(texts: Any) -> str:
    """The text, or all texts of a list joined as lines."""
    return "\n".join(listed(texts))


def only(field: str, value: Any) -> Any:
    """The single value of an input that is the same for all clips."""
    values = listed(value)
    if len(values) != 1:
        raise ValueError(f"{field}: found a list of {len(values)}, expected one value for all clips")
    return values[0]


def only_each(values: dict[str, Any]) -> dict[str, Any]:
    return {field: only(field, value) for field, value in values.items()}


def by_place(field: str, value: Any, count: int, *, shared: bool = True, one_for: str = "clip") -> list:
    """`count` values, one for each clip, or what `one_for` says. A single value is repeated if it may be `shared`."""
    values = listed(value)
    if len(values) == 1 and shared:
        return values * count
    if len(values) != count:
        raise ValueError(
            f"{field}: found {len(values)}, expected {count}, one for each {one_for}"
            f"{' or one for all' if shared else ''}"
        )
    return values


def for_each(make: Callable[[T], R], items: Iterable[T], name: Callable[[T], str]) -> list[R]:
    """`make(item)` for every item. One ValueError names all items that it refuses and says why."""
    made, problems = [], []
    for item in items:
        try:
            made.append(make(item))
        except ValueError as error:
            problems.append(f"{name(item)}: {error}")
    if problems:
        several = "some clips cannot be used:\n- " if len(problems) > 1 else ""
        raise ValueError(several + "\n- ".join(problems))
    return made
