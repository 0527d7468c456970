"""What ComfyUI's own check of a prompt says of our nodes before it is queued, and when their results are made anew."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import execution
import folder_paths
import pytest
from comfy_api.latest import io
from kinoloom.nodes import folders
from kinoloom.nodes.adapters import matching, start
from kinoloom.nodes.animatediff import loras as motion_loras
from kinoloom.nodes.animatediff import modules as motion
from kinoloom.nodes.data import nodes as data
from kinoloom.nodes.data import svd_nodes as svd_data
from kinoloom.nodes.data.reading.folder import resolve_folder
from kinoloom.nodes.tracklets import control
from kinoloom.nodes.tracklets import nodes as tracklets
from kinoloom.nodes.training import previews as samples
from kinoloom.nodes.training import registry as jobs
from kinoloom.nodes.training import train
from kinoloom.nodes.widgets import require_name
from kinoloom.trainers import recipes
from kinoloom.trainers.run.job import Job

import nodes

from ..coroutines import result_of
from ..runs import Published, finish, make_config, make_job

WAN, SNS, MD = "KinoloomTrainWanLora", "KinoloomTrainSetAndSequence", "KinoloomTrainMotionDirector"
TRACKLETS = "KinoloomTrainSvdTracklets"
MODULES = (control, data, matching, motion, motion_loras, samples, start, svd_data, tracklets, train)


class Anything(io.ComfyNode):
    """Stands for whatever arrives by wire."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="Anything", outputs=[io.AnyType.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(None)


class Output(io.ComfyNode):
    """Makes whatever it shows a part of the prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="Output", is_output_node=True, inputs=[io.AnyType.Input("shown")])

    @classmethod
    def execute(cls, shown: Any) -> io.NodeOutput:
        return io.NodeOutput()


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jobs, "_registry", jobs.Registry(tmp_path / "jobs"))
    for node in (Anything, Output, *(node for module in MODULES for node in module.NODES)):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)


def prompt_of(node_id: str, **values: Any) -> dict[str, dict]:
    """The node at its defaults but for `values`, everything that must be connected connected."""
    given = nodes.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()
    options = {**given["required"], **given.get("optional", {})}
    defaults = {name: spec[1]["default"] for name, spec in options.items() if "default" in spec[1]}
    wired = {name: ["any", 0] for name in given["required"] if name not in defaults}
    inputs = {**wired, **defaults, **values}
    return {"any": {"class_type": "Anything", "inputs": {}}, "node": {"class_type": node_id, "inputs": inputs}}


def fingerprint(node_id: str, **values: Any) -> Any:
    """What ComfyUI compares to know whether the node's last result may be used again."""
    node, inputs = nodes.NODE_CLASS_MAPPINGS[node_id], prompt_of(node_id, **values)["node"]["inputs"]
    given, _, v3 = execution.get_input_data(inputs, node, "node")
    call = execution._async_map_node_over_list("id", "node", node, given, "fingerprint_inputs", v3_data=v3)
    return result_of(call)[0]


def errors(node_id: str, **values: Any) -> list[str]:
    """What the check says of the node, whether it is the prompt's output or an output needs it."""
    prompt = prompt_of(node_id, **values)
    if not getattr(nodes.NODE_CLASS_MAPPINGS[node_id], "OUTPUT_NODE", False):
        prompt["output"] = {"class_type": "Output", "inputs": {"shown": ["node", 0]}}
    queued, error, _, found = result_of(execution.validate_prompt("id", prompt, None))
    assert found.keys() == (set() if queued else {"node"}), error
    return [f"{e['message']}: {e['details']}" for e in found["node"]["errors"]] if found else []


@pytest.mark.parametrize("node_id", recipes())
def test_defaults_and_names_of_any_language_are_queued(node_id: str) -> None:
    steps = {"set_steps": 5} if node_id == SNS else {}
    for name in ("my_run", " dance 2 ", "été-2", "踊り", "v1.5", "console", "com10", "auxiliary", "lpt"):
        assert errors(node_id, run_name=name, **steps) == []


@pytest.mark.parametrize(
    ("node_id", "values", "expected"),
    [
        ("KinoloomI2vStart", {"first_frame_cond": "cinemo", "use_dct_init": True}, ""),
        ("KinoloomI2vStart", {"first_frame_cond": ["any", 0], "use_dct_init": True}, ""),
        ("KinoloomI2vStart", {"use_dct_init": True}, "use_dct_init=True: expected first_frame_cond=cinemo, not lamp"),
        ("KinoloomI2vStart", {"width": 500}, "width=500: expected a multiple of 8"),
        ("KinoloomI2vStart", {"first_frame_cond": "svd"}, "first_frame_cond='svd': expected one of lamp, cinemo"),
        ("KinoloomI2vStart", {"dct_cutoff_shape": "disc"}, "dct_cutoff_shape: 'disc' not in ['rect', 'tri']"),
        ("KinoloomI2vSigmas", {"steps": ["any", 0], "cil_ratio": 0.9}, ""),
        ("KinoloomI2vSigmas", {"steps": 90, "cil_ratio": 0.05}, "steps=90: expected 1..50 for cil_ratio=0.05"),
        ("KinoloomAdainSampler", {}, ""),
        ("KinoloomAdainSampler", {"first_frame_from": 1.5}, "Value 1.5 bigger than max of 1.0: first_frame_from"),
    ],
)
def test_starts_of_videos_are_checked_before_they_are_queued(node_id: str, values: dict, expected: str) -> None:
    found = errors(node_id, **values)
    assert len(found) == bool(expected) and all(expected in error for error in found), found


@pytest.mark.parametrize(
    "name",
    ["", "  ", "a/b", "..", "../x", "a\\b", "a:b", ".hidden", "ends.", "con", "CON", "PRN.txt", "aux", "Nul", "com1", "COM9.x",
     "LPT3", "lpt1.a.b", "nul .txt", "COM²", "x" * 101, "é" * 51, "a\nb", "a\0b", "<img src=x>", "\ud800"],
)  # fmt: skip
@pytest.mark.parametrize("node_id", [WAN, MD])
def test_names_that_some_system_cannot_have_are_refused_once(node_id: str, name: str) -> None:
    (error,) = errors(node_id, run_name=name)
    assert f"run_name={name!r}: expected" in error


def test_a_name_is_kept_without_the_spaces_around_it() -> None:
    assert require_name("name", "\t two words \n") == "two words"


@pytest.mark.parametrize(
    ("node_id", "values", "expected"),
    [
        (WAN, {"rank": 0}, "rank=0: expected 1..256"),
        (WAN, {"learning_rate": 10.5}, "learning_rate=10.5: expected 0.0..10.0"),
        (WAN, {"learning_rate": float("nan")}, "learning_rate=nan: expected 0.0..10.0"),
        (WAN, {"optimizer": "SGD"}, "optimizer='SGD': expected one of AdamW"),
        (WAN, {"target_layers": "none"}, "target_layers='none': expected one of"),
        (SNS, {"set_steps": 0}, "set_steps=0: expected above 0"),
        (SNS, {"identity_file": "missing.safetensors"}, "identity_file='missing.safetensors': expected a file in"),
        (SNS, {"self_conditioning_prob": 0.5}, "self_conditioning_prob=0.5: expected 0, because"),
        (MD, {"rank": 7}, "rank=7: expected"),
        (TRACKLETS, {"self_tracking_steps": 0, "clean_steps": 0}, "self_tracking_steps=0 and clean_steps=0: expected"),
    ],
)
def test_options_that_do_not_fit_are_refused_once_with_field_value_and_range(
    node_id: str, values: dict[str, Any], expected: str
) -> None:
    (error,) = errors(node_id, **values)
    assert expected in error


def test_a_chosen_file_must_be_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loras = tmp_path / "loras"
    loras.mkdir()
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    (loras / "face.safetensors").write_bytes(b"x")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})  # the folder is gone after the test
    stage_two = {"set_steps": 0, "sequence_steps": 5}
    assert errors(SNS, identity_file="face.safetensors", **stage_two) == []
    (error,) = errors(SNS, identity_file="../outside.safetensors", **stage_two)
    assert "identity_file='../outside.safetensors': expected a file in the model folder loras" in error
    (error,) = errors(SNS, identity_file="face.safetensors", set_steps=5)
    assert "identity_file=" in error and "set_steps=5" in error


def test_what_arrives_by_wire_is_no_reason_to_refuse_and_the_rest_is_checked() -> None:
    wire = ["any", 0]
    assert errors(SNS, run_name=wire, set_steps=0, identity_file=wire) == []
    assert errors(MD, preset=wire, rank=7) == []
    (error,) = errors(SNS, run_name=wire, set_steps=wire, rank=257)
    assert "rank=257: expected 1..256" in error


FOLDER, SVD_FOLDER = "KinoloomClipsFromFolder", "KinoloomSvdClipsFromFolder"
BOX = '{"width": 64, "height": 64, "frames": 4, "tracklets": [{"id": 0, "keyframes": []}]}'


@pytest.mark.parametrize(
    ("node_id", "values", "expected"),
    [
        (FOLDER, {"role": "prior", "hold_out": 2}, "hold_out=2: only clips with role train"),
        (SVD_FOLDER, {"role": "validation", "hold_out": 1}, "hold_out=1: only clips with role train"),
        (FOLDER, {"role": "test"}, "role='test': expected one of train, validation, prior"),
        (FOLDER, {"hold_out": -1}, "hold_out=-1: expected 0..4096"),
        (FOLDER, {"folder": "no_such_folder"}, "no_such_folder"),
        (FOLDER, {"frames_per_clip": 0}, "frames_per_clip"),
        ("KinoloomEncodeClips", {"caption": "a"}, "connect either images or video"),
        ("KinoloomEncodeSvdClips", {"images": ["any", 0], "video": ["any", 0]}, "connect either images or video"),
        ("KinoloomPriorClips", {"prompts": " \n"}, "prompts is empty"),
        ("KinoloomSamplePrompts", {"prompts": "\n"}, "prompts: found 0, expected 1..16"),
        ("KinoloomSamplePrompts", {"prompts": "a\n" * 17}, "prompts: found 17, expected 1..16"),
        ("KinoloomSampleI2v", {"prompts": "\n"}, "prompts: found 0, expected 1..16"),
        ("KinoloomApplyMotionModule", {"context_length": 8, "context_overlap": 8}, "context_overlap=8: expected less than context_length=8"),
        ("KinoloomApplyMotionModule", {"context_length": 1}, "context_length=1: expected 2..128"),
        ("KinoloomMergeMotionLoras", {"name": "LPT9.v2", "lora_1": ["any", 0]}, "name='LPT9.v2': expected another name"),
        ("KinoloomLoadTrackletControl", {"file": "none"}, "file='none': expected a control of the list"),
        ("KinoloomLoadTrackletControl", {"file": "gone.safetensors"}, "file='gone.safetensors': expected a file"),
        ("KinoloomTracklets", {"json": BOX}, "tracklets[0].id=0: expected a whole number"),
    ],
)  # fmt: skip
def test_nodes_around_training_are_checked_too(node_id: str, values: dict[str, Any], expected: str) -> None:
    wired = {"folder": ["any", 0]} if node_id in (FOLDER, SVD_FOLDER) else {}
    (error,) = errors(node_id, **{**wired, **values})
    assert expected in error


@pytest.mark.parametrize(
    ("node_id", "values"),
    [
        (FOLDER, {"folder": 1, "role": 1, "hold_out": 2}),
        (SVD_FOLDER, {"folder": 1, "role": "prior", "hold_out": 1}),
        ("KinoloomEncodeClips", {"images": 1, "caption": 1}),
        ("KinoloomSamplePrompts", {"prompts": 1}),
        ("KinoloomSampleI2v", {"prompts": 1, "images": 1}),
        ("KinoloomPriorClips", {"prompts": 1}),
        ("KinoloomApplyMotionModule", {"context_length": 1, "context_overlap": 100}),
        ("KinoloomMergeMotionLoras", {"lora_1": 1, "lora_2": 1, "name": 1}),
        ("KinoloomLoadTrackletControl", {"file": "none", "path": 1}),
        ("KinoloomLoadTracklets", {"file": 1}),
        ("KinoloomTracklets", {"json": 1, "width": 1, "frames": 1}),
    ],
)
def test_any_of_their_inputs_may_arrive_by_wire(node_id: str, values: dict[str, Any]) -> None:
    assert errors(node_id, **{name: ["any", 0] if value == 1 else value for name, value in values.items()}) == []


@pytest.mark.parametrize(("node_id", "name"), [(FOLDER, "folder"), (SVD_FOLDER, "folder"), (WAN, "run_name"),
                                               ("KinoloomLoadTracklets", "file")])  # fmt: skip
def test_what_arrives_by_wire_and_is_cheap_to_read_is_read_every_time(node_id: str, name: str) -> None:
    assert fingerprint(node_id, **{name: ["any", 0]}) != fingerprint(node_id, **{name: ["any", 0]})


@pytest.mark.parametrize(
    ("node_id", "folder", "name"),
    [
        ("KinoloomLoadMotionModule", folders.MOTION_MODELS, "motion_module"),
        ("KinoloomLoadMotionLora", folders.MOTION_LORAS, "lora_name"),
        ("KinoloomMergeMotionLoras", folders.MOTION_LORAS, "lora_1"),
        ("KinoloomMergeMotionLoras", folders.MOTION_LORAS, "lora_2"),
        ("KinoloomLoadTrackletControl", "tracklet_control", "file"),
        (SNS, "loras", "identity_file"),
    ],
)
def test_a_file_that_is_replaced_is_loaded_again(
    node_id: str, folder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    one.write_bytes(b"1")
    other.write_bytes(b"1")
    chosen, wired = {name: "one.safetensors"}, {name: ["any", 0]}
    if node_id == "KinoloomMergeMotionLoras" and name == "lora_2":
        chosen["lora_1"] = wired["lora_1"] = "other.safetensors"
    before = fingerprint(node_id, **chosen), fingerprint(node_id, **wired)
    assert (fingerprint(node_id, **chosen), fingerprint(node_id, **wired)) == before
    one.write_bytes(b"22")
    after = fingerprint(node_id, **chosen), fingerprint(node_id, **wired)
    assert after[0] != before[0] and after[1] != before[1]
    (tmp_path / "more.safetensors").write_bytes(b"4")
    folder_paths.filename_list_cache.clear()  # as ComfyUI does when a folder changes
    assert fingerprint(node_id, **chosen) == after[0], "another file is no reason"
    assert fingerprint(node_id, **wired) != after[1], "it may be the one on the wire"


def test_merging_what_arrives_by_wire_is_not_done_again_for_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.MOTION_LORAS, ([str(tmp_path)], {".safetensors"}))
    wired = {"lora_1": ["any", 0]}
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    before = fingerprint("KinoloomMergeMotionLoras", **wired)
    made = folders.output_folder(folders.MOTION_LORAS) / "merged.safetensors"
    made.parent.mkdir()
    made.write_bytes(b"x")
    folder_paths.filename_list_cache.clear()
    assert fingerprint("KinoloomMergeMotionLoras", **wired) == before


@pytest.mark.parametrize("folder", ["../secret", "/etc", "clips/../..", "clips\0", "", ".", None, 7])
def test_a_folder_by_wire_cannot_lead_out_of_the_input_folder(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "input" / "clips").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    with pytest.raises(ValueError, match="folder="):
        resolve_folder(tmp_path / "input", folder)


@pytest.mark.parametrize("file", ["../secret.csv", "gone.json", "clips"])
def test_tracklets_by_wire_are_files_of_the_input_folder(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "input" / "clips").mkdir(parents=True)
    (tmp_path / "secret.csv").write_text("1,1,0,0,8,8")
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    with pytest.raises(ValueError, match="Invalid file path|file="):
        tracklets.LoadTracklets.execute(file, 64, 64, 24.0, 0.0)


@pytest.fixture
def stopped(inputs: Callable, tmp_path: Path) -> Job:
    """A run called "dance", stopped after 3 of 9 steps."""
    job = make_job(tmp_path, *inputs(WAN), make_config(WAN, steps=9, rank=4), WAN)
    job.spec = replace(job.spec, run_name="dance")
    job.publish = Published().at(3, Job.stop)
    finish(job, inputs(WAN)[0], "stopped")
    jobs.registry().jobs[job.spec.id] = job
    return job


@pytest.mark.parametrize(
    ("node_id", "changed", "expected"),
    [
        (WAN, {"rank": 8}, "run 'dance' cannot be resumed: changed since it was started: rank (was 4, now 8)"),
        (SNS, {}, "run 'dance' cannot be resumed: changed since it was started: training method"),
        (WAN, {"steps": 2}, "steps=2"),
    ],
)
def test_a_run_that_cannot_go_on_with_the_options_is_refused_before_anything_is_encoded(
    stopped: Job, node_id: str, changed: dict[str, Any], expected: str
) -> None:
    same = {name: stopped.config.__dict__[name] for name in ("seed", "rank", "steps", "save_precision")}
    for name in ("dance", " Dance "):
        assert errors(WAN, run_name=name, **same) == []
        own = {**same, **changed} if node_id == WAN else changed
        (error,) = errors(node_id, run_name=name, **own)
        assert expected.casefold() in error.casefold()
        assert errors(node_id, run_name="dance-2", **own) == [], "another run"
    assert errors(WAN, run_name="dance", **{**same, "learning_rate": 1e-5, "steps": 20}) == [], "may change on the way"


def test_a_chosen_file_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    config, hashes = recipes()[SNS].Config, []
    none = dict.fromkeys(train.file_options(config), "none")
    for content in (b"1", b"2", b"1"):
        (tmp_path / "face.safetensors").write_bytes(content)
        values = {**none, "identity_file": "face.safetensors"}
        hashes.append(train.resolve_files(config, values)["identity_file"])
        assert values["identity_file"] == str(tmp_path / "face.safetensors")
    assert hashes[0] == hashes[2] == hashlib.sha256(b"1").hexdigest() != hashes[1]
    assert train.resolve_files(config, none) == {}
