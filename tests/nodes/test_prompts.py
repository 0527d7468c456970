"""Captions with dropped tokens, encoded by core's own text encoder classes."""

from typing import Any

import pytest
import torch
from comfy import sd1_clip
from comfy.text_encoders.t5 import T5
from kinoloom.nodes.data.encoding.prompts import count_tokens, drop_tokens, encode_prompt, end_token

LENGTH = 32
START, END = 49406, 49407


class TinyT5:
    """core's T5 encoder as Wan has it (end token 1, padding 0, masked rows zero), made tiny; a word is a token."""

    def __init__(self) -> None:
        config = {
            "d_ff": 32,
            "d_kv": 8,
            "d_model": 16,
            "dense_act_fn": "gelu_pytorch_tanh",
            "is_gated_act": True,
            "model_type": "umt5",
            "num_heads": 2,
            "num_layers": 2,
            "vocab_size": 256,
        }
        self.model = sd1_clip.SDClipModel(
            textmodel_json_config=config,
            model_class=T5,
            dtype=torch.float32,
            special_tokens={"end": 1, "pad": 0},
            enable_attention_masks=True,
            zero_out_masked=True,
        )
        rng = torch.Generator().manual_seed(0)
        for weight in self.model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3, generator=rng)
            else:
                torch.nn.init.ones_(weight)

    def tokenize(self, text: str) -> dict[str, list[list[tuple[int, float]]]]:
        ids = [2 + sum(word.encode()) % 250 for word in text.split()] + [1]
        return {"umt5xxl": [[(token, 1.0) for token in ids + [0] * (LENGTH - len(ids))]]}

    def encode_from_tokens(self, tokens: dict[str, Any]) -> torch.Tensor:
        return self.model.encode_token_weights(tokens["umt5xxl"])[0]


@pytest.fixture(scope="module")
def clip() -> TinyT5:
    return TinyT5()


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


def ids(tokens: dict[str, Any]) -> list[list[int]]:
    return [[token[0] for token in section] for section in next(iter(tokens.values()))]


def test_clean_caption_comes_first_and_masked_tail_is_cut(clip: TinyT5) -> None:
    made = encode_prompt(clip, words(10), 4)
    full = clip.encode_from_tokens(clip.tokenize(words(10)))[0]
    assert made["prompt_embeds"].shape == (5, 11, 16)
    assert torch.equal(made["prompt_embeds"][0], full[:11]) and full[11:].abs().max() == 0
    assert int(made["prompt_length"]) == LENGTH
    assert made["prompt_tokens"][0] == 11
    assert made["token_mask_prob"].dtype == torch.float32 and float(made["token_mask_prob"]) == pytest.approx(0.1)


def test_rows_are_visible_up_to_the_end_token_of_each_variant(clip: TinyT5) -> None:
    made = encode_prompt(clip, words(12), 12)
    counts = (made["prompt_embeds"].abs().amax(-1) > 0).sum(1)
    assert torch.equal(counts, made["prompt_tokens"])
    assert made["prompt_tokens"].min() < 13


def test_without_variants_there_is_the_caption_only(clip: TinyT5) -> None:
    made = encode_prompt(clip, "one two", 0)
    assert made["prompt_embeds"].shape == (1, 3, 16) and float(made["token_mask_prob"]) == 0


def test_variants_depend_on_the_caption_only(clip: TinyT5) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = encode_prompt(clip, words(20), 3)["prompt_embeds"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(encode_prompt(clip, words(20), 3)["prompt_embeds"], first)
    assert not torch.equal(first[1], first[2])


def test_a_tenth_of_the_tokens_is_dropped(clip: TinyT5) -> None:
    clean, empty, rng = clip.tokenize(words(30)), clip.tokenize(""), torch.Generator().manual_seed(0)
    counts = torch.tensor([count_tokens(drop_tokens(clean, empty, 0.1, rng), 1) for _ in range(400)])
    sigma = (0.1 * 0.9 / (30 * 400)) ** 0.5
    assert 1 - (counts - 1).float().mean() / 30 == pytest.approx(0.1, abs=4 * sigma)


def test_dropping_keeps_order_length_and_end_token(clip: TinyT5) -> None:
    clean, empty, rng = clip.tokenize(words(20)), clip.tokenize(""), torch.Generator().manual_seed(0)
    for probability in (0.0, 0.5, 1.0):
        dropped = ids(drop_tokens(clean, empty, probability, rng))[0]
        assert len(dropped) == LENGTH
        kept = [token for token in dropped if token > 1]
        assert dropped == kept + [1] + [0] * (LENGTH - len(kept) - 1)
        remaining = iter(ids(clean)[0])
        assert all(token in remaining for token in kept)
    assert ids(drop_tokens(clean, empty, 0.0, rng)) == ids(clean)


def clip_l(*sections: list[int]) -> dict[str, Any]:
    """Tokens as CLIP-L has them: padded with the end token."""
    padded = [[START, *section] + [END] * (9 - len(section)) for section in sections]
    return {"l": [[(token, 1.0) for token in section] for section in padded]}


def test_clip_l_sections_keep_start_and_end() -> None:
    clean, empty = clip_l([5, 6, 7, 8, 9, 10, 11, 12], [5, 6]), clip_l([])
    assert end_token(clean, empty) == END
    assert count_tokens(clean, END) == 10 + 4
    gone = drop_tokens(clean, empty, 1.0, torch.Generator())
    assert ids(gone) == [[START] + [END] * 9] * 2 and count_tokens(gone, END) == 4


def test_embeddings_in_a_caption_are_tokens() -> None:
    clean, empty = clip_l([5]), clip_l([])
    clean["l"][0][1] = (torch.ones(4), 1.0)
    assert count_tokens(clean, end_token(clean, empty)) == 3
    assert ids(drop_tokens(clean, empty, 1.0, torch.Generator())) == [[START] + [END] * 9]
