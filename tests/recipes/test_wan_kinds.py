"""Wan's other models are refused by name, recognised by class, shape, file name or metadata."""

from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.supported_models
import pytest
import tiny
import torch
from kinoloom.nodes.training.train import train_node
from kinoloom.trainers import recipes
from kinoloom.trainers.backbones.flow import wan
from kinoloom.trainers.backbones.flow.wan_kinds import WIDTH_14B, require_wan21
from safetensors.torch import load_file, save_file

from ..runs import load_model, make_config

WAN_LORA = "KinoloomTrainWanLora"
SMALL = {"dim": 128, "num_heads": 2, "ffn_dim": 128, "num_layers": 1, "out_dim": 16, "text_dim": 64, "in_dim": 16}
VARIANTS = {
    "WAN22_T2V": ({"in_dim": 48, "out_dim": 48, "model_type": "t2v"}, r"Wan 2\.2 5B"),
    "WAN21_Vace": ({"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}, "Wan VACE"),
    "WAN21_FunControl2V": ({"in_dim": 48, "model_type": "t2v"}, "a Wan t2v model with 48 input channels .Fun Control"),
    "WAN21_I2V": ({"in_dim": 36, "model_type": "i2v"}, r"Wan 2\.1 image-to-video"),
    "WAN21_T2V": ({"in_dim": 36, "model_type": "t2v"}, r"Wan 2\.2 A14B image-to-video"),
    "WAN21_Camera": ({"in_dim": 32, "model_type": "camera", "in_dim_control_adapter": 24}, "Wan Fun Camera"),
    "WAN22_Camera": ({"in_dim": 36, "model_type": "camera_2.2", "in_dim_control_adapter": 24}, "Wan Fun Camera"),
    "WAN21_HuMo": ({"in_dim": 36, "model_type": "humo"}, "HuMo"),
    "WAN22_S2V": ({"model_type": "s2v"}, r"Wan 2\.2 S2V"),
    "WAN22_Animate": ({"in_dim": 36, "model_type": "animate"}, r"Wan 2\.2 Animate"),
    "WAN21_SCAIL": ({"in_dim": 20, "model_type": "scail"}, "SCAIL"),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_every_other_class_is_named_as_what_it_is(name: str) -> None:
    own, called = VARIANTS[name]
    config = getattr(comfy.supported_models, name)({"image_model": "wan2.1", **SMALL, **own})
    with pytest.raises(ValueError, match=rf"model: found {called}.*, expected Wan 2.1 text-to-video"):
        wan.Wan.grid(config.get_model({}, "", torch.device("meta")), {})


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled", "an expert of Wan 2.2 A14B"),
        ("Wan2_2-T2V-A14B-LOW_fp8_e4m3fn", "an expert of Wan 2.2 A14B"),
        ("WAN22 T2V low", "an expert of Wan 2.2 A14B"),
        ("my t2v low-noise merge", "an expert of Wan 2.2 A14B"),
        ("Phantom-Wan-14B_fp16", "Phantom"),
    ],
)
@pytest.mark.parametrize("method", [WAN_LORA, "KinoloomTrainSetAndSequence"])
def test_the_node_refuses_by_the_name_of_the_file(method: str, file: str, message: str, tmp_path: Path) -> None:
    tiny.write_wan(tmp_path / f"{file}.safetensors")
    model = load_model(tmp_path / f"{file}.safetensors")
    with pytest.raises(ValueError, match=rf"model: {file}\.safetensors is {message}"):
        make_config(method, wan_version="2.1").check_model(model)


def test_a_renamed_expert_is_known_by_its_metadata(tmp_path: Path, data: Any) -> None:
    tiny.write_wan(tmp_path / "plain.safetensors")
    tensors, path = load_file(tmp_path / "plain.safetensors"), tmp_path / "favourite.safetensors"
    config = '{"transformer": {"num_heads": 2, "text_dim": 768}}'
    save_file(tensors, path, {"config": config, "modelspec.title": "Wan2.2 T2V 14B High Noise"})
    with pytest.raises(ValueError, match=r"favourite\.safetensors is an expert of Wan 2\.2 A14B"):
        given = {"model": load_model(path), "data": data, "run_name": "unused"}
        train_node(recipes()[WAN_LORA]).execute(**given, **vars(make_config(WAN_LORA)))


def test_a_14b_file_that_says_nothing_is_asked_about(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    silent = tmp_path / "models" / "renamed.safetensors"
    tiny.write_wan(silent)
    with pytest.raises(ValueError, match=r"wan_version='auto': renamed\.safetensors does not say .* Set wan_version to 2\.1"):
        require_wan21(silent, "", WIDTH_14B, "auto")
    require_wan21(silent, "", WIDTH_14B, "2.1")
    require_wan21(silent, "", 1536, "auto")  # no expert is so narrow


def test_the_folder_of_a_14b_file_may_tell(tmp_path: Path) -> None:
    for folder, refused in {"Wan2.1-T2V-14B": False, "Wan2.2-T2V-A14B": True}.items():
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "diffusion_pytorch_model.safetensors"
        tiny.write_wan(path)
        if refused:
            with pytest.raises(ValueError, match="expert of Wan 2.2"):
                require_wan21(path, "", WIDTH_14B, "2.1")
        else:
            require_wan21(path, "", WIDTH_14B, "auto")


@pytest.mark.parametrize("file", ["wan2.1_t2v_14B_bf16", "Wan2_1-T2V-14B_fp8_e4m3fn", "wan21 tuned"])
def test_files_that_say_wan_21_pass(file: str, tmp_path: Path) -> None:
    path = tmp_path / f"{file}.safetensors"
    tiny.write_wan(path)
    require_wan21(path, "", WIDTH_14B, "auto")
