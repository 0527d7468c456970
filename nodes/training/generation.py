"""Chooses the shipped workflow that generates with a run's files, and the file for each of its loaders."""

import json
import os
from pathlib import Path
from typing import Any

from ...trainers.run.job import Job
from ...trainers.run.shown import loader_name

WORKFLOWS = Path(__file__).parents[2] / "workflows"
BYPASSED = 4  # a mode of nodes in ComfyUI's workflows


def generation(job: Job) -> dict[str, Any]:
    """The workflow's name, and the file for each of its loaders, or None for a loader to bypass.

    ValueError if no shipped workflow generates with the run's files.
    """
    offered = job.recipe_class.generations(job.config, job.spec.data)
    if not offered:
        title = job.recipe_class.title
        raise ValueError(f"No template generates with the files of {title}: load the model in your own workflow")
    made = {name: path for name in job.exports if (path := newest(job, name))}
    for choice in offered:
        if made.keys() >= set(choice.loaders.values()):
            same = (other.loaders for other in offered if other.template == choice.template)
            unused: dict[str, str | None] = {loader: None for loaders in same for loader in loaders}
            used = {loader: loader_name(made[name]) for loader, name in choice.loaders.items()}
            return {"template": choice.template, "loaders": unused | used}
    raise ValueError(f"run {job.spec.run_name!r} has no file left that a template generates with")


def workflow(template: str, loaders: dict[str, str | None]) -> dict[str, Any]:
    """The shipped workflow with these files in its loaders. Loaders are named by title or type; None bypasses one."""
    found = json.loads((WORKFLOWS / f"{template}.json").read_text(encoding="utf-8"))
    for node in found["nodes"]:
        for name in loaders.keys() & {node.get("title"), node["type"]}:
            if file := loaders[name]:
                node["widgets_values"][0] = file
            else:
                node["mode"] = BYPASSED
    return found


def newest(job: Job, export: str) -> Path | None:
    """The last saved file of an export, else its best so far. None if neither is on disk."""
    files = (Path(job.files[label]) for label in (export, f"{export}-best") if label in job.files)
    return next((path for path in files if os.path.isfile(path)), None)
