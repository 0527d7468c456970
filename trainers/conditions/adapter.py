"""A motion adapter for AnimateDiff, image to video: what a run of Train CA-LoRA learns, as layers beside frozen ones.

Its parts, each optional at each place: an I2V-Adapter (Guo et al. 2023, arXiv 2312.16693) beside self-attention,
CA-LoRA on cross-attention, and a motion LoRA with a motion embedding on temporal attention. Tensors are named as in the
original's files, by diffusers' paths of the UNet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...lora_io.adapter_names import kind_of
from ...lora_io.keys import diffusers_path
from .adapter_positions import NONE

Shapes = dict[str, tuple[int, ...]]
PARTS = {"image": ".i2v_adapter.", "cross": ".attn2.processor.", "temporal": ".processor."}  # and what follows a place
LORAS = ("to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora")
DOWN, UP, EMBED = "down.weight", "up.weight", "motion_embed.weight"


@dataclass(frozen=True)
class Query:
    """How an adapter's cross-attention sees the frames: a positional mode, and the stride of its queries in space."""

    positions: str = NONE
    stride: int = 1


class LowRank(nn.Module):
    """alpha / rank * up(down(x)): the update of a frozen linear layer."""

    def __init__(self, shapes: Shapes, alpha: float, operations: Any, made: dict[str, Any]) -> None:
        super().__init__()
        rank, inputs = shapes[DOWN]
        self.scale = alpha / rank
        self.down = operations.Linear(inputs, rank, bias=False, **made)
        self.up = operations.Linear(rank, shapes[UP][0], bias=False, **made)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) * self.scale


class Loras(nn.Module):
    """The LoRAs of an attention layer's projections, and a motion embedding [F, C]. Those without shapes are None."""

    def __init__(self, shapes: Shapes, alpha: float, operations: Any, made: dict[str, Any]) -> None:
        super().__init__()
        for name in LORAS:
            own = _below(shapes, name)
            setattr(self, name, LowRank(own, alpha, operations, made) if own else None)
        embed = shapes.get(EMBED)
        self.motion_embed = operations.Embedding(*embed, **made) if embed else None

    def added(self, name: str, x: Tensor) -> Tensor | float:
        """The update of a projection for its input x, 0.0 if it has none."""
        lora = getattr(self, name)
        return 0.0 if lora is None else lora(x)


class ImagePart(nn.Module):
    """Attention of every frame to the first one. Projections without shapes are None: the base's are used."""

    def __init__(self, shapes: Shapes, alpha: float, operations: Any, made: dict[str, Any]) -> None:
        super().__init__()
        for name in ("to_q", "to_k", "to_v"):
            shape = shapes.get(f"{name}.weight")
            setattr(self, name, operations.Linear(shape[1], shape[0], bias=False, **made) if shape else None)
        outputs, inputs = shapes["to_out.0.weight"]
        self.to_out = nn.ModuleList([operations.Linear(inputs, outputs, **made)])


KINDS: dict[str, Callable[..., nn.Module]] = {"image": ImagePart, "cross": Loras, "temporal": Loras}


class Adapter(nn.Module):
    """The parts of an adapter, by kind and place. `shapes` are those of its tensors; alpha / rank scales its LoRAs.

    ValueError names a tensor that belongs to no part.
    """

    def __init__(
        self, shapes: Shapes, alpha: float, query: Query = Query(), *, operations: Any = nn, dtype: Any = None,
        device: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.alpha, self.query = alpha, query
        made = {"dtype": dtype, "device": device}
        places: dict[tuple[str, str], Shapes] = {}
        for key, shape in shapes.items():
            kind, place, rest = split(key)
            places.setdefault((kind, place), {})[rest] = shape
        for kind in PARTS:
            self.add_module(kind, nn.ModuleDict())
        for (kind, place), own in places.items():
            self.get_submodule(kind).add_module(place.replace(".", "/"), KINDS[kind](own, alpha, operations, made))
        if unknown := shapes.keys() - self.tensors().keys():
            raise ValueError(f"{min(unknown)}: not a tensor of an adapter")

    def part(self, kind: str, place: str) -> Any:
        """The part of that kind at a place, or None."""
        parts = self.get_submodule(kind)
        return parts._modules.get(place.replace(".", "/"))

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by the key names of a file."""
        return {_file_key(key): value for key, value in self.named_parameters()}

    def load(self, tensors: dict[str, Tensor]) -> "Adapter":
        """Load a file's tensors of the same shapes. Layers on the device "meta" get the tensors themselves."""
        names = {_file_key(key): key for key in self.state_dict()}
        assign = any(parameter.is_meta for parameter in self.parameters())
        self.load_state_dict({names[key]: value for key, value in tensors.items()}, assign=assign)
        return self

    def require_fit(self, unet: nn.Module) -> None:
        """ValueError names a tensor whose layer the UNet does not have, or has in another size."""
        blocks = spatial_blocks(unet)
        self._require({place: block.attn1 for place, block in blocks.items()}, "image")
        self._require({place: block.attn2 for place, block in blocks.items()}, "cross")

    def require_motion_fit(self, motion: nn.Module) -> None:
        """The same for motion modules."""
        self._require(temporal_attentions(motion), "temporal")

    def _require(self, layers: dict[str, Any], wanted: str) -> None:
        for key, value in self.tensors().items():
            kind, place, rest = split(key)
            if kind != wanted:
                continue
            if place not in layers:
                raise ValueError(f"made for another model: this one has no {place}")
            expected = expected_shape(layers[place], rest, value)
            if value.shape != expected:
                raise ValueError(f"made for another model: {key} is {(*value.shape,)}, here {expected} is expected")


def expected_shape(attention: Any, rest: str, value: Tensor) -> tuple[int, ...]:
    """The shape that a part's tensor has on an attention layer, in which its rank and its number of frames are free."""
    name, _, factor = rest.partition(".")
    layer = name.removesuffix("_lora")
    if name == "motion_embed":
        return (len(value), attention.to_q.weight.shape[1])
    outputs, inputs = (attention.to_out[0] if layer == "to_out" else getattr(attention, layer)).weight.shape
    shapes = {DOWN: (len(value), inputs), UP: (outputs, value.shape[-1])}
    return shapes.get(factor, (outputs, inputs)[: value.ndim])


def split(key: str) -> tuple[str, str, str]:
    """A tensor's kind of part, its place and the rest of its name. ValueError for a key of another file."""
    kind = kind_of(key)
    if kind is None or kind.part not in PARTS:
        raise ValueError(f"{key}: expected a tensor of an adapter, such as ...attn2.processor.to_k_lora.down.weight")
    return kind.part, kind.place, kind.rest


def _file_key(key: str) -> str:
    """<kind>.<a/b>.<rest> to <a.b>.<infix of the kind>.<rest>"""
    kind, place, rest = key.split(".", 2)
    return place.replace("/", ".") + PARTS[kind] + rest


def _below(shapes: Shapes, name: str) -> Shapes:
    return {key.removeprefix(f"{name}."): shape for key, shape in shapes.items() if key.startswith(f"{name}.")}


def spatial_transformers(unet: Any) -> dict[str, Any]:
    """The SpatialTransformers of a UNet, each by the path of its block in diffusers."""
    return {
        diffusers_path(f"{path}.transformer_blocks.0"): module
        for path, module in unet.named_modules()
        if type(module).__name__ == "SpatialTransformer"
    }


def spatial_blocks(unet: Any) -> dict[str, Any]:
    """The blocks of a UNet's SpatialTransformers, by their paths in diffusers."""
    return {place: module.transformer_blocks[0] for place, module in spatial_transformers(unet).items()}


def temporal_attentions(motion: Any) -> dict[str, Any]:
    """The attention layers of motion modules, by path."""
    return {path: module for path, module in motion.named_modules() if type(module).__name__ == "TemporalAttention"}
