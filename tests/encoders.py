"""Tiny encoders as ComfyUI's own loaders give them, and folders of a test's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.sd
import comfy.utils
import folder_paths
import torch
from safetensors.torch import save_file
from tiny import sd as tiny_sd
from tiny.weights import Weights

VISION = {
    "hidden_size": 32, "image_size": 224, "intermediate_size": 64, "model_type": "clip_vision_model",
    "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 2, "patch_size": 56, "projection_dim": 1024,
    "hidden_act": "gelu",
}  # fmt: skip


def load_wan(models: Path) -> dict[str, Any]:
    """The tiny Wan's "vae", "clip" and "model", each loaded by core's node."""
    for kind in ("vae", "diffusion_models", "text_encoders"):
        folder_paths.add_model_folder_path(kind, str(models / kind))
    import nodes as core

    with torch.inference_mode():
        return {
            "vae": core.VAELoader().load_vae("tiny_wan_vae.safetensors")[0],
            "clip": core.CLIPLoader().load_clip("tiny_clip.safetensors", "wan")[0],
            "model": core.UNETLoader().load_unet("tiny_wan.safetensors", "default")[0],
        }


def image_vae(folder: Path, seed: int = 0) -> Any:
    path = folder / f"vae{seed}.safetensors"
    save_file(tiny_sd.tiny_autoencoder(Weights(seed)), path)
    return comfy.sd.VAE(comfy.utils.load_torch_file(str(path)))


def tiny_vision(seed: int = 0) -> Any:
    with torch.inference_mode():
        model = comfy.clip_vision.ClipVisionModel(VISION)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return model


@contextmanager
def own_folders(folder: Path) -> Iterator[Path]:
    """Input and user folders in `folder`, and input/set; the code runs in inference mode, as nodes do."""
    before = folder_paths.get_input_directory(), folder_paths.get_user_directory()
    folder_paths.set_input_directory(str(folder / "input"))
    folder_paths.set_user_directory(str(folder / "user"))
    (folder / "input" / "set").mkdir(parents=True)
    with torch.inference_mode():
        yield folder / "input" / "set"
    folder_paths.set_input_directory(before[0])
    folder_paths.set_user_directory(before[1])
