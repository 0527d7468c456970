"""Reads an image-to-video motion adapter from any known file layout, checks it, and names its parts.

Layouts: our one safetensors file; the original's files `*-i2v-weights.pt`, `*-lora-weights.pt` and
`*-ca-lora-weights.pt`, of which any may be absent; its `adapter.pt`; and whole UNets. Keys may begin with `module.`,
`unet.` and the like, and factors of LoRAs may have the names of diffusers, PEFT or ComfyUI. Tensors are then named as
in the original, where a block is a transformer block of the UNet and an attention one of a motion module:

    <block>.i2v_adapter.to_q/to_k/to_v/to_out.0.weight            [C, C], to_out.0.bias [C]
    <block>.i2v_adapter.processor.to_q/out_lora.down/up.weight    [r, C] / [C, r]
    <block>.attn2.processor.to_q/k/v/out_lora.down/up.weight      [r, in] / [C, r]
    <attention>.processor.to_q/k/v/out_lora.down/up.weight        [r, C] / [C, r]
    <attention>.processor.motion_embed.weight                     [F, C]
    word                                                          [1, 768], a learned word
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .adapter_names import ALPHA, SELF_IN_TIME, SIZES, Kind, kind_of, read_name
from .file import open_tensors
from .keys import scale_of
from .pickled import Pickled

SAFETENSORS = (".safetensors", ".sft")
PLACES = {"image": 16, "cross": 16, "temporal": 40}  # of SD1.5, without the motion module in the middle that few have
NEEDED = {"image": {"to_out.0.weight", "to_out.0.bias"}}
STORED_ALPHA, EXPORT, WHOLE = "kinoloom.alpha", "kinoloom.export", "adapter"  # metadata of our files, and a value
MOST_NAMED = 3
RANDOM = (
    "is of a layer that adds a random, untrained constant at each block, and only this file has it: expected the split "
    "files or adapter.pt of the same run"
)


class Readable(Protocol):
    """An open file of named tensors, as `safetensors.safe_open` gives it."""

    def keys(self) -> Iterable[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def metadata(self) -> dict[str, str] | None: ...


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's tensors on the CPU. alpha: of all its LoRAs; None if no file says it, as in the original's files."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    alpha: float | None

    @property
    def has_loras(self) -> bool:
        """Whether alpha matters: an I2V-Adapter alone may have no LoRA."""
        return any("_lora." in key for key in self.tensors)


def read_adapter(*paths: Path) -> AdapterFiles:
    """One adapter from one or more files, each with some of its parts. Pickled code is never run.

    ValueError names the file that is missing, damaged, holds nothing of an adapter or tensors that are not known, and
    anything that `check_adapter` finds. A tensor may be in two files if it is the same.
    """
    if not paths:
        raise ValueError("no file is given, expected at least one of an adapter")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    alphas: set[float] = set()
    for path in paths:
        with _opened(path) as file, naming(path):
            found, own = _read(file)
            for key in found.keys() & tensors.keys():
                if not torch.equal(found[key], tensors[key]):
                    raise ValueError(f"{key} has other values in two of these files, expected files of one adapter")
            described = file.metadata() or {}
            own |= _stored_alpha(described, found)
        tensors, metadata, alphas = tensors | found, described | metadata, alphas | own
    with naming(*paths):
        if len(alphas) > 1:
            raise ValueError(f"found the alphas {', '.join(map(str, sorted(alphas)))}, expected the same for all LoRAs")
        check_adapter(tensors)
    return AdapterFiles(tensors, metadata, next(iter(alphas), None))


def check_adapter(tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless tensors with our own names are an adapter.

    Each is finite, factors come in pairs, each part is complete, and numbers that must be the same are: the rank in a
    part, the channels of a layer, the width of the text, the frames of motion embeddings.
    """
    if not tensors:
        raise ValueError("holds nothing of an adapter, expected an I2V adapter, CA-LoRA, motion LoRA or learned word")
    sizes: dict[tuple[str, ...], tuple[int, str]] = {}
    for key in sorted(tensors):
        _check_tensor(key, tensors[key], sizes)
    for part, places in parts_of(tensors).items():
        _check_part(part, places)


def parts_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Tensors with our own names by part ("image", "cross", "temporal", "word"), place, and the rest of the name."""
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        kind = _kind(key)
        parts.setdefault(kind.part, {}).setdefault(kind.place, {})[kind.rest] = tensor
    return parts


def motion_lora(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """An adapter's motion LoRA as a file of AnimateDiff's: up factors times alpha / rank, no motion embedding."""
    made = {}
    for key, tensor in tensors.items():
        if _kind(key).part == "temporal" and "_lora." in key:
            made[key] = tensor if ".down." in key else tensor * (alpha / tensor.shape[1])
    return made


def merge_image_loras(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The adapter with LoRAs of its I2V adapter merged into its projections, as the original applies them.

    The one of the query is added to it: W + s BA. That of the output follows it: (I + s BA) (W x + b). s is alpha /
    rank. ValueError if a query has a LoRA but is not in the files itself.
    """
    merged = {key: tensor for key, tensor in tensors.items() if ".i2v_adapter.processor." not in key}
    for place, own in parts_of(tensors).get("image", {}).items():
        for layer in ("q", "out"):
            lora, base = f"processor.to_{layer}_lora", f"to_{layer}{'.0' * (layer == 'out')}"
            if f"{lora}.down.weight" not in own:
                continue
            if f"{base}.weight" not in own:
                raise ValueError(f"{place}.i2v_adapter.{base}.weight is missing, expected it beside its LoRA")
            down, up = (own[f"{lora}.{side}.weight"].float() for side in ("down", "up"))
            scale = alpha / len(down)
            weight, name = own[f"{base}.weight"].float(), f"{place}.i2v_adapter.{base}"
            merged[f"{name}.weight"] = weight + scale * up @ (down if layer == "q" else down @ weight)
            if layer == "out":
                bias = own[f"{base}.bias"].float()
                merged[f"{name}.bias"] = bias + scale * up @ (down @ bias)
    return merged


@contextmanager
def naming(*paths: Path) -> Iterator[None]:
    """Puts the files before a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"file {', '.join(path.name for path in paths)}: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[Readable]:
    if path.suffix.lower() in SAFETENSORS:
        with open_tensors(path) as file:
            yield file
    else:
        yield Pickled(path)


def _read(file: Readable) -> tuple[dict[str, Tensor], set[float]]:
    """The tensors of an adapter in a file, by our own names, and the alphas in it."""
    tensors: dict[str, Tensor] = {}
    alphas, unknown = set(), []
    for key in file.keys():
        name = read_name(key)
        if name is None:
            unknown.append(key)
        elif name == ALPHA:
            alphas.add(scale_of(key, file.get_tensor(key)))
        elif found := SELF_IN_TIME.fullmatch(name):
            if found[2].startswith("to_out.") and file.get_tensor(key).any():
                raise ValueError(f"{key} {RANDOM}")
        elif name:
            if name in tensors:
                raise ValueError(f"{key}: {name} is in it twice")
            tensors[name] = file.get_tensor(key)
    if unknown and not tensors:
        raise ValueError(f"holds nothing of an adapter, but {_some(unknown)}")
    if unknown:
        raise ValueError(f"holds tensors that are not known: {_some(unknown)}")
    if "word" in tensors and tensors["word"].ndim == 1:
        tensors["word"] = tensors["word"].unsqueeze(0)
    return tensors, alphas


def _some(keys: list[str]) -> str:
    rest = len(keys) - MOST_NAMED
    return ", ".join(keys[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _kind(key: str) -> Kind:
    kind = kind_of(key)
    if kind is None:
        raise ValueError(f"{key}: expected a tensor of an adapter")
    return kind


def _check_tensor(key: str, tensor: Tensor, sizes: dict[tuple[str, ...], tuple[int, str]]) -> None:
    """Checks a tensor, and its sizes against those of the tensors before, which `sizes` collects."""
    kind, shape = _kind(key), (*tensor.shape,)
    if len(shape) != len(kind.sizes) or 0 in shape or not tensor.is_floating_point():
        wanted = ", ".join(SIZES[letter] for letter in kind.sizes)
        raise ValueError(f"{key} is {tensor.dtype} of shape {shape}, expected floats of shape ({wanted})")
    if not tensor.float().isfinite().all():
        raise ValueError(f"{key} holds NaN or infinite values")
    for letter, size in zip(kind.sizes, shape, strict=True):
        for scope in kind.scopes(letter):
            had, first = sizes.setdefault(scope, (size, key))
            if size != had:
                raise ValueError(f"{key} is of shape {shape}: {SIZES[letter]} {size}, but {had} in {first}")


def _check_part(part: str, places: dict[str, dict[str, Tensor]]) -> None:
    """ValueError unless a part has the same tensors in all its layers, with both factors of each LoRA."""
    rests = NEEDED.get(part, set()).union(*places.values())
    rests |= {rest.replace(".down.", ".up.") for rest in rests} | {rest.replace(".up.", ".down.") for rest in rests}
    for place, own in places.items():
        if missing := sorted(rests - own.keys()):
            raise ValueError(f"{place} lacks {missing[0]}, expected it in every layer of the {part} part")
    found = sum(not place.startswith("mid_block.motion_modules.") for place in places)
    if found != PLACES.get(part, found):
        raise ValueError(f"the {part} part has {found} layers, expected {PLACES[part]}")


def _stored_alpha(metadata: dict[str, str], tensors: dict[str, Tensor]) -> set[float]:
    """The alpha by a file's metadata, if there is any. Our motion LoRAs have their scale in `up`: it is their rank."""
    if metadata.get(EXPORT, WHOLE) != WHOLE:
        return {float(len(tensor)) for key, tensor in tensors.items() if ".down." in key}
    text = metadata.get(STORED_ALPHA)
    if text is None:
        return set()
    with suppress(ValueError):
        if math.isfinite(alpha := float(text)):
            return {alpha}
    raise ValueError(f"{STORED_ALPHA}={text!r} in its metadata, expected a number")
