"""Reads Wan LoRA files: converts every known key format to Wan's module paths, and checks which model a file is for."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .file import load
from .fitting import require_base, require_layers
from .keys import check_pairs, matrix, scale_of, split_factor
from .peft import alpha_of, config_of

ROOT = r"(base_model\.model\.)?(model\.)?(diffusion_model\.|transformer\.|pipe\.dit\.|dit\.|lora_unet__?|lycoris_)?"
OTHER_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "magnitude_vector": "DoRA", "oft_": "OFT"}
# Wan's names of a block's LoRA layers, and diffusers' names (dots as underscores) mapped to them.
NATIVE = [f"{part}.{layer}" for part in ("self_attn", "cross_attn") for layer in "qkvo"] + ["ffn.0", "ffn.2"]
DIFFUSERS = {
    **{
        f"attn{number}_to_{theirs}": f"{part}.{ours}"
        for number, part in ((1, "self_attn"), (2, "cross_attn"))
        for theirs, ours in {"q": "q", "k": "k", "v": "v", "out": "o", "out_0": "o"}.items()
    },
    "ffn_net_0_proj": "ffn.0",
    "ffn_net_2": "ffn.2",
}
LAYERS = {path.replace(".", "_"): path for path in NATIVE} | DIFFUSERS


def from_any_wan(tensors: Mapping[str, Tensor], alpha: float | None = None) -> dict[str, Tensor]:
    """A Wan LoRA in any known key format to `<module>.lora_down/lora_up.weight` and, where present, `<module>.alpha`.

    Known formats: ComfyUI (`diffusion_model.`), musubi and kohya (`lora_unet_`), diffusers (`transformer.`), PEFT and
    bare paths, each with Wan's or diffusers' layer names. Layers without an alpha get `alpha` unless it is None.
    ValueError names an unknown key or layer, or a layer with only one factor.
    """
    named = {}
    for key, tensor in tensors.items():
        if factor := split_factor(key):
            named[f"{_module(key, factor[0])}.lora_{factor[1]}.weight"] = matrix(tensor)
        elif key.endswith(".alpha"):
            named[f"{_module(key, key.removesuffix('.alpha'))}.alpha"] = torch.tensor(scale_of(key, tensor))
        else:
            kind = next((kind for part, kind in OTHER_KINDS.items() if part in key), "none")
            raise ValueError(f"LoRA key {key!r}: expected a LoRA's down or up factor, found {kind}")
    if not any(key.endswith(".weight") for key in named):
        raise ValueError("holds no LoRA layers, expected a LoRA for Wan")
    check_pairs(named, "LoRA")
    if alpha is not None:
        paths = [key.removesuffix(".lora_down.weight") for key in named if key.endswith(".lora_down.weight")]
        named = {**{f"{path}.alpha": torch.tensor(float(alpha)) for path in paths}, **named}
    return named


def _module(key: str, path: str) -> str:
    """`blocks.<n>.<layer>` from a path in any known format."""
    match = re.fullmatch(rf"{ROOT}blocks[._](\d+)[._](.+)", path)
    if not match or not (layer := LAYERS.get(match[5].replace(".", "_"))):
        raise ValueError(f"LoRA key {key!r}: expected a layer of a Wan block, one of {', '.join(NATIVE)}")
    return f"blocks.{int(match[4])}.{layer}"


# Exports of Set-and-Sequence that another run cannot start from, by their metadata entry `sns.stage`.
MOTION_STAGES = {
    "motion": "motion alone, which works only together with its identity file",
    "combined": "look and motion in one",
}


def require_made_for(metadata: Mapping[str, str], refused: Collection[str] = (), bases: Collection[str] = ()) -> None:
    """ValueError if the metadata names another model than Wan 2.1 text-to-video, or a base model not in `bases`.

    `refused` lists stages of Set-and-Sequence that are an error too.
    """
    for name in ("ss_base_model_version", "modelspec.architecture"):
        plain = re.sub(r"[^a-z0-9]", "", metadata.get(name, "wan").lower())
        if "wan" not in plain or any(word in plain for word in ("i2v", "wan22", "vace")):
            raise ValueError(
                f"made for another model: its metadata says {name}={metadata[name]!r}, expected a LoRA for Wan 2.1 "
                "text-to-video"
            )
    if (stage := metadata.get("sns.stage", "")) in refused:
        raise ValueError(f"a {stage} file: {MOTION_STAGES[stage]}. Expected the identity file of that run")
    require_base(metadata, bases)


def read_wan_lora(
    path: Path, layers: Mapping[str, tuple[int, ...]], rank: int, refused: Collection[str], bases: Collection[str] = ()
) -> dict[str, Tensor]:
    """A LoRA file as `from_any_wan` returns it. ValueError unless it has exactly `layers` and this rank.

    `layers` maps a module path to its weight's shape. `refused` and `bases` as in `require_made_for`.
    """
    named = read_any_wan_lora(path, refused, bases)
    require_layers(named, layers, rank)
    return named


def read_any_wan_lora(path: Path, refused: Collection[str], bases: Collection[str]) -> dict[str, Tensor]:
    """The same with any layers and rank."""
    tensors, metadata = load(path)
    require_made_for(metadata, refused, bases)
    return from_any_wan(tensors, alpha_of(config_of(path, metadata, "transformer.")))
