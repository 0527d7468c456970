"""Runs motion adapters in a UNet and its motion modules, for training and for samplers: the base runs once.

With one adapter of weight 1 both modes are the forward that it was trained with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.attention import attend
from .adapter import Adapter, Loras, spatial_transformers, temporal_attentions
from .adapter_cross import BESIDE, RESIDUAL, WEIGHTS, Cross, added

SMALLEST_SHARE = 1e-6  # of the base beside adapters whose weights sum to 1

Parts = list[tuple[float, Loras | None]]


@dataclass(frozen=True)
class Playing:
    """An adapter with its weight and its prompt [1, n, D]. Without a prompt it sees that of the sampler."""

    adapter: Adapter
    weight: float = 1.0
    prompt: Tensor | None = None


class Adapted:
    """Applies adapters inside the `with` block. `frames`: the length of a clip. `positive`: for each clip of the batch,
    whether it has the positive prompt; the others keep the base's cross-attention.

    residual: the output of a layer is computed with each adapter alone, and averaged by their weights w. If these do
    not sum to 1, the base has the rest of the weight. weights: low-rank updates are added by w, and one softmax runs
    over the tokens of all prompts. The I2V-Adapters' outputs are added by w in both. Adapters of weight 0 are left out.
    `cache` keeps the keys and values of prompts, which do not change while a sampler runs.
    """

    def __init__(
        self, unet: Any, motion: Any, playing: Sequence[Playing], mode: str = RESIDUAL, cache: dict | None = None
    ) -> None:
        self.unet, self.motion, self.mode, self.cache = unet, motion, mode, cache
        self.numbers = [number for number, one in enumerate(playing) if one.weight]
        self.playing = [playing[number] for number in self.numbers]
        self.frames, self.positive = 1, [True]
        self.undo: list[Callable[[], None]] = []
        if mode == WEIGHTS and len({one.adapter.query for one in self.playing}) > 1:
            raise ValueError("mode='weights': expected adapters with the same positions and query_stride")

    @property
    def share(self) -> float:
        """The share of the base in residual mode."""
        share = 1 - sum(one.weight for one in self.playing)
        return share if abs(share) > SMALLEST_SHARE and self.mode == RESIDUAL else 0.0

    def parts(self, kind: str, place: str) -> list[tuple[float, Any]]:
        """The weight of each adapter and its part at a place, or None."""
        return [(one.weight, one.adapter.part(kind, place)) for one in self.playing]

    def __enter__(self) -> "Adapted":
        if not self.playing:
            return self
        for place, transformer in spatial_transformers(self.unet).items():
            if any(part for _, part in self.parts("image", place)):
                FirstFrame(self, place, transformer.transformer_blocks[0])
            Cross(self, place, transformer)
        for place, attention in temporal_attentions(self.motion).items():
            if any(part for _, part in self.parts("temporal", place)):
                self.replace(attention, Temporal(self, place, attention).forward)
        return self

    def __exit__(self, *_: object) -> None:
        while self.undo:
            self.undo.pop()()

    def hook(self, handle: Any) -> None:
        self.undo.append(handle.remove)

    def replace(self, layer: nn.Module, forward: Callable) -> None:
        before = layer.__dict__.get("forward")
        layer.forward = forward
        self.undo.append(lambda: _restore(layer, before))


def _restore(layer: nn.Module, before: Callable | None) -> None:
    if before is None:
        del layer.forward
    else:
        layer.forward = before


class FirstFrame:
    """I2V-Adapters beside a block's self-attention: o = softmax(Q_f K_0^T / sqrt(d)) V_0 of the same normed input."""

    def __init__(self, adapted: Adapted, place: str, block: Any) -> None:
        self.adapted, self.base = adapted, block.attn1
        self.parts = [(weight, part) for weight, part in adapted.parts("image", place) if part]
        self.seen: list[Tensor] = []
        adapted.hook(block.norm1.register_forward_hook(self._see))
        adapted.hook(block.attn1.to_out.register_forward_hook(self._add))

    def _see(self, norm: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.seen[:] = [output]

    def _add(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        seen = self.seen.pop()
        if output.shape != seen.shape:
            found, expected = (*output.shape[:2],), (*seen.shape[:2],)
            raise ValueError(f"{BESIDE} self-attention, such as ToMe or HyperTile: found {found}, expected {expected}")
        n = seen.unflatten(0, (-1, self.adapted.frames))  # clips F L C
        attended: dict[tuple, Tensor] = {}  # adapters that keep the base's projections share it
        for weight, part in self.parts:
            layers = tuple(getattr(part, name) or getattr(self.base, name) for name in ("to_q", "to_k", "to_v"))
            if layers not in attended:
                to_q, to_k, to_v = layers
                attended[layers] = attend(to_q(n.flatten(1, 2)), to_k(n[:, 0]), to_v(n[:, 0]), self.base.heads)
            output = output + weight * part.to_out[0](attended[layers]).view(output.shape)
        return output


class Temporal:
    """Motion LoRAs on a temporal attention, each of whose four updates is an ordinary addition to the projection."""

    def __init__(self, adapted: Adapted, place: str, layer: Any) -> None:
        self.adapted, self.layer, self.parts = adapted, layer, adapted.parts("temporal", place)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, F, C]. In residual mode all weights sum to 1, the base's share among them, so one W_O serves all."""
        x = self.layer.pos_encoder(x)
        projected: dict[str, Tensor] = {}  # by the base, for all adapters
        if self.adapted.mode == WEIGHTS:
            return self._output([(1.0, self._attended(x, self.parts, projected), self.parts)])
        plain = [weight for weight, part in self.parts if part is None]
        share = self.adapted.share + sum(plain)
        own = [(weight, [(1.0, part)]) for weight, part in self.parts if part is not None]
        given = [*own, *([(share, [])] if share or not own else [])]
        return self._output([(weight, self._attended(x, parts, projected), parts) for weight, parts in given])

    def _attended(self, x: Tensor, parts: Parts, projected: dict[str, Tensor]) -> Tensor:
        for weight, part in parts:
            if part is not None and part.motion_embed is not None:
                x, projected = x + weight * self._embedding(part.motion_embed, x), {}

        def projection(name: str) -> Tensor:
            if name not in projected:
                projected[name] = getattr(self.layer, name)(x)
            return projected[name] + sum(weight * added(part, f"{name}_lora", x) for weight, part in parts)

        return self.layer.attend(*map(projection, ("to_q", "to_k", "to_v")))

    def _output(self, attended: list[tuple[float, Tensor, Parts]]) -> Tensor:
        """W_O of the weighted sum, plus each output LoRA on what its adapters attended to."""
        mixed = sum(share * o for share, o, _ in attended)
        y = self.layer.to_out[0](mixed)
        for share, o, parts in attended:
            for weight, part in parts:
                y = y + share * weight * added(part, "to_out_lora", o)
        return y

    def _embedding(self, embed: Any, x: Tensor) -> Tensor:
        frames, known = x.shape[1], len(embed.weight)
        if frames > known:
            raise ValueError(f"an adapter's motion embedding has {known} frames, this clip has {frames}")
        return embed(torch.arange(frames, device=x.device)).to(x)
