"""Prompts with learned words, encoded without files of embeddings, and which place of them is which word."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...trainers.conditions.word import EMBEDDING, name_of, put_names, words_of
from ...trainers.host.text import WIDTH, require_clip_l, with_vectors

END_OF_WORD = "</w>"  # ends the last token of a word in CLIP's vocabulary
Tokens = dict[str, list[list[tuple]]]


def tokenize(clip: Any, text: str, words: Mapping[str, Tensor], **options: Any) -> Tokens:
    """The tokens of a prompt as a CLIP makes them, with the vectors [n, 768] of learned words in place of these words.

    A word is replaced where it stands whole and in the same case. ValueError if the text has a learned word and the
    CLIP is not Stable Diffusion 1.5's, or a vector has another width.
    """
    found = {word: words[word] for word in words_of(text, words)}
    if not found:
        return clip.tokenize(text, **options)
    require_clip_l(clip)
    for word, vector in found.items():
        if vector.ndim != 2 or vector.shape[1] != WIDTH:
            raise ValueError(f"learned word {word!r}: a vector of shape {(*vector.shape,)}, expected [n, {WIDTH}]")
    own = clip.clone()
    own.tokenizer = with_vectors(clip.tokenizer, {name_of(word): vector for word, vector in found.items()})
    return own.tokenize(put_names(text, found), **options)


def encode(clip: Any, text: str, words: Mapping[str, Tensor]) -> Tensor:
    """The encoding [1, 77 n, 768] of a prompt with learned words, as that of core's CLIP Text Encode.

    Prompt weights such as (word:1.2) and embeddings of files work beside them. Without a learned word in the text it is
    the plain encoding, of any CLIP.
    """
    return clip.encode_from_tokens(tokenize(clip, text, words))


def word_places(clip: Any, text: str, words: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The word at each place of an encoded prompt: "" at start, end and padding, and where there is no letter or digit.

    An embedding is a word by its name. Without places for the tokenizer of another kind of model.
    """
    tokenizer = getattr(clip.tokenizer, getattr(clip.tokenizer, "clip", ""), None)
    if tokenizer is None:
        return ()
    learned = {name_of(word): word for word in words}
    names = re.findall(rf"{EMBEDDING}([^\s,]+)", put_names(text, words_of(text, words)))
    sections, = tokenize(clip, text, words, return_word_ids=True).values()
    places: list[str] = []
    pieces: list[int] = []  # of a word, the tokens so far
    vectors: dict[int, str] = {}
    for token, _, word in (token for section in sections for token in section):
        if isinstance(token, Tensor):
            if word not in vectors:
                name = names[len(vectors)] if len(vectors) < len(names) else EMBEDDING
                vectors[word] = learned.get(name, name)
            places.append(vectors[word])
            continue
        pieces.append(token)
        if tokenizer.inv_vocab[token].endswith(END_OF_WORD) or not word:
            name = tokenizer.tokenizer.decode(pieces).strip() if word else ""
            places += [name if any(map(str.isalnum, name)) else ""] * len(pieces)
            pieces = []
    return tuple(places)
