"""Names, tooltips and help pages: one of each for every node, in English and Chinese, as the nodes are now."""

import json
import re
from pathlib import Path

import pytest

import locales
from ..coroutines import in_thread

PACK = Path(__file__).parents[2]
DOCS = PACK / "web" / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LANGUAGES = ("en", "zh")
CHINESE = re.compile("[\u4e00-\u9fff]")
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)]+)\)")


@pytest.fixture(scope="module")
def defs() -> dict:
    return in_thread(locales.node_defs)


def phrases() -> dict[str, str]:
    return json.loads((PACK / "locales" / "zh" / "phrases.json").read_text(encoding="utf-8"))


def node_of(page: Path) -> str:
    """docs/<node>.md is English, docs/<node>/zh.md is Chinese."""
    return page.stem if page.parent == DOCS else page.parent.name


def name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def test_every_text_is_translated_and_no_translation_is_left_over(defs: dict) -> None:
    texts = locales.texts(defs)
    assert texts - phrases().keys() == set(), "add them to locales/zh/phrases.json, then run scripts/locales.py"
    assert phrases().keys() - texts == set(), "remove them from locales/zh/phrases.json"


def test_generated_files_are_up_to_date() -> None:
    made = in_thread(locales.files)
    assert {path.parent.name for path in made} == set(LANGUAGES)
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(PACK)}: run scripts/locales.py"


def test_translations_are_chinese_and_keep_the_numbers() -> None:
    for english, chinese in phrases().items():
        if " " in english:
            assert CHINESE.search(chinese), english
        numbers = re.findall(r"\d[\d.]*\d", english)
        assert [number for number in numbers if number not in chinese] == [], english


def test_names_are_escaped_for_the_front_end_and_tooltips_are_not() -> None:
    written = json.loads(locales.to_file({"Node": {"description": "a {b} | 1%", "inputs": {"x": {"tooltip": "{b}"}}}}))
    assert written["Node"] == {
        "description": "a {'{'}b{'}'} {'|'} 1{'%'}",
        "inputs": {"x": {"tooltip": "{b}"}},
    }


def test_settings_and_commands_are_translated() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (PACK / "web").rglob("*js"))
    for file, label in (("settings", "name"), ("commands", "label")):
        ids = re.findall(rf'id: "(Kinoloom\.[\w.]+)",\s*{label}:', source)
        translated = json.loads((PACK / "locales" / "zh" / f"{file}.json").read_text(encoding="utf-8"))
        assert ids and sorted(translated) == sorted(own.replace(".", "_") for own in ids)
        assert all(CHINESE.search(texts[label]) for texts in translated.values())


def test_comfyui_gives_them_out() -> None:
    from app.custom_node_manager import CustomNodeManager

    served = CustomNodeManager().build_translations()
    for language in LANGUAGES:
        ours = json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        assert {node: served[language]["nodeDefs"][node] for node in ours} == ours


def test_every_node_has_a_page_and_every_page_a_node(defs: dict) -> None:
    for language in LANGUAGES:
        pages = [node_of(page) for page in PAGES if (page.parent == DOCS) == (language == "en")]
        assert sorted(pages) == sorted(defs), language


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_is_about_its_node(page: Path, defs: dict) -> None:
    text, node = page.read_text(encoding="utf-8"), defs[node_of(page)]
    title = node["display_name"] if page.parent == DOCS else phrases()[node["display_name"]]
    assert text.startswith(f"# {title}\n")
    assert 15 <= len(text.splitlines()) <= 55
    known = node["inputs"].keys() | {output.get("name") for output in node["outputs"].values()}
    explained = [word for row in re.findall(r"^\|([^|]*`[^|]*)\|", text, re.M) for word in re.findall("`([^`]+)`", row)]
    assert [word for word in explained if word not in known] == []
    for source, _, target in (line.partition(" → ") for line in text.splitlines() if " → " in line):
        into, out = re.search("`([^`]+)`$", target), re.search(r"^- [^`*]*`([^`]+)`$", source)
        assert into is None or into[1] in node["inputs"], target
        assert out is None or out[1] in known, source


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_links_to_what_exists(page: Path) -> None:
    """The front end looks for pictures in docs/, and leaves other links as they are."""
    headings = re.findall("^#+ (.+)$", (PACK / "README.md").read_text(encoding="utf-8"), re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for picture, target in LINK.findall(page.read_text(encoding="utf-8")):
        if picture:
            assert (DOCS / target).is_file(), target
        else:
            assert target.startswith("https://"), target
        if "kinoloom/kinoloom#" in target:
            assert target.partition("#")[2] in anchors, target


def test_pictures_are_light_and_used() -> None:
    pictures = {path.name: path.stat().st_size for path in DOCS.iterdir() if path.suffix not in ("", ".md")}
    used = {target for page in PAGES for _, target in LINK.findall(page.read_text(encoding="utf-8"))}
    assert pictures.keys() <= used
    assert 0 < sum(pictures.values()) < 300_000
