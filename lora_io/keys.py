"""Key names of LoRA files, one function per format.

Our own names are native module paths: `<module>.lora_down.weight` [rank, in], `<module>.lora_up.weight` [out, rank].
"""

import math
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
        named[f"{names[name]}.{rest}"] = matrix(tensor)
    check_pairs(named, "LoRA")
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


FACTOR = re.compile(r"(.+?)(?:[._]lora\.(down|up)|\.lora_linear_layer\.(down|up)|\.lora_(down|up|A|B))(\.\w+)?\.weight")


def split_factor(key: str) -> tuple[str, str] | None:
    """The path in a key of a LoRA's factor in any spelling in use, and "down" or "up"; None for other keys."""
    match = FACTOR.fullmatch(key)
    if match is None:
        return None
    side = next(found for found in match.groups()[1:4] if found)
    return match[1], {"A": "down", "B": "up"}.get(side, side)


def check_pairs(tensors: dict[str, Tensor], what: str) -> None:
    """ValueError unless the factors in `<module>.lora_down/lora_up.weight` come in pairs of matrices of one rank."""
    for key, tensor in tensors.items():
        path, _, side = key.partition(".lora_")
        if not side:
            continue
        other = f"{path}.lora_{'up' if side == 'down.weight' else 'down'}.weight"
        if other not in tensors:
            raise ValueError(f"{what}: {key} has no {other}")
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(f"{what}: {key} is no matrix, but {tensor.dtype} of shape {(*tensor.shape,)}")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{what}: {key} holds values that are no numbers (NaN or infinite)")
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            up = tensors[key.replace(".lora_down.", ".lora_up.")]
            if up.shape[1] != len(down):
                raise ValueError(f"{what}: {key} has rank {len(down)}, its up factor {up.shape[1]}")


def matrix(tensor: Tensor) -> Tensor:
    """A factor, also one that is stored as the kernel of a convolution, as a matrix."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def scale_of(key: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not math.isfinite(tensor):
        raise ValueError(f"LoRA key {key!r}: expected one finite number, found {tensor.flatten()[:3].tolist()}")
    return float(tensor)


# Layers of diffusers' motion modules to those of AnimateDiff's files.
MOTION_LAYERS = {"attn1": "attention_blocks.0", "attn2": "attention_blocks.1"}


def from_motion_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A motion LoRA in any spelling in use to `<module path>.lora_down/lora_up.weight`; ValueError for other files.

    Known: AnimateDiff's (`processor.to_q_lora.down`), MotionDirector's (`to_out.processor.0_lora.down`), diffusers' and
    PEFT's (`transformer_blocks.0.attn1.to_q.lora_A`), with or without `processor` and a leading `unet.`, and plain
    `to_q.lora_down`. An alpha is multiplied into the up factor.
    """
    pairs, alphas = {}, {}
    for key, tensor in tensors.items():
        if "temporal" not in key and "motion_modules" not in key:
            continue
        name = key.replace("processor.", "")
        factor = split_factor(name)
        if name.endswith(".alpha"):
            alphas[_motion_path(name.removesuffix(".alpha").removesuffix("_lora"))] = scale_of(key, tensor)
        elif factor is None:
            raise ValueError(f"motion LoRA key {key!r}: expected a down or up factor of a motion module's layer")
        else:
            pairs[f"{_motion_path(factor[0])}.lora_{factor[1]}.weight"] = matrix(tensor)
    if not pairs:
        raise ValueError("no layers of a motion module in it, expected a motion LoRA")
    check_pairs(pairs, "motion LoRA")
    for path, alpha in alphas.items():
        up = f"{path}.lora_up.weight"
        if up in pairs:
            pairs[up] = pairs[up] * (alpha / pairs[up].shape[1])
    return pairs


def _motion_path(name: str) -> str:
    """A layer's path in AnimateDiff's own files."""
    for root in ("base_model.model.", UNET, "module."):
        name = name.removeprefix(root)
    if ".temporal_transformer." not in name:
        name = re.sub(r"(motion_modules\.\d+)\.", r"\1.temporal_transformer.", name)
    name = re.sub(r"\.(attn[12])\.", lambda match: f".{MOTION_LAYERS[match[1]]}.", name)
    return f"{name}.0" if name.endswith(".to_out") else name


FORMATS = {"comfy": to_comfy, "kohya": to_kohya, "motion_lora": to_motion_lora, "model": dict}
