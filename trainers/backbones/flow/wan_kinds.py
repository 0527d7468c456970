"""Recognises the models of the Wan family by class, shape, file name and metadata."""

import re
from pathlib import Path
from typing import Any

# Names by ComfyUI's model class, or by `model_type` if a class has several.
BY_CLASS = {
    "WAN22": "Wan 2.2 5B (text and image to video)",
    "WAN21_CausalAR": "a causal Wan 2.1 (self-forcing)",
    "WAN21_Vace": "Wan VACE",
    "WAN21_HuMo": "HuMo",
    "WAN22_Animate": "Wan 2.2 Animate",
    "WAN22_S2V": "Wan 2.2 S2V (sound to video)",
    "WAN21_FlowRVS": "FlowRVS",
    "WAN21_SCAIL": "SCAIL",
    "WAN21_SCAIL2": "SCAIL 2",
    "WAN22_WanDancer": "WanDancer",
    "WAN21_Camera": "Wan Fun Camera",
}
IMAGE_CHANNELS = 36  # 16 of the noise, 4 of the mask, 16 of the image
WIDTH_14B = 5120
WAN_22 = re.compile(r"wan[\s._-]*v?2[\s._-]?2|a14b|(high|low)[\s._-]*noise", re.IGNORECASE)
WAN_21 = re.compile(r"wan[\s._-]*v?2[\s._-]?1(?!\d)", re.IGNORECASE)
PHANTOM = re.compile("phantom", re.IGNORECASE)


def kind_of(model: Any) -> str:
    """The name of a model (a comfy BaseModel) of Wan's family that is not plain text-to-video."""
    name, module = type(model).__name__, model.diffusion_model
    if name != "WAN21":
        return BY_CLASS.get(name, f"{name} ({type(module).__name__})")
    if module.model_type == "i2v":
        return "Wan 2.1 image-to-video"
    if module.in_dim == IMAGE_CHANNELS:
        return "Wan 2.2 A14B image-to-video (or Fun Inpaint)"
    return f"a Wan {module.model_type} model with {module.in_dim} input channels (Fun Control has 48)"


def require_wan21(path: Path, metadata: str, width: int, said: str) -> None:
    """ValueError if a text-to-video file is Phantom or an expert of Wan 2.2 A14B, which have Wan 2.1's shapes.

    The file's name decides first, then its metadata, then its folder's name. If none names a version, a file of the 14B
    width is an error unless the user set wan_version (`said`) to "2.1".
    """
    texts = [path.stem, metadata, *([path.parent.name] if width == WIDTH_14B else [])]
    for text in texts:
        if PHANTOM.search(text):
            raise ValueError(f"model: {path.name} is Phantom (subject to video), expected Wan 2.1 text-to-video")
        if WAN_22.search(text):
            raise ValueError(
                f"model: {path.name} is an expert of Wan 2.2 A14B, trained only for high or only for low noise. "
                "Training uses all noise levels; expected Wan 2.1 text-to-video"
            )
        if WAN_21.search(text):
            return
    if width == WIDTH_14B and said != "2.1":
        raise ValueError(
            f"wan_version={said!r}: {path.name} does not say which 14B model it is, and Wan 2.1 has the same shapes as "
            "the experts of Wan 2.2, which are refused. Set wan_version to 2.1 if you know that it is Wan 2.1"
        )
