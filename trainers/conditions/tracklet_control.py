"""Control of Stable Video Diffusion by boxes: each box becomes a token, gated self-attention adds tokens to frames.

The architecture is TrackDiffusion's for SVD (arXiv 2312.00651): that of GLIGEN (arXiv 2301.07093), but with a colour
instead of a text for each object, as in Boximator (arXiv 2402.01566).
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..core.attention import attend
from ..core.feed_forward import FeedForward
from ..core.transfer import to_device
from .tracklets import MAX_OBJECTS

BANDS, TEMPERATURE = 8, 100.0
NUMBERS = 7  # x1, y1, x2, y2, R, G, B; with 8 the last is 1 for a hard box
HIDDEN, TOKEN = 512, 1024
FUSER = ".transformer_blocks.0.fuser."
POSITIONS = "position_net."
# Layers of the base model that are trained with the control and saved in its file.
BASE_LAYERS = r"(.*\.)?time_mixer\.mix_factor|input_blocks\.0\.0\..*|out\.2\..*"


class PositionNet(nn.Module):
    """Boxes [N, 20, `numbers`] and mask [N, 20] to tokens [N, 20, 1024]. A masked slot gets the learned null token."""

    def __init__(self, numbers: int, operations: Any, made: dict[str, Any]) -> None:
        super().__init__()
        features = 2 * BANDS * numbers
        self.numbers = numbers
        self.null_position_feature = nn.Parameter(torch.zeros(features, **made))
        sizes = (features, HIDDEN, HIDDEN, TOKEN)
        layers = [operations.Linear(*pair, **made) for pair in zip(sizes, sizes[1:], strict=False)]
        self.linears = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])

    def forward(self, boxes: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        null, mask = self.null_position_feature.to(boxes.device, torch.float32), mask.unsqueeze(-1)
        return self.linears((mask * fourier(boxes[..., : self.numbers]) + (1 - mask) * null).to(dtype))


def fourier(x: Tensor) -> Tensor:
    """Fourier features [..., 16 n] of x [..., n]: sin and cos of 100^(k/8) x, ordered by k = 0..7, sin/cos, number."""
    bands = TEMPERATURE ** (torch.arange(BANDS, device=x.device) / BANDS)
    angles = bands.unsqueeze(-1) * x.unsqueeze(-2)
    return torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(-3)


class Attention(nn.Module):
    """Attention in heads of 64 channels from x [N, L, C] to `seen` [N, M, C]."""

    def __init__(self, width: int, operations: Any, made: dict[str, Any]) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (operations.Linear(width, width, bias=False, **made) for _ in range(3))
        self.to_out = nn.Sequential(operations.Linear(width, width, **made))
        self.heads = width // 64

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.to_out(attend(self.to_q(x), self.to_k(seen), self.to_v(seen), self.heads))


class Fuser(nn.Module):
    """Gated self-attention of a frame's pixels x [N, L, C] and its box tokens [N, 20, 1024]. Returns the residual.

    Both gates start at zero, so an untrained fuser adds exact zeros.
    """

    def __init__(self, width: int, operations: Any, made: dict[str, Any]) -> None:
        super().__init__()
        self.linear = operations.Linear(TOKEN, width, **made)
        self.attn = Attention(width, operations, made)
        self.ff = FeedForward(width, operations, made)
        self.norm1, self.norm2 = (operations.LayerNorm(width, **made) for _ in range(2))
        self.alpha_attn, self.alpha_dense = (nn.Parameter(torch.zeros((), **made)) for _ in range(2))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        seen = self.norm1(torch.cat([x, self.linear(tokens)], dim=1))
        added = self.alpha_attn.tanh().to(x) * self.attn(seen[:, : x.shape[1]], seen)
        return added + self.alpha_dense.tanh().to(x) * self.ff(self.norm2(x + added))


class TrackletControl(nn.Module):
    """A PositionNet, and a fuser for each spatial transformer. `widths` maps a transformer's path to its channels."""

    def __init__(
        self,
        widths: dict[str, int],
        *,
        numbers: int = NUMBERS,
        operations: Any = nn,
        dtype: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.position_net = PositionNet(numbers, operations, made)
        self.fusers = nn.ModuleDict({path.replace(".", "/"): Fuser(w, operations, made) for path, w in widths.items()})

    def initialise(self, generator: torch.Generator) -> "TrackletControl":
        """Draw weights from `generator` as torch does, U(-1/sqrt(inputs), 1/sqrt(inputs)). Gates stay at zero."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.fill_(1)
                    module.bias.zero_()
                elif isinstance(module, nn.Linear):
                    bound = 1 / math.sqrt(module.in_features)
                    for parameter in module.parameters(recurse=False):
                        drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                        parameter.copy_(drawn)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The state with the key names of a file."""
        state = self.state_dict()
        return {_file_name(key): value for key, value in state.items()}

    def load(self, tensors: dict[str, Tensor]) -> "TrackletControl":
        """Load a file's tensors, except those of the base model. ValueError if one is missing."""
        state = self.state_dict()
        for key, value in state.items():
            name = _file_name(key)
            if name not in tensors or tensors[name].shape != value.shape:
                found = (*tensors[name].shape,) if name in tensors else "nothing"
                raise ValueError(f"{name}: found {found}, expected a tensor of shape {(*value.shape,)}")
        own = {key: tensors[_file_name(key)] for key in state}
        self.load_state_dict(own, assign=next(self.parameters()).is_meta)
        return self

    def require_fit(self, unet: nn.Module) -> None:
        """ValueError unless every transformer of the UNet has a fuser of its width."""
        here, fusers = widths_of(unet), self.fusers.items()
        made_for = {path.replace("/", "."): fuser.get_parameter("norm1.weight").shape[0] for path, fuser in fusers}
        if made_for != here:
            raise ValueError(
                f"made for a model of {len(made_for)} transformers of {sorted(set(made_for.values()))} channels, this "
                f"one has {len(here)} of {sorted(set(here.values()))}"
            )


def _file_name(key: str) -> str:
    """fusers.<a/b>.<rest> to <a.b>.transformer_blocks.0.fuser.<rest>"""
    if not key.startswith("fusers."):
        return key
    path, _, rest = key.removeprefix("fusers.").partition(".")
    return path.replace("/", ".") + FUSER + rest


def read(tensors: dict[str, Tensor]) -> tuple[dict[str, int], int, dict[str, Tensor]]:
    """TrackletControl's arguments from a file's tensors, and the base model's layers. ValueError for other files."""
    first = tensors.get(f"{POSITIONS}linears.0.weight")
    widths = {
        key.partition(FUSER)[0]: len(value)
        for key, value in tensors.items()
        if key.endswith(f"{FUSER}linear.weight") and value.ndim
    }
    if first is None or not widths or first.ndim != 2:
        raise ValueError("no position_net and fusers in it, expected a file of Train SVD Tracklets")
    base = {key: value for key, value in tensors.items() if re.fullmatch(BASE_LAYERS, key)}
    return widths, first.shape[1] // (2 * BANDS), base


def transformers(unet: Any) -> dict[str, Any]:
    """The spatial block of each transformer of a UNet, by the transformer's path."""
    return {
        path: module.transformer_blocks[0]
        for path, module in unet.named_modules()
        if type(module).__name__ == "SpatialVideoTransformer"
    }


def widths_of(unet: nn.Module) -> dict[str, int]:
    return {path: block.norm1.weight.shape[0] for path, block in transformers(unet).items()}


class Controlled:
    """Applies a control in a UNet inside the `with` block. Set boxes [N, 20, 8] and mask [N, 20] for all images first.

    A fuser runs between self- and cross-attention of spatial blocks. No module receives the residual stream there, so
    its output is added twice: to the input of cross-attention's norm, and to cross-attention's output.
    """

    def __init__(self, unet: Any, control: TrackletControl) -> None:
        self.unet, self.control = unet, control
        self.boxes, self.mask = torch.zeros(1, MAX_OBJECTS, 8), torch.zeros(1, MAX_OBJECTS)
        self.handles: list[Any] = []

    def __enter__(self) -> "Controlled":
        first = self.unet.input_blocks[0][0]
        self.handles.append(first.register_forward_pre_hook(self._make_tokens))
        for path, block in transformers(self.unet).items():
            added: list[Tensor] = []
            fuser = self.control.fusers[path.replace(".", "/")]
            self.handles.append(block.norm2.register_forward_pre_hook(self._before_norm(fuser, added)))
            self.handles.append(block.attn2.to_out.register_forward_hook(lambda *a, added=added: a[-1] + added.pop()))
        return self

    def __exit__(self, *_: object) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _make_tokens(self, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0]
        boxes, mask = (to_device(value, x.device, torch.float32) for value in (self.boxes, self.mask))
        self.tokens = self.control.position_net(boxes, mask, x.dtype)

    def _before_norm(self, fuser: nn.Module, added: list[Tensor]) -> Any:
        def hook(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            (x,) = inputs
            added[:] = [fuser(x, self.tokens)]
            return (x + added[0],)

        return hook
