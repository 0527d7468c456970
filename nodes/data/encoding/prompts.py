"""Encodes captions and prompts, also as variants with random tokens dropped."""

import hashlib
import math
import re
from typing import Any

import torch
from comfy.sd1_clip import escape_important, token_weights, unescape_important
from torch import Tensor

from ....trainers.core.rng import derived_generator

TOKEN_MASK_PROB = 0.1
LONGEST_TEXT, MOST_TOKENS = 10_000, 1024  # characters; Wan was trained with 512 tokens
EMBEDDING = re.compile(r"(?:^|(?<=\s))embedding:\S*")  # embeddings as ComfyUI's tokenizers find them
Tokens = dict[str, list[list[tuple]]]  # encoder -> sections of (token id or embedding, weight), from CLIP.tokenize


def tokenize(text_encoder: Any, text: str, *, literal: bool, name: str = "caption") -> Tokens:
    """Tokens of a text. ValueError names `name` and the text if it is too long or malformed.

    A literal text has no prompt weights: (word:1.2) is plain text.
    """
    try:
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"has {len(text)} characters, expected at most {LONGEST_TEXT}")
        written = escape(text) if literal else text
        tokens = text_encoder.tokenize(written)
        _require_embeddings(text_encoder, written)
        for sections in tokens.values():
            _require_usable([token for section in sections for token in section])
        return tokens
    except RecursionError as error:
        raise ValueError(f"{name} {shown(text)}: brackets are nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{name} {shown(text)}: {error}") from error


def escape(text: str) -> str:
    r"""The text with its brackets escaped as \( and \). Brackets that are already escaped stay as they are."""
    return re.sub(r"(?<!\\)[()]", r"\\\g<0>", text)


def shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


def describe(tokens: Tokens) -> str:
    """Hash of the tokens, their weights, and the values of embeddings among them."""
    digest = hashlib.sha256()
    for encoder, sections in tokens.items():
        for section in sections:
            digest.update(f"{encoder} {len(section)}".encode())
            for token, weight, *_ in section:
                value = token.float().cpu().numpy().tobytes() if isinstance(token, Tensor) else str(token).encode()
                digest.update(value + f" {weight} ".encode())
    return digest.hexdigest()


def _require_embeddings(text_encoder: Any, written: str) -> None:
    """ValueError names a missing embedding, which ComfyUI's tokenizers would ignore."""
    for segment, _ in token_weights(escape_important(written), 1.0):
        for word in EMBEDDING.findall(segment):
            tokens = text_encoder.tokenize(word)
            found = (token[0] for sections in tokens.values() for section in sections for token in section)
            if not any(isinstance(token, Tensor) for token in found):
                name = unescape_important(word)
                raise ValueError(f"{name} is not in models/embeddings: expected the name of an embedding")


def _require_usable(tokens: list[tuple]) -> None:
    if len(tokens) > MOST_TOKENS:
        raise ValueError(f"has {len(tokens)} tokens, expected at most {MOST_TOKENS}")
    if bad := [weight for _, weight, *_ in tokens if not math.isfinite(weight)]:
        raise ValueError(f"has the prompt weight {bad[0]}, expected a finite number")


def encode_prompt(text_encoder: Any, caption: str, variants: int, *, literal: bool = True) -> dict[str, Tensor]:
    """Encodings [1 + variants, n, D] of a caption and of variants with dropped tokens. Padding zeros are cut off.

    Tokens are dropped before the encoder, so the others have to carry the meaning (Set-and-Sequence 3.4.3).
    """
    empty = text_encoder.tokenize("")
    clean = tokenize(text_encoder, caption, literal=literal)
    end = end_token(clean, empty)
    rng = derived_generator("token variants", caption, TOKEN_MASK_PROB)
    prompts = [clean] + [drop_tokens(clean, empty, TOKEN_MASK_PROB, rng) for _ in range(variants)]
    encoded = torch.cat([text_encoder.encode_from_tokens(tokens).float().cpu() for tokens in prompts])
    used = encoded.abs().amax(dim=(0, 2)).nonzero()
    return {
        "prompt_embeds": encoded[:, : int(used.max()) + 1],
        "prompt_length": torch.tensor(encoded.shape[1]),
        "prompt_tokens": torch.tensor([count_tokens(tokens, end) for tokens in prompts]),
        "token_mask_prob": torch.tensor(TOKEN_MASK_PROB if variants else 0.0),
    }


def drop_tokens(tokens: Tokens, empty: Tokens, probability: float, rng: torch.Generator) -> Tokens:
    """Drop each token with `probability`, except start, end and padding, and pad sections to their old length."""
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
    """The first encoder's number of tokens, up to and including each section's end token."""
    total = 0
    for section in next(iter(tokens.values())):
        ends = [place for place, token in enumerate(section) if _is_special(token, {end})]
        total += ends[0] + 1 if ends else len(section)
    return total


def end_token(clean: Tokens, empty: Tokens) -> int | None:
    """The token after the last word, or None. Padding repeats it (CLIP) or is another token (T5)."""
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
