"""An image encoder in ComfyUI's own CLIP vision architecture, at a size that its loaders do not know."""

from pathlib import Path

import comfy.clip_vision
import comfy.utils

WIDTH = 64
CONFIG = {
    "model_type": "clip_vision_model", "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "projection_dim": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_channels": 3, "hidden_act": "gelu", "image_size": 64, "patch_size": 16,
}  # fmt: skip


def build() -> comfy.clip_vision.ClipVisionModel:
    """A CLIP_VISION without values."""
    return comfy.clip_vision.ClipVisionModel(CONFIG)


def load(path: str | Path) -> comfy.clip_vision.ClipVisionModel:
    """The CLIP_VISION in a file."""
    vision = build()
    vision.load_sd(comfy.utils.load_torch_file(str(path), safe_load=True))
    return vision
