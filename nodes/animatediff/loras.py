"""Nodes that apply a motion LoRA to a MODEL's motion module, and that merge motion LoRAs into one file."""

import logging
from pathlib import Path
from typing import Any

import comfy.lora
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ...lora_io.file import free_path, save
from ...lora_io.keys import from_motion_lora, to_motion_lora
from ...lora_io.merge import merge
from ...trainers.backbones.animatediff.motion_module import MID, PART
from ...trainers.host.weights import load_tensors
from ..folders import MOTION_LORAS, output_folder
from ..widgets import NO_FILE, files_state, require_name

LORA_STRENGTH = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}


def with_motion_lora(model: Any, tensors: dict[str, Tensor], strength: float, name: str) -> Any:
    """`model` with a motion LoRA on its motion module. ValueError if the module lacks a layer of the LoRA."""
    if not model.get_additional_models_with_key(PART):
        raise ValueError("model: has no motion module. Put Apply Motion Module before the motion LoRA")
    if strength == 0:
        return model
    try:
        pairs = from_motion_lora(tensors)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    patched = model.clone()
    motion = patched.get_additional_models_with_key(PART)[0]
    layout, weights = motion.model.layout, motion.model.state_dict()
    if not layout.mid and any(key.startswith(MID) for key in pairs):
        logging.warning("Kinoloom: %s was made for a v2 motion module; this one is %s", name, layout.version)
        pairs = {key: tensor for key, tensor in pairs.items() if not key.startswith(MID)}
    layers = {key.partition(".lora_")[0]: f"{key.partition('.lora_')[0]}.weight" for key in pairs}
    if unknown := [path for path, key in layers.items() if key not in weights]:
        raise ValueError(f"{name}: {len(unknown)} of its layers are not in this motion module, such as {unknown[0]}")
    for path, key in layers.items():
        found = pairs[f"{path}.lora_up.weight"].shape[0], pairs[f"{path}.lora_down.weight"].shape[1]
        if found != weights[key].shape:
            raise ValueError(
                f"{name}: made for a motion module of another width: {path} is for a layer of {found}, this motion "
                f"module's is {(*weights[key].shape,)}. Choose a LoRA for this module ({layout.version})"
            )
    wide = {key: tensor.float() for key, tensor in pairs.items()}
    motion.add_patches(comfy.lora.load_lora(wide, layers), strength)
    return patched


def require_same_layers(first: dict[str, Tensor], *others: dict[str, Tensor]) -> None:
    """ValueError if a layer has another width in another motion LoRA."""
    for other in others:
        for key in first.keys() & other.keys():
            side = 1 if ".lora_down." in key else 0
            if first[key].shape[side] != other[key].shape[side]:
                raise ValueError(
                    f"lora_2: made for a motion module of another width than lora_1: {key} is {(*other[key].shape,)}, "
                    f"in lora_1 {(*first[key].shape,)}"
                )


def lora_choices() -> list[str]:
    return folder_paths.get_filename_list(MOTION_LORAS)


def read_lora(name: str) -> dict[str, Tensor]:
    return load_tensors(Path(folder_paths.get_full_path_or_raise(MOTION_LORAS, name)))


class LoadMotionLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomLoadMotionLora",
            display_name="Load Motion LoRA",
            category="Kinoloom/animatediff",
            description="Applies a motion LoRA to a model's motion module. Chain several to add their motions.",
            search_aliases=["animatediff lora", "motiondirector"],
            inputs=[
                io.Model.Input("model", tooltip="A model from Apply Motion Module."),
                io.Combo.Input(
                    "lora_name",
                    options=lora_choices(),
                    tooltip="A file in models/animatediff_motion_lora, such as kinoloom/<run name>/...-temporal-....",
                ),
                io.Float.Input("strength", tooltip="How much of it. 0.7 if results look alike.", **LORA_STRENGTH),
            ],
            outputs=[io.Model.Output(tooltip="The model with the motion LoRA.")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: Any) -> str:
        return files_state(MOTION_LORAS, lora_name)

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength: float) -> io.NodeOutput:
        return io.NodeOutput(with_motion_lora(model, read_lora(lora_name), strength, f"lora_name={lora_name!r}"))


class LoadMotionLoraModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomLoadMotionLoraModel",
            display_name="Load Motion LoRA Model",
            category="Kinoloom/animatediff",
            description="Applies a motion LoRA from another node, such as Training Result, to a model's motion module.",
            inputs=[
                io.Model.Input("model", tooltip="A model from Apply Motion Module."),
                io.LoraModel.Input("lora", tooltip="The motion LoRA: lora of Training Result."),
                io.Float.Input("strength", tooltip="How much of it. 0.7 if results look alike.", **LORA_STRENGTH),
            ],
            outputs=[io.Model.Output(tooltip="The model with the motion LoRA.")],
        )

    @classmethod
    def execute(cls, model: Any, lora: dict[str, Tensor], strength: float) -> io.NodeOutput:
        return io.NodeOutput(with_motion_lora(model, lora, strength, "lora"))


class MergeMotionLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomMergeMotionLoras",
            display_name="Merge Motion LoRAs",
            category="Kinoloom/animatediff",
            is_output_node=True,
            description="Merges two motion LoRAs into one file, or rewrites one with key names for every loader.",
            search_aliases=["convert motion lora"],
            inputs=[
                io.Combo.Input("lora_1", options=lora_choices(), tooltip="A motion LoRA in any known format."),
                io.Float.Input("strength_1", tooltip="How much of it goes in.", **LORA_STRENGTH),
                io.Combo.Input(
                    "lora_2",
                    options=[NO_FILE, *lora_choices()],
                    default=NO_FILE,
                    tooltip="The second motion LoRA, or none to convert only the first.",
                ),
                io.Float.Input("strength_2", tooltip="How much of it goes in.", **LORA_STRENGTH),
                io.String.Input("name", default="merged", tooltip="Name of the new file; a number is added if taken."),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    advanced=True,
                    tooltip="Rank of the result. 0 merges exactly, with the sum of the ranks. Lower makes it smaller.",
                ),
            ],
            outputs=[
                io.LoraModel.Output("lora", tooltip="The merged LoRA, for Load Motion LoRA Model."),
                io.String.Output("path", tooltip="Its file."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool:
        if name is not None:  # not a connected input
            require_name("name", name)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_1: str | None = None, lora_2: str | None = None, **_: Any) -> str:
        """A fingerprint of the files. A connected input covers all files, except merged ones, which never change."""
        others = [name for name in lora_choices() if Path(name).parent != Path(output_folder(MOTION_LORAS).name)]
        chosen = [name for given in (lora_1, lora_2) for name in (others if given is None else [given])]
        return files_state(MOTION_LORAS, *chosen)

    @classmethod
    def execute(
        cls, lora_1: str, strength_1: float, lora_2: str, strength_2: float, name: str, rank: int
    ) -> io.NodeOutput:
        name = require_name("name", name)
        chosen = [(lora_1, strength_1), *([(lora_2, strength_2)] if lora_2 != NO_FILE else [])]
        parts = []
        for option, (file, strength) in zip(("lora_1", "lora_2"), chosen, strict=False):
            try:
                parts.append((from_motion_lora(read_lora(file)), strength))
            except ValueError as error:
                raise ValueError(f"{option}={file!r}: {error}") from error
        require_same_layers(*(pairs for pairs, _ in parts))
        merged = to_motion_lora(merge(parts, rank))
        path = free_path(output_folder(MOTION_LORAS), name)
        described = ", ".join(f"{Path(file).name} x {strength:g}" for file, strength in chosen)
        save(path, merged, {"format": "pt", "kinoloom.merged": described})
        return io.NodeOutput(merged, str(path), ui={"text": (str(path),)})


NODES: list[type[io.ComfyNode]] = [LoadMotionLora, LoadMotionLoraModel, MergeMotionLoras]
