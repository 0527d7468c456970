"""Inputs of nodes that take lists whole: a value for each clip by its place, or one for all."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def listed(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def joined(texts: Any) -> str:
    """The lines of a text, or of all texts of a list."""
    return "\n".join(listed(texts))


def only(field: str, value: Any) -> Any:
    """The one value of an input that cannot differ from clip to clip."""
    values = listed(value)
    if len(values) != 1:
        raise ValueError(f"{field}: found a list of {len(values)}, expected one value for all clips")
    return values[0]


def only_each(values: dict[str, Any]) -> dict[str, Any]:
    return {field: only(field, value) for field, value in values.items()}


def by_place(field: str, value: Any, count: int, *, shared: bool = True) -> list:
    """`count` values; a single one is for all clips if it may be `shared`."""
    values = listed(value)
    if len(values) == 1 and shared:
        return values * count
    if len(values) != count:
        raise ValueError(
            f"{field}: found {len(values)}, expected {count}, one for each clip{' or one for all' if shared else ''}"
        )
    return values


def for_each(make: Callable[[T], R], items: Iterable[T], name: Callable[[T], str]) -> list[R]:
    """`make` of every item; one ValueError names all items that it refuses, and why."""
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
