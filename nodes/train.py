"""One train node per recipe, built from its Config."""

import logging
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from safetensors import safe_open

from ..lora_io.file import sha256
from ..trainers import backbone_modules, recipes
from ..trainers.core.config import TrainConfig, make
from ..trainers.core.data import PhaseData, TrainingData, column_path
from ..trainers.core.host import carried, device, require_trainable, resolve_precision
from ..trainers.core.recipe import Recipe
from ..trainers.core.sampling import PROMPTS, Samples
from .jobs import registry
from .widgets import NO_FILE, TrainingDataType, TrainingJobType, TrainingSamplesType, widget


def knobs(config_class: type) -> list[Field]:
    """In the order of the widgets: what a method adds before what others share, rare ones after, added ones last."""
    shared = {option.name: place for place, c in enumerate(config_class.__mro__[:-1]) for option in fields(c)}
    return sorted(fields(config_class), key=lambda o: (o.metadata["added"], o.metadata["advanced"], shared[o.name]))


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
                    TrainingSamplesType.Input(
                        "samples",
                        optional=True,
                        tooltip="What to sample while training, from Sample Prompts or Sample First Frames (SVD). "
                        "Changes nothing of what is learned.",
                    ),
                ],
                outputs=[TrainingJobType.Output("job", tooltip="The running job, for Training Result.")],
            )

        @classmethod
        def fingerprint_inputs(cls, run_name: str, **_: Any) -> float | str:
            """Unchanged while a run goes on or is finished; one that ended early, was deleted or resumed runs again."""
            job = registry().newest(run_name)
            early = job and job.ended.is_set() and job.status != "finished"
            return float("nan") if early else str(registry().times_voided(run_name))

        @classmethod
        def execute(
            cls, model: Any, data: TrainingData, run_name: str, samples: Samples | None = None, **values: Any
        ) -> io.NodeOutput:
            require_trainable(model)
            files = resolve_files(recipe.Config, values)
            config = make(recipe.Config, values)
            config = replace(config, precision=resolve_precision(config.precision, device()))
            backbone_modules()[recipe.backbone].check(model.model, carried(model), data.rows)
            config.check_model(model)
            check_data(recipe, config, data)
            shaped = samples and fit_samples(recipe, carried(model), data, samples)
            job = registry().start(model, recipe.name, config, data, files, run_name, shaped)
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


def fit_samples(recipe: type[Recipe], parts: dict[str, Any], data: TrainingData, samples: Samples) -> Samples:
    """The samples with their latent shape. ValueError if this method's model cannot make them."""
    found, expected = ("prompts", "first frames") if samples.column == PROMPTS else ("first frames", "prompts")
    if (samples.column == PROMPTS) != (PROMPTS in recipe.columns):
        raise ValueError(f"samples: these are {found}, but {recipe.title} takes {expected}")
    if samples.column == PROMPTS:
        theirs = prompt_width(data.folder, data.rows[0].columns[PROMPTS])
        ours = prompt_width(samples.folder, samples.stems[0])
        if ours != theirs:
            raise ValueError(f"samples: prompts are {ours} wide, the data's {theirs}: expected the same text encoder")
    try:
        shape = backbone_modules()[recipe.backbone].latent_shape(parts, samples.width, samples.height, samples.frames)
    except ValueError as error:
        raise ValueError(f"samples: {error}") from error
    return replace(samples, shape=shape)


def prompt_width(folder: str, stem: str) -> int:
    with safe_open(str(column_path(folder, stem, PROMPTS)), framework="pt") as opened:
        return opened.get_slice(PROMPTS).get_shape()[-1]


def resolve_files(config_class: type, values: dict[str, Any]) -> dict[str, str]:
    """Replace chosen file names in `values` by full paths ("" for none); option name -> sha256 of what was chosen."""
    hashes = {}
    for option in fields(config_class):
        if folder := option.metadata["file_of"]:
            name = values[option.name]
            values[option.name] = "" if name in ("", NO_FILE) else folder_paths.get_full_path_or_raise(folder, name)
            if values[option.name]:
                hashes[option.name] = sha256(Path(values[option.name]))
    return hashes


NODES = [train_node(recipe) for recipe in recipes().values()]
