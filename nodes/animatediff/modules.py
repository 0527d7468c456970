"""Nodes that load motion modules and apply them to a MODEL, for any sampler."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.context_windows
import comfy.model_patcher
import comfy.model_sampling
import folder_paths
from comfy_api.latest import io

from ...trainers.backbones.animatediff.model import check_model
from ...trainers.backbones.animatediff.motion_module import PART, Attached, MotionModules, read
from ...trainers.host.weights import load_tensors
from ..folders import MOTION_MODELS
from ..hooked import Forward, as_loaded, hooked, patcher_of
from ..widgets import files_state
from ..wires import EvolvedModelType, MotionModuleType

LINEAR, KEEP = "linear (AnimateDiff)", "the model's own"
LONGEST = 128  # most frames of a window


def load_motion_module(path: str, disable_dynamic: bool = False) -> Any:
    """A patcher of the MotionModules in a file. ValueError says what another file holds instead."""
    loaded = load_tensors(Path(path))
    try:
        layout, tensors = read(loaded)
    except ValueError as error:
        raise ValueError(f"motion_module={Path(path).name!r}: found {error}") from error
    module = MotionModules(layout, **as_loaded(tensors)).load(tensors)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_of(module, kind)
    patcher.cached_patcher_init = (load_motion_module, (path,))
    return patcher


def from_evolved(model: Any) -> Any:
    """Convert AnimateDiff-Evolved's MOTION_MODEL to this pack's: the same file and motion LoRAs."""
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
            description="Turns a Stable Diffusion 1.5 model into an AnimateDiff video model, for training and for any "
            "sampler. The images of a latent batch become the frames of one clip.",
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
                    tooltip="Frames that are sampled together; longer clips are sampled in overlapping windows of this "
                    "length. Use the length that the module or the motion LoRA was trained on. A Context Windows node "
                    "before this one takes precedence.",
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
                    tooltip="Noise schedule for sampling. Motion modules are trained with the linear one, I2V adapters "
                    "with the model's own.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For samplers, motion LoRA loaders, Apply I2V Adapters and Train nodes.")],
        )

    @classmethod
    def validate_inputs(cls, context_length: int | None = None, context_overlap: int | None = None) -> bool:
        """ValueError for widgets that do not fit together. Connected inputs are None."""
        require_windows(context_length or LONGEST, context_overlap or 0)
        return True

    @classmethod
    def execute(
        cls, model: Any, motion_module: Any, context_length: int, context_overlap: int, beta_schedule: str
    ) -> io.NodeOutput:
        motion = motion_module if isinstance(motion_module.model, MotionModules) else from_evolved(motion_module)
        check_model(model.model)
        require_frames(motion.model, context_length, context_overlap)

        @contextmanager
        def at_work(forward: Forward) -> Iterator[dict[str, Any]]:
            with Attached(forward.unet, motion.model, forward.frames):
                yield {}

        applied = hooked(model, PART, [motion], "motion_module", at_work)
        if beta_schedule == LINEAR:
            applied.add_object_patch("model_sampling", linear_betas())
        set_windows(applied, context_length, context_overlap)
        return io.NodeOutput(applied)


def require_frames(motion: MotionModules, length: int, overlap: int) -> None:
    """ValueError unless the motion modules can sample windows of `length` frames with this overlap."""
    layout = motion.layout
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


def linear_betas() -> Any:
    """ComfyUI's noise-prediction sampling with the linear betas of motion modules' training."""

    class LinearBetas(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    return LinearBetas(SimpleNamespace(sampling_settings={"beta_schedule": "sqrt_linear"}))


def set_windows(model: Any, length: int, overlap: int) -> None:
    """Sample latent batches longer than `length` in windows of that length, unless windows are already set."""
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


NODES: list[type[io.ComfyNode]] = [LoadMotionModule, ApplyMotionModule]
