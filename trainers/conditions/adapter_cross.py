"""The cross-attention of motion adapters, beside patches of other nodes."""

import math
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.attention import attend
from ..core.transfer import to_device
from .adapter import Loras
from .adapter_positions import of_frames, rotated_queries, with_positions

MODES = RESIDUAL, WEIGHTS = ("residual", "weights")
WATCH = "kinoloom_attention"  # the name in transformer_options of what sees queries and keys
BESIDE = "model: I2V adapters cannot work beside a node that regroups the tokens of"

Keys = tuple[Tensor, Tensor]


class Cross:
    """CA-LoRAs of the Adapted at work on a block's cross-attention, each with its own prompt. The output LoRA acts on
    the layer's output, bias included: y = (I + s B A)(W_O o + b_O).

    If a patch of another node takes the layer's place, the difference between adapters and base is added to its output.
    """

    def __init__(self, adapted: Any, place: str, transformer: Any) -> None:
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
            ours = self._ours(*given, options=self.options)
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
            base: list[Tensor] = []
            ours: list[Tensor] = []
            if any(based):
                given = self._of(based, x, context, value, mask)
                base += self._clips(self.original(*given, transformer_options=transformer_options))
            if any(own):
                ours += self._clips(self._ours(*self._of(own, x, context, value), options=transformer_options))
        made = []
        for mine in own:
            y = ours.pop(0) if mine else base.pop(0)
            made.append(y + share * base.pop(0) if mine and share else y)
        return made[0] if len(made) == 1 else torch.cat(made)

    def _clips(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.adapted.frames)

    def _of(self, clips: list[bool], x: Tensor, *others: Tensor | None) -> list[Any]:
        """The rows of these clips, of x and of the others that have as many rows."""
        count = self.adapted.frames * len(clips)
        if x.shape[:2] != (expected := (count, math.prod(self.size))):
            found = (*x.shape[:2],)
            raise ValueError(f"{BESIDE} cross-attention, such as attention couple: found {found}, expected {expected}")

        def rows(part: Tensor | None) -> Tensor | None:
            if part is None or all(clips) or len(part) != count:
                return part
            return torch.cat([own for own, picked in zip(self._clips(part), clips, strict=True) if picked])

        return [rows(part) for part in (x, *others)]

    def _ours(self, x: Tensor, context: Tensor, value: Tensor | None, *, options: dict) -> Tensor:
        """The adapters' output for clips x [(B F), L, C] with the positive prompt."""
        adapted, watch = self.adapted, options.get(WATCH)
        x = x.unflatten(0, (-1, adapted.frames)).unflatten(2, self.size)  # B F h w C
        given = [(context if part is None else part)[:: adapted.frames] for part in (context, value)]
        numbers = range(len(self.parts))
        keys = [self._keys(number, *given) for number in numbers]
        settings = [one.adapter.query for one in adapted.playing]
        queries = {query: self._queries(x, query) for query in dict.fromkeys(settings)}
        together = [list(numbers)] if adapted.mode == WEIGHTS else [[number] for number in numbers]
        total = x.new_zeros(())
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


def added(part: Loras | None, name: str, x: Tensor) -> Tensor | float:
    return 0.0 if part is None else part.added(name, x)


def _to_size(y: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, F, h', w', C] to [(B F), L, C] with L = h w, by the nearest value."""
    y = y.flatten(0, 1)
    if y.shape[1:3] != size:
        y = nn.functional.interpolate(y.permute(0, 3, 1, 2), size, mode="nearest").permute(0, 2, 3, 1)
    return y.flatten(1, 2)
