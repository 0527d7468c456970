"""Prompts with learned words: the encoding of core's `embedding:` syntax, without files."""

from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from kinoloom.lora_io.file import save
from kinoloom.nodes.adapters.words import encode, tokenize, word_places
from torch import Tensor
from toyworld.install import MODELS
from toyworld.pack import text_encoder as toy

from ..rows import random


@pytest.fixture(scope="module")
def clip(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory, words: dict[str, Tensor]) -> Any:
    """CLIP-L with the vectors of the words as embeddings: fog, rain and snow."""
    folder = tmp_path_factory.mktemp("embeddings")
    for word, vector in words.items():
        save(folder / f"{word.split('_')[0]}.safetensors", {word: vector})
    with torch.inference_mode():
        path = tiny_models / "text_encoders" / "tiny_clip.safetensors"
        return comfy.sd.load_clip([str(path)], embedding_directory=str(folder))


@pytest.fixture(scope="module")
def words() -> dict[str, Tensor]:
    shapes = {"fog_new": 1, "rain_new": 1, "snow_new": 2}
    return {word: random(count, 768, name=word) for word, count in shapes.items()}


@pytest.mark.parametrize(
    ("text", "of_files"),
    [
        ("fog_new", "embedding:fog"),
        ("a fog_new in the valley, slow", "a embedding:fog in the valley, slow"),
        ("(fog_new:1.3) over [hills]", "(embedding:fog:1.3) over [hills]"),
        ("a ((slow fog_new) rises:0.7), (rain_new)", "a ((slow embedding:fog ) rises:0.7), ( embedding:rain )"),
        ("fog_new, rain_new; Fog_new fog_newer", "embedding:fog, embedding:rain ; Fog_new fog_newer"),
        (r"\(fog_new\) rain_new.", r"\( embedding:fog \) embedding:rain ."),
        ("snow_new and embedding:rain, fog_new", "embedding:snow and embedding:rain, embedding:fog"),
        ("fog_new\nrain_new", "embedding:fog\n embedding:rain"),
        ("dust " * 73 + "fog_new rain_new more", "dust " * 73 + "embedding:fog embedding:rain more"),
        ("dust " * 60 + "snow_new " * 12 + "end", "dust " * 60 + "embedding:snow " * 12 + "end"),
    ],
)
def test_a_learned_word_is_encoded_as_its_embedding(
    text: str, of_files: str, clip: Any, words: dict[str, Tensor]
) -> None:
    with torch.inference_mode():
        ours, theirs = encode(clip, text, words), clip.encode_from_tokens(clip.tokenize(of_files))
        assert torch.equal(ours, theirs)
        assert not torch.allclose(ours[:, :77], clip.encode_from_tokens(clip.tokenize(text))[:, :77], atol=1e-2)


@pytest.mark.parametrize("text", ["", "a (fog:1.2)", "fog_newer, Fog_new", "embedding:fog fog"])
def test_without_a_learned_word_a_prompt_is_encoded_as_ever(text: str, clip: Any, words: dict[str, Tensor]) -> None:
    for given in (words, {}):
        ours, theirs = tokenize(clip, text, given), clip.tokenize(text)
        assert list(ours) == list(theirs)
        for a, b in zip(ours["l"][0], theirs["l"][0], strict=True):
            assert a[1] == b[1] and (torch.equal(a[0], b[0]) if isinstance(a[0], Tensor) else a[0] == b[0])


def test_a_text_encoder_or_a_vector_of_another_width_is_named(clip: Any, words: dict[str, Tensor]) -> None:
    other = toy.load(MODELS / "toy_text_encoder.safetensors")
    with pytest.raises(ValueError, match=r"^clip: _Model, expected the text encoder of Stable Diffusion 1.5 \(CLIP-L\)"):
        encode(other, "a fog_new", words)
    with torch.inference_mode():
        assert torch.equal(encode(other, "a fog", words), other.encode_from_tokens(other.tokenize("a fog")))
    with pytest.raises(ValueError, match=r"learned word 'fog_new': a vector of shape \(1, 1024\), expected \[n, 768\]"):
        encode(clip, "a fog_new", {"fog_new": torch.zeros(1, 1024)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("waterfall", ["waterfall"]),
        ("A Waterfall, (slow clouds:1.3)!", ["a", "waterfall", "slow", "clouds"]),
        ("supercalifragilistic fog_new, café 42", ["supercalifragilistic", "fog_new", "café", "4", "2"]),
        ("snow_new rain_new embedding:fog, sun", ["snow_new", "snow_new", "rain_new", "fog", "sun"]),
        ("", []),
        ("...", []),
    ],
)
def test_every_place_of_a_prompt_has_its_word(clip: Any, words: dict[str, Tensor], text: str, expected: list[str]) -> None:
    """A word of several tokens has several places, one after the other."""
    places = word_places(clip, text, words)
    assert len(places) == 77 and places[0] == ""
    pieces = [len(clip.tokenizer.clip_l.tokenizer(word)["input_ids"]) - 2 if word not in ("snow_new", "rain_new", "fog_new", "fog") else 1 for word in expected]
    assert [word for word in places if word] == [word for word, count in zip(expected, pieces, strict=True) for _ in range(count)]


def test_places_go_on_in_the_next_section(clip: Any, words: dict[str, Tensor]) -> None:
    places = word_places(clip, "dust " * 80 + "fog_new", words)
    assert len(places) == 154 == encode(clip, "dust " * 80 + "fog_new", words).shape[1]
    assert places.count("dust") == 80 and places[77] == "" and places.index("fog_new") == 78 + 5
