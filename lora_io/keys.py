"""Key names of LoRA files, one function per format.

Our own names are native module paths: `<module>.lora_down.weight` [rank, in], `<module>.lora_up.weight` [out, rank].
"""

import math
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

PREFIX = "diffusion_model."


def to_comfy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys for ComfyUI's LoRA loaders: `diffusion_model.<module>.lora_A/lora_B.weight`, plus `.alpha`."""
    rename = {".lora_down.weight": ".lora_A.weight", ".lora_up.weight": ".lora_B.weight", ".alpha": ".alpha"}
    return {PREFIX + _renamed(key, rename): tensor for key, tensor in tensors.items()}


def from_comfy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_comfy`. ValueError names a key of another format."""
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


LEVEL = 3  # blocks in one level of SD1.5's UNet: two residual blocks and one down- or upsampling
UNET, MOTION = "unet.", "motion."


def to_kohya(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kohya's keys for SD1.5's UNet: `lora_unet_<diffusers module>.lora_down/lora_up.weight` and `.alpha`.

    The factors of a 1x1 convolution become kernels [out, in, 1, 1]. A layer without an alpha gets its rank as alpha.
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
    """The inverse of `to_kohya`, for layers in `paths`. ValueError names a key of another layer or format."""
    names, named = {_kohya_name(path): path for path in paths}, {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        if name not in names or rest not in ("lora_down.weight", "lora_up.weight", "alpha"):
            raise ValueError(f"LoRA key {key!r}: expected a factor of lora_unet_<a trained layer>")
        named[f"{names[name]}.{rest}"] = matrix(tensor)
    check_pairs(named, "LoRA")
    return named


def _kohya_name(path: str) -> str:
    return "lora_unet_" + diffusers_path(path.removeprefix(UNET)).replace(".", "_")


def diffusers_path(path: str) -> str:
    """Such as input_blocks.4.1.x to down_blocks.1.attentions.0.x. Only transformer blocks have LoRA layers."""
    side, _, rest = path.partition(".")
    if side == "middle_block":
        return f"mid_block.attentions.0.{rest.removeprefix('1.')}"
    index, _, rest = rest.partition(".1.")
    level, place = divmod(int(index) - (side == "input_blocks"), LEVEL)
    return f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}.attentions.{place}.{rest}"


def to_motion_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """AnimateDiff's motion LoRA keys: `<module>.processor.<layer>_lora.down/up.weight`.

    The scale alpha / rank is multiplied into the up factor. The file must hold no alpha key, because AnimateDiff's
    loaders treat every key that is not an up factor as a down factor.
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
    """A LoRA factor's module path and side ("down" or "up"), from a key in any known format. None for other keys."""
    match = FACTOR.fullmatch(key)
    if match is None:
        return None
    side = next(found for found in match.groups()[1:4] if found)
    return match[1], {"A": "down", "B": "up"}.get(side, side)


def check_pairs(tensors: dict[str, Tensor], what: str) -> None:
    """ValueError unless each `<module>` has a down and an up factor: finite matrices of the same rank."""
    for key, tensor in tensors.items():
        path, _, side = key.partition(".lora_")
        if not side:
            continue
        other = f"{path}.lora_{'up' if side == 'down.weight' else 'down'}.weight"
        if other not in tensors:
            raise ValueError(f"{what}: {key} has no {other}")
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(f"{what}: {key} is not a matrix but {tensor.dtype} of shape {(*tensor.shape,)}")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{what}: {key} holds NaN or infinite values")
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            up = tensors[key.replace(".lora_down.", ".lora_up.")]
            if up.shape[1] != len(down):
                raise ValueError(f"{what}: {key} has rank {len(down)}, its up factor {up.shape[1]}")


def matrix(tensor: Tensor) -> Tensor:
    """A factor as a matrix, from a matrix or the kernel of a 1x1 convolution."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def scale_of(key: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not math.isfinite(tensor):
        raise ValueError(f"LoRA key {key!r}: expected one finite number, found {tensor.flatten()[:3].tolist()}")
    return float(tensor)


# Layer names of motion modules: diffusers' to AnimateDiff's.
MOTION_LAYERS = {"attn1": "attention_blocks.0", "attn2": "attention_blocks.1"}


def from_motion_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A motion LoRA in any known format to `<module path>.lora_down/lora_up.weight`. ValueError for other files.

    Known formats: AnimateDiff (`processor.to_q_lora.down`), MotionDirector (`to_out.processor.0_lora.down`), diffusers
    and PEFT (`transformer_blocks.0.attn1.to_q.lora_A`), each with or without `processor` and a leading `unet.`, and
    plain `to_q.lora_down`. The scale alpha / rank is multiplied into the up factor.
    """
    pairs, alphas = {}, {}
    for key, tensor in tensors.items():
        if "temporal" not in key and "motion_modules" not in key:
            continue
        name = key.replace("processor.", "")
        factor = split_factor(name)
        if name.endswith(".alpha"):
            alphas[motion_path(name.removesuffix(".alpha").removesuffix("_lora"))] = scale_of(key, tensor)
        elif factor is None:
            raise ValueError(f"motion LoRA key {key!r}: expected a down or up factor of a motion module's layer")
        else:
            pairs[f"{motion_path(factor[0])}.lora_{factor[1]}.weight"] = matrix(tensor)
    if not pairs:
        raise ValueError("no layers of a motion module in it, expected a motion LoRA")
    check_pairs(pairs, "motion LoRA")
    for path, alpha in alphas.items():
        up = f"{path}.lora_up.weight"
        if up in pairs:
            pairs[up] = pairs[up] * (alpha / pairs[up].shape[1])
    return pairs


def motion_path(name: str) -> str:
    """A layer's module path in AnimateDiff's motion module files."""
    for root in ("base_model.model.", UNET, "module."):
        name = name.removeprefix(root)
    if ".temporal_transformer." not in name:
        name = re.sub(r"(motion_modules\.\d+)\.", r"\1.temporal_transformer.", name)
    name = re.sub(r"\.(attn[12])\.", lambda match: f".{MOTION_LAYERS[match[1]]}.", name)
    return f"{name}.0" if name.endswith(".to_out") else name


FORMATS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "comfy": to_comfy, "kohya": to_kohya, "motion_lora": to_motion_lora, "whole": dict,
}
