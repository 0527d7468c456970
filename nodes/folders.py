"""The model folders that the pack reads from and writes into: one table, registered once."""

import os
from dataclasses import dataclass
from pathlib import Path

import folder_paths

LORAS, DIFFUSION_MODELS, DIFFUSERS = "loras", "diffusion_models", "diffusers"
MOTION_MODELS, MOTION_LORAS = "animatediff_models", "animatediff_motion_lora"  # the folders of AnimateDiff-Evolved too
TRACKLET_CONTROL = "tracklet_control"
I2V_ADAPTERS, EMBEDDINGS = "i2v_adapters", "embeddings"


@dataclass(frozen=True)
class ModelFolder:
    """added: whether the pack adds the folder to ComfyUI's. written: whether runs write into it. has_loras: whether its
    loaders list LoRAs."""

    added: bool = False
    written: bool = True
    has_loras: bool = False


FOLDERS = {
    LORAS: ModelFolder(has_loras=True),
    DIFFUSION_MODELS: ModelFolder(),
    DIFFUSERS: ModelFolder(written=False),
    MOTION_MODELS: ModelFolder(added=True, written=False),
    MOTION_LORAS: ModelFolder(added=True, has_loras=True),
    TRACKLET_CONTROL: ModelFolder(added=True),
    I2V_ADAPTERS: ModelFolder(added=True),
    EMBEDDINGS: ModelFolder(),
}
WRITTEN = tuple(name for name, folder in FOLDERS.items() if folder.written)


def register() -> None:
    for name in (name for name, folder in FOLDERS.items() if folder.added):
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
        paths, extensions = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, extensions | folder_paths.supported_pt_extensions)


register()


def output_folder(name: str) -> Path:
    """kinoloom/ in the first path of a model folder, except models/unet, the old name of diffusion_models."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(name)]
    return next((folder for folder in folders if folder.name != "unet"), folders[0]) / "kinoloom"
