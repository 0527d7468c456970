"""The version of a run's files, and the only place that converts files of earlier versions."""

from collections.abc import Callable
from typing import Any

VERSION = 2  # files without a number are of version 1


def _version_2(kind: str, content: dict[str, Any]) -> None:
    """Renames to run key, model key and unit; makes previews rows, and allows several MODELs."""
    if kind == "checkpoint":
        _rename(content, identity="run_key")
    if kind == "record" and isinstance(spec := content.get("spec"), dict):
        if "source" in spec:
            spec["sources"] = {"model": _rename(spec.pop("source"), identity="key", parts="carried")}
        _rename(spec, identity="run_key")
        rows = spec["data"].get("rows") if isinstance(spec.get("data"), dict) else None
        for row in rows if isinstance(rows, list) else ():
            _rename(row, split="unit")
        if "samples" in spec:
            spec["previews"] = _previews(spec.pop("samples"))


def _previews(samples: Any) -> Any:
    """Previews from the samples of version 1, which were names and file stems in one column."""
    if not isinstance(samples, dict):
        return samples
    column, stems, shape = (samples.pop(name, None) for name in ("column", "stems", "shape"))
    names, negative = samples.pop("names", None), samples.pop("negative", "")

    def row(name: Any, stem: Any) -> dict[str, Any]:
        return {"name": name, "unit": "clips", "role": "preview", "shape": shape or [], "columns": {str(column): stem}}

    both = zip(names, stems, strict=False) if isinstance(names, list) and isinstance(stems, list) else ()
    return {
        **samples,
        "rows": [row(*each) for each in both],
        "negative": row("negative", negative) if negative else None,
    }


def _rename(content: Any, **names: str) -> Any:
    """Rename entries in place, old name = new name. Other values than objects fail in the check that follows."""
    for old, new in names.items():
        if isinstance(content, dict) and old in content:
            content[new] = content.pop(old)
    return content


# STEPS[n - 1] converts content of version n to version n + 1, in place. `kind` is "record" (job.json, with the options
# at spec.config and spec.run_key.config), "checkpoint" (state.pt), "state" and "run_key" (parts of it), or "event" (a
# line of the history). Lines of the history have no version: every step is applied to them, so it must not change new
# content.
STEPS: list[Callable[[str, dict[str, Any]], None]] = [_version_2]


def current(kind: str, content: dict[str, Any], version: Any = 1) -> dict[str, Any]:
    """`content` converted to this version. ValueError if it is of a later version."""
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"version={str(version)[:20]}: expected 1 to {VERSION}; a newer Kinoloom reads later ones")
    for step in STEPS[version - 1 :]:
        step(kind, content)
    return content
