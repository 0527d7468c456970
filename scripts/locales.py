"""Writes locales/<language>/nodeDefs.json from the nodes themselves; run it after a change of their names or tooltips.

English is what the nodes say. Other languages look each English text up in locales/<language>/phrases.json.
"""

import asyncio
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from comfy_client import make_base
from comfy_library import PACK, register_pack, start_comfyui

LOCALES = PACK / "locales"
COMPILED = ("display_name", "description", "name")  # the front end reads tooltips as they are


def node_defs() -> dict[str, dict[str, Any]]:
    """Names and tooltips of every node, in the layout of ComfyUI's nodeDefs.json. Needs ComfyUI (comfy_library)."""
    from kinoloom.nodes import Kinoloom

    nodes = asyncio.run(Kinoloom().get_node_list())
    return {node.GET_SCHEMA().node_id: _described(node.GET_NODE_INFO_V1()) for node in nodes}


def _described(info: dict[str, Any]) -> dict[str, Any]:
    inputs: dict[str, dict[str, str]] = {}
    for name, spec in {**info["input"].get("required", {}), **info["input"].get("optional", {})}.items():
        options = spec[1]
        inputs[name] = {"name": options.get("display_name") or name, "tooltip": options["tooltip"]}
        if options.get("control_after_generate"):
            inputs["control_after_generate"] = {"name": "control after generate"}
    names = zip(info["output_name"], info["output"], info["output_tooltips"], strict=True)
    outputs = {
        str(place): {**({"name": name} if name != kind else {}), "tooltip": tooltip}
        for place, (name, kind, tooltip) in enumerate(names)
    }
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def texts(defs: dict[str, Any]) -> set[str]:
    """All texts in nested dicts."""
    return {text for value in defs.values() for text in (texts(value) if isinstance(value, dict) else [value])}


def translate(defs: dict[str, Any], phrases: dict[str, str]) -> dict[str, Any]:
    """`defs` in another language. KeyError names a text that has no translation."""
    return {
        key: translate(value, phrases) if isinstance(value, dict) else phrases[value] for key, value in defs.items()
    }


def to_file(defs: dict[str, Any]) -> str:
    """The JSON of a nodeDefs.json, where the front end takes @ { } | % in names as its message syntax."""

    def escape(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {own: escape(inner, own) for own, inner in value.items()}
        return re.sub(r"[@{}|%]", r"{'\g<0>'}", value) if key in COMPILED else value

    return json.dumps(escape(defs), ensure_ascii=False, indent=2) + "\n"


def files() -> dict[Path, str]:
    """What every generated file must hold."""
    english = node_defs()
    made = {LOCALES / "en" / "nodeDefs.json": to_file(english)}
    for path in sorted(LOCALES.glob("*/phrases.json")):
        phrases = json.loads(path.read_text(encoding="utf-8"))
        made[path.with_name("nodeDefs.json")] = to_file(translate(english, phrases))
    return made


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        start_comfyui(make_base(Path(base), PACK))
        register_pack()
        for written, text in files().items():
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{written.relative_to(PACK)}\n")
