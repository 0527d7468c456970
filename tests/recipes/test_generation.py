"""Generate on the page: the template of a run's method, and the file of each of its loaders, as the server says it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kinoloom.nodes.training.generation import generation, workflow
from kinoloom.trainers import recipes
from kinoloom.trainers.run.job import Job

from ..runs import NO_DATA, make_config, make_job

WAN, SNS, MD = "KinoloomTrainWanLora", "KinoloomTrainSetAndSequence", "KinoloomTrainMotionDirector"
FINETUNE, BOXES, ADAPTER = "KinoloomTrainSvdFinetune", "KinoloomTrainSvdTracklets", "KinoloomTrainCaLora"
WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
LOOK, MOVES = "Load LoRA: spatial", "KinoloomLoadMotionLora"
IDENTITY, MOTION = "Load LoRA: identity", "Load LoRA: motion"
BOTH, NEW, STAGES = "motion_director_both_generate", "motion_director_new_subject_generate", "set_and_sequence_generate"
CONTROL = "KinoloomLoadTrackletControl"


LORAS, MOTIONS = "loras", "animatediff_motion_lora"
EXPORTS = {
    WAN: {"lora": ("lora", "comfy", LORAS)},
    SNS: dict.fromkeys(("identity", "motion", "combined"), ("lora", "comfy", LORAS)),
    MD: {"spatial": ("lora", "kohya", LORAS), "temporal": ("lora", "motion_lora", MOTIONS)},
    ADAPTER: {
        "motion": ("lora", "whole", MOTIONS), "adapter": ("module", "whole", "i2v_adapters"),
    },
    "KinoloomTrainSvdLora": {"lora": ("lora", "comfy", LORAS)},
    FINETUNE: {"unet": ("model", "whole", "diffusion_models")},
    BOXES: dict.fromkeys(("painting", "tracklets"), ("module", "whole", "tracklet_control")),
}


def test_each_export_is_of_its_kind() -> None:
    assert EXPORTS.keys() == recipes().keys()
    for name, expected in EXPORTS.items():
        made = recipes()[name].exports(make_config(name), NO_DATA)
        assert {label: (each.kind, each.format, each.folder) for label, each in made.items()} == expected


@pytest.fixture
def run(inputs: Callable, tmp_path: Path) -> Callable[..., Job]:
    """A run of a method with files of these labels, which exist on disk except those in `gone`."""

    def make(name: str, labels: list[str], gone: tuple[str, ...] = (), **options: Any) -> Job:
        job = make_job(tmp_path, *inputs(WAN), make_config(name, **options), name)
        for label in labels:
            path = tmp_path / "kinoloom" / "run" / f"run-{label}-000005.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            job.files[label] = str(path)
            if label not in gone:
                path.write_bytes(b"x")
        return job

    return make


def file(label: str) -> str:
    return str(Path("kinoloom", "run", f"run-{label}-000005.safetensors"))


@pytest.mark.parametrize(
    ("name", "options", "labels", "template", "loaders"),
    [
        (WAN, {}, ["lora"], "wan_lora_generate", {"LoraLoaderModelOnly": "lora"}),
        (WAN, {}, ["lora-best"], "wan_lora_generate", {"LoraLoaderModelOnly": "lora-best"}),
        (WAN, {}, ["lora", "lora-best"], "wan_lora_generate", {"LoraLoaderModelOnly": "lora"}),
        (MD, {"train": "both"}, ["spatial", "temporal"], BOTH, {LOOK: "spatial", MOVES: "temporal"}),
        (MD, {"train": "both"}, ["temporal", "spatial-best"], BOTH, {LOOK: "spatial-best", MOVES: "temporal"}),
        (MD, {"train": "both", "spatial_loras": 2}, ["temporal", "spatial-2", "spatial-1"], BOTH,
         {LOOK: "spatial-1", MOVES: "temporal"}),
        (MD, {"train": "both", "spatial_loras": 2}, ["temporal", "spatial-2"], BOTH,
         {LOOK: "spatial-2", MOVES: "temporal"}),
        (MD, {"train": "temporal"}, ["temporal"], NEW, {MOVES: "temporal"}),
        (MD, {"train": "spatial"}, ["spatial"], BOTH, {LOOK: "spatial", MOVES: None}),
        (SNS, {}, ["combined", "motion", "identity"], STAGES, {IDENTITY: "identity", MOTION: "motion"}),
        (SNS, {}, ["identity", "motion-best", "combined-best"], STAGES, {IDENTITY: "identity", MOTION: "motion-best"}),
        (SNS, {}, ["identity-best"], STAGES, {IDENTITY: "identity-best", MOTION: None}),
        (SNS, {"set_steps": 0, "identity_file": "face.safetensors"}, ["motion", "combined"], STAGES,
         {IDENTITY: None, MOTION: "combined"}),
        (ADAPTER, {}, ["motion", "adapter"], "ca_lora_generate", {"KinoloomLoadI2vAdapter": "adapter"}),
        (ADAPTER, {"train_temporal": False}, ["adapter-best"], "ca_lora_generate",
         {"KinoloomLoadI2vAdapter": "adapter-best"}),
        (BOXES, {}, ["painting"], "svd_tracklets_generate", {CONTROL: "painting"}),
        (BOXES, {}, ["painting", "tracklets-best"], "svd_tracklets_generate", {CONTROL: "tracklets-best"}),
    ],
)  # fmt: skip
def test_each_loader_gets_the_file_that_it_is_for(
    run: Callable[..., Job], name: str, options: dict, labels: list[str], template: str, loaders: dict
) -> None:
    expected = {loader: label and file(label) for loader, label in loaders.items()}
    assert generation(run(name, labels, **options)) == {"template": template, "loaders": expected}


def test_files_that_were_deleted_are_not_offered(run: Callable[..., Job]) -> None:
    job = run(MD, ["spatial", "temporal"], gone=("spatial",), train="both")
    assert generation(job) == {"template": NEW, "loaders": {MOVES: file("temporal")}}
    with pytest.raises(ValueError, match="'run' has no file left"):
        generation(run(WAN, ["lora"], gone=("lora",)))
    with pytest.raises(ValueError, match="the files of Train SVD Fine-tune"):
        generation(run(FINETUNE, ["unet"]))


@pytest.mark.parametrize("name", recipes())
def test_what_a_method_names_is_in_its_templates(name: str) -> None:
    recipe = recipes()[name]
    config = make_config(name)
    named: dict[str, set[str]] = {}
    for choice in recipe.generations(config, NO_DATA):
        assert recipe.exports(config, NO_DATA).keys() >= set(choice.loaders.values()) and choice.loaders
        named.setdefault(choice.template, set()).update(choice.loaders)
    for template, loaders in named.items():
        nodes = json.loads((WORKFLOWS / f"{template}.json").read_text())["nodes"]
        mine = [n.get("title") or n["type"] for n in nodes if str((n.get("widgets_values") or [""])[0]).startswith("kinoloom/")]
        assert sorted(mine) == sorted(loaders), template


def test_each_file_is_in_its_loader_and_the_others_are_bypassed() -> None:
    def opened(loaders: dict[str, str | None]) -> dict[str, tuple[Any, int]]:
        nodes = {n.get("title") or n["type"]: n for n in workflow(BOTH, loaders)["nodes"]}
        return {name: (node["widgets_values"][0], node["mode"]) for name, node in nodes.items() if name in (LOOK, MOVES)}

    look, moves = "run/look.safetensors", "run/moves.safetensors"
    assert opened({LOOK: look, MOVES: moves}) == {LOOK: (look, 0), MOVES: (moves, 0)}
    assert opened({LOOK: look, MOVES: None}) == {LOOK: (look, 0), MOVES: (opened({})[MOVES][0], 4)}


@pytest.mark.parametrize(
    ("labels", "main"),
    [([], None), (["identity"], "identity"), (["identity", "motion-best", "combined-best"], "combined-best"),
     (["combined", "combined-best", "identity", "motion"], "combined")],
)  # fmt: skip
def test_the_main_file_is_the_whole_result_or_the_best_so_far(
    run: Callable[..., Job], labels: list[str], main: str | None
) -> None:
    assert run(SNS, labels).summary()["main_file"] == (main and file(main))
