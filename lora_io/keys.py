"""Key names of LoRA files, one function per format.

Our own names are native module paths: `<module>.lora_down.weight` [rank, in], `<module>.lora_up.weight` [out, rank].
"""

from torch import Tensor

PREFIX = "diffusion_model."


def to_comfy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The form core's LoRA loaders match for Wan: `diffusion_model.<module>.lora_A/lora_B.weight`, plus `.alpha`."""
    rename = {".lora_down.weight": ".lora_A.weight", ".lora_up.weight": ".lora_B.weight", ".alpha": ".alpha"}
    return {PREFIX + _renamed(key, rename): tensor for key, tensor in tensors.items()}


def from_comfy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Back to module paths; ValueError names a key of another format."""
    rename = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight", ".alpha": ".alpha"}
    for key in tensors:
        if not key.startswith(PREFIX):
            raise ValueError(f"LoRA key {key!r}: expected it to start with {PREFIX!r}")
    return {_renamed(key, rename).removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def _renamed(key: str, rename: dict[str, str]) -> str:
    for old, new in rename.items():
        if key.endswith(old):
            return key.removesuffix(old) + new
    raise ValueError(f"LoRA key {key!r}: expected it to end with one of {', '.join(rename)}")


FORMATS = {"comfy": to_comfy}
