"""The toy world's text encoder: Wan's UMT5 architecture in ComfyUI's own classes, two layers and a vocabulary of words."""

import re
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.t5
import comfy.utils

WIDTH, LENGTH = 128, 24  # the width of an encoding, and the tokens that a prompt is padded to
RARE = tuple(f"[{letter}]" for letter in string.ascii_lowercase)  # words without meaning; [u] and [v] are never trained
WORDS = (
    "<pad> <end> <unknown> . a an the and at by in it is on of to left right up down circle moves moving spins grows "
    "stands still thing small big red yellow green cyan blue purple disc square triangle cross ring bar striped spotted "
    "meadow desert night snow sea room"
).split()  # fmt: skip
VOCABULARY = {word: index for index, word in enumerate((*WORDS, *RARE))}
PAD, END, UNKNOWN = 0, 1, 2
CONFIG = {
    "d_model": WIDTH,
    "d_ff": 256,
    "d_kv": 32,
    "num_heads": 4,
    "num_layers": 2,
    "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True,
    "model_type": "umt5",
    "vocab_size": len(VOCABULARY),
}


class WordTokenizer:
    """Words of the vocabulary to their numbers; ComfyUI's SDTokenizer does the rest (weights, padding)."""

    @classmethod
    def from_pretrained(cls, path: str, **_: Any) -> "WordTokenizer":
        return cls()

    def __call__(self, text: str) -> dict[str, list[int]]:
        words = re.findall(r"\[\w\]|\w+|\.", text.lower())
        return {"input_ids": [VOCABULARY.get(word, UNKNOWN) for word in words] + [END]}

    def get_vocab(self) -> dict[str, int]:
        return VOCABULARY


class _Tokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> None:
        super().__init__(
            "toyworld", embedding_directory=embedding_directory, embedding_size=WIDTH, embedding_key="toyworld",
            tokenizer_class=WordTokenizer, has_start_token=False, pad_with_end=False, pad_to_max_length=False,
            max_length=512, min_length=LENGTH, pad_token=PAD, tokenizer_data=tokenizer_data or {},
        )  # fmt: skip


class ToyTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, clip_name="toyworld", tokenizer=_Tokenizer)


class ToyEncoder(comfy.sd1_clip.SDClipModel):
    """Padding's rows are zero, as Wan's are."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        super().__init__(
            device=device, dtype=dtype, textmodel_json_config=dict(CONFIG), special_tokens={"end": END, "pad": PAD},
            model_class=comfy.text_encoders.t5.T5, enable_attention_masks=True, zero_out_masked=True,
            model_options=model_options or {},
        )  # fmt: skip


class _Model(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        super().__init__(device, dtype, model_options or {}, clip_name="toyworld", clip_model=ToyEncoder)


def load(path: str | Path) -> comfy.sd.CLIP:
    """The text encoder in `path` as a CLIP, which ComfyUI's text nodes take."""
    target = SimpleNamespace(params={}, clip=_Model, tokenizer=ToyTokenizer)
    return comfy.sd.CLIP(target, state_dict=[comfy.utils.load_torch_file(str(path), safe_load=True)])


def tokenize(captions: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Token numbers padded to 24, and 1 where a token is, 0 where padding; for training without the CLIP around it."""
    rows = [WordTokenizer()(caption)["input_ids"] for caption in captions]
    padded = [row + [PAD] * (LENGTH - len(row)) for row in rows]
    return padded, [[int(token != PAD) for token in row] for row in padded]
