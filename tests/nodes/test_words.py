"""The page knows all of the server's words and no others."""

import re
from pathlib import Path

import pytest
from kinoloom.nodes.training.words import words
from kinoloom.trainers.core.events import EVENTS, Event

WEB = Path(__file__).resolve().parents[2] / "web"
MODULES = {
    path.relative_to(WEB).as_posix(): path.read_text(encoding="utf-8")
    for room in ("training", "tracklets", "shared")
    for path in sorted((WEB / room).glob("*js"))
}
STATUSES = [*words()["going"], *words()["ended"]]


def keys(module: str, table: str) -> list[str]:
    """Those of an object that a module exports, one a line."""
    return re.findall(r"^    (\w+): ", re.search(rf"export const {table} = {{(.*?)^}};", MODULES[module], re.S | re.M)[1], re.M)


def test_every_event_has_its_name_in_the_table() -> None:
    assert list(EVENTS.values()) == Event.__subclasses__()
    assert all(name.isalpha() and name.islower() for name in EVENTS)


def test_the_page_has_a_reader_for_every_event_and_an_icon_for_every_status() -> None:
    assert keys("training/history.mjs", "READERS") == words()["events"] == list(EVENTS)
    assert keys("training/facts.mjs", "ICONS") == STATUSES
    assert keys("training/words.mjs", "words") == list(words())


def compared(name: str, module: str) -> set[str]:
    """The string literals with which a module compares a variable of this name."""
    return set(re.findall(rf"\b{name} [!=]== \"(\w+)\"", MODULES[module]))


def test_comparisons_are_found() -> None:
    assert compared("status", "training/facts.mjs") == {"paused", "waiting"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_names_only_what_the_server_says(module: str) -> None:
    assert compared("event", module) == set(), "what to do with an event is in history.mjs"
    assert compared("status", module) <= set(STATUSES)
    assert set(re.findall(r"\bwords\.(?!mjs|py)(\w+)", MODULES[module])) <= words().keys()
    assert module.startswith("tracklets/") or re.findall(r"Kinoloom[A-Z]\w+", MODULES[module]) == []
