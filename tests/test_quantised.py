"""Base models whose file holds scaled fp8 matrices, which ComfyUI keeps as quantised tensors."""

from pathlib import Path

import torch
from comfy.quant_ops import QuantizedTensor
from kinoloom.trainers import recipes
from kinoloom.trainers.core.noise import Rng, derived_generator
from safetensors import safe_open
from safetensors.torch import save_file

from .runs import load_model, make_backbone, make_batch, make_config, write_data

NAME = "KinoloomTrainWanLora"
LARGEST_FP8 = 448


def write_scaled_fp8(source: Path, path: Path) -> None:
    """The block matrices as fp8 with one scale each, the way published fp8_scaled files are."""
    with safe_open(str(source), "pt") as opened:
        tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, tensor in tensors.items():
        if key.startswith("blocks.") and key.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / LARGEST_FP8
            out[key] = (tensor / scale).to(torch.float8_e4m3fn)
            out[key.replace(".weight", ".scale_weight")] = scale.clone()
        else:
            out[key] = tensor
    save_file(out, path, metadata)


def gradient(model, data) -> torch.Tensor:
    """All LoRA gradients of one loss, from the same non-zero factors."""
    backbone, config = make_backbone(model), make_config(NAME)
    recipe = recipes()[NAME](backbone, config)
    recipe.start(recipe.phases(config)[0])
    for path, up in recipe.lora.factors("lora", "up").items():
        up.data.normal_(0, 0.1, generator=derived_generator("up", path))
    for _, loss in recipe.losses(make_batch(backbone, data), Rng(0, "test", 0)):
        loss.backward()
    return torch.cat([p.grad.flatten() for name in ("down", "up") for p in recipe.lora.factors("lora", name).values()])


def test_scaled_fp8_file_trains_as_its_unquantised_twin_does(tmp_path: Path, tiny_models: Path) -> None:
    plain = tiny_models / "diffusion_models" / "tiny_wan.safetensors"
    write_scaled_fp8(plain, tmp_path / "scaled.safetensors")
    quantised = load_model(tmp_path / "scaled.safetensors")
    assert isinstance(quantised.model.diffusion_model.blocks[0].ffn[0].weight, QuantizedTensor)
    data = write_data(tmp_path / "data", "wan", roles=("train",))
    ours, reference = gradient(quantised, data), gradient(load_model(plain), data)
    assert torch.cosine_similarity(ours, reference, dim=0) > 0.99
    assert abs(ours.norm() / reference.norm() - 1) < 0.05
