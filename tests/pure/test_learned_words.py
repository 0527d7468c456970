"""Words that are learned: which are taken, and where they stand in a prompt."""

import re
from typing import Any

import pytest
from kinoloom.trainers.conditions.word import WordConfig, name_of, put_names, words_of

WORDS = ("clouds_new", "clouds", "<sks>", "night-clouds", "Wolken", "é")


def put(text: str, *words: str) -> list[str]:
    """The text with each replaced word as {word}, without the spaces around it."""
    names = {f"embedding:{name_of(word)}": "{" + word + "}" for word in WORDS}
    found = put_names(text, words or WORDS)
    for name, word in names.items():
        found = found.replace(name, word)
    return found.split()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clouds_new", ["{clouds_new}"]),
        ("clouds clouds_new.", ["{clouds}", "{clouds_new}", "."]),
        ("a (clouds_new:1.2) sky", ["a", "(", "{clouds_new}", ":1.2)", "sky"]),
        ("night-clouds, clouds", ["{night-clouds}", ",", "{clouds}"]),
        ("cloudsy clouds_newer xclouds Clouds CLOUDS wolken", ["cloudsy", "clouds_newer", "xclouds", "Clouds", "CLOUDS", "wolken"]),
        ("<sks>clouds", ["<sks>", "{clouds}"]),
        ("é clouds's", ["{é}", "{clouds}", "'s"]),
        ("embedding:clouds and embedding:x/clouds.pt clouds", ["embedding:clouds", "and", "embedding:x/clouds.pt", "{clouds}"]),
        ("", []),
    ],
)  # fmt: skip
def test_a_word_is_replaced_where_it_stands_whole(text: str, expected: list[str]) -> None:
    assert put(text) == expected
    assert {f"{{{word}}}" for word in words_of(text, WORDS)} == {word for word in expected if word.startswith("{")}


def test_without_words_a_prompt_stays_as_it_is() -> None:
    assert put_names("a (b:1.2) embedding:c", []) == "a (b:1.2) embedding:c"
    assert words_of("a", []) == set()


@pytest.mark.parametrize("word", [*WORDS, "7", "1e5", "nan", "inf"])
def test_a_name_is_no_number_which_brackets_would_take_as_a_weight(word: str) -> None:
    assert re.fullmatch(r"[\w-]+", name_of(word), re.ASCII)
    with pytest.raises(ValueError, match="could not convert"):
        float(name_of(word))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"word_to_learn": "new clouds", "initializer_token": "clouds"}, "word_to_learn='new clouds': expected one word"),
        ({"word_to_learn": "\t", "initializer_token": "clouds"}, "word_to_learn='\\t': expected one word"),
        ({"word_to_learn": "x(y", "initializer_token": "clouds"}, "word_to_learn='x(y': expected a word without ("),
        ({"word_to_learn": "x,y", "initializer_token": "clouds"}, "word_to_learn='x,y': expected a word without ,"),
        ({"word_to_learn": "embedding:x", "initializer_token": "clouds"}, "word_to_learn='embedding:x': expected a word"),
        ({"word_to_learn": "fog_x"}, "initializer_token='': expected a known word that 'fog_x' starts from"),
        ({"word_to_learn": "fog_x", "initializer_token": "  "}, "initializer_token='  ': expected a known word"),
        (
            {"word_to_learn": "fog_x", "initializer_token": "fog", "word_prompt": "a foggy fog_xy, Fog_x"},
            "word_prompt='a foggy fog_xy, Fog_x': expected 'fog_x', which is word_to_learn, in it",
        ),
        (
            {"word_to_learn": "fog_x", "initializer_token": "fog", "word_prompt": "fog_x embedding:a"},
            "word_prompt='fog_x embedding:a': expected text without embedding:",
        ),
        ({"initializer_token": "fog"}, "initializer_token='fog': expected none, because word_to_learn is empty"),
        ({"word_prompt": "fog"}, "word_prompt='fog': expected none, because word_to_learn is empty"),
    ],
)  # fmt: skip
def test_words_that_cannot_be_learned_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        WordConfig(**options)


@pytest.mark.parametrize("prompt", ["", "fog_x", "a (fog_x) in the (valley)", "fog_x, fog_x"])
def test_words_that_can_be_learned(prompt: str) -> None:
    assert WordConfig(word_to_learn="fog_x", initializer_token="fog", word_prompt=prompt).word_to_learn == "fog_x"
