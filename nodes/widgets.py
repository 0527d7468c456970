"""Node inputs: widgets made from knobs, and checks of names and files."""

import os
import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

NO_FILE = "none"
UNCONNECTED = object()  # default of an input in validate_inputs, where None means a connected input
LONGEST_NAME = 100  # bytes; a file name, at most 255 bytes long, holds it together with other parts
DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)[1-9¹²³]) *(\..*)?", re.IGNORECASE)


def require_name(field: str, value: str) -> str:
    """The value without spaces around it. ValueError unless it is a valid file name on every system."""
    name = value.strip() if isinstance(value, str) else ""
    if not re.fullmatch(r"[\w-]([\w .-]*[\w-])?", name) or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"{field}={value!r}: expected letters, digits, '_' or '-', with spaces or dots only in between, at most "
            f"{LONGEST_NAME} bytes"
        )
    if DEVICE.fullmatch(name):
        raise ValueError(f"{field}={value!r}: expected another name, because Windows reserves this one for a device")
    return name


def require_one(images: Any, video: Any, absent: Any = UNCONNECTED) -> bool:
    """ValueError unless exactly one of the two is connected."""
    if (images is absent) == (video is absent):
        raise ValueError("connect either images or video")
    return True


def model_file(field: str, folder: str, name: str) -> Path:
    """The path of a file chosen from a model folder. ValueError if it does not exist or is outside the folder."""
    path = folder_paths.get_full_path(folder, name) if isinstance(name, str) else None
    if path is None:
        raise ValueError(f"{field}={name!r}: expected a file in the model folder {folder}")
    return Path(path)


def listed_file(folder: str, name: str, what: str) -> Path:
    """The path of the file that is chosen where `path_input` is not connected. ValueError if none is."""
    if name == NO_FILE:
        raise ValueError(f"file={name!r}: expected {what} of the list, or path of Training Result connected")
    return model_file("file", folder, name)


def path_input() -> io.Input:
    """The input that takes the place of `file` in a loader of what runs make."""
    return io.String.Input(
        "path",
        optional=True,
        force_input=True,
        tooltip="path of Training Result, to sample in the same workflow. Replaces file.",
    )


def files_state(folder: str, *names: str | None) -> str:
    """A fingerprint of these model files. None means a connected input, and covers all files of the folder."""
    wanted = folder_paths.get_filename_list(folder) if None in names else sorted({*names} - {NO_FILE, ""})
    paths = [path for name in wanted if (path := folder_paths.get_full_path(folder, name))]
    return repr([(path, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [os.stat(path)]])


def widget(option: Field) -> io.Input:
    """The node input for a knob."""
    extra, name, default = option.metadata, option.name, option.default
    shared: dict[str, Any] = {"tooltip": extra["tooltip"], "advanced": extra["advanced"]}
    if extra["file_of"]:
        files = [NO_FILE, *folder_paths.get_filename_list(extra["file_of"])]
        return io.Combo.Input(name, options=files, default=NO_FILE, **shared)
    shared["default"] = default
    if extra["choices"]:
        return io.Combo.Input(name, options=list(extra["choices"]), **shared)
    if isinstance(default, bool):
        return io.Boolean.Input(name, **shared)
    if isinstance(default, str):
        return io.String.Input(name, **shared)
    shared |= {"min": extra["min"], "max": extra["max"]}
    if isinstance(default, int):
        after = {"control_after_generate": io.ControlAfterGenerate.fixed} if name == "seed" else {}
        return io.Int.Input(name, step=extra["step"], **after, **shared)
    return io.Float.Input(name, step=extra["step"] or 0.01, **shared)


def widgets(config_class: type) -> list[io.Input]:
    """The inputs of all knobs: a class's own first, then inherited, then advanced, then those that were added later."""
    inherited = {option.name: place for place, c in enumerate(config_class.__mro__[:-1]) for option in fields(c)}

    def place(option: Field) -> tuple[int, bool, int]:
        return option.metadata["added"], option.metadata["advanced"], inherited[option.name]

    return [widget(option) for option in sorted(fields(config_class), key=place)]
