"""Training runs without nodes: synthetic columns on disk, and jobs on them with every recipe at its smallest."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from kinoloom.nodes.animatediff import modules as motion
from kinoloom.nodes.folders import FOLDERS
from kinoloom.trainers import recipes
from kinoloom.trainers.backbones.animatediff.model import AnimateDiff
from kinoloom.trainers.backbones.flow.wan import Wan
from kinoloom.trainers.backbones.svd.model import Svd
from kinoloom.trainers.conditions.columns import IMAGE, LATENTS, MASK, PROMPT, TRACKLETS
from kinoloom.trainers.core.config import TrainConfig
from kinoloom.trainers.core.data import PhaseData, Row, TrainingData, write_column
from kinoloom.trainers.core.memory import checkpointed_blocks
from kinoloom.trainers.core.placement import Placement
from kinoloom.trainers.core.state import State
from kinoloom.trainers.host.attention import TRANSFORMER_OPTIONS
from kinoloom.trainers.host.private import Private, load_private
from kinoloom.trainers.host.source import ModelSource, base_key, carried_files, text_keys
from kinoloom.trainers.run.checkpoint import RunKey, load_state
from kinoloom.trainers.run.job import Job
from kinoloom.trainers.run.previews import Previews
from kinoloom.trainers.run.record import Spec, read_record
from rows import SHAPES, TEXT_LENGTH, TEXT_WIDTH, TOKENS, boxes, image, prompt, random, write_data, write_row  # noqa: F401
from torch import Tensor
from toyworld.pack import unet, video_unet

NO_DATA = TrainingData("", ())
COLUMNS = (LATENTS, MASK, PROMPT, IMAGE, TRACKLETS)
SMALL = {"precision": "fp32", "rank": 4, "learning_rate": 1e-2, "validate_every": 3, "save_every": 2}
# What makes a run of each method small: a new method adds a line, and is then in every test of the matrix.
RUNS: dict[str, dict[str, Any]] = {
    "KinoloomTrainWanLora": {"steps": 6},
    "KinoloomTrainSetAndSequence": {"set_steps": 3, "sequence_steps": 4, "gradient_accumulation": 2},
    "KinoloomTrainMotionDirector": {"steps": 4, "validate_every": 4, "preset": "custom", "spatial_learning_rate": 1e-2},
    "KinoloomTrainCaLora": {"steps": 4, "validate_every": 4, "alpha": 4.0},
    "KinoloomTrainSvdLora": {"steps": 4, "validate_every": 4},
    "KinoloomTrainSvdFinetune": {"steps": 4, "validate_every": 4, "learning_rate": 1e-3},
    "KinoloomTrainSvdTracklets": {
        "self_tracking_steps": 2,
        "clean_steps": 2,
        "validate_every": 2,
        "warmup_steps": 0,
        "learning_rate": 3e-3,
        "clean_learning_rate": 3e-3,
    },
}
LAYERS = {"spatial": 192, "temporal": 200, "KinoloomTrainSvdLora": 48}  # of a file's export or method; else 20, Wan's


def load_model(path: Path, **options: Any) -> Any:
    """A MODEL as from Load Diffusion Model, made in inference mode. `dtype` is its weight_dtype."""
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path), options)


def load_animatediff(folder: Path, motion_module: str = "tiny_motion", **options: Any) -> Any:
    """The tiny SD1.5 of a folder of tiny models after Apply Motion Module."""
    with torch.inference_mode():
        model = unet.load(folder / "diffusion_models" / "tiny_sd.safetensors")
        module = motion.load_motion_module(str(folder / "animatediff_models" / f"{motion_module}.safetensors"))
        widgets = {"context_length": 16, "context_overlap": 4, "beta_schedule": motion.LINEAR, **options}
        return motion.ApplyMotionModule.execute(model, module, **widgets).args[0]


def load_svd(folder: Path, name: str = "tiny_svd") -> Any:
    with torch.inference_mode():
        return video_unet.load_unet(folder / "diffusion_models" / f"{name}.safetensors")


def load_tiny(folder: Path, backbone: str) -> Any:
    """The tiny MODEL of a backbone."""
    if backbone == "animatediff":
        return load_animatediff(folder)
    if backbone == "svd":
        return load_svd(folder, "shallow_svd")
    return load_model(folder / "diffusion_models" / "tiny_wan.safetensors")


def write_samples(folder: Path, backbone: str, **options: Any) -> Previews:
    """Two previews of the shape of the clips, as the sample nodes write them, fitted to the model."""
    channels, frames, height, width = shape = SHAPES[backbone]["clips"]
    rows = {name: preview(folder, name, backbone, shape) for name in ("first", "second", "away")}
    size = {"width": 8 * width, "height": 8 * height, "frames": 4 * frames - 3 if channels == 16 else frames}
    steps = {"steps": 2, "cfg": 2.5, "first_cfg": 1.0 if backbone == "svd" else 2.5, "shift": 5.0, "sample_every": 2}
    shown = {"rows": (rows["first"], rows["second"]), "negative": None if backbone == "svd" else rows["away"]}
    return Previews(**{"folder": str(folder), **shown, **size, **steps, "fps": 8.0, "seed": 1, **options})


def preview(folder: Path, name: str, backbone: str, shape: tuple[int, ...]) -> Row:
    """A row without latents, and its columns on disk."""
    _, frames, height, width = shape
    columns: dict[str, dict[str, Tensor]] = {"prompt_embeds": prompt(name, variants=0)}
    if backbone == "svd":
        own, control = image(name, height=height, width=width), boxes(name, frames, height=height, width=width)
        first_frame = {"first_frame": own["first_frames"][0], "augmentation": torch.tensor(0.0)}
        columns = {
            "sample": {**{key: own[key] for key in ("image_embeds", "fps", "motion_bucket")}, **first_frame},
            "boxes": {key: control[key] for key in ("boxes", "box_mask")},
        }
    if backbone == "animatediff":
        columns["start"] = {"start": random(4, height, width, name=f"{name} start")}
    for column, tensors in columns.items():
        write_column(folder, name, column, tensors)
    return Row(name, "clips", "preview", shape, dict.fromkeys(columns, name))


def make_config(recipe: str, **options: Any) -> TrainConfig:
    config = recipes()[recipe].Config
    small = {name: value for name, value in SMALL.items() if name in config.__dataclass_fields__}
    return config(**{**small, **RUNS[recipe], **options})


def slow_but_of_wan(method: str) -> tuple[Any, ...]:
    """Marks for a method's tests: runs of Wan's methods are quick, those of the others take several times as long."""
    return () if recipes()[method].backbone_class is Wan else (pytest.mark.slow,)


class Published(list):
    """Everything a job published; `at(done, act)` calls `act(job)` in the job's thread after optimizer step `done`."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: dict[int, Callable[[Job], None]] = {}

    def at(self, done: int, act: Callable[[Job], None]) -> "Published":
        self.actions[done] = act
        return self

    def __call__(self, job: Job, event: dict) -> None:
        self.append(event)
        if event["event"] == "step" and event["done"] in self.actions:
            self.actions[event["done"]](job)


def make_job(
    folder: Path,
    model: Any,
    data: TrainingData,
    config: TrainConfig,
    recipe: str,
    published: Published | None = None,
    samples: Previews | None = None,
    clip: Any = None,
) -> Job:
    """A job in folder/job that writes to folder/out. A job that is already there is loaded as after a restart."""
    kept = folder / "job" / "job.json"
    if kept.is_file():
        spec = read_record(kept.parent).spec
    else:
        given = {"model": model} | ({"clip": clip.patcher} if clip else {})
        sources = {name: ModelSource.of(each) for name, each in given.items()}
        spec = Spec(
            id="job",
            run_name="run",
            recipe=recipe,
            config=vars(config),
            data=data,
            sources=sources,
            run_key=RunKey.of(recipe, base_key(sources), data.digest, config, text_keys(sources)),
            outputs=dict.fromkeys(FOLDERS, str(folder / "out")),
            created=0.0,
            previews=samples,
        )
    method = recipes()[recipe]
    publish = Published() if published is None else published
    job = Job(
        folder / "job",
        spec,
        method,
        publish,
        lambda job: False,
        make_room=lambda: None,
    )
    if kept.is_file():
        job.restore(read_record(kept.parent))
    return job


def finish(job: Job, model: Any, status: str = "finished", clip: Any = None) -> Job:
    """Start `job` and wait until it ended as expected."""
    job.start({"model": model} | ({"clip": clip.patcher} if clip else {}))
    assert job.ended.wait(600)
    assert job.status == status, job.error or job.status
    return job


def state_of(job: Job) -> State:
    return load_state(job.folder / "state.pt")[0]


def events(job: Job, *kinds: str) -> list[dict]:
    """The history's events of these kinds, without times."""
    return [{k: v for k, v in e.items() if k != "seconds"} for e in job.history if e["event"] in kinds]


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Bit equality of nested dicts, lists, tensors and plain values."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    else:
        assert ours == theirs, f"{where}: {ours!r} != {theirs!r}"


def make_backbone(model: Any, dtype: torch.dtype = torch.float32, method: str = "") -> Any:
    """The backbone of a private copy of `model`, as a job of the method makes it, on the CPU."""
    parts, cpu = carried_files(model), torch.device("cpu")
    private = load_private(model, cpu)
    plain = AnimateDiff if parts else Svd if type(private).__name__ == "SVD_img2vid" else Wan
    kind = recipes()[method].backbone_class if method else plain
    backbone = kind({"model": Private(private, parts)}, cpu, dtype, TRANSFORMER_OPTIONS)
    checkpointed_blocks(backbone)
    return backbone


def placements(backbone: Any) -> Iterator[int]:
    """Recompute none, half, then all of the blocks."""
    blocks = len(backbone.blocks)
    for count in (0, blocks // 2, blocks):
        backbone.placement = Placement(recomputed=count)
        yield count
    backbone.placement = Placement()


def make_batch(backbone: Any, data: TrainingData, unit: str = "clips", size: int = 1) -> dict[str, Any]:
    columns = tuple(column for column in COLUMNS if column.name in data.rows[0].columns)
    return PhaseData(data, unit, columns, size, 0, backbone.prepare)[0]


def leaves(loss: Tensor) -> set[Tensor]:
    """Every tensor that a backward from `loss` would give a gradient."""
    found, todo, seen = set(), [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found


def motion_lora(layers: dict[str, tuple[int, int]], rank: int, name: str) -> dict[str, Tensor]:
    """A motion LoRA on layers of a motion module, by their paths and (out, in) features."""
    return {
        f"{path}.lora_{side}.weight": random(*shape, name=f"{name} {path} {side}") / 3
        for path, (out, inputs) in layers.items()
        for side, shape in (("down", (rank, inputs)), ("up", (out, rank)))
    }
