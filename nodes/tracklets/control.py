"""Nodes that load a tracklet control and apply it to a Stable Video Diffusion MODEL, for any sampler."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ...trainers.backbones.svd.model import check_model
from ...trainers.conditions.tracklet_control import NUMBERS, Controlled, TrackletControl, read
from ...trainers.conditions.tracklets import Tracklets, to_tensors
from ...trainers.core.backbone import PIXELS
from ...trainers.host.weights import load_tensors
from ..folders import TRACKLET_CONTROL
from ..hooked import Forward, as_loaded, hooked, patcher_of
from ..training.registry import trained_file
from ..widgets import NO_FILE, files_state, listed_file, path_input
from ..wires import TrackletControlType, TrackletsType


def load_control(path: str) -> tuple[Any, dict[str, Tensor]]:
    """A patcher of a file's TrackletControl, and the base model's layers that were trained with it."""
    tensors = load_tensors(Path(path))
    try:
        widths, numbers, base = read(tensors)
        control = TrackletControl(widths, numbers=numbers, **as_loaded(tensors)).load(tensors)
    except ValueError as error:
        raise ValueError(f"file={Path(path).name!r}: {error}") from error
    return patcher_of(control), base


def control_file(name: str) -> Path:
    return listed_file(TRACKLET_CONTROL, name, "a control")


class LoadTrackletControl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomLoadTrackletControl",
            display_name="Load Tracklet Control",
            category="Kinoloom/tracklets",
            description="Loads a tracklet control from Train SVD Tracklets.",
            search_aliases=["boximator", "trackdiffusion", "box control"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[NO_FILE, *folder_paths.get_filename_list(TRACKLET_CONTROL)],
                    tooltip="A file in models/tracklet_control, such as kinoloom/<run name>/...-tracklets-....",
                ),
                path_input(),
            ],
            outputs=[TrackletControlType.Output(display_name="control", tooltip="For Apply Tracklets.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None, path: str | None = "") -> bool:
        """ValueError for a missing file. Connected inputs are None."""
        if file is not None and path == "":
            control_file(file)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_: Any) -> str:
        return files_state(TRACKLET_CONTROL, file)

    @classmethod
    def execute(cls, file: str, path: str = "") -> io.NodeOutput:
        return io.NodeOutput(load_control(trained_file(path) if path else str(control_file(file))))


class ApplyTracklets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomApplyTracklets",
            display_name="Apply Tracklets",
            category="Kinoloom/tracklets",
            description="Makes objects of a Stable Video Diffusion video follow boxes. For KSampler and CFG Guider.",
            search_aliases=["boximator", "trackdiffusion", "box control", "motion control"],
            inputs=[
                io.Model.Input("model", tooltip="The SVD model that the control was trained on, or a similar one."),
                TrackletControlType.Input("control", tooltip="From Load Tracklet Control."),
                TrackletsType.Input(
                    "tracklets", tooltip="The boxes. They are fitted to the video's aspect ratio and number of frames."
                ),
            ],
            outputs=[io.Model.Output(tooltip="For samplers.")],
        )

    @classmethod
    def execute(cls, model: Any, control: tuple[Any, dict[str, Tensor]], tracklets: Tracklets) -> io.NodeOutput:
        check_model(model.model)
        patcher, base = control
        mixers = {key: value for key, value in base.items() if key.endswith("mix_factor")}
        layers = {f"diffusion_model.{key}": ("set", (base[key],)) for key in base.keys() - mixers.keys()}
        boxes = Boxes(patcher.model, mixers, tracklets)
        applied = hooked(model, TRACKLET_CONTROL, [patcher], "control", boxes.at_work)
        applied.add_patches(layers)
        keys = [key for tracklet in tracklets.tracklets for key in tracklet.keyframes]
        soft = tracklets.interpolated == "soft" or not all(key.hard for key in keys)
        if soft and patcher.model.position_net.numbers == NUMBERS:
            logging.warning("Kinoloom: this control was trained with soft_boxes=0 and takes soft boxes for hard ones")
        return io.NodeOutput(applied)


@dataclass(frozen=True)
class Boxes:
    """The tracklets that a control follows. The negative conditioning gets null tokens.

    Time mixers are set here instead of by patches, which dynamic VRAM applies only to layers.
    """

    control: TrackletControl
    mixers: dict[str, Tensor]
    tracklets: Tracklets

    @contextmanager
    def at_work(self, forward: Forward) -> Iterator[dict[str, Any]]:
        window, device = forward.options.get("context_window"), forward.x.device
        total = forward.frames if window is None else window.total_frames
        height, width = (side * PIXELS for side in forward.x.shape[-2:])
        boxes, mask = to_tensors(self.tracklets, total, (width, height))
        if window is not None:
            anchor = getattr(window, "causal_anchor_index", -1)
            places = [*([anchor] if anchor >= 0 else []), *window.index_list]
            boxes, mask = boxes[places], mask[places]
        with replaced(forward.unet, self.mixers), Controlled(forward.unet, self.control) as controlled:
            controlled.boxes = torch.cat([boxes] * len(forward.prompts)).to(device)
            controlled.mask = torch.cat([mask * (prompt == 0) for prompt in forward.prompts]).to(device)
            yield {} if window is None else {"num_video_frames": forward.frames}


@contextmanager
def replaced(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Replace parameters of a module by these values inside the `with` block."""
    parameters = {name: module.get_parameter(name) for name in values}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name].to(parameter)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


NODES = [LoadTrackletControl, ApplyTracklets]
