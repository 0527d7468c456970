"""A new adapter: which layers it has, and what they start from."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.rng import derived_generator
from .adapter import DOWN, LORAS, UP, Adapter, Shapes, spatial_blocks, split, temporal_attentions
from .adapter_bases import basis, columns_of, read_basis, require_bin


def shapes_of(config: Any, unet: nn.Module, motion: nn.Module) -> Shapes:
    """The tensors of a new adapter with the parts that the options turn on."""
    shapes: Shapes = {}
    for place, block in spatial_blocks(unet).items():
        width = len(block.norm1.weight)
        if config.train_image:
            own = {"to_out.0.weight": (width, width), "to_out.0.bias": (width,)}
            own |= {"to_q.weight": (width, width)} if config.image_query else {}
            shapes |= {f"{place}.i2v_adapter.{name}": shape for name, shape in own.items()}
        layers = {"to_k_lora": block.attn2.to_k, "to_v_lora": block.attn2.to_v}
        layers |= {"to_out_lora": block.attn2.to_out[0]} if config.cross_out else {}
        layers |= {"to_q_lora": block.attn2.to_q} if config.cross_query else {}
        for name, layer in layers.items() if config.train_cross else ():
            shapes |= lora_shapes(f"{place}.attn2.processor.", name, layer, config.rank)
    for place, attention in temporal_attentions(motion).items() if config.train_temporal else ():
        layers = dict(zip(LORAS, (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]), strict=True))
        for name, layer in layers.items():
            shapes |= lora_shapes(f"{place}.processor.", name, layer, config.rank)
        if config.motion_embed:
            shapes[f"{place}.processor.motion_embed.weight"] = tuple(attention.pos_encoder.pe.shape[1:])
    return shapes


def lora_shapes(place: str, name: str, layer: Any, rank: int) -> Shapes:
    """The shapes of a new LoRA's factors on a frozen layer; `place` ends with the part's infix."""
    outputs, inputs = layer.weight.shape
    return {f"{place}{name}.{DOWN}": (rank, inputs), f"{place}{name}.{UP}": (outputs, rank)}


@torch.no_grad()
def initialise(adapter: Adapter, unet: Any, seed: int) -> Adapter:
    """Fill a new adapter so that it changes nothing: `up`, `to_out` and motion embeddings are zero, `down` N(0, 1/r^2).

    Queries of the I2V-Adapter start as the base's. The original draws motion embeddings from N(0, 1), which changes the
    model before the first step.
    """
    blocks = spatial_blocks(unet)
    for key, value in adapter.tensors().items():
        kind, place, rest = split(key)
        if rest.endswith(DOWN):
            drawn = torch.empty(value.shape)
            value.copy_(drawn.normal_(std=1 / len(value), generator=derived_generator(seed, "adapter", key)))
        elif kind == "image" and not rest.startswith("to_out"):
            value.copy_(blocks[place].attn1.get_submodule(rest.removesuffix(".weight")).weight)
        else:
            value.zero_()
    return adapter


def orthogonal_loras(adapter: Adapter) -> dict[str, Any]:
    """The LoRAs that take a bin of a basis, by their names in the original's folder of bases."""
    found = {}
    for key in adapter.tensors():
        kind, place, rest = split(key)
        name = rest.partition(".")[0]
        if name in LORAS and not (kind == "cross" and name in ("to_k_lora", "to_v_lora")):
            found[key.removesuffix(f".{rest}") + f".{name}"] = getattr(adapter.part(kind, place), name)
    return found


@torch.no_grad()
def freeze_bases(adapter: Adapter, config: Any) -> None:
    """Fix `up` of each LoRA to the columns `oa_bin` of its layer's basis, and let `down` start at zero.

    Keys and values of cross-attention stay ordinary LoRAs, as in the original.
    """
    for place, lora in orthogonal_loras(adapter).items():
        width = len(lora.up.weight)
        matrix = read_basis(Path(config.oa_bases), place, width) if config.oa_bases else basis(place, width)
        lora.up.weight.copy_(columns_of(matrix, config.oa_bin, config.rank))
        lora.down.weight.zero_()


def fixed_factors(adapter: Adapter) -> dict[str, nn.Parameter]:
    """The tensors of an orthogonal adapter that are not trained, by their names in its file."""
    return {f"{place}.up.weight": lora.up.weight for place, lora in orthogonal_loras(adapter).items()}


def check_bases(config: Any, unet: nn.Module) -> None:
    """ValueError if a layer of the UNet has no such bin, or the folder of bases is not there."""
    require_bin(config.oa_bin, config.rank, min(len(block.norm1.weight) for block in spatial_blocks(unet).values()))
    if config.oa_bases and not Path(config.oa_bases).is_dir():
        raise ValueError(f"oa_bases={config.oa_bases!r}: not a folder on this machine")
