"""AnimateDiff's motion modules (Guo et al. 2023, arXiv 2307.04725), with keys as in the files, on ComfyUI's SD1.5."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.feed_forward import FeedForward

PART = "kinoloom.motion_module"  # the name under which a MODEL carries its motion module
HEADS, NORM_GROUPS = 8, 32
LCM_POSITIONS = 64  # AnimateLCM's files hold no position table
LARGEST_BATCH = 1 << 15  # sequences in one attention call; some CUDA kernels take at most 65535
DOWN, UP = 2, 3  # modules per level
MID = "mid_block.motion_modules.0"
MODULE_KEY = re.compile(r"((?:down_blocks\.\d+|up_blocks\.\d+|mid_block)\.motion_modules\.\d+)\.temporal_transformer\.")


@dataclass(frozen=True)
class Layout:
    """version: "v1", "v2", "v3" or "AnimateLCM". widths: channels of each level. positions: most frames of a clip."""

    version: str
    widths: tuple[int, ...]
    positions: int

    @property
    def mid(self) -> bool:
        return self.version == "v2"

    @property
    def norm_over_frames(self) -> bool:
        """Whether the UNet's group norms are computed over all frames, as in v1's training."""
        return self.version == "v1"

    def modules(self) -> dict[str, int]:
        """The channels of each motion module, by path."""
        levels = len(self.widths)
        down = {f"down_blocks.{b}.motion_modules.{m}": self.widths[b] for b in range(levels) for m in range(DOWN)}
        up = {f"up_blocks.{b}.motion_modules.{m}": self.widths[-1 - b] for b in range(levels) for m in range(UP)}
        return {**down, **({MID: self.widths[-1]} if self.mid else {}), **up}


def read(state: dict[str, Any]) -> tuple[Layout, dict[str, Tensor]]:
    """A motion module's layout and tensors, without the wrapper keys of a file. ValueError names other contents."""
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    tensors = {key.removeprefix("module."): value for key, value in state.items() if ".motion_modules." in key}
    if not tensors:
        raise ValueError(f"no motion modules in it, but {len(state)} other entries such as {next(iter(state), 'none')}")
    if any("lora" in key for key in tensors):
        raise ValueError("a motion LoRA, which goes on top of a motion module; use Load Motion LoRA for it")
    found = {match[1] for match in map(MODULE_KEY.match, tensors) if match}
    levels = 1 + max((int(path.split(".")[1]) for path in found if path.startswith("down_blocks.")), default=-1)
    if levels != 4:
        raise ValueError(f"a motion module with {levels} levels, expected the 4 of Stable Diffusion 1.5")
    attention = "{}.temporal_transformer.transformer_blocks.0.attention_blocks.0.{}"
    first = "down_blocks.0.motion_modules.0"
    table = tensors.get(attention.format(first, "pos_encoder.pe"))
    if any(not (value.is_floating_point() and value.ndim) for value in tensors.values()):
        raise ValueError("a damaged motion module, some of whose entries are not tensors")
    table = table if table is None or table.ndim == 3 else table.new_zeros(1, 0, 0)
    version = "v2" if MID in found else "AnimateLCM" if table is None else "v3" if table.shape[1] == 32 else "v1"
    queries = [attention.format(f"down_blocks.{level}.motion_modules.0", "to_q.weight") for level in range(levels)]
    if any(key not in tensors for key in queries):
        raise ValueError("a motion module of another kind than AnimateDiff's v1, v2, v3 or AnimateLCM")
    positions = LCM_POSITIONS if table is None else table.shape[1]
    layout = Layout(version, tuple(len(tensors[key]) for key in queries), positions)
    expected = MotionModules(layout, device="meta").state_dict()
    different = {key for key, value in expected.items() if key not in tensors or tensors[key].shape != value.shape} | (
        tensors.keys() - expected.keys()
    )
    different = {key for key in different if not (version == "AnimateLCM" and key.endswith(".pe"))}
    if different:
        raise ValueError(
            f"a motion module like {version}, but {len(different)} entries differ, such as {min(different)}"
        )
    return layout, tensors


class MotionModules(nn.Module):
    """The motion modules of one file. `operations` creates the layers: torch.nn or ComfyUI's casting layers.

    `load` fills them. Layers created on the device "meta", which draws no random numbers, get the file's own tensors.
    """

    def __init__(self, layout: Layout, *, operations: Any = nn, dtype: Any = None, device: Any = None) -> None:
        super().__init__()
        self.layout = layout
        made = {"dtype": dtype, "device": device}
        for path, width in layout.modules().items():
            block, _, module = path.rpartition(".motion_modules.")
            parent: nn.Module = self
            for name in [*block.split("."), "motion_modules"]:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent.get_submodule(name)
            parent.add_module(module, MotionModule(width, layout.positions, operations, made))

    def load(self, tensors: dict[str, Tensor]) -> "MotionModules":
        """Load the tensors from `read`. Position tables that are not in the file keep their values."""
        tables = {name: value for name, value in self.named_buffers() if name not in tensors}
        self.load_state_dict({**tables, **tensors}, assign=next(self.parameters()).is_meta)
        return self

    def require_fit(self, unet: Any) -> None:
        """ValueError unless every module has the width of the layer that it follows."""
        widths = self.layout.modules()
        for path, site in sites(unet, self.layout).items():
            width = getattr(site, "out_channels", None) or site.in_channels
            if width != widths[path]:
                raise ValueError(f"made for {widths[path]} channels at {path}, this model has {width}")


class MotionModule(nn.Module):
    """Attention over the frames of every pixel. A single frame passes unchanged, so that the image model works."""

    def __init__(self, width: int, positions: int, operations: Any, made: dict[str, Any]) -> None:
        super().__init__()
        self.temporal_transformer = TemporalTransformer(width, positions, operations, made)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x [(B F) C H W]."""
        return x if frames == 1 else self.temporal_transformer(x, frames)


class TemporalTransformer(nn.Module):
    def __init__(self, width: int, positions: int, operations: Any, made: dict[str, Any]) -> None:
        super().__init__()
        self.norm = operations.GroupNorm(NORM_GROUPS, width, eps=1e-6, **made)
        self.proj_in = operations.Linear(width, width, **made)
        self.transformer_blocks = nn.ModuleList([TemporalBlock(width, positions, operations, made)])
        self.proj_out = operations.Linear(width, width, **made)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        count, width, height, breadth = x.shape
        clips = count // frames
        hidden = self.norm(x).reshape(clips, frames, width, -1).permute(0, 3, 1, 2).flatten(0, 1)  # (B HW) F C
        hidden = self.proj_in(hidden)
        for block in self.transformer_blocks:
            hidden = block(hidden)
        hidden = self.proj_out(hidden).view(clips, -1, frames, width).permute(0, 2, 3, 1)
        return x + hidden.reshape(count, width, height, breadth)


class TemporalBlock(nn.Module):
    def __init__(self, width: int, positions: int, operations: Any, made: dict[str, Any]) -> None:
        super().__init__()
        self.attention_blocks = nn.ModuleList([TemporalAttention(width, positions, operations, made) for _ in range(2)])
        self.norms = nn.ModuleList([operations.LayerNorm(width, **made) for _ in range(2)])
        self.ff = FeedForward(width, operations, made)
        self.ff_norm = operations.LayerNorm(width, **made)

    def forward(self, x: Tensor) -> Tensor:
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x = x + attention(norm(x))
        return x + self.ff(self.ff_norm(x))


class TemporalAttention(nn.Module):
    """Self-attention over frames. Positions are added to the input, so they affect queries, keys and values."""

    def __init__(self, width: int, positions: int, operations: Any, made: dict[str, Any]) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (operations.Linear(width, width, bias=False, **made) for _ in range(3))
        self.to_out = nn.ModuleList([operations.Linear(width, width, **made)])
        self.pos_encoder = Positions(width, positions, made)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_encoder(x)
        return self.to_out[0](self.attend(self.to_q(x), self.to_k(x), self.to_v(x)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of frames [N, F, C] in heads."""
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        parts = (x.split(LARGEST_BATCH) for x in (q, k, v))
        attended = torch.cat([nn.functional.scaled_dot_product_attention(*part) for part in zip(*parts, strict=True)])
        return attended.transpose(1, 2).flatten(-2)


class Positions(nn.Module):
    """Adds pe[p, 2i] = sin(p 10000^(-2i/C)), pe[p, 2i + 1] = cos of the same, to x [N F C]."""

    pe: Tensor

    def __init__(self, width: int, positions: int, made: dict[str, Any]) -> None:
        super().__init__()
        frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        angles = torch.arange(positions).unsqueeze(1) * frequencies
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).unsqueeze(0)
        self.register_buffer("pe", table.to(made["dtype"]))

    def forward(self, x: Tensor) -> Tensor:
        frames, positions = x.shape[1], self.pe.shape[1]
        if frames > positions:
            raise ValueError(f"clip of {frames} frames, but this motion module takes {positions} at most")
        return x + self.pe[:, :frames].to(x)


class Attached:
    """Applies motion modules in a UNet inside the `with` block. `frames` is the length of a clip in the batch.

    A hook runs each module after its block's last SpatialTransformer, or after the ResBlock if there is none. Hooks
    keep the UNet's keys, which inserted modules would change.
    """

    def __init__(self, unet: Any, motion: MotionModules, frames: int = 1) -> None:
        self.unet, self.motion, self.frames = unet, motion, frames
        self.handles: list[Any] = []

    def __enter__(self) -> "Attached":
        for path, site in sites(self.unet, self.motion.layout).items():
            module = self.motion.get_submodule(path)
            self.handles.append(site.register_forward_hook(self._after(module)))
        if self.motion.layout.norm_over_frames:
            self.handles += norms_over_frames(self.unet, lambda: self.frames)
        return self

    def __exit__(self, *_: object) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _after(self, module: nn.Module) -> Any:
        return lambda site, inputs, output: module(output, self.frames)


def norms_over_frames(unet: Any, frames: Callable[[], int]) -> list[Any]:
    """Makes a UNet's group norms run over all frames of a clip, `frames()` of them. The handles take it back."""

    def join(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """[(B F) C H W] to [B C F H W]."""
        return (inputs[0].unflatten(0, (-1, frames())).transpose(1, 2),)

    def part(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output.transpose(1, 2).flatten(0, 1)

    norms = list(group_norms(unet))
    before = [norm.register_forward_pre_hook(join) for norm in norms]
    return before + [norm.register_forward_hook(part) for norm in norms]


def require_layout(unet: Any) -> None:
    """ValueError unless a UNetModel has SD1.5's blocks: 12 input blocks, 12 output blocks, 16 transformers."""
    counts = [len(getattr(unet, name, ())) for name in ("input_blocks", "output_blocks")]
    transformers = sum("SpatialTransformer" == type(module).__name__ for module in unet.modules())
    if counts == [12, 12] and transformers == 16 and unet.middle_block[1].use_linear:
        raise ValueError("found a UNet of Stable Diffusion 2, expected Stable Diffusion 1.5")
    if counts != [12, 12] or transformers != 16:
        raise ValueError(
            f"found a UNet of {counts[0]} input and {counts[1]} output blocks, {transformers} spatial transformers, "
            "expected Stable Diffusion 1.5 (12, 12 and 16)"
        )


def sites(unet: Any, layout: Layout) -> dict[str, nn.Module]:
    """The UNet layer that each motion module follows, by the module's path."""
    found: dict[str, nn.Module] = {}
    for path in layout.modules():
        level, _, module = path.partition(".motion_modules.")
        if path == MID:
            block = unet.middle_block
        elif level.startswith("down"):
            block = unet.input_blocks[1 + (DOWN + 1) * int(level.split(".")[1]) + int(module)]
        else:
            block = unet.output_blocks[UP * int(level.split(".")[1]) + int(module)]
        transformers = [layer for layer in block if type(layer).__name__ == "SpatialTransformer"]
        found[path] = transformers[-1] if transformers else block[0]
    return found


def group_norms(unet: Any) -> Iterator[nn.Module]:
    """The group norms of ResBlocks and output, which v1 computes over all frames; transformers' are per frame."""
    for module in unet.modules():
        if type(module).__name__ == "ResBlock":
            yield module.in_layers[0]
            yield module.out_layers[0]
    yield unet.out[0]
