"""Key names of LoRA files, one function per format.

Our own names are native module paths: `<module>.lora_down.weight` [rank, in], `<module>.lora_up.weight` [out, rank].
"""

import re
from collections.abc import Iterable

import torch
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


LEVEL = 3  # of SD1.5's UNet: two blocks and a change of size
UNET, MOTION = "unet.", "motion."


def to_kohya(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD1.5's UNet in kohya's form with diffusers' names: `lora_unet_<module>.lora_down/lora_up.weight` and `.alpha`.

    The factors of a 1x1 convolution become kernels [out, in, 1, 1]. Alpha is the rank where there is none.
    """
    named = {}
    for key, tensor in tensors.items():
        path, _, rest = key.partition(".lora_")
        if rest:
            name = _kohya_name(path)
            kernel = path.endswith((".proj_in", ".proj_out"))
            named[f"{name}.lora_{rest}"] = tensor[..., None, None] if kernel else tensor
            if rest == "down.weight":
                named[f"{name}.alpha"] = tensors.get(f"{path}.alpha", torch.tensor(float(len(tensor))))
    return named


def from_kohya(tensors: dict[str, Tensor], paths: Iterable[str]) -> dict[str, Tensor]:
    """Back to module paths, which are some of `paths`; ValueError names a key of another layer or form."""
    names, named = {_kohya_name(path): path for path in paths}, {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        if name not in names or rest not in ("lora_down.weight", "lora_up.weight", "alpha"):
            raise ValueError(f"LoRA key {key!r}: expected a factor of lora_unet_<a layer that is trained>")
        named[f"{names[name]}.{rest}"] = tensor.flatten(1) if tensor.ndim else tensor
    return named


def _kohya_name(path: str) -> str:
    return "lora_unet_" + _diffusers_path(path.removeprefix(UNET)).replace(".", "_")


def _diffusers_path(path: str) -> str:
    """input_blocks.4.1.x to down_blocks.1.attentions.0.x, and the like; only transformers have LoRA layers."""
    side, _, rest = path.partition(".")
    if side == "middle_block":
        return f"mid_block.attentions.0.{rest.removeprefix('1.')}"
    index, _, rest = rest.partition(".1.")
    level, place = divmod(int(index) - (side == "input_blocks"), LEVEL)
    return f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}.attentions.{place}.{rest}"


def to_motion_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """AnimateDiff's motion LoRAs: `<module>.processor.<layer>_lora.down/up.weight`, alpha / rank inside the up factor.

    These files hold no alpha: a loader that meets one fails, for it takes every entry that is no up factor for a down.
    """
    named = {}
    for key, tensor in tensors.items():
        path, _, rest = key.partition(".lora_")
        if rest:
            rank = len(tensors[f"{path}.lora_down.weight"])
            scale = float(tensors.get(f"{path}.alpha", rank)) / rank
            module, _, layer = path.removeprefix(MOTION).removesuffix(".0").rpartition(".")
            named[f"{module}.processor.{layer}_lora.{rest}"] = tensor if rest.startswith("down") else tensor * scale
    return named


def from_motion_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A motion LoRA in any spelling in use to `<module path>.lora_down/lora_up.weight`; ValueError for other files.

    Known: AnimateDiff's (`processor.to_q_lora.down`), MotionDirector's (`to_out.processor.0_lora.down`), with or
    without `processor` and a leading `unet.`, and plain `to_q.lora_down`. An alpha is multiplied into the up factor.
    """
    pairs, alphas = {}, {}
    for key, tensor in tensors.items():
        if "temporal" not in key:
            continue
        name = key.removeprefix(UNET).removeprefix("module.").replace("processor.", "")
        match = re.fullmatch(r"(.+?)(?:_lora\.(down|up)|\.lora_(down|up|A|B))\.weight", name)
        if name.endswith(".alpha"):
            alphas[_motion_path(name.removesuffix(".alpha").removesuffix("_lora"))] = float(tensor)
        elif match is None:
            raise ValueError(f"motion LoRA key {key!r}: expected a down or up factor of a motion module's layer")
        else:
            side = {"A": "down", "B": "up"}.get(match[3], match[2] or match[3])
            pairs[f"{_motion_path(match[1])}.lora_{side}.weight"] = tensor.flatten(1)
    if not pairs:
        raise ValueError("no layers of a motion module in it, expected a motion LoRA")
    for path, alpha in alphas.items():
        up = f"{path}.lora_up.weight"
        if up in pairs:
            pairs[up] = pairs[up] * (alpha / pairs[up].shape[1])
    for key in pairs:
        other = key.replace(".lora_up.", ".lora_down.") if ".lora_up." in key else key.replace("_down.", "_up.")
        if other not in pairs:
            raise ValueError(f"motion LoRA: {key} has no {other}")
    return pairs


def _motion_path(name: str) -> str:
    return f"{name}.0" if name.endswith(".to_out") else name


FORMATS = {"comfy": to_comfy, "kohya": to_kohya, "motion_lora": to_motion_lora, "model": dict}
