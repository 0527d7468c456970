"""Prompts with learned words, encoded without files of embeddings."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...trainers.conditions.word import name_of, put_names, words_of
from ...trainers.host.text import WIDTH, require_clip_l, with_vectors

Tokens = dict[str, list[list[tuple]]]


def tokenize(clip: Any, text: str, words: Mapping[str, Tensor]) -> Tokens:
    """The tokens of a prompt as a CLIP makes them, with the vectors [n, 768] of learned words in place of these words.

    A word is replaced where it stands whole and in the same case. ValueError if the text has a learned word and the
    CLIP is not Stable Diffusion 1.5's, or a vector has another width.
    """
    found = {word: words[word] for word in words_of(text, words)}
    if not found:
        return clip.tokenize(text)
    require_clip_l(clip)
    for word, vector in found.items():
        if vector.ndim != 2 or vector.shape[1] != WIDTH:
            raise ValueError(f"learned word {word!r}: a vector of shape {(*vector.shape,)}, expected [n, {WIDTH}]")
    own = clip.clone()
    own.tokenizer = with_vectors(clip.tokenizer, {name_of(word): vector for word, vector in found.items()})
    return own.tokenize(put_names(text, found))


def encode(clip: Any, text: str, words: Mapping[str, Tensor]) -> Tensor:
    """The encoding [1, 77 n, 768] of a prompt with learned words, as that of core's CLIP Text Encode.

    Prompt weights such as (word:1.2) and embeddings of files work beside them. Without a learned word in the text it is
    the plain encoding, of any CLIP.
    """
    return clip.encode_from_tokens(tokenize(clip, text, words))
