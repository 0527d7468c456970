"""A word that the text encoder learns: one new row of its table of tokens (textual inversion, arXiv 2208.01618)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.config import TrainConfig, knob
from ..core.data import Batch

EMBEDDING = "embedding:"  # begins the name of an embedding in a prompt
KEY = "word"  # of the row in an adapter's file
WORD, TEXT = "kinoloom.word", "kinoloom.word_prompt"  # metadata of the word and of the prompt that it was learned in
NOT_IN_WORDS = "()\\,"  # of prompt weights, and of names of embeddings


class Encoder(Protocol):
    """A text encoder. `vectors` are those [1, 768] of `embedding:<name>` in a text, by name."""

    def tokens(self, text: str) -> list[int]: ...
    def sections(self, text: str, vectors: dict[str, Tensor]) -> list[list[Any]]: ...
    def row(self, text: str) -> Tensor: ...
    def encode(self, text: str, vectors: dict[str, Tensor]) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class WordConfig(TrainConfig):
    """Options of a recipe that can learn a word."""

    word_to_learn: str = knob(
        "",
        "A new word for what the clips have in common, such as clouds_new. It is trained with the rest, and saved as "
        "an embedding too. Needs clip. Empty: no word is learned.",
    )
    initializer_token: str = knob(
        "", "A known word that word_to_learn starts from, such as clouds. Of a longer text only the first token counts."
    )
    word_prompt: str = knob(
        "",
        "The prompt of all clips, with word_to_learn in it. It takes the place of captions, in samples too. Empty: the "
        "word alone.",
        advanced=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.word_to_learn:
            check_word(self.word_to_learn, self.initializer_token, self.word_prompt)
            return
        for name in ("initializer_token", "word_prompt"):
            if value := getattr(self, name):
                raise ValueError(f"{name}={value!r}: expected none, because word_to_learn is empty")

    def check_text_encoder(self, encoder: Encoder) -> None:
        """ValueError if the text encoder has the word already, or cannot take the other texts."""
        word, initializer = self.word_to_learn, self.initializer_token
        if len(encoder.tokens(word)) == 1:
            raise ValueError(
                f"word_to_learn={word!r}: a word that the text encoder knows, expected a new one such as "
                f"{word + '_new'!r}. Its learned vector would replace it in all prompts"
            )
        if not encoder.tokens(initializer):
            raise ValueError(f"initializer_token={initializer!r}: has no tokens, expected a known word")
        text = self.word_prompt or word
        sections = encoder.sections(put_names(text, [word]), {name_of(word): torch.zeros(1, 768)})
        if (count := len(sections)) > 1:
            raise ValueError(f"word_prompt={text!r}: {count} sections of 77 tokens, expected one")


def check_word(word: str, initializer: str, prompt: str) -> None:
    """ValueError unless a prompt can hold the word, and this one does ("" is the word alone)."""
    if re.search(r"\s", word):
        raise ValueError(f"word_to_learn={word!r}: expected one word without spaces")
    if bad := [character for character in NOT_IN_WORDS if character in word]:
        raise ValueError(f"word_to_learn={word!r}: expected a word without {bad[0]}, which has a meaning in prompts")
    if word.startswith(EMBEDDING):
        raise ValueError(f"word_to_learn={word!r}: expected a word, not the name of an embedding")
    if not initializer.strip():
        raise ValueError(
            f"initializer_token={initializer!r}: expected a known word that {word!r} starts from"
        )
    if EMBEDDING in prompt:
        raise ValueError(f"word_prompt={prompt!r}: expected text without {EMBEDDING}")
    if prompt and not words_of(prompt, [word]):
        raise ValueError(f"word_prompt={prompt!r}: expected {word!r}, which is word_to_learn, in it as a whole word")


def name_of(word: str) -> str:
    """The name under which a tokenizer finds a word's vector: no number, and no part of a prompt's syntax."""
    return f"kinoloom-word-{word.encode().hex()}"


def put_names(text: str, words: Iterable[str]) -> str:
    """The text with ` embedding:<name> ` in place of these words, whole and in the same case.

    Names of embeddings that are in the text already stay.
    """
    return _pattern(words).sub(lambda found: f" {EMBEDDING}{name_of(found[1])} " if found[1] else found[0], text)


def words_of(text: str, words: Iterable[str]) -> set[str]:
    """Those of the words that `put_names` would replace."""
    return {found[1] for found in _pattern(words).finditer(text) if found[1]}


def _pattern(words: Iterable[str]) -> re.Pattern:
    """Matches a name of an embedding, or one of the words as group 1, the longest first."""
    known = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"{EMBEDDING}\S*|(?<!\w)({known})(?!\w)" if known else r"(?!)()")


class LearnedWord(nn.Module):
    """The row of a new word, and the encoding of the prompt that it stands in. Only the row is a parameter."""

    def __init__(self, encoder: Encoder, config: WordConfig) -> None:
        super().__init__()
        self.word = config.word_to_learn
        self.text = config.word_prompt or self.word
        self.encoder = encoder
        self.row = nn.Parameter(encoder.row(config.initializer_token))

    def encode(self) -> Tensor:
        """The encoding [1, 77, 768] of the prompt, in fp32, with a gradient to the row."""
        return self.encoder.encode(put_names(self.text, [self.word]), {name_of(self.word): self.row})

    def instead_of_captions(self, batch: Batch) -> Batch:
        """A batch whose B clips have this prompt: [B, 77, 768], or [B, 1, 77, 768] where captions have variants."""
        captions, own = batch["prompt_embeds"], self.encode()
        own = own.view(*[1] * (captions.ndim - 2), *own.shape[1:]).expand(len(captions), *[-1] * (captions.ndim - 1))
        return {**{name: value for name, value in batch.items() if name != "prompt_length"}, "prompt_embeds": own}

    def metadata(self, trigger_words: str) -> dict[str, str]:
        """Metadata of a file that holds the row."""
        triggers = [self.word, *(word.strip() for word in trigger_words.split(","))]
        return {
            WORD: self.word,
            TEXT: self.text,
            "modelspec.trigger_phrase": ", ".join(dict.fromkeys(word for word in triggers if word)),
        }
