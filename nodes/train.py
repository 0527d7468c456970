"""One train node per recipe, built from its Config."""

import logging
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..lora_io.file import sha256
from ..trainers import backbone_modules, recipes
from ..trainers.core.config import TrainConfig, make
from ..trainers.core.data import PhaseData, TrainingData
from ..trainers.core.host import carried, device, resolve_precision
from ..trainers.core.recipe import Recipe
from .jobs import registry
from .widgets import NO_FILE, TrainingDataType, TrainingJobType, widget


def knobs(config_class: type) -> list[Field]:
    """In the order of the widgets: what a method adds before what others share, rare ones last."""
    shared = {option.name: place for place, c in enumerate(config_class.__mro__[:-1]) for option in fields(c)}
    return sorted(fields(config_class), key=lambda o: (o.metadata["advanced"], shared[o.name]))


def train_node(recipe: type[Recipe]) -> type[io.ComfyNode]:
    class Train(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=recipe.name,
                display_name=recipe.title,
                category="Kinoloom/training",
                is_output_node=True,
                description=recipe.description + " Runs in the background; attach Training Result to wait for it.",
                inputs=[
                    io.Model.Input("model", tooltip="The model to train on. It is copied, never changed."),
                    TrainingDataType.Input("data", tooltip="Encoded clips, from Encode Training Clips or a folder."),
                    io.String.Input(
                        "run_name",
                        default="my_run",
                        tooltip="Names the run and its files. Running again under "
                        "the same name resumes what was stopped and leaves a finished run as it is.",
                    ),
                    *(widget(option) for option in knobs(recipe.Config)),
                ],
                outputs=[TrainingJobType.Output("job", tooltip="The running job, for Training Result.")],
            )

        @classmethod
        def fingerprint_inputs(cls, run_name: str, **_: Any) -> float | str:
            """Unchanged while the run goes on or is finished; one that ended early or was deleted is run again."""
            job = registry().newest(run_name)
            early = job and job.ended.is_set() and job.status != "finished"
            return float("nan") if early else str(registry().deletions(run_name))

        @classmethod
        def execute(cls, model: Any, data: TrainingData, run_name: str, **values: Any) -> io.NodeOutput:
            files = resolve_files(recipe.Config, values)
            config = make(recipe.Config, values)
            config = replace(config, precision=resolve_precision(config.precision, device()))
            backbone_modules()[recipe.backbone].check(model.model, carried(model), data.rows)
            check_data(recipe, config, data)
            job = registry().start(model, recipe.name, config, data, files, run_name)
            shown = {"text": (f"{job.spec.run_name}: {job.status}",), "kinoloom_job": (job.spec.id,)}
            return io.NodeOutput(job.spec.id, ui=shown)

    Train.__name__ = recipe.name
    return Train


def check_data(recipe: type[Recipe], config: TrainConfig, data: TrainingData) -> None:
    """ValueError if the data does not suit the options; a warning if prior clips are there for some phases only."""
    phases = {
        phase.name: PhaseData(data, phase.split, recipe.columns, config.batch_size, config.seed, dict)
        for phase in recipe.phases(config)
    }
    config.check_data(data)
    without = [name for name, phase in phases.items() if not phase.prior.rows]
    if without and len(without) < len(phases):
        logging.warning("Kinoloom: the data has prior clips, but none for the phase %s", ", ".join(without))


def resolve_files(config_class: type, values: dict[str, Any]) -> dict[str, str]:
    """Replace chosen file names in `values` by full paths ("" for none); option name -> sha256 of what was chosen."""
    hashes = {}
    for option in fields(config_class):
        if option.metadata["lora_file"]:
            name = values[option.name]
            values[option.name] = "" if name in ("", NO_FILE) else folder_paths.get_full_path_or_raise("loras", name)
            if values[option.name]:
                hashes[option.name] = sha256(Path(values[option.name]))
    return hashes


NODES = [train_node(recipe) for recipe in recipes().values()]
