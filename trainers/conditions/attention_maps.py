"""Which words of its prompt an adapter looks at, where and in which frame: recorded while a sampler runs."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

LEVELS = {"low": 2, "middle": 1, "high": 0}  # how often the UNet has halved the size there
# The layer in the middle of the UNet is left out, as in the original.
BLOCKS = {
    "down_blocks.0": "high", "down_blocks.1": "middle", "down_blocks.2": "low",
    "up_blocks.1": "low", "up_blocks.2": "middle", "up_blocks.3": "high",
}  # fmt: skip
MOST_BYTES = 512 << 20
LARGEST_PART = 1 << 24  # entries of a softmax at a time

Words = tuple[str, ...]
Kept = tuple[int, str, tuple[int, ...]]  # the number of an adapter, a level, and the grid of its queries


class AttentionMaps:
    """Attention to each word, the mean over heads, layers and steps. `words`: for each adapter, by number, the word at
    each place of its prompt, "" where there is none.

    The maps of all runs of a sampler but the last are forgotten. An adapter without words is not recorded.
    """

    def __init__(self, words: Sequence[Words]) -> None:
        self.words = [tuple(own) for own in words]
        self.places = [[place for place, word in enumerate(own) if word] for own in words]
        self.start(0, 0, 0)

    def start(self, frames: int, height: int, width: int) -> None:
        """Forget everything, for a video of latents [F, h, w]. ValueError if its maps do not fit into memory."""
        columns = sum(map(len, self.places))
        size = sum(4 * columns * frames * (height >> level) * (width >> level) for level in LEVELS.values())
        if size > MOST_BYTES:
            raise ValueError(
                f"attention maps of {columns} words in {frames} frames of {width}x{height} latents have "
                f"{size >> 20} MiB, expected at most {MOST_BYTES >> 20}. Make the video smaller or shorter, or the "
                "adapters' prompts shorter"
            )
        self.frames = frames
        self.sums: dict[Kept, Tensor] = {}  # [F, h', w', columns]
        self.counts: dict[Kept, Tensor] = {}  # [F], of layers and steps

    @torch.no_grad()
    def see(self, site: Any, q: Tensor, keys: dict[int, Tensor], options: dict[str, Any]) -> None:
        """A layer's queries [B, F, h', w', C], and the keys [B, n, C] of the adapters that share its softmax."""
        level, recorded = BLOCKS.get(".".join(site.place.split(".")[:2])), [n for n in keys if self.places[n]]
        if level is None or not recorded:
            return
        frames, grid = frames_of(options.get("context_window"), q.shape[1]), tuple(q.shape[2:4])
        parts = shares(q.flatten(1, 3), torch.cat(list(keys.values()), dim=1), site.base.heads)
        found: dict[int, list[Tensor]] = {number: [] for number in recorded}
        for part in parts:
            split = part.split([k.shape[1] for k in keys.values()], dim=1)
            own = dict(zip(keys, split, strict=True))
            for number in recorded:
                found[number].append(self._words(own[number], number))
        for number, pieces in found.items():
            made = torch.cat(pieces).unflatten(0, (len(frames), *grid)).cpu()
            kept = number, level, grid
            if kept not in self.sums:
                self.sums[kept] = torch.zeros(self.frames, *made.shape[1:])
                self.counts[kept] = torch.zeros(self.frames)
            self.sums[kept].index_add_(0, frames, made)
            self.counts[kept].index_add_(0, frames, torch.ones(len(frames)))

    def _words(self, part: Tensor, number: int) -> Tensor:
        """Of an adapter's shares [l, n] those of its words. Of keys that are repeated for each frame, their sum."""
        return part.unflatten(1, (-1, len(self.words[number]))).sum(1)[:, self.places[number]]

    def of_word(self, number: int, word: str, level: str, size: tuple[int, int]) -> Tensor | None:
        """Attention [F, H, W] to a word, wherever the prompt has it, at that size. None if nothing was recorded."""
        columns = [column for column, place in enumerate(self.places[number]) if self.words[number][place] == word]
        kept = [key for key in self.sums if key[:2] == (number, level)]
        if not kept or not columns:
            return None
        sums = [self.sums[key][..., columns].sum(-1, keepdim=True).movedim(-1, 1) for key in kept]
        total = [torch.nn.functional.interpolate(own, size, mode="nearest-exact")[:, 0] for own in sums]
        counts = torch.stack([self.counts[key] for key in kept]).sum(0)
        return torch.stack(total).sum(0) / counts.view(-1, 1, 1)

    def words_of(self, number: int) -> list[str]:
        """The words of an adapter's prompt, each once, in order."""
        return list(dict.fromkeys(self.words[number][place] for place in self.places[number]))


def frames_of(window: Any, frames: int) -> Tensor:
    """The numbers of the frames that a UNet sees. A context window may have the first frame in front of its own."""
    own = list(range(frames)) if window is None else list(window.index_list)
    return torch.tensor([0] * (frames - len(own)) + own)


def shares(q: Tensor, k: Tensor, heads: int) -> Iterator[Tensor]:
    """softmax(q k^T / sqrt(d)) of queries [B, L, C] over keys [B, M, C], the mean over B and heads: parts [l, M]."""
    q, k = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    for part in q.split(max(1, LARGEST_PART // k[..., 0].numel()), dim=2):
        yield (part @ k.transpose(-1, -2) * part.shape[-1] ** -0.5).softmax(-1).mean(dim=(0, 1))
