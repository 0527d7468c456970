"""Stable Video Diffusion's layouts: names and results of diffusers' model and ComfyUI's."""

import re
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_detection
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep, UNetModel
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers
from kinoloom.lora_io.svd_layouts import (
    CHECKPOINT,
    convert_unet,
    layout_of,
    lora_to_comfy,
    lora_to_diffusers,
    to_comfy,
    to_diffusers,
)
from kinoloom.trainers.host.private import load_private
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from toyworld.pack import video_unet

from ..runs import random

CLIPS, FRAMES, RANK = 2, 3, 4
X = random(CLIPS, FRAMES, 8, 8, 16, name="x")
TIME = torch.tensor([-0.3, 1.2])  # a quarter of the logarithm of sigma
CONTEXT = random(CLIPS, 1, 1024, name="context")
IDS = torch.tensor([[5.0, 127.0, 0.02], [11.0, 30.0, 0.3]])
LINEAR = ["to_q", "to_k", "to_v", "to_out.0"]  # what SVD_Xtend trains
QUERY = "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q"
OUT = "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0"


@pytest.fixture(scope="module")
def path(tiny_models: Path) -> Path:
    return tiny_models / "diffusion_models" / "tiny_svd.safetensors"


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    """The tiny MODEL."""
    return video_unet.load_unet(path)


def diffusers_unet(path: Path) -> nn.Module:
    """diffusers' model with the same weights."""
    tensors = load_file(path)
    widths = [len(tensors[f"input_blocks.{index}.0.out_layers.3.bias"]) for index in (1, 4, 7, 10)]
    heads = [width // 64 for width in widths]
    unet = UNetSpatioTemporalConditionModel(block_out_channels=widths, num_attention_heads=heads)
    unet.load_state_dict(convert_unet(tensors, "diffusers"))
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def diffusers_output(unet: nn.Module) -> Tensor:
    return unet(X, TIME, CONTEXT, IDS).sample


@torch.no_grad()
def comfy_output(model: Any) -> Tensor:
    """With the LoRAs on the MODEL."""
    network = load_private(model, torch.device("cpu")).diffusion_model
    ids = Timestep(256)(IDS.flatten()).reshape(CLIPS, -1)
    time, context, y = (rows.repeat_interleave(FRAMES, 0) for rows in (TIME, CONTEXT, ids))
    return network(X.flatten(0, 1), time, context, y, num_video_frames=FRAMES).unflatten(0, (CLIPS, FRAMES))


def test_every_key_of_the_real_model_has_one_name_in_the_other_layout_and_the_same_shape() -> None:
    with torch.device("meta"):
        theirs = UNetSpatioTemporalConditionModel().state_dict()
    ours = {to_comfy(key): tensor for key, tensor in theirs.items()}
    assert len(theirs) == len(ours) == 1428
    assert all(to_diffusers(to_comfy(key)) == key for key in theirs)
    config = comfy.model_detection.detect_unet_config(ours, "")
    with torch.device("meta"):
        core = UNetModel(**config, num_heads=-1, num_head_channels=64).state_dict()
    assert {key: tensor.shape for key, tensor in core.items()} == {key: tensor.shape for key, tensor in ours.items()}
    assert type(comfy.model_detection.model_config_from_unet(ours, "")).__name__ == "SVD_img2vid"


def test_both_models_compute_the_same(model: Any, path: Path) -> None:
    expected, found = diffusers_output(diffusers_unet(path)), comfy_output(model)
    assert (found - expected).abs().max() < 1e-4 < 0.1 * expected.std()


def test_a_model_is_converted_from_any_layout_to_any(path: Path) -> None:
    ours = load_file(path)
    theirs = convert_unet(ours, "diffusers")
    assert (layout_of(ours), layout_of(theirs)) == ("comfyui", "diffusers")
    for tensors in (ours, theirs):
        for prefix in ("", CHECKPOINT):
            given = {prefix + key: tensor for key, tensor in tensors.items()}
            for to, expected in (("comfyui", ours), ("diffusers", theirs)):
                converted = convert_unet(given, to)
                assert converted.keys() == expected.keys()
                assert all(converted[key] is expected[key] for key in expected)


def test_other_models_are_not_converted(path: Path, tiny_models: Path) -> None:
    ours = load_file(path)
    with pytest.raises(
        ValueError, match="key 'conditioner.x': expected Stable Video Diffusion's UNet in the layout of"
    ):
        convert_unet({"conditioner.x": X, **ours}, "diffusers")
    with pytest.raises(ValueError, match="key 'position_net.x': expected a layer of .*UNet in the layout of comfyui"):
        convert_unet({**ours, "position_net.x": X}, "diffusers")
    with pytest.raises(ValueError, match="key '': expected"):
        convert_unet({}, "diffusers")
    image = load_file(tiny_models / "diffusion_models" / "tiny_sd.safetensors")
    with pytest.raises(ValueError, match="label_emb.0.0 is missing, expected all layers of Stable Video"):
        convert_unet(image, "diffusers")
    half = dict(list(convert_unet(ours, "diffusers").items())[:400])
    with pytest.raises(ValueError, match="is missing, expected all layers"):
        convert_unet(half, "comfyui")


# -- LoRA ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(path: Path) -> nn.Module:
    """diffusers' model with a LoRA of SVD_Xtend's kind on it, every factor random."""
    unet = diffusers_unet(path)
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=LINEAR)
    unet = inject_adapter_in_model(config, unet)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = random(*parameter.shape, name=name) * (0.2 if "lora_B" in name else 1 / RANK)
    return unet


@pytest.fixture(scope="module")
def original(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Its file as SVD_Xtend means to save it."""
    folder = tmp_path_factory.mktemp("lora")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained))
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=layers)
    return load_file(folder / "pytorch_lora_weights.safetensors")


def with_lora(model: Any, lora: dict[str, Tensor]) -> tuple[Any, list[str]]:
    """A MODEL with a LoRA as core's loader puts it on, and the weights that it patches."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patched = model.clone()
    return patched, patched.add_patches(comfy.lora.load_lora(lora, keys), 1.0)


def test_core_puts_the_whole_of_a_converted_lora_on_to_the_same_effect(
    model: Any, trained: nn.Module, original: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    assert len(original) == 512 and f"unet.{QUERY}.lora.down.weight" in original
    assert with_lora(model, original)[1] == []  # which is why it must be converted
    caplog.clear()
    patched, weights = with_lora(model, lora_to_comfy(original))
    assert len(set(weights)) == 256 and sum("time_stack" in weight for weight in weights) == 128
    assert "not loaded" not in caplog.text
    found, expected = comfy_output(patched), diffusers_output(trained)
    assert (found - expected).abs().max() < 1e-4 < 0.1 * (expected - comfy_output(model)).abs().max()


def processors(key: str) -> str:
    """<attention>.processor.to_q.lora.down.weight, as older ones had it."""
    return re.sub(r"\.(to_\w+)(\.0)?\.lora", r".processor.\1.lora", key)


def raw(key: str) -> str:
    return key.removeprefix("unet.").replace(".lora.down", ".lora_A").replace(".lora.up", ".lora_B")


SPELLINGS = {
    "PEFT's": raw,
    "PEFT's of a model": lambda key: f"base_model.model.{raw(key)}",
    "with unet": lambda key: f"unet.{raw(key)}",
    "no prefix": lambda key: key.removeprefix("unet."),
    "processors'": processors,
    "older processors'": lambda key: processors(key).replace(".lora.", "_lora."),
}


@pytest.mark.parametrize("spelling", list(SPELLINGS))
def test_every_spelling_of_a_lora_is_read_to_the_same_tensors(spelling: str, original: dict[str, Tensor]) -> None:
    expected = lora_to_comfy(original)
    found = lora_to_comfy({SPELLINGS[spelling](key): tensor for key, tensor in original.items()})
    assert found.keys() == expected.keys() and all(found[key] is expected[key] for key in expected)


def test_a_lora_comes_back_with_alpha_in_its_up_factors(model: Any, original: dict[str, Tensor]) -> None:
    converted = lora_to_comfy(original)
    back = lora_to_diffusers(converted)
    assert back.keys() == original.keys() and all(torch.equal(back[key], original[key]) for key in original)
    query, out = (f"diffusion_model.{to_comfy(path)}" for path in (QUERY, OUT))
    own = {**converted, f"{query}.alpha": torch.tensor(1.0)}
    assert lora_to_comfy({**original, f"unet.{QUERY}.alpha": torch.tensor(1.0)}).keys() == own.keys()
    folded = lora_to_diffusers(own)
    assert torch.equal(folded[f"unet.{QUERY}.lora.up.weight"], original[f"unet.{QUERY}.lora.up.weight"] / RANK)
    assert torch.equal(folded[f"unet.{OUT}.lora.up.weight"], original[f"unet.{OUT}.lora.up.weight"])
    for given, alpha in ((None, RANK), (8.0, 8.0)):
        patched, _ = with_lora(model, lora_to_comfy(original, given))
        up, down = (converted[f"{out}.lora_{side}.weight"] for side in "BA")
        weight, plain = (
            load_private(m, torch.device("cpu")).get_parameter(f"{out}.weight") for m in (patched, model)
        )
        torch.testing.assert_close(weight, plain + alpha / RANK * up @ down, rtol=1e-5, atol=1e-6)


def test_loras_of_other_kinds_are_refused(original: dict[str, Tensor]) -> None:
    for key, message in {
        f"unet.{QUERY}.lora_magnitude_vector": "LoRA key '.*lora_magnitude_vector': expected the down or up factor",
        f"unet.{QUERY}.base_layer.weight": "LoRA key '.*base_layer.weight': expected the down or up factor",
        "text_encoder.layers.0.q_proj.lora_A.weight": "key 'text_encoder.layers.0.q_proj': expected a layer of Stable",
        "diffusion_model.blocks.0.q.lora_A.weight": "key 'diffusion_model.blocks.0.q': expected a layer of Stable",
    }.items():
        with pytest.raises(ValueError, match=message):
            lora_to_comfy({**original, key: X})
    halves = {key: tensor for key, tensor in original.items() if "lora.down" in key}
    with pytest.raises(
        ValueError, match="LoRA: diffusion_model..*.lora_A.weight has no diffusion_model..*.lora_B.weight"
    ):
        lora_to_comfy(halves)
    with pytest.raises(ValueError, match="has no"):
        lora_to_diffusers(dict(list(lora_to_comfy(original).items())[:3]))
    with pytest.raises(ValueError, match="LoRA key 'unet..*': expected it to start with 'diffusion_model.'"):
        lora_to_diffusers(original)
    with pytest.raises(ValueError, match="key 'blocks.0.q': expected a layer of .* in the layout of comfyui"):
        lora_to_diffusers({f"diffusion_model.blocks.0.q.lora_{side}.weight": X for side in "AB"})
