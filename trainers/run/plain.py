"""Reads and checks JSON files of limited size, builds dataclasses from them, and makes plain values of options."""

import json
import stat
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..core.config import TrainConfig

Plain = str | int | float | bool | None
LARGEST_FILE = 1 << 28  # bytes
LARGEST_NUMBER = 1e18


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError if it is not an object, too large or nested too deeply."""
    require_small_file(path)
    return parse(path.read_bytes(), path.name)


def require_small_file(path: Path) -> None:
    """ValueError for a link, a pipe, a device, or a file above LARGEST_FILE."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_FILE:
        raise ValueError(f"{path.name}: expected a file of at most {LARGEST_FILE} bytes, and no link")


def parse(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not readable as JSON ({str(error)[:200]})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object, not {type(value).__name__}")
    return value


def read(kind: Any, value: Any, name: str) -> Any:
    """Convert a JSON `value` to `kind`, a type or a dataclass. ValueError names the part of `name` that is wrong."""
    if is_dataclass(kind):
        return _read_fields(kind, _expect(dict, value, name), name)
    inner = get_args(kind)
    if get_origin(kind) is tuple:
        return tuple(read(inner[0], item, f"{name}[{place}]") for place, item in enumerate(_expect(list, value, name)))
    if get_origin(kind) is list:
        return [read(inner[0], item, f"{name}[{place}]") for place, item in enumerate(_expect(list, value, name))]
    if get_origin(kind) is dict:
        return {key: read(inner[1], item, f"{name}.{key}") for key, item in _expect(dict, value, name).items()}
    if inner and value is None and type(None) in inner:
        return None
    if len(some := [one for one in inner if one is not type(None)]) == 1:
        return read(some[0], value, name)
    return _expect(tuple(some) or kind, value, name)


def _read_fields(kind: Any, values: dict[str, Any], name: str) -> Any:
    found = {}
    for option, hint, needed in _hints(kind):
        if option in values:
            found[option] = read(hint, values[option], f"{name}.{option}")
        elif needed:
            raise ValueError(f"{name}.{option}: missing")
    return kind(**found)


@cache
def _hints(kind: Any) -> list[tuple[str, Any, bool]]:
    hints = get_type_hints(kind)
    return [(f.name, hints[f.name], f.default is MISSING and f.default_factory is MISSING) for f in fields(kind)]


def _expect(kinds: Any, value: Any, name: str) -> Any:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if not fits or (isinstance(value, (int, float)) and not abs(value) <= LARGEST_NUMBER):  # NaN fails this too
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name}={str(value)[:60]!r}: expected {expected}")
    return value


def public_config(config: TrainConfig) -> dict[str, Any]:
    """The options as they may be shared: of chosen files the name alone."""
    return {
        option.name: Path(value).name if option.metadata["file_of"] else value
        for option in fields(config)
        for value in [getattr(config, option.name)]
    }
