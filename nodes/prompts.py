"""Captions to text encodings, with variants that miss random tokens."""

from typing import Any

import torch
from torch import Tensor

from ..trainers.core.noise import derived_generator

TOKEN_MASK_PROB = 0.1
Tokens = dict[str, list[list[tuple]]]  # encoder -> sections of (token id or embedding, weight), as CLIP.tokenize gives


def encode_prompt(clip: Any, caption: str, variants: int) -> dict[str, Tensor]:
    """Encodings [1 + variants, n, D] of the caption and of variants without some of its tokens, zero tail cut off.

    Tokens are dropped before the encoder, so what remains has to carry the meaning (Set-and-Sequence 3.4.3).
    """
    empty = clip.tokenize("")
    clean = clip.tokenize(caption)
    end = end_token(clean, empty)
    rng = derived_generator("token variants", caption, TOKEN_MASK_PROB)
    prompts = [clean] + [drop_tokens(clean, empty, TOKEN_MASK_PROB, rng) for _ in range(variants)]
    encoded = torch.cat([clip.encode_from_tokens(tokens).float().cpu() for tokens in prompts])
    used = encoded.abs().amax(dim=(0, 2)).nonzero()
    return {
        "prompt_embeds": encoded[:, : int(used.max()) + 1],
        "prompt_length": torch.tensor(encoded.shape[1]),
        "prompt_tokens": torch.tensor([count_tokens(tokens, end) for tokens in prompts]),
        "token_mask_prob": torch.tensor(TOKEN_MASK_PROB if variants else 0.0),
    }


def drop_tokens(tokens: Tokens, empty: Tokens, probability: float, rng: torch.Generator) -> Tokens:
    """Leave out each token with `probability`, never start, end or padding, and pad each section to its old length."""
    dropped = {}
    for encoder, sections in tokens.items():
        special = _special(empty[encoder])
        padding = empty[encoder][-1][-1]
        dropped[encoder] = []
        for section in sections:
            draws = torch.rand(len(section), generator=rng).tolist()
            kept = [
                token
                for token, draw in zip(section, draws, strict=True)
                if _is_special(token, special) or draw >= probability
            ]
            dropped[encoder].append(kept + [padding] * (len(section) - len(kept)))
    return dropped


def count_tokens(tokens: Tokens, end: int | None) -> int:
    """Tokens up to and including the end token of each section, of the first encoder."""
    total = 0
    for section in next(iter(tokens.values())):
        ends = [place for place, token in enumerate(section) if _is_special(token, {end})]
        total += ends[0] + 1 if ends else len(section)
    return total


def end_token(clean: Tokens, empty: Tokens) -> int | None:
    """What follows the last word; padding is more of it (CLIP), or another token (T5). None if nothing follows."""
    encoder = next(iter(clean))
    special = _special(empty[encoder])
    section = clean[encoder][-1]
    words = [place for place, token in enumerate(section) if not _is_special(token, special)]
    after = max(words, default=-1) + 1
    return section[after][0] if after < len(section) else None


def _special(sections: list[list[tuple]]) -> set[int]:
    return {token[0] for section in sections for token in section}


def _is_special(token: tuple, special: set[int | None]) -> bool:
    return isinstance(token[0], int) and token[0] in special
