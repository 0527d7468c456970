"""AnimateDiff in ComfyUI: motion modules on a MODEL, in any sampler, and motion LoRAs on those."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.context_windows
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.utils
import folder_paths
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..lora_io.file import free_path, save
from ..lora_io.keys import from_motion_lora, to_motion_lora
from ..lora_io.merge import merge
from ..trainers.backbones.animatediff import check_model
from ..trainers.backbones.motion_module import MID, PART, Attached, MotionModules, read, sites
from ..trainers.core.host import load_tensors
from .folders import MOTION_LORAS, MOTION_MODELS, output_folder
from .widgets import NO_FILE, files_state, require_name

MotionModuleType = io.Custom("MOTION_MODULE")  # a ModelPatcher of MotionModules
EvolvedModelType = io.Custom("MOTION_MODEL_ADE")
LINEAR, KEEP = "linear (AnimateDiff)", "the model's own"
LONGEST = 128  # frames of a window
LORA_STRENGTH = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}


def load_motion_module(path: str, disable_dynamic: bool = False) -> Any:
    """A patcher of the MotionModules in a file. ValueError says what the file is if not that."""
    try:
        layout, tensors = read(load_tensors(Path(path)))
    except ValueError as error:
        raise ValueError(f"motion_module={Path(path).name!r}: found {error}") from error
    size = sum(tensor.numel() for tensor in tensors.values())
    dtype = comfy.model_management.unet_dtype(model_params=size, weight_dtype=comfy.utils.weight_dtype(tensors))
    offload = comfy.model_management.unet_offload_device()
    module = MotionModules(layout, operations=comfy.ops.manual_cast, dtype=dtype, device=offload).load(tensors)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(module, load_device=comfy.model_management.get_torch_device(), offload_device=offload)
    patcher.cached_patcher_init = (load_motion_module, (path,))
    return patcher


def from_evolved(model: Any) -> Any:
    """AnimateDiff-Evolved's MOTION_MODEL as ours: the same file and the same motion LoRAs."""
    name = model.model.mm_info.mm_name
    patcher = load_motion_module(folder_paths.get_full_path_or_raise(MOTION_MODELS, name))
    patcher.patches = {key: list(patches) for key, patches in model.patches.items()}
    return patcher


class LoadMotionModule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomLoadMotionModule",
            display_name="Load Motion Module",
            category="Kinoloom/animatediff",
            description="Loads AnimateDiff's motion module (v1, v2, v3 or AnimateLCM, for Stable Diffusion 1.5).",
            search_aliases=["animatediff loader", "v3_sd15_mm"],
            inputs=[
                io.Combo.Input(
                    "motion_module",
                    options=folder_paths.get_filename_list(MOTION_MODELS),
                    tooltip="A file in models/animatediff_models, such as v3_sd15_mm.ckpt.",
                )
            ],
            outputs=[MotionModuleType.Output(display_name="motion_module", tooltip="For Apply Motion Module.")],
        )

    @classmethod
    def fingerprint_inputs(cls, motion_module: str | None = None) -> str:
        return files_state(MOTION_MODELS, motion_module)

    @classmethod
    def execute(cls, motion_module: str) -> io.NodeOutput:
        return io.NodeOutput(load_motion_module(folder_paths.get_full_path_or_raise(MOTION_MODELS, motion_module)))


class ApplyMotionModule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomApplyMotionModule",
            display_name="Apply Motion Module",
            category="Kinoloom/animatediff",
            description="Makes a Stable Diffusion 1.5 model an AnimateDiff video model, for training and for any "
            "sampler: the images of a latent batch become the frames of one clip.",
            search_aliases=["animatediff", "context windows"],
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 1.5 model, with LoRAs if you like."),
                io.MultiType.Input(
                    "motion_module",
                    [MotionModuleType, EvolvedModelType],
                    tooltip="From Load Motion Module, or a MOTION_MODEL of AnimateDiff-Evolved.",
                ),
                io.Int.Input(
                    "context_length",
                    default=16,
                    min=2,
                    max=LONGEST,
                    tooltip="Frames that move together. Longer clips are made of overlapping windows of so many. Keep "
                    "it at the length that the module, or the motion LoRA, was trained on. A Context Windows node "
                    "before this one has precedence.",
                ),
                io.Int.Input(
                    "context_overlap",
                    default=4,
                    min=0,
                    max=LONGEST - 1,
                    tooltip="Frames that two windows share. Raise it if a long clip jumps.",
                ),
                io.Combo.Input(
                    "beta_schedule",
                    options=[LINEAR, KEEP],
                    default=LINEAR,
                    advanced=True,
                    tooltip="Noise levels for sampling. Motion modules are trained on the linear ones.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For samplers, motion LoRA loaders and Train MotionDirector.")],
        )

    @classmethod
    def validate_inputs(cls, context_length: int | None = None, context_overlap: int | None = None) -> bool:
        """ValueError for widgets that do not fit together; what arrives by wire is None."""
        require_windows(context_length or LONGEST, context_overlap or 0)
        return True

    @classmethod
    def execute(
        cls, model: Any, motion_module: Any, context_length: int, context_overlap: int, beta_schedule: str
    ) -> io.NodeOutput:
        motion = motion_module if isinstance(motion_module.model, MotionModules) else from_evolved(motion_module)
        require_fit(model, motion.model, context_length, context_overlap)
        applied = model.clone()
        applied.set_additional_models(PART, [motion.clone()])
        applied.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, PART)
        applied.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, PART, sampling_with(motion.model))
        if beta_schedule == LINEAR:
            applied.add_object_patch("model_sampling", linear_betas())
        set_windows(applied, context_length, context_overlap)
        return io.NodeOutput(applied)


def require_fit(model: Any, motion: MotionModules, length: int, overlap: int) -> None:
    check_model(model.model)
    unet, layout = model.model.diffusion_model, motion.layout
    for path, site in sites(unet, layout).items():
        width = getattr(site, "out_channels", None) or site.in_channels
        if width != layout.modules()[path]:
            raise ValueError(
                f"motion_module: made for {layout.modules()[path]} channels at {path}, this model has {width}"
            )
    if length > layout.positions:
        raise ValueError(
            f"context_length={length}: this motion module ({layout.version}) takes {layout.positions} frames at most"
        )
    require_windows(length, overlap)


def require_windows(length: int, overlap: int) -> None:
    if not 2 <= length <= LONGEST:
        raise ValueError(f"context_length={length}: expected 2..{LONGEST}")
    if not 0 <= overlap < length:
        raise ValueError(f"context_overlap={overlap}: expected less than context_length={length}, from 0 on")


def sampling_with(motion: MotionModules) -> Callable:
    """A wrapper of the UNet's forward that has the modules at work in it, and only in it."""

    def run(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = args[4] if len(args) > 4 else kwargs.get("transformer_options", {})
        clips = len(options.get("cond_or_uncond", [0]))
        if len(x) % clips:
            raise ValueError(f"a batch of {len(x)} images for {clips} prompts cannot be parted into clips")
        frames = len(x) // clips
        with Attached(executor.class_obj, motion) as attached:
            attached.frames = frames
            return executor(x, *args, **kwargs)

    return run


def linear_betas() -> Any:
    """ComfyUI's noise prediction on the betas that motion modules are trained on."""

    class LinearBetas(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    return LinearBetas(SimpleNamespace(sampling_settings={"beta_schedule": "sqrt_linear"}))


def set_windows(model: Any, length: int, overlap: int) -> None:
    """Sample latent batches longer than `length` in windows of so many frames, unless windows are set already."""
    if "context_handler" in model.model_options:
        return
    model.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule(
            comfy.context_windows.ContextSchedules.STATIC_STANDARD
        ),
        fuse_method=comfy.context_windows.get_matching_fuse_method(comfy.context_windows.ContextFuseMethods.PYRAMID),
        context_length=length,
        context_overlap=overlap,
        dim=0,
        causal_window_fix=False,
    )
    comfy.context_windows.create_prepare_sampling_wrapper(model)


def with_motion_lora(model: Any, tensors: dict[str, Tensor], strength: float, name: str) -> Any:
    """`model` with a motion LoRA on its motion module. ValueError if a layer of the LoRA has no place there."""
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
    """ValueError if a layer of one motion LoRA is of another width in the next."""
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
            description="Puts a motion LoRA on a model's motion module. Chain several to add their motions.",
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
            description="Puts a motion LoRA from another node, such as Training Result, on a model's motion module.",
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
            description="Saves two motion LoRAs as one, or one in the spelling that every loader reads.",
            search_aliases=["convert motion lora"],
            inputs=[
                io.Combo.Input("lora_1", options=lora_choices(), tooltip="A motion LoRA in any spelling."),
                io.Float.Input("strength_1", tooltip="How much of it goes in.", **LORA_STRENGTH),
                io.Combo.Input(
                    "lora_2",
                    options=[NO_FILE, *lora_choices()],
                    default=NO_FILE,
                    tooltip="Another, or none to convert.",
                ),
                io.Float.Input("strength_2", tooltip="How much of it goes in.", **LORA_STRENGTH),
                io.String.Input("name", default="merged", tooltip="Name of the new file; a number is added if taken."),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    advanced=True,
                    tooltip="Rank of the result. 0 keeps everything, at the sum of the ranks. Lower makes it smaller.",
                ),
            ],
            outputs=[
                io.LoraModel.Output("lora", tooltip="The merged LoRA, for Load Motion LoRA Model."),
                io.String.Output("path", tooltip="Its file."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool:
        if name is not None:  # does not arrive by wire
            require_name("name", name)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_1: str | None = None, lora_2: str | None = None, **_: Any) -> str:
        """Of a name that arrives by wire any file counts, but for what this node made, which never changes."""
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


NODES: list[type[io.ComfyNode]] = [
    LoadMotionModule,
    ApplyMotionModule,
    LoadMotionLora,
    LoadMotionLoraModel,
    MergeMotionLoras,
]
