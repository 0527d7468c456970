"""Convert SVD Model: files in ComfyUI's folders from one layout to the other, as ComfyUI and diffusers load them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from kinoloom.lora_io.file import load, save
from kinoloom.lora_io.svd_layouts import convert_unet, lora_to_comfy
from kinoloom.nodes.svd.convert import ConvertSvd, choices
from safetensors.torch import load_file
from tiny import svd as tiny_svd
from torch import Tensor
from toyworld.pack import video_unet

from ..runs import random
from ..server_prompts import node
from comfy_client import Client

UNET = "unet/diffusion_pytorch_model.safetensors"
LAYERS = ("mid_block.attentions.0.temporal_transformer_blocks.0.attn1.to_q", "up_blocks.1.attentions.2.proj_out")
LORA = {
    f"unet.{layer}.lora.{side}.weight": random(*shape, name=f"{layer} {side}")
    for layer in LAYERS
    for side, shape in (("down", (2, 64)), ("up", (64, 2)))
}


@pytest.fixture
def models(tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ComfyUI's folder of models, with a tiny SVD, models in diffusers' layout and LoRAs in it."""
    folders = {
        "diffusion_models": ([str(tmp_path / "unet"), str(tmp_path / "diffusion_models")], {".safetensors", ".bin"}),
        "diffusers": ([str(tmp_path / "diffusers")], ["folder"]),
        "loras": ([str(tmp_path / "loras")], {".safetensors"}),
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {**folder_paths.folder_names_and_paths, **folders})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})  # the folders are gone after the test
    (tmp_path / "unet").mkdir()
    (tmp_path / "diffusion_models").mkdir()
    tiny = tiny_models / "diffusion_models" / "tiny_svd.safetensors"
    (tmp_path / "diffusion_models" / "mine.safetensors").symlink_to(tiny)
    (tmp_path / "diffusion_models" / "other.safetensors").symlink_to(tiny.with_name("tiny_wan.safetensors"))
    (tmp_path / "diffusion_models" / "old.bin").touch()
    save(tmp_path / "diffusers" / "forest" / UNET, convert_unet(load_file(tiny), "diffusers"), {"step": "7"})
    save(tmp_path / "diffusers" / "forest" / "vae" / "diffusion_pytorch_model.safetensors", LORA)
    save(tmp_path / "loras" / "forest" / "pytorch_lora_weights.safetensors", LORA)
    yield tmp_path


def convert(file: str) -> Path:
    output = ConvertSvd.execute(file)
    assert output.ui == {"text": (output.args[0],)}
    return Path(output.args[0])


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def test_the_choices_are_safetensors_models_and_loras(models: Path) -> None:
    assert choices() == [
        "diffusion_models/mine.safetensors",
        "diffusion_models/other.safetensors",
        "loras/forest/pytorch_lora_weights.safetensors",
        f"diffusers/forest/{UNET}",
    ]


def test_a_folder_of_diffusers_becomes_a_file_for_comfyui(models: Path) -> None:
    path = convert(f"diffusers/forest/{UNET}")
    assert path == models / "diffusion_models" / "kinoloom" / "forest-comfyui.safetensors"
    tensors, metadata = load(path)
    assert equal(tensors, load_file(models / "diffusion_models" / "mine.safetensors"))
    described = "diffusion_pytorch_model.safetensors to the layout of comfyui"
    assert metadata == {"format": "pt", "step": "7", "kinoloom.converted": described}
    assert type(video_unet.load_unet(path).model).__name__ == "SVD_img2vid"


def test_there_and_back_is_the_same_and_overwrites_nothing(models: Path) -> None:
    there = convert("diffusion_models/mine.safetensors")
    assert there.name == "mine-diffusers.safetensors"
    back = [convert(f"diffusion_models/kinoloom/{there.name}") for _ in range(2)]
    assert [path.name for path in back] == ["mine-comfyui.safetensors", "mine-comfyui-2.safetensors"]
    for path in back:
        assert equal(load_file(path), load_file(models / "diffusion_models" / "mine.safetensors"))


def test_diffusers_loads_what_is_converted_to_its_layout(models: Path) -> None:
    path = convert("diffusion_models/mine.safetensors")
    config = {"block_out_channels": tiny_svd.TINY, "num_attention_heads": (1, 1, 1, 1)}
    with torch.device("meta"):
        UNetSpatioTemporalConditionModel(**config).save_config(models / "pipeline" / "unet")
    path.rename(models / "pipeline" / UNET)
    unet, report = UNetSpatioTemporalConditionModel.from_pretrained(
        models / "pipeline" / "unet", output_loading_info=True
    )
    assert not any(report.values())
    assert equal(unet.state_dict(), load_file(models / "diffusers" / "forest" / UNET))


def test_core_loads_a_converted_model(models: Path) -> None:
    narrow = convert_unet(tiny_svd.unet(tiny_svd.Weights(0), tiny_svd.NARROW, 1024), "diffusers")
    half = {key: tensor.half() for key, tensor in narrow.items()}
    save(models / "diffusers" / "narrow" / "unet_ema" / "diffusion_pytorch_model.fp16.safetensors", half)
    path = convert("diffusers/narrow/unet_ema/diffusion_pytorch_model.fp16.safetensors")
    assert path.name == "narrow-comfyui.safetensors"
    model = comfy.sd.load_diffusion_model(str(path)).model
    assert type(model).__name__ == "SVD_img2vid"
    loaded = {key: tensor.half() for key, tensor in model.diffusion_model.state_dict().items()}
    assert equal(convert_unet(loaded, "diffusers"), half)


def test_a_lora_is_converted_and_back(models: Path) -> None:
    path = convert("loras/forest/pytorch_lora_weights.safetensors")
    assert path == models / "loras" / "kinoloom" / "forest-comfyui.safetensors"
    tensors, metadata = load(path)
    assert equal(tensors, lora_to_comfy(LORA))
    assert metadata["kinoloom.converted"] == "pytorch_lora_weights.safetensors to the layout of comfyui"
    back = convert(f"loras/kinoloom/{path.name}")
    assert back.name == "forest-diffusers.safetensors" and equal(load_file(back), LORA)


def test_a_lora_keeps_the_scale_that_peft_or_diffusers_notes_beside_it(models: Path) -> None:
    """lora_alpha 8 of rank 2."""
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {}, "use_dora": False}
    sides = {"unet.": "base_model.model.", ".lora.down": ".lora_A", ".lora.up": ".lora_B"}
    peft = LORA
    for old, new in sides.items():
        peft = {key.replace(old, new): tensor for key, tensor in peft.items()}
    save(models / "loras" / "peft" / "adapter_model.safetensors", peft)
    (models / "loras" / "peft" / "adapter_config.json").write_text(json.dumps(config))
    layers = {key.removeprefix("unet."): tensor for key, tensor in LORA.items()}
    noted = {"unet_lora_layers": layers, "unet_lora_adapter_metadata": config}
    StableDiffusionLoraLoaderMixin.save_lora_weights(models / "loras" / "noted", **noted)
    for file in ("peft/adapter_model.safetensors", "noted/pytorch_lora_weights.safetensors"):
        path = convert(f"loras/{file}")
        tensors, metadata = load(path)
        assert equal(tensors, lora_to_comfy(LORA, 8.0)) and "lora_adapter_metadata" not in metadata
        back = load_file(convert(f"loras/kinoloom/{path.name}"))
        assert equal(back, {key: tensor * 4 if "lora.up" in key else tensor for key, tensor in LORA.items()})
    config["use_rslora"] = True
    (models / "loras" / "peft" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="file='loras/peft/.*': LoRA with use_rslora: expected one alpha for all layers"
    ):
        convert("loras/peft/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("file", "tensors", "message"),
    [
        (
            "diffusion_models/other.safetensors",
            None,
            "key 'blocks.*': expected Stable Video Diffusion's UNet in the layout",
        ),
        (
            "diffusion_models/lora.safetensors",
            LORA,
            "key 'unet.mid_block.*': expected Stable Video Diffusion's UNet in",
        ),
        ("diffusers/part/" + UNET, {"conv_in.weight": torch.zeros(1)}, "conv_norm_out is missing, expected all layers of"),
        (
            "loras/model.safetensors",
            {"conv_in.weight": torch.zeros(1)},
            "LoRA key 'conv_in.weight': expected the down or up",
        ),
        ("loras/empty.safetensors", {}, "holds no LoRA layers, expected a LoRA for Stable Video"),
        (
            "loras/wan.safetensors",
            {f"diffusion_model.blocks.0.q.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"},
            "key 'blocks.0.q.*': expected",
        ),
    ],
)
def test_other_files_are_refused_and_nothing_is_written(
    models: Path, file: str, tensors: dict[str, Any] | None, message: str
) -> None:
    if tensors is not None:
        save(models / file, tensors)
    with pytest.raises(ValueError, match=f"file='{file}': {message}"):
        convert(file)
    assert not list(models.rglob("kinoloom"))


def test_a_damaged_file_is_named(models: Path) -> None:
    (models / "loras" / "damaged.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="file='loras/damaged.safetensors': file .*: not a readable safetensors file"):
        convert("loras/damaged.safetensors")


def test_the_input_says_what_it_is_for() -> None:
    schema = ConvertSvd.define_schema()
    assert schema.node_id == "KinoloomConvertSvd" and schema.is_output_node
    assert all(len(given.tooltip) > 15 for given in (*schema.inputs, *schema.outputs))


def test_a_server_converts_a_model_and_loads_the_result(client: Client) -> None:
    for file, layout in (("tiny_svd", "diffusers"), ("kinoloom/tiny_svd-diffusers", "comfyui")):
        outputs = client.run({"made": node("KinoloomConvertSvd", file=f"diffusion_models/{file}.safetensors")})
        assert outputs["made"]["text"][0].endswith(f"models/diffusion_models/kinoloom/tiny_svd-{layout}.safetensors")
    loader = node("ToyWorldImageToVideoModel", unet_name="kinoloom/tiny_svd-comfyui.safetensors")
    client.run({"model": loader, "saved": node("ModelSave", model=["model", 0], filename_prefix="svd")})
