"""Stable Video Diffusion's UNet at any width, in ComfyUI's own classes; its loaders only know the full width."""

from pathlib import Path
from typing import Any

import comfy.supported_models

from . import unet


def load_unet(path: str | Path, disable_dynamic: bool = False) -> Any:
    """The MODEL in a file, which can be copied for training as those of ComfyUI's own loaders can."""
    patcher = unet.build(path, comfy.supported_models.SVD_img2vid, disable_dynamic)
    patcher.cached_patcher_init = (load_unet, (str(path),))
    return patcher
