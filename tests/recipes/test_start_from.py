"""Starting from a LoRA file: the values at the start of a run, and the files that the node refuses."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from kinoloom.lora_io.file import load, save
from kinoloom.lora_io.keys import to_comfy
from kinoloom.trainers import recipes
from kinoloom.trainers.run.job import Job

from ..runs import Published, assert_same, events, finish, load_model, make_config, make_job, state_of

WAN, SNS, SVD = "KinoloomTrainWanLora", "KinoloomTrainSetAndSequence", "KinoloomTrainSvdLora"
DIRECTOR = "KinoloomTrainMotionDirector"
STILL = {"steps": 1, "learning_rate": 0.0, "weight_decay": 0.0, "validate_every": 0, "save_precision": "fp32"}
Run = Callable[..., Job]


@pytest.fixture(scope="module")
def run(inputs: Callable, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of a method; made once for the same options."""
    made: dict[str, Job] = {}

    def of(recipe: str, **options: Any) -> Job:
        key = repr([recipe, options])
        if key not in made:
            model, data = inputs(recipe)
            config = make_config(recipe, **options)
            config.check_model(model)
            made[key] = finish(make_job(tmp_path_factory.mktemp("run"), model, data, config, recipe), model)
        return made[key]

    return of


def first(run: Run, recipe: str, **options: Any) -> Job:
    return run(recipe, save_precision="fp32", validate_every=0, **{"steps": 2, **options})


def chosen(recipe: str, job: Job) -> dict[str, str]:
    """The options with which a run begins from the files of another."""
    if recipe == DIRECTOR:
        return {"start_from": job.files["spatial"], "start_from_motion": job.files["temporal"]}
    return {"start_from": job.result_files[-1]}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [WAN, SVD, DIRECTOR])
def test_a_run_begins_with_the_factors_of_the_file(recipe: str, run: Run) -> None:
    one = first(run, recipe)
    still = {**STILL, **({"spatial_learning_rate": 0.0} if recipe == DIRECTOR else {})}
    two = run(recipe, **still, **chosen(recipe, one))
    assert two.files.keys() == one.files.keys()
    for name, path in one.files.items():
        assert_same(load(Path(two.files[name]))[0], load(Path(path))[0], name)


def test_the_loss_goes_on_where_the_file_ends(run: Run) -> None:
    one = first(run, WAN, steps=8)
    begun, afresh = (
        run(WAN, **{**STILL, "steps": 4}, **start) for start in ({"seed": 1}, {"seed": 1, **chosen(WAN, one)})
    )
    before, after = ([e["losses"]["concept"] for e in events(job, "step")] for job in (begun, afresh))
    assert sum(after) < sum(before)


def test_a_resumed_run_does_not_begin_from_the_file_again(run: Run, inputs: Callable, tmp_path: Path) -> None:
    model, data = inputs(WAN)
    config = make_config(WAN, steps=4, validate_every=0, **chosen(WAN, first(run, WAN)))
    straight = finish(make_job(tmp_path / "a", model, data, config, WAN), model)
    finish(make_job(tmp_path / "b", model, data, config, WAN, Published().at(2, Job.stop)), model, "stopped")
    resumed = finish(make_job(tmp_path / "b", model, data, config, WAN), model)
    assert_same(vars(state_of(resumed)), vars(state_of(straight)))


def test_a_file_of_another_scale_has_the_same_effect(run: Run, inputs: Callable, tmp_path: Path) -> None:
    tensors = load(Path(first(run, WAN).result_files[-1]))[0]
    scaled = {**tensors, **{k.replace("lora_A.weight", "alpha"): torch.tensor(8.0) for k in tensors if "lora_A" in k}}
    save(tmp_path / "scaled.safetensors", scaled)
    begun = run(WAN, **STILL, alpha=2.0, start_from=str(tmp_path / "scaled.safetensors"))
    ours = load(Path(begun.result_files[-1]))[0]
    for key in (key for key in tensors if "lora_B" in key):
        torch.testing.assert_close(ours[key] * (2.0 / 4), tensors[key] * (8.0 / 4), rtol=1e-6, atol=0)


def test_set_and_sequence_begins_stage_one_from_a_look(run: Run) -> None:
    look = first(run, WAN)
    stages = {"set_steps": 1, "sequence_steps": 0, "gradient_accumulation": 1}
    begun = run(SNS, **{k: v for k, v in STILL.items() if k != "steps"}, **stages, start_from=look.result_files[-1])
    assert_same(load(Path(begun.files["identity"]))[0], load(Path(look.result_files[-1]))[0])
    with pytest.raises(ValueError, match="start_from='a.safetensors': expected none beside an identity_file"):
        make_config(SNS, set_steps=0, identity_file="/x/b.safetensors", start_from="/x/a.safetensors")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("rank", "has rank 4, but rank=8: set rank to 4"),
        ("layers", "has layers that this model does not train"),
        ("motion", "a motion file: motion alone"),
        ("base", "trained on another base model"),
        ("i2v", "made for another model: its metadata says ss_base_model_version='wan-i2v'"),
        ("kind", "expected a layer of a Wan block"),
        ("text", "not a readable safetensors file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name_before_the_run(
    case: str, message: str, run: Run, inputs: Callable, tmp_path: Path
) -> None:
    model, _ = inputs(WAN)
    tensors, metadata = load(Path(first(run, WAN).result_files[-1]))
    options: dict[str, Any] = {"rank": 8} if case == "rank" else {"target_layers": "attention"} if case == "layers" else {}
    if case == "motion":
        metadata["sns.stage"] = "motion"
    if case == "i2v":
        metadata["ss_base_model_version"] = "wan-i2v"
    if case == "base":
        tiny.write_wan(tmp_path / "other.safetensors", seed=5)
        model = load_model(tmp_path / "other.safetensors")
    if case == "kind":
        tensors = {key.replace("blocks.", "layers."): tensor for key, tensor in tensors.items()}
    save(tmp_path / "my start.safetensors", tensors, metadata)
    if case == "text":
        (tmp_path / "my start.safetensors").write_text("no tensors")
    config = make_config(WAN, start_from=str(tmp_path / "my start.safetensors"), **options)
    with pytest.raises(ValueError, match="start_from='my start.safetensors': .*" + message):
        config.check_model(model)


@pytest.mark.parametrize("recipe", [WAN, SVD, DIRECTOR])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("half", "up.weight has no .*down.weight"),
        ("nan", "holds NaN or infinite values"),
        ("vector", "is not a matrix"),
        ("whole numbers", "is not a matrix but torch.int32"),
        ("alpha", "alpha': expected one finite number, found .nan"),
    ],
)
def test_a_file_with_a_damaged_layer_is_refused_by_name_before_the_run(
    case: str, message: str, recipe: str, run: Run, inputs: Callable, tmp_path: Path
) -> None:
    model, _ = inputs(recipe)
    options = chosen(recipe, first(run, recipe))
    tensors, metadata = load(Path(options["start_from"]))
    down = next(key for key in tensors if "lora_A" in key or "lora_down" in key)
    factor = tensors.pop(down)
    if case == "alpha":
        tensors |= {down: factor, down.rpartition(".lora_")[0] + ".alpha": torch.tensor(math.nan)}
    elif case != "half":
        damaged = {"nan": factor * math.nan, "vector": factor.flatten()[:4].clone(), "whole numbers": factor.int()}
        tensors[down] = damaged[case]
    save(tmp_path / "my start.safetensors", tensors, metadata)
    config = make_config(recipe, **{**options, "start_from": str(tmp_path / "my start.safetensors")})
    with pytest.raises(ValueError, match="start_from='my start.safetensors': .*" + message):
        config.check_model(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_from": "/x/a"}, "start_from_motion='': expected the temporal LoRA too"),
        ({"start_from_motion": "/x/a"}, "start_from='': expected the spatial LoRA too"),
        ({"start_from": "/x/a", "train": "temporal"}, "start_from='a': expected none"),
        ({"start_from_motion": "/x/a", "train": "spatial"}, "start_from_motion='a': expected none"),
        ({"start_from": "/x/a", "start_from_motion": "/x/b", "spatial_loras": 2}, "expected none with spatial_loras=2"),
    ],
)
def test_motion_director_wants_the_files_of_what_it_trains(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(DIRECTOR, **options)


def test_motion_director_refuses_a_file_of_the_other_kind(run: Run, inputs: Callable) -> None:
    model, _ = inputs(DIRECTOR)
    job = first(run, DIRECTOR)
    config = make_config(DIRECTOR, **chosen(DIRECTOR, job))
    with pytest.raises(ValueError, match=r"start_from='run-temporal-000002.safetensors': LoRA key .*expected a factor of"):
        replace(config, start_from=job.files["temporal"]).check_model(model)
    with pytest.raises(ValueError, match="start_from_motion='run-spatial-.*': no layers of a motion module"):
        replace(config, start_from_motion=job.files["spatial"]).check_model(model)
    with pytest.raises(ValueError, match="start_from='run-spatial-.*': has rank 4, but rank=2: set rank to 4"):
        replace(config, rank=2).check_model(model)


def test_every_method_that_trains_a_lora_can_begin_from_one() -> None:
    for name, recipe in recipes().items():
        knobs = recipe.Config.__dataclass_fields__
        assert ("start_from" in knobs) == ("rank" in knobs), name


def test_an_svd_lora_in_other_names_points_to_the_converter(run: Run, inputs: Callable, tmp_path: Path) -> None:
    tensors, metadata = load(Path(first(run, SVD).result_files[-1]))
    other = {key.replace("diffusion_model.", "unet."): tensor for key, tensor in tensors.items()}
    save(tmp_path / "diffusers.safetensors", other, metadata)
    with pytest.raises(ValueError, match="start_from='diffusers.safetensors': .* Convert SVD Model"):
        make_config(SVD, start_from=str(tmp_path / "diffusers.safetensors")).check_model(inputs(SVD)[0])
    assert to_comfy({"a.lora_down.weight": torch.zeros(1)})  # the names that are read
