"""Runs motion adapters in a UNet and its motion modules, for training and for samplers: the base runs once.

With one adapter of weight 1 both modes are the forward that it was trained with.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.transfer import to_device
from .adapter import Adapter, Loras, spatial_transformers, temporal_attentions
from .adapter_positions import of_frames, rotated_queries, with_positions

MODES = RESIDUAL, WEIGHTS = ("residual", "weights")
WATCH = "kinoloom_attention"  # the name in transformer_options of what sees queries and keys
BESIDE = "model: I2V adapters cannot work beside a node that makes"
SMALLEST_SHARE = 1e-6  # of the base beside adapters whose weights sum to 1

Keys = tuple[Tensor, Tensor]
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

    residual: each adapter makes the output of a layer on its own, and they are averaged by their weights w; what is
    missing to a sum of 1 comes from the base. weights: low-rank updates are added by w, and one softmax runs over the
    tokens of all prompts. The I2V-Adapters' outputs are added by w in both. Adapters of weight 0 are left out.
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
        if output.shape != seen.shape:  # by ToMe or HyperTile
            raise ValueError(f"{BESIDE} self-attention run on {(*output.shape[:2],)} in place of {(*seen.shape[:2],)}")
        n = seen.unflatten(0, (-1, self.adapted.frames))  # clips F L C
        attended: dict[tuple, Tensor] = {}  # adapters that keep the base's projections share it
        for weight, part in self.parts:
            layers = tuple(getattr(part, name) or getattr(self.base, name) for name in ("to_q", "to_k", "to_v"))
            if layers not in attended:
                to_q, to_k, to_v = layers
                attended[layers] = attend(to_q(n.flatten(1, 2)), to_k(n[:, 0]), to_v(n[:, 0]), self.base.heads)
            output = output + weight * part.to_out[0](attended[layers]).view(output.shape)
        return output


class Cross:
    """CA-LoRAs on a block's cross-attention, each with its own prompt. The output LoRA acts on the layer's output, bias
    included: y = (I + s B A)(W_O o + b_O).

    If a patch of another node takes the layer's place, the difference between adapters and base is added to its output.
    """

    def __init__(self, adapted: Adapted, place: str, transformer: Any) -> None:
        self.adapted, self.place, self.base = adapted, place, transformer.transformer_blocks[0].attn2
        self.parts = adapted.parts("cross", place)
        self.original, self.within, self.size = self.base.forward, False, (0, 0)
        self.seen: dict[str, Tensor] = {}
        self.options: dict = {}
        adapted.hook(transformer.register_forward_pre_hook(self._measure, with_kwargs=True))
        adapted.replace(self.base, self.forward)
        for name in ("to_q", "to_k", "to_v"):
            layer = getattr(self.base, name)
            adapted.hook(layer.register_forward_pre_hook(lambda _, inputs, name=name: self._see(name, inputs)))
        adapted.hook(self.base.to_out.register_forward_hook(self._add))

    @contextmanager
    def inside(self) -> Any:
        self.within = True
        try:
            yield
        finally:
            self.within = False

    def _measure(self, transformer: nn.Module, inputs: tuple, given: dict) -> None:
        self.size = inputs[0].shape[-2:]
        self.options = given["transformer_options"] if "transformer_options" in given else inputs[2]

    def _see(self, name: str, inputs: tuple) -> None:
        if not self.within:
            self.seen[name] = inputs[0]

    def _add(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        """Only where a patch calls the layer's projections itself."""
        own = self.adapted.positive
        if self.within or not any(own):
            return None
        given = self._of(own, *(self.seen.pop(name) for name in ("to_q", "to_k", "to_v")))
        with self.inside():
            ours = self._ours(*given, self.options)
            added = ours + (self.adapted.share - 1) * self.original(*given, transformer_options=self.options)
        each = iter(added.split(self.adapted.frames))
        return torch.cat([y + next(each) if mine else y for y, mine in zip(self._clips(output), own, strict=True)])

    def forward(
        self, x: Tensor, context: Tensor, value: Tensor | None = None, mask: Tensor | None = None, *,
        transformer_options: dict,
    ) -> Tensor:  # fmt: skip
        """x [(clips F), L, C], context [(clips F), n, D]."""
        own, share = self.adapted.positive, self.adapted.share
        based = [bool(share) or not mine for mine in own]
        with self.inside():
            ours = base = iter(())
            if any(based):
                given = self._of(based, x, context, value, mask)
                base = iter(self._clips(self.original(*given, transformer_options=transformer_options)))
            if any(own):
                ours = iter(self._clips(self._ours(*self._of(own, x, context, value), transformer_options)))
        made = [
            (next(ours) + share * next(base) if share else next(ours)) if mine else next(base) for mine in own
        ]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _clips(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.adapted.frames)

    def _of(self, clips: list[bool], x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
        """The rows of these clips, of x and of the others that have as many rows."""
        count = self.adapted.frames * len(clips)
        if x.shape[:2] != (count, math.prod(self.size)):  # by attention couple
            expected = (count, math.prod(self.size))
            raise ValueError(f"{BESIDE} cross-attention run on {(*x.shape[:2],)} in place of {expected}")

        def rows(part: Tensor | None) -> Tensor | None:
            if part is None or all(clips) or len(part) != count:
                return part
            return torch.cat([own for own, picked in zip(self._clips(part), clips, strict=True) if picked])

        return [rows(part) for part in (x, *others)]

    def _ours(self, x: Tensor, context: Tensor, value: Tensor | None, options: dict) -> Tensor:
        """The adapters' output for clips x [(B F), L, C] with the positive prompt."""
        adapted, watch = self.adapted, options.get(WATCH)
        x = x.unflatten(0, (-1, adapted.frames)).unflatten(2, self.size)  # B F h w C
        given = [(context if part is None else part)[:: adapted.frames] for part in (context, value)]
        numbers = range(len(self.parts))
        keys = [self._keys(number, *given) for number in numbers]
        settings = [one.adapter.query for one in adapted.playing]
        queries = {query: self._queries(x, query) for query in dict.fromkeys(settings)}
        together = [list(numbers)] if adapted.mode == WEIGHTS else [[number] for number in numbers]
        total: Tensor | float = 0.0
        for group in together:  # of adapters that share a softmax
            q = queries[settings[group[0]]]
            if watch:
                watch(self, q, {adapted.numbers[number]: keys[number][0] for number in group}, options)
            k, v = (torch.cat(each, dim=1) for each in zip(*(keys[number] for number in group), strict=True))
            y = self.base.to_out(attend(q.flatten(1, 3), k, v, self.base.heads)).view(q.shape)
            total = total + self._scaled_out(y, group)
        return total

    def _scaled_out(self, y: Tensor, group: list[int]) -> Tensor:
        """The output LoRAs, on y = W_O o + b_O [B, F, h', w', C], of adapters that share a softmax."""
        residual = self.adapted.mode != WEIGHTS
        for number in group:
            weight, part = self.parts[number]
            update = added(part, "to_out_lora", y)
            y = weight * (y + update) if residual else y + weight * update
        return _to_size(y, self.size)

    def _queries(self, x: Tensor, query: Any) -> Tensor:
        """[B, F, h', w', C]: all adapters of a mode share the sum of their query LoRAs."""
        batch, frames, height, width, channels = x.shape
        if query.stride > 1:
            small = (max(height // query.stride, 1), max(width // query.stride, 1))
            planes = x.flatten(0, 1).permute(0, 3, 1, 2)
            x = nn.functional.interpolate(planes, small, mode="nearest").permute(0, 2, 3, 1)
            x = x.unflatten(0, (batch, frames))
        x = with_positions(query.positions, x)
        q = self.base.to_q(x)
        for weight, part in self.parts:
            q = q + weight * added(part, "to_q_lora", x)
        return rotated_queries(query.positions, q)

    def _keys(self, number: int, context: Tensor, value: Tensor) -> Keys:
        """Keys and values [B, n, C] of an adapter's prompt; in weights mode with its LoRA by its weight.

        An adapter without a prompt takes those of the sampler, which patches of other nodes may have changed.
        """
        one, (weight, part), batch = self.adapted.playing[number], self.parts[number], len(context)
        cache = self.adapted.cache if one.prompt is not None else None
        kept = self.place, number, self.adapted.frames
        if cache is not None and kept in cache:
            k, v = cache[kept]
        else:
            if one.prompt is not None:
                context = value = to_device(one.prompt, context.device, context.dtype)
            scale = weight if self.adapted.mode == WEIGHTS else 1.0
            k = self.base.to_k(context) + scale * added(part, "to_k_lora", context)
            v = self.base.to_v(value) + scale * added(part, "to_v_lora", value)
            k, v = of_frames(one.adapter.query.positions, k, v, self.adapted.frames)
            if cache is not None:
                cache[kept] = k, v
        return k.expand(batch, -1, -1), v.expand(batch, -1, -1)


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
                x, projected = x + weight * self._embedding(part, x), {}

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

    def _embedding(self, part: Loras, x: Tensor) -> Tensor:
        frames, known = x.shape[1], part.embedded_frames or 0
        if frames > known:
            raise ValueError(f"an adapter's motion embedding has {known} frames, this clip has {frames}")
        return part.motion_embed(torch.arange(frames, device=x.device)).to(x)


def added(part: Loras | None, name: str, x: Tensor) -> Tensor | float:
    return 0.0 if part is None else part.added(name, x)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention for q [N, L, C] and k, v [N, M, C]: [N, L, C]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def _to_size(y: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, F, h', w', C] to [(B F), L, C] with L = h w, by the nearest value."""
    y = y.flatten(0, 1)
    if y.shape[1:3] != size:
        y = nn.functional.interpolate(y.permute(0, 3, 1, 2), size, mode="nearest").permute(0, 2, 3, 1)
    return y.flatten(1, 2)
