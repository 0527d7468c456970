"""One train node per recipe, built from its Config."""

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

from comfy_api.latest import io
from safetensors import safe_open

from ...lora_io.file import sha256
from ...trainers import recipes
from ...trainers.conditions.columns import PROMPT
from ...trainers.core.backbone import Grid
from ...trainers.core.config import TrainConfig, check, make
from ...trainers.core.data import PhaseData, TrainingData, files_of
from ...trainers.core.recipe import ModelInput, Recipe
from ...trainers.host.device import resolve_precision, torch_device
from ...trainers.host.source import carried_modules, require_trainable
from ...trainers.host.text import TextEncoder, require_clip_l, require_last_layer
from ...trainers.run.checkpoint import RunKey
from ...trainers.run.previews import Previews
from ..widgets import NO_FILE, files_state, model_file, require_name, widgets
from ..wires import TrainingDataType, TrainingJobType, TrainingSamplesType
from .naming import asked_as, same_name
from .registry import registry


class TrainNode(io.ComfyNode):
    """Starts a run of `recipe`, or resumes one."""

    recipe: ClassVar[type[Recipe]]

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=cls.recipe.name,
            display_name=cls.recipe.title,
            category="Kinoloom/training",
            is_output_node=True,
            description=cls.recipe.description + " Runs in the background; attach Training Result to wait for it.",
            inputs=[
                *(model_input(model) for model in cls.recipe.models),
                TrainingDataType.Input("data", tooltip="Encoded clips, from Encode Training Clips or a folder."),
                io.String.Input(
                    "run_name",
                    default="my_run",
                    tooltip="Name of the run and its files. The same name again resumes a stopped run and keeps a "
                    "finished one, or continues it with more steps.",
                ),
                *widgets(cls.recipe.Config),
                TrainingSamplesType.Input(
                    "samples",
                    optional=True,
                    tooltip="Small videos to sample during training, from Sample Prompts or a Sample First "
                    "Frames node. They do not change the trained weights.",
                ),
            ],
            outputs=[TrainingJobType.Output("job", tooltip="The running job, for Training Result.")],
        )

    @classmethod
    def validate_inputs(cls, run_name: str | None = None, **values: Any) -> bool:
        """ValueError names a wrong widget value before the prompt is queued.

        Connected inputs are None here; `execute` checks them. The error is raised, because ComfyUI repeats a
        returned error for each input.
        """
        name = None if run_name is None else require_name("run_name", run_name)
        config = check_options(cls.recipe.Config, values)
        if name and config:
            check_earlier(name, cls.recipe.name, config)
        return True

    @classmethod
    def fingerprint_inputs(cls, run_name: str | None = None, **values: Any) -> float | str:
        """Equal while a run trains or is finished. Different, so that the node runs again, if the run ended early,
        was deleted, or was resumed from the panel."""
        if run_name is None:  # a connected input
            return float("nan")
        name = run_name.strip()
        job = registry().newest(name)
        if job and job.ended.is_set() and job.status != "finished":
            return float("nan")
        chosen = [files_state(folder, values.get(o, NO_FILE)) for o, folder in file_options(cls.recipe.Config).items()]
        return repr([registry().times_voided(name), *chosen])

    @classmethod
    def execute(
        cls, data: TrainingData, run_name: str, samples: Previews | None = None, **values: Any
    ) -> io.NodeOutput:
        given = {model.name: values.pop(model.name, None) for model in cls.recipe.models}
        for model in cls.recipe.models:
            if not model.option:
                require_trainable(given[model.name], model.name)
        files = resolve_files(cls.recipe.Config, values)
        config = make(cls.recipe.Config, values)
        models = {model.name: connected(model, given[model.name], config) for model in cls.recipe.used(config)}
        config = replace(config, precision=resolve_precision(config.precision, torch_device()))
        first = next(iter(models.values()))
        grid = cls.recipe.backbone_class.grid(first.model, carried_modules(first))
        cls.recipe.data_grid(config, grid).check(data.rows)
        config.check_model(*(model for model in models.values() if not model.is_clip))
        for model in models.values():
            if model.is_clip:
                config.check_text_encoder(TextEncoder(model.model))
        check_data(cls.recipe, config, data)
        previews = samples and samples.fitted(cls.recipe.previews, grid)
        for name, given in {"data": data, "samples": previews}.items():
            check_text_width(name, given, grid)
        job = registry().start(models, cls.recipe.name, config, data, files, run_name, previews)
        text = f"{job.spec.run_name}: {job.status}. {job.note}".rstrip(". ")
        shown = {"text": (text,), "kinoloom_job": (job.spec.id,)}
        return io.NodeOutput(job.spec.id, ui=shown)


def train_node(recipe: type[Recipe]) -> type[io.ComfyNode]:
    return type(recipe.name, (TrainNode,), {"recipe": recipe})


def model_input(model: ModelInput) -> io.Input:
    kind = io.Clip if model.text_encoder else io.Model
    return kind.Input(model.name, tooltip=model.tooltip, optional=bool(model.option))


def connected(model: ModelInput, given: Any, config: TrainConfig) -> Any:
    """The model patcher of a connected MODEL or CLIP. ValueError if it is missing or cannot be copied."""
    if given is None:
        kind, value = "CLIP" if model.text_encoder else "MODEL", getattr(config, model.option)
        raise ValueError(f"{model.name}: not connected, expected a {kind}, which {model.option}={value!r} needs")
    if model.text_encoder:
        require_clip_l(given, model.name)
        require_last_layer(given, model.name)
        given = given.patcher
    require_trainable(given, model.name)
    return given


def check_data(recipe: type[Recipe], config: TrainConfig, data: TrainingData) -> None:
    """ValueError if the data does not suit the options. Warns if only some phases have prior clips."""
    phases = {
        phase.name: PhaseData(data, phase.unit, recipe.columns, config.batch_size, config.seed, dict)
        for phase in recipe.phases(config, data)
    }
    config.check_data(data)
    without = [name for name, phase in phases.items() if not phase.prior.rows]
    if without and len(without) < len(phases):
        logging.warning("Kinoloom: the data has prior clips, but none for the phase %s", ", ".join(without))


def check_text_width(name: str, given: TrainingData | Previews | None, grid: Grid) -> None:
    """ValueError unless prompts were encoded with a text encoder for this model."""
    if given is None or grid.text_width is None:
        return
    for path in {path for row in given.rows for path in files_of(given.folder, row, (PROMPT,)).values()}:
        with safe_open(str(path), framework="pt") as opened:
            width = opened.get_slice(PROMPT.name).get_shape()[-1]
        if width != grid.text_width:
            raise ValueError(
                f"{name}: prompts are {width} wide, expected {grid.text_width} for this model: were they encoded with "
                "the text encoder of another one?"
            )


def file_options(config_class: type) -> dict[str, str]:
    """The options that choose a file, and the model folder of each."""
    return {o.name: o.metadata["file_of"] for o in fields(config_class) if o.metadata["file_of"]}


def check_options(config_class: type[TrainConfig], values: dict[str, Any]) -> TrainConfig | None:
    """The config, or None if a value is None (a connected input). ValueError for values that do not fit."""
    options = {option.name: option for option in fields(config_class)}
    given = {name: value for name, value in values.items() if name in options}
    known = {name: value for name, value in given.items() if value is not None}
    for name, value in known.items():
        check(options[name], value)
    for name, folder in file_options(config_class).items():
        known[name] = chosen_path(name, folder, known.get(name, ""))
    return None if None in given.values() else make(config_class, known)


def check_earlier(name: str, recipe: str, config: TrainConfig) -> None:
    """ValueError if the options alone show that the unfinished run of this name cannot go on with them."""
    earlier = registry().called(name)
    if earlier is None or earlier.status == "finished" or not same_name(asked_as(earlier.spec), name):
        return
    if earlier.resumable or not earlier.ended.is_set():
        known = earlier.spec.run_key
        RunKey.of(recipe, known.base_model, known.data, config, known.files).require_same(known, name)
        earlier.require_reachable(config)


def chosen_path(option: str, folder: str, name: str) -> str:
    return "" if name in ("", NO_FILE) else str(model_file(option, folder, name))


def resolve_files(config_class: type, values: dict[str, Any]) -> dict[str, str]:
    """Replace file names in `values` by full paths ("" for none). Returns each chosen file's SHA-256 by option."""
    hashes = {}
    for option, folder in file_options(config_class).items():
        values[option] = chosen_path(option, folder, values[option])
        if values[option]:
            hashes[option] = sha256(Path(values[option]))
    return hashes


NODES = [train_node(recipe) for recipe in recipes().values()]
