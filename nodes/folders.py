"""The model folders that runs write into, and loaders look in: one table, registered once."""

import os
from pathlib import Path

import folder_paths

MOTION_MODELS, MOTION_LORAS = "animatediff_models", "animatediff_motion_lora"  # the folders of AnimateDiff-Evolved too
TRACKLET_CONTROL = "tracklet_control"
LORAS = ("loras", MOTION_LORAS)  # whose loaders take a LoRA by its name
OUTPUTS = (*LORAS, "diffusion_models", TRACKLET_CONTROL)  # an export's folder is one of these


def register() -> None:
    for name in (MOTION_MODELS, MOTION_LORAS, TRACKLET_CONTROL):
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
        paths, extensions = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, extensions | folder_paths.supported_pt_extensions)


register()


def output_folder(kind: str) -> Path:
    """kinoloom/ in ComfyUI's first folder of that kind, but for models/unet, the old name of diffusion_models."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(kind)]
    return next((folder for folder in folders if folder.name != "unet"), folders[0]) / "kinoloom"
