"""The shipped workflows: offered as templates, opened by the real front end, run with only file names changed.

Those for SVD take gigabytes with ComfyUI's own loader, which knows one width alone, so only the fine-tune is run with it.
"""

import json
from pathlib import Path

import comfy_extras.nodes_video_model as core
import folder_paths
import pytest
import torch
from kinoloom.trainers import recipes
from PIL import Image
from playwright.sync_api import Page
from safetensors.torch import load_file
from torch import Tensor
from toyworld.install import IMAGE_VAE, VIDEO_UNET
from toyworld.install import VISION as VISION_ENCODER

from ..media import write_image
from ..server_prompts import write_clips, write_video
from comfy_client import Client, Server, set_widget, to_prompt

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
FILES = {
    "UNETLoader": ("unet_name", "tiny_wan.safetensors"),
    "CLIPLoader": ("clip_name", "tiny_clip.safetensors"),
    "VAELoader": ("vae_name", "tiny_wan_vae.safetensors"),
    "CheckpointLoaderSimple": ("ckpt_name", "narrow_sd15.safetensors"),
    "ImageOnlyCheckpointLoader": ("ckpt_name", "narrow_svd.safetensors"),
    "KinoloomLoadMotionModule": ("motion_module", "narrow_motion.safetensors"),
}
SMALL = {"frames_per_clip": 9, "size": 32}
SMALL_SVD = {"frames_per_clip": 2, "size": 64}
VISION = "conditioner.embedders.0.open_clip.model.visual."
TIMEOUT = 300.0  # seconds for a prompt; SVD's image encoder comes in one size, which a CPU takes its time for
TRAINING = {
    "wan_lora": {
        "KinoloomClipsFromFolder": {"folder": "clips", **SMALL},
        "KinoloomTrainWanLora": {"run_name": "template wan", "steps": 3},
    },
    "set_and_sequence": {
        "LoadVideo": {"file": "square.mp4"},
        "KinoloomEncodeClips": {**SMALL, "single_frames": 2, "token_variants": 2},
        "KinoloomTrainSetAndSequence": {"run_name": "template sns", "set_steps": 2, "sequence_steps": 2},
    },
    "motion_director": {
        "LoadVideo": {"file": "square.mp4"},
        "KinoloomEncodeClips": {"frames_per_clip": 4, "size": 64},
        "KinoloomTrainMotionDirector": {"run_name": "template md", "preset": "low", "steps": 2},
    },
    "ca_lora": {
        "KinoloomClipsFromFolder": {"folder": "clips", "frames_per_clip": 5, "size": 64},
        "KinoloomSampleI2v": {"prompts": "a square moves", "size": 64, "frames": 4, "steps": 1},
        "KinoloomTrainCaLora": {"run_name": "template ca", "steps": 2, "frames": 4},
    },
    "svd_lora": {
        "LoadVideo": {"file": "square.mp4"},
        "KinoloomEncodeSvdClips": SMALL_SVD,
        "KinoloomTrainSvdLora": {"run_name": "template svd", "steps": 2},
    },
    "svd_tracklets": {
        "KinoloomSvdClipsFromFolder": {"folder": "tracked", **SMALL_SVD},
        "KinoloomTrainSvdTracklets": {"run_name": "template boxes", "self_tracking_steps": 1, "clean_steps": 1},
    },
}
TOY_LOADER = ("svd_lora_train", "svd_lora_generate", "svd_tracklets_train", "svd_tracklets_generate")
ADAPTERS = ("KinoloomLoadI2vAdapter", "First adapter", "Second adapter")
LOADED_BY = dict.fromkeys(("KinoloomLoadTrackletControl", *ADAPTERS), "file")  # the widget that takes a method's file
ADAPTER = "template ca/template ca-adapter-000002.safetensors"
TEMPORAL = {"KinoloomLoadMotionLora": "template md/template md-temporal-000002.safetensors"}
MADE = {  # method -> generation workflow -> the node of each of the method's files
    "wan_lora": {"wan_lora_generate": {"LoraLoaderModelOnly": "template wan/template wan-lora-000003.safetensors"}},
    "set_and_sequence": {
        "set_and_sequence_generate": {
            "Load LoRA: identity": "template sns/template sns-identity-000002.safetensors",
            "Load LoRA: motion": "template sns/template sns-motion-000004.safetensors",
        },
    },
    "motion_director": {
        "motion_director_new_subject_generate": TEMPORAL,
        "motion_director_both_generate": {
            **TEMPORAL,
            "Load LoRA: spatial": "template md/template md-spatial-000002.safetensors",
        },
    },
    "ca_lora": {
        "ca_lora_generate": {"KinoloomLoadI2vAdapter": ADAPTER},
        "ca_lora_two_generate": {"First adapter": ADAPTER, "Second adapter": ADAPTER},
        "ca_lora_maps_generate": {"First adapter": ADAPTER, "Second adapter": ADAPTER},
    },
    "svd_lora": {"svd_lora_generate": {"LoraLoaderModelOnly": "template svd/template svd-lora-000002.safetensors"}},
    "svd_tracklets": {
        "svd_tracklets_generate": {
            "KinoloomLoadTrackletControl": "template boxes/template boxes-tracklets-000002.safetensors"
        },
    },
}
SAMPLED = {
    "EmptyHunyuanLatentVideo": {"width": 32, "height": 32, "length": 9},
    "EmptyLatentImage": {"width": 64, "height": 64, "batch_size": 4},
    "KinoloomTracklets": {"width": 64, "height": 64, "frames": 2},
    "SVD_img2vid_Conditioning": {"width": 64, "height": 64, "video_frames": 2},
    "KinoloomI2vStart": {"width": 64, "height": 64, "frames": 4},
    "KinoloomI2vSigmas": {"steps": 2},
    "LoadImage": {"image": "square.png"},
    "KSampler": {"steps": 2},
}


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def types(workflow: dict) -> list[str]:
    return [node["type"] for node in workflow["nodes"]]


def with_values(client: Client, name: str, values: dict[str, dict]) -> dict:
    workflow, info = load(name), client.object_info()
    if name in TOY_LOADER:
        (loader,) = (node for node in workflow["nodes"] if node["type"] == "ImageOnlyCheckpointLoader")
        loader["type"], loader["widgets_values"] = "ToyWorldImageToVideo", [VIDEO_UNET, VISION_ENCODER, IMAGE_VAE]
    for node_type, (widget, file) in FILES.items():
        if node_type in types(workflow):
            set_widget(workflow, info, node_type, widget, file)
    sampled = {node: widgets for node, widgets in SAMPLED.items() if node in types(workflow)}
    for node, widgets in {**sampled, **values}.items():
        for widget, value in widgets.items():
            set_widget(workflow, info, node, widget, value)
    return workflow


SMOKE = ("wan_lora", "motion_director")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.smoke] if name in SMOKE else []) for name in TRAINING]
)
def test_train_then_generate(server: Server, client: Client, method: str) -> None:
    write_clips(server.base)
    (server.base / "input" / "clips" / "square.txt").unlink(missing_ok=True)
    write_video(server.base / "input" / "square.mp4")
    write_image(server.base / "input" / "square.png", 90)
    tracked = write_video(server.base / "input" / "tracked" / "square.mp4")
    tracked.with_suffix(".csv").write_text("".join(f"{frame + 1},1,{frame},8,12,12\n" for frame in range(9)))
    if method == "wan_lora":  # one caption, as its note says
        (server.base / "input" / "clips" / "square.static.txt").rename(server.base / "input" / "clips" / "square.txt")
        (server.base / "input" / "clips" / "square.motion.txt").unlink()
    outputs = client.run_workflow(with_values(client, f"{method}_train", TRAINING[method]), TIMEOUT)
    assert any(file.endswith(".png") for file in client.files(outputs)), "the loss graph"
    client._object_info = None  # the lists of files have grown
    for name, files in MADE[method].items():
        made = {node: {LOADED_BY.get(node, "lora_name"): f"kinoloom/{file}"} for node, file in files.items()}
        found = client.files(client.run_workflow(with_values(client, name, made), TIMEOUT))
        videos = [file for file in found if file.endswith(".mp4")]
        assert len(videos) == types(load(name)).count("SaveVideo") > 0
        assert all((server.base / video).stat().st_size for video in videos)
    assert "lora key not loaded" not in server.log.read_text()


def test_svd_finetune(server: Server, client: Client, narrow_svd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model trained is the one sampled from, and the one in the checkpoint that core's loader takes."""
    write_clips(server.base)
    write_image(server.base / "input" / "square.png", 90)
    run = {"run_name": "template svd model", "steps": 2, "learning_rate": 1e-3, "precision": "fp32"}
    values = {
        "KinoloomSvdClipsFromFolder": {"folder": "clips", **SMALL_SVD},
        "KinoloomTrainSvdFinetune": run,
    }
    outputs = client.run_workflow(with_values(client, "svd_finetune", values), TIMEOUT)
    assert sorted(file.rsplit(".", 1)[1] for file in client.files(outputs)) == ["mp4", "png"]

    checkpoints = server.base / "output" / "checkpoints"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(checkpoints)], {".safetensors"}))
    (saved,) = checkpoints.glob("my_svd_model_*.safetensors")
    model, vision, vae = core.ImageOnlyCheckpointLoader().load_checkpoint(saved.name)
    assert type(model.model).__name__ == "SVD_img2vid"
    base = load_file(server.base / "models" / "checkpoints" / narrow_svd)
    assert differing(vae.get_sd(), base, "first_stage_model.") == []
    assert differing({"ln_post.bias": vision.get_sd()["vision_model.post_layernorm.bias"]}, base, VISION) == []
    (file,) = server.base.glob("models/*/kinoloom/*/template svd model-unet-000002.safetensors")
    unet = model.model.diffusion_model.state_dict()
    assert len(unet) > 1000 and differing(unet, load_file(file)) == []
    trained = differing(unet, base, "model.diffusion_model.")
    assert len(trained) > 100 and all(".time_stack.0." in key for key in trained)
    client.post("/free", {"unload_models": True, "free_memory": True})


def differing(tensors: dict[str, Tensor], others: dict[str, Tensor], prefix: str = "") -> list[str]:
    """Names of the tensors that the others, under a prefix, are not equal to."""
    return [key for key, tensor in tensors.items() if not torch.equal(tensor.float(), others[prefix + key].float())]


@pytest.mark.parametrize("name", NAMES)
def test_front_end_opens_it_whole_and_submits_what_we_submit(page: Page, client: Client, name: str) -> None:
    page.evaluate("(text) => app.loadGraphData(JSON.parse(text))", (FOLDER / f"{name}.json").read_text())
    known = "() => app.graph.nodes.filter(n => LiteGraph.registered_node_types[n.type]).map(n => n.type)"
    assert sorted(types(load(name))) == sorted(page.evaluate(known))
    assert len(load(name)["links"]) == page.evaluate(
        "() => app.graph.links.size ?? Object.keys(app.graph.links).length"
    )
    submitted = page.evaluate("async () => (await app.graphToPrompt()).output")
    ours = to_prompt(load(name), client.object_info())
    assert {key: (n["class_type"], n["inputs"]) for key, n in submitted.items()} == {
        key: (n["class_type"], n["inputs"]) for key, n in ours.items()
    }


def test_train_nodes_of_templates_are_at_their_defaults(client: Client) -> None:
    info = client.object_info()
    nodes = [node for name in NAMES for node in to_prompt(load(name), info).values() if node["class_type"] in recipes()]
    assert len(nodes) >= len(recipes())
    for node in nodes:
        given = info[node["class_type"]]["input"]
        options = {**given["required"], **given.get("optional", {})}
        widgets = {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}
        changed = {name for name, value in widgets.items() if value != options[name][1].get("default", value)}
        assert changed <= {"run_name"}, node["class_type"]


def test_template_browser_offers_them_with_thumbnails(client: Client) -> None:
    assert sorted(client.get("/workflow_templates")["kinoloom"]) == NAMES
    assert {name.rsplit("_", 1)[1] for name in NAMES} == {"train", "generate", "finetune"}
    for name in NAMES:
        assert json.loads(client.read(f"/api/workflow_templates/kinoloom/{name}.json")) == load(name)
        picture = FOLDER / f"{name}.jpg"
        assert client.read(f"/api/workflow_templates/kinoloom/{name}.jpg") == picture.read_bytes()
        assert Image.open(picture).size >= (400, 150)


def test_every_input_of_every_node_says_when_to_change_it(client: Client) -> None:
    ours = {name: info for name, info in client.object_info().items() if name.startswith("Kinoloom")}
    assert {"KinoloomEncodeClips", "KinoloomClipsFromFolder", "KinoloomTrainingResult"} <= ours.keys()
    for name, info in ours.items():
        assert info["description"] and info["category"].startswith("Kinoloom/")
        for inputs in (info["input"]["required"], info["input"].get("optional", {})):
            for widget, spec in inputs.items():
                assert len(spec) > 1 and len(spec[1].get("tooltip", "")) > 5, f"{name}.{widget}"
