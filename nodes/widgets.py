"""Config fields as inputs, and the types on this pack's wires."""

import re
from dataclasses import Field
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

TrainingDataType = io.Custom("TRAINING_DATA")  # trainers.core.data.TrainingData
TrainingJobType = io.Custom("TRAINING_JOB")  # the id of a job
TrainingSamplesType = io.Custom("TRAINING_SAMPLES")  # trainers.core.sampling.Samples
TrackletsType = io.Custom("TRACKLETS")  # trainers.core.tracklets.Tracklets
NO_FILE = "none"
LONGEST_NAME = 100  # bytes; a file name of at most 255 holds it several times over
TRACKLET_CONTROL = "tracklet_control"  # a model folder


def require_name(field: str, value: str) -> None:
    """ValueError unless the value of this input may name files and folders."""
    if not re.fullmatch(r"[\w-]([\w .-]*[\w-])?", value) or len(value.encode()) > LONGEST_NAME:
        raise ValueError(
            f"{field}={value!r}: expected letters, digits, '_' or '-', with spaces or dots only in between, at most "
            f"{LONGEST_NAME} bytes"
        )


def output_folder(kind: str) -> Path:
    """kinoloom/ in ComfyUI's first folder of that kind, but for models/unet, the old name of diffusion_models."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(kind)]
    return next((folder for folder in folders if folder.name != "unet"), folders[0]) / "kinoloom"


def widget(option: Field) -> io.Input:
    """The input that a knob becomes."""
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
