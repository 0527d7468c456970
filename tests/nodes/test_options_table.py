"""docs/ca_lora_options.md names nodes and inputs that exist."""

import re
from pathlib import Path

import pytest

import locales
from ..coroutines import in_thread

TABLE = Path(__file__).parents[2] / "docs" / "ca_lora_options.md"
CORE = {"Load Checkpoint", "Load Image", "CLIP Text Encode", "Save Video", "Save Image"}


@pytest.fixture(scope="module")
def inputs() -> dict[str, set[str]]:
    return {node["display_name"]: node["inputs"].keys() for node in in_thread(locales.node_defs).values()}


def test_nodes_and_inputs_of_the_table_exist(inputs: dict[str, set[str]]) -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    for row in rows:
        _, original, here, _ = row.split("|")
        assert here.strip() and original.strip(), row
        for title in re.findall(r"\*\*([^*]+)\*\*", here):
            assert title in inputs.keys() | CORE, row
        for title, names in re.findall(r"\*\*([^*]+)\*\*: (`[^`]+`(?:, `[^`]+`)*)", here):
            assert set(re.findall("`([^`]+)`", names)) <= inputs[title], row
