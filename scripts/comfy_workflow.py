"""Turns a workflow as the front end saves it (UI format 0.4) into the prompt that the server runs."""

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

MUTED, BYPASSED = 2, 4
NOTES = {"Note", "MarkdownNote"}
VIRTUAL = NOTES | {"Reroute", "PrimitiveNode"}
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDGET_DEFAULTS = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}
WIDGET_TYPES = {
    *WIDGET_DEFAULTS, "COMBO", DYNAMIC_COMBO, "BOUNDING_BOX", "BOUNDING_BOXES", "CHART", "COLOR", "COLORS", "CURVE",
    "GALLERIA", "IMAGECOMPARE", "IMAGEUPLOAD", "LOAD_3D", "MARKDOWN", "PAINTER", "RANGE", "TEXTAREA", "WEBCAM",
}  # fmt: skip
UPLOADS = {"image_upload", "video_upload", "audio_upload", "animated_image_upload"}


def to_prompt(workflow: Json, object_info: Json) -> Json:
    """Convert as the front end's graphToPrompt does; subgraphs are refused."""
    graph = _Graph(workflow, object_info)
    prompt = {str(id): graph.prompt_node(node) for id, node in graph.nodes.items() if graph.runs(node)}
    for node in prompt.values():
        node["inputs"] = {k: v for k, v in node["inputs"].items() if not _is_link(v) or v[0] in prompt}
    return prompt


def set_widget(workflow: Json, object_info: Json, node: str | Json, input_name: str, value: object) -> None:
    """Set one widget, in place, of a node or of the one node of that type or title."""
    node = find_node(workflow, node) if isinstance(node, str) else node
    name = node.get("title") or node["type"]
    if any(slot["name"] == input_name and slot.get("link") is not None for slot in node.get("inputs") or []):
        raise ValueError(f"{name}.{input_name} is linked: expected a widget with a value of its own")
    values = list(node.get("widgets_values") or [])
    slots = list(_slots(_definition(object_info, node), values))
    names = [name for name, _ in slots]
    if input_name not in names:
        raise ValueError(f"{name} has no widget {input_name!r}: expected one of {[n for n in names if n]}")
    values += [_default(spec) for _, spec in slots[len(values) :]]
    values[names.index(input_name)] = value
    node["widgets_values"] = values


def find_node(workflow: Json, node_type_or_title: str) -> Json:
    """The one node of that title or, failing that, of that type."""
    titled = [node for node in workflow["nodes"] if node.get("title") == node_type_or_title]
    found = titled or [node for node in workflow["nodes"] if node["type"] == node_type_or_title]
    if len(found) != 1:
        known = sorted({node.get("title") or node["type"] for node in workflow["nodes"]})
        raise ValueError(f"{len(found)} nodes are called {node_type_or_title!r}: expected one, in {known}")
    return found[0]


def upstream(workflow: Json, node: Json, input_name: str) -> Json:
    """The node whose output is linked to this input."""
    link = next(slot["link"] for slot in node["inputs"] if slot["name"] == input_name)
    origin = next(source for id, source, *_ in workflow["links"] if id == link)
    return next(other for other in workflow["nodes"] if other["id"] == origin)


class _Graph:
    """A workflow's nodes and links by id."""

    def __init__(self, workflow: Json, object_info: Json) -> None:
        self.nodes: dict[int | str, Json] = {node["id"]: node for node in workflow["nodes"]}
        self.sources: dict[int, tuple[int | str, int]] = {link[0]: (link[1], link[2]) for link in workflow["links"]}
        self.object_info = object_info

    def runs(self, node: Json) -> bool:
        return node["type"] not in VIRTUAL and node.get("mode", 0) not in (MUTED, BYPASSED)

    def prompt_node(self, node: Json) -> Json:
        definition = _definition(self.object_info, node)
        inputs = dict(_widget_values(definition, node.get("widgets_values") or []))
        for slot in node.get("inputs") or []:
            source = self.resolve_input(slot)
            if source is not None:
                inputs[slot["name"]] = source
        title = node.get("title") or definition["display_name"] or node["type"]
        return {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}

    def resolve_input(self, slot: Json, wanted: str | None = None) -> Any:
        """What feeds this input: [node id, slot], a primitive's value, or None."""
        link = slot.get("link")
        if link is None:
            return None
        origin, index = self.sources[link]
        return self.resolve_output(self.nodes[origin], index, wanted or slot["type"])

    def resolve_output(self, node: Json, index: int, wanted: str) -> Any:
        if node.get("mode", 0) == MUTED:
            return None
        if node.get("mode", 0) == BYPASSED:
            passed = _bypass_input(node, index, wanted)
            return None if passed is None else self.resolve_input(passed)
        if node["type"] == "Reroute":
            return self.resolve_input(node["inputs"][0], wanted)
        if node["type"] == "PrimitiveNode":
            return _wrapped(node["widgets_values"][0])
        return [str(node["id"]), index]


def _bypass_input(node: Json, output: int, wanted: str) -> Json | None:
    """The input that stands in for a bypassed node's output: same position, then same type, then compatible type."""
    inputs = node.get("inputs") or []
    produced = node["outputs"][output]["type"]
    if wanted in ("*", ""):
        return inputs[output] if output < len(inputs) else inputs[0]
    fits = [slot for slot in inputs if _compatible(slot["type"], produced) and _compatible(slot["type"], wanted)]
    exact = [slot for slot in inputs if slot["type"] == wanted]
    opposite = [slot for slot in inputs[output : output + 1] if slot in fits]
    return next(iter(opposite + exact + fits), None)


def _compatible(a: str, b: str) -> bool:
    a_types, b_types = set(str(a).lower().split(",")), set(str(b).lower().split(","))
    return "*" in a_types | b_types or bool(a_types & b_types)


def _definition(object_info: Json, node: Json) -> Json:
    if node["type"] not in object_info:
        raise ValueError(f"node {node['id']}: the server knows no {node['type']!r} (a missing pack, or a subgraph)")
    return object_info[node["type"]]


def _widget_values(definition: Json, values: list | Json) -> Iterator[tuple[str, object]]:
    by_name = values if isinstance(values, dict) else None
    for i, (name, spec) in enumerate(_slots(definition, [] if by_name is not None else values)):
        if name is None:
            continue
        if by_name is not None:
            yield name, _wrapped(by_name.get(name, _default(spec)))
        else:
            yield name, _wrapped(values[i] if i < len(values) else _default(spec))


def _slots(definition: Json, values: list) -> Iterator[tuple[str | None, Any]]:
    """The (input name, spec) behind each entry of widgets_values; the name None is an entry of the front end alone."""
    at = 0
    for section in ("required", "optional"):
        specs = definition["input"].get(section) or {}
        for name in (definition.get("input_order") or {}).get(section) or specs:
            for slot in _input_slots(name, specs[name], values, at):
                yield slot
                at += 1
        if any(UPLOADS & set(_options(spec)) for spec in specs.values()):
            yield None, None
            at += 1


def _input_slots(name: str, spec: Any, values: list, at: int) -> Iterator[tuple[str | None, Any]]:
    kind, options = _type(spec), _options(spec)
    if kind not in WIDGET_TYPES or options.get("forceInput"):
        return
    yield name, spec
    at += 1
    if options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")):
        yield None, "fixed"
    if kind != DYNAMIC_COMBO:
        return
    chosen = values[at - 1] if at <= len(values) else _default(spec)
    for option in options["options"]:
        if option["key"] != chosen:
            continue
        for child, child_spec in _children(option["inputs"]):
            for slot in _input_slots(f"{name}.{child}", child_spec, values, at):
                yield slot
                at += 1


def _children(inputs: Json) -> Iterator[tuple[str, Any]]:
    for section in ("required", "optional"):
        yield from (inputs.get(section) or {}).items()


def _type(spec: Any) -> str:
    if isinstance(spec[0], list):
        return "COMBO"
    return _options(spec).get("widgetType") or spec[0]


def _options(spec: Any) -> Json:
    return spec[1] if spec and len(spec) > 1 else {}


def _default(spec: Any) -> object:
    if spec is None or isinstance(spec, str):
        return spec
    options = _options(spec)
    if "default" in options:
        return options["default"]
    if _type(spec) == DYNAMIC_COMBO:
        return options["options"][0]["key"]
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    return choices[0] if choices else WIDGET_DEFAULTS.get(_type(spec))


def _wrapped(value: object) -> object:
    """A list value in a box, since a bare list in a prompt means a link."""
    return {"__value__": value} if isinstance(value, list) else value


def _is_link(value: object) -> bool:
    return isinstance(value, list)
