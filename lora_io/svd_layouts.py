"""Converts key names of Stable Video Diffusion between ComfyUI's (Stability's) layout and diffusers'.

It converts models and LoRA files. Modules and shapes are the same in both layouts.
"""

import re
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from .keys import PREFIX as COMFY
from .keys import UNET, from_comfy

CHECKPOINT = "model.diffusion_model."
PEFT = "base_model.model."
ENDS = {
    "A": ".lora_A.weight",
    "down": ".lora_A.weight",
    "B": ".lora_B.weight",
    "up": ".lora_B.weight",
    "alpha": ".alpha",
}
OPTIONAL = (".conv_shortcut", ".skip_connection")  # absent where a block's input and output width are equal


def _modules() -> dict[str, str]:
    """Module paths, diffusers' to ComfyUI's. Names below these paths are equal in both."""
    table = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        **{f"time_embedding.linear_{i + 1}": f"time_embed.{2 * i}" for i in range(2)},
        **{f"add_embedding.linear_{i + 1}": f"label_emb.0.{2 * i}" for i in range(2)},
        **_res_block("mid_block.resnets.0", "middle_block.0"),
        **_res_block("mid_block.resnets.1", "middle_block.2"),
        **_transformer("mid_block.attentions.0", "middle_block.1"),
    }
    for level in range(4):
        for i in range(2):
            name, block = f"down_blocks.{level}", f"input_blocks.{3 * level + 1 + i}"
            table |= _res_block(f"{name}.resnets.{i}", f"{block}.0")
            if level < 3:
                table |= _transformer(f"{name}.attentions.{i}", f"{block}.1")
        for i in range(3):
            name, block = f"up_blocks.{level}", f"output_blocks.{3 * level + i}"
            table |= _res_block(f"{name}.resnets.{i}", f"{block}.0")
            if level > 0:
                table |= _transformer(f"{name}.attentions.{i}", f"{block}.1")
        if level < 3:
            table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 * level + 3}.0.op"
            place = 2 if level else 1
            table[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{3 * level + 2}.{place}.conv"
    return table


def _res_block(diffusers: str, comfy: str) -> dict[str, str]:
    layers = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
    }
    return {
        **{f"{diffusers}.spatial_res_block.{old}": f"{comfy}.{new}" for old, new in layers.items()},
        f"{diffusers}.spatial_res_block.conv_shortcut": f"{comfy}.skip_connection",
        **{f"{diffusers}.temporal_res_block.{old}": f"{comfy}.time_stack.{new}" for old, new in layers.items()},
        f"{diffusers}.time_mixer": f"{comfy}.time_mixer",
    }


def _transformer(diffusers: str, comfy: str) -> dict[str, str]:
    same = ("norm", "proj_in", "proj_out", "time_mixer", "transformer_blocks.0")
    return {
        **{f"{diffusers}.{name}": f"{comfy}.{name}" for name in same},
        f"{diffusers}.temporal_transformer_blocks.0": f"{comfy}.time_stack.0",
        f"{diffusers}.time_pos_embed.linear_1": f"{comfy}.time_pos_embed.0",
        f"{diffusers}.time_pos_embed.linear_2": f"{comfy}.time_pos_embed.2",
    }


TO_COMFY = _modules()
LAYOUTS = {"diffusers": TO_COMFY, "comfyui": {comfy: diffusers for diffusers, comfy in TO_COMFY.items()}}


def to_comfy(key: str) -> str:
    """A module path or key of diffusers' UNetSpatioTemporalConditionModel, renamed for ComfyUI's UNetModel."""
    return _swapped(key, "diffusers")


def to_diffusers(key: str) -> str:
    """A module path or key of ComfyUI's UNetModel, renamed for diffusers' UNetSpatioTemporalConditionModel."""
    return _swapped(key, "comfyui")


def _swapped(key: str, layout: str) -> str:
    module = _module(key, layout)
    if module is None:
        raise ValueError(f"key {key!r}: expected a layer of Stable Video Diffusion's UNet in the layout of {layout}")
    return LAYOUTS[layout][module] + key.removeprefix(module)


def _module(key: str, layout: str) -> str | None:
    parts = key.split(".")
    paths = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((path for path in paths if path in LAYOUTS[layout]), None)


def layout_of(keys: Iterable[str]) -> str:
    """The layout of a UNet's keys, "diffusers" or "comfyui". ValueError names a key that fits neither."""
    key = min(keys, default="")
    for layout in LAYOUTS:
        if _module(key.removeprefix(CHECKPOINT), layout):
            return layout
    raise ValueError(f"key {key!r}: expected Stable Video Diffusion's UNet in the layout of {' or '.join(LAYOUTS)}")


def unet_names(keys: Collection[str], to: str) -> dict[str, str]:
    """Maps each key of a UNet to its name in the layout `to`, without the prefix that keys have in a checkpoint.

    ValueError names a key that is not a layer of SVD, or a layer of SVD that is missing.
    """
    layout = layout_of(keys)
    bare = {key: key.removeprefix(CHECKPOINT) for key in keys}
    swapped = {key: _swapped(name, layout) for key, name in bare.items()}
    having = {_module(name, layout) for name in bare.values()}
    missing = [path for path in LAYOUTS[layout] if path not in having and not path.endswith(OPTIONAL)]
    if missing:
        raise ValueError(f"{missing[0]} is missing, expected all layers of Stable Video Diffusion's UNet")
    return bare if to == layout else swapped


def convert_unet(tensors: dict[str, Tensor], to: str) -> dict[str, Tensor]:
    """A UNet's tensors renamed to the layout `to`. Input keys and ValueError as in `unet_names`."""
    names = unet_names(tensors, to)
    return {names[key]: tensor for key, tensor in tensors.items()}


def lora_to_comfy(tensors: dict[str, Tensor], alpha: float | None = None) -> dict[str, Tensor]:
    """Rename a diffusers LoRA's keys, which ComfyUI's loaders skip, to the keys they load completely.

    Known keys: `[base_model.model.][unet.]<module>` plus `.lora.down.weight`, `_lora.down.weight` or `.lora_A.weight`,
    with or without `processor`, as SVD_Xtend, diffusers and PEFT write them. Layers without an alpha get `alpha`; with
    None the loader uses the rank. ValueError names an unknown key, or a layer with only one factor.
    """
    named = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PEFT).removeprefix(UNET).replace(".processor.", ".")
        match = re.fullmatch(r"(.+?)(?:[._]lora\.(down|up)\.weight|\.lora_(A|B)\.weight|\.(alpha))", name)
        if match is None:
            raise ValueError(f"LoRA key {key!r}: expected the down or up factor, or alpha, of a layer")
        path = COMFY + to_comfy(match[1] + ".0" * match[1].endswith(".to_out"))
        named[path + ENDS[match[2] or match[3] or match[4]]] = tensor
    _check_pairs(named)
    if alpha is not None:
        paths = [key.removesuffix(ENDS["A"]) for key in named if key.endswith(ENDS["A"])]
        named = {**{f"{path}.alpha": torch.tensor(float(alpha)) for path in paths}, **named}
    return named


def lora_to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: `unet.<module>.lora.down/up.weight`. alpha / rank is multiplied into the up factor."""
    native, named = from_comfy(tensors), {}
    _check_pairs(tensors)
    for key, tensor in native.items():
        path, _, side = key.partition(".lora_")
        if side:
            rank = len(native[f"{path}.lora_down.weight"])
            scale = float(native.get(f"{path}.alpha", rank)) / rank
            named[f"{UNET}{to_diffusers(path)}.lora.{side}"] = tensor * scale if side == "up.weight" else tensor
    return named


def _check_pairs(tensors: dict[str, Tensor]) -> None:
    if not any(key.endswith(ENDS["A"]) for key in tensors):
        raise ValueError("holds no LoRA layers, expected a LoRA for Stable Video Diffusion")
    for key in tensors:
        for one, other in ((ENDS["A"], ENDS["B"]), (ENDS["B"], ENDS["A"])):
            if key.endswith(one) and (missing := key.removesuffix(one) + other) not in tensors:
                raise ValueError(f"LoRA: {key} has no {missing}")
