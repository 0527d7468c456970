"""Tracklet control in ComfyUI: boxes that objects of a Stable Video Diffusion video follow, in any sampler."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor, nn

from ...trainers.backbones.svd.model import check_model
from ...trainers.conditions.tracklet_control import NUMBERS, Controlled, TrackletControl, read, widths_of
from ...trainers.conditions.tracklets import Tracklets, to_tensors
from ...trainers.core.backbone import PIXELS
from ...trainers.host.weights import load_tensors
from ..folders import TRACKLET_CONTROL
from ..training.registry import trained_file
from ..widgets import NO_FILE, files_state, model_file
from ..wires import TrackletControlType, TrackletsType


def load_control(path: str) -> tuple[Any, dict[str, Tensor]]:
    """A patcher of the TrackletControl in a file, and the layers of the base model that were trained with it."""
    tensors = load_tensors(Path(path))
    size = sum(tensor.numel() for tensor in tensors.values())
    dtype = comfy.model_management.unet_dtype(model_params=size, weight_dtype=comfy.utils.weight_dtype(tensors))
    offload = comfy.model_management.unet_offload_device()
    made = {"operations": comfy.ops.manual_cast, "dtype": dtype, "device": offload}
    try:
        widths, numbers, base = read(tensors)
        control = TrackletControl(widths, numbers=numbers, **made).load(tensors)
    except ValueError as error:
        raise ValueError(f"file={Path(path).name!r}: {error}") from error
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(control, load_device=device, offload_device=offload), base


def control_file(name: str) -> Path:
    if name == NO_FILE:
        raise ValueError(f"file={name!r}: expected a control of the list, or path of Training Result connected")
    return model_file("file", TRACKLET_CONTROL, name)


class LoadTrackletControl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomLoadTrackletControl",
            display_name="Load Tracklet Control",
            category="Kinoloom/tracklets",
            description="Loads what Train SVD Tracklets learned.",
            search_aliases=["boximator", "trackdiffusion", "box control"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[NO_FILE, *folder_paths.get_filename_list(TRACKLET_CONTROL)],
                    tooltip="A file in models/tracklet_control, such as kinoloom/<run name>/...-tracklets-....",
                ),
                io.String.Input(
                    "path",
                    optional=True,
                    force_input=True,
                    tooltip="path of Training Result, to go on in the same graph. Takes the place of file.",
                ),
            ],
            outputs=[TrackletControlType.Output(display_name="control", tooltip="For Apply Tracklets.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None, path: str | None = "") -> bool:
        """ValueError for a file that is not there; what arrives by wire is None."""
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
            description="Has the objects of a Stable Video Diffusion video follow boxes; for KSampler and CFG Guider.",
            search_aliases=["boximator", "trackdiffusion", "box control", "motion control"],
            inputs=[
                io.Model.Input("model", tooltip="The SVD model that the control was trained on, or one like it."),
                TrackletControlType.Input("control", tooltip="From Load Tracklet Control."),
                TrackletsType.Input(
                    "tracklets", tooltip="The boxes. They are fitted to the video's shape and number of frames."
                ),
            ],
            outputs=[io.Model.Output(tooltip="For samplers.")],
        )

    @classmethod
    def execute(cls, model: Any, control: tuple[Any, dict[str, Tensor]], tracklets: Tracklets) -> io.NodeOutput:
        check_model(model.model)
        patcher, base = control
        require_fit(model.model.diffusion_model, patcher.model)
        keys = [key for tracklet in tracklets.tracklets for key in tracklet.keyframes]
        soft = tracklets.interpolated == "soft" or not all(key.hard for key in keys)
        if soft and patcher.model.position_net.numbers == NUMBERS:
            logging.warning("Kinoloom: this control was trained with soft_boxes=0 and takes soft boxes for hard ones")
        applied = model.clone()
        mixers = {key: value for key, value in base.items() if key.endswith("mix_factor")}
        layers = {f"diffusion_model.{key}": ("set", (base[key],)) for key in base.keys() - mixers.keys()}
        applied.add_patches(layers)
        applied.set_additional_models(TRACKLET_CONTROL, [patcher.clone()])
        applied.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, TRACKLET_CONTROL)
        run = sampling_with(patcher.model, mixers, tracklets)
        applied.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, TRACKLET_CONTROL, run)
        return io.NodeOutput(applied)


def require_fit(unet: Any, control: TrackletControl) -> None:
    here = widths_of(unet)
    made_for = {path.replace("/", "."): fuser.norm1.weight.shape[0] for path, fuser in control.fusers.items()}
    if made_for != here:
        raise ValueError(
            f"control: made for a model of {len(made_for)} transformers of {sorted(set(made_for.values()))} channels, "
            f"this one has {len(here)} of {sorted(set(here.values()))}"
        )


def sampling_with(control: TrackletControl, mixers: dict[str, Tensor], tracklets: Tracklets) -> Callable:
    """A wrapper of the UNet's forward with the boxes at work in it; the negative's images get the null tokens.

    Time mixers are set here and not as patches, which dynamic VRAM applies to layers alone.
    """

    def run(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = args[4] if len(args) > 4 else kwargs.get("transformer_options", {})
        halves = options.get("cond_or_uncond", [0])
        frames = len(x) // len(halves)
        window = options.get("context_window")
        total = frames if window is None else window.total_frames
        height, width = (side * PIXELS for side in x.shape[-2:])
        boxes, mask = to_tensors(tracklets, total, (width, height))
        if window is not None:
            anchor = getattr(window, "causal_anchor_index", -1)
            places = [*([anchor] if anchor >= 0 else []), *window.index_list]
            boxes, mask, kwargs = boxes[places], mask[places], {**kwargs, "num_video_frames": frames}
        unet = executor.class_obj
        with replaced(unet, mixers), Controlled(unet, control) as controlled:
            controlled.boxes = torch.cat([boxes] * len(halves)).to(x.device)
            controlled.mask = torch.cat([mask * (half == 0) for half in halves]).to(x.device)
            return executor(x, *args, **kwargs)

    return run


@contextmanager
def replaced(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Parameters of a module have these values within."""
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
