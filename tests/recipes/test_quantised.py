"""Base models whose file holds fp8 or int8 matrices with scales, which ComfyUI keeps as quantised tensors."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.ops
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from kinoloom.trainers import recipes
from kinoloom.trainers.core.rng import Rng, derived_generator
from kinoloom.trainers.host.weights import merge
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..runs import NO_DATA, load_model, make_backbone, make_batch, make_config, write_data

NAME = "KinoloomTrainWanLora"
LARGEST_FP8, LARGEST_INT8 = 448, 127


def scaled_fp8(name: str, matrix: Tensor) -> dict[str, Tensor]:
    scale = matrix.abs().max() / LARGEST_FP8
    return {f"{name}.weight": (matrix / scale).to(torch.float8_e4m3fn), f"{name}.scale_weight": scale}


def int8(name: str, matrix: Tensor) -> dict[str, Tensor]:
    scale = matrix.abs().max() / LARGEST_INT8
    form = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
    rounded = (matrix / scale).round().to(torch.int8)
    return {f"{name}.weight": rounded, f"{name}.weight_scale": scale, f"{name}.comfy_quant": form}


def write_quantised(source: Path, path: Path, quantise: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    """The block matrices with one scale each, the way published files are."""
    with safe_open(str(source), "pt") as opened:
        tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if quantise is scaled_fp8 else {}
    for key, tensor in tensors.items():
        matrix = key.startswith("blocks.") and key.endswith(".weight") and tensor.ndim == 2
        out |= quantise(key.removesuffix(".weight"), tensor) if matrix else {key: tensor}
    save_file(out, path, metadata)


def gradient(model, data) -> torch.Tensor:
    """All LoRA gradients of one loss, from the same non-zero factors."""
    backbone, config = make_backbone(model), make_config(NAME)
    recipe = recipes()[NAME](backbone, config)
    recipe.start(recipe.phases(config, NO_DATA)[0])
    for path, up in recipe.lora.factors("lora", "up").items():
        up.data.normal_(0, 0.1, generator=derived_generator("up", path))
    for _, loss in recipe.losses(make_batch(backbone, data), Rng(0, "test", 0)):
        loss.backward()
    return torch.cat([p.grad.flatten() for name in ("down", "up") for p in recipe.lora.factors("lora", name).values()])


@pytest.mark.parametrize("quantise", [scaled_fp8, int8])
def test_a_quantised_file_trains_as_its_unquantised_twin_does(
    tmp_path: Path, tiny_models: Path, quantise: Callable
) -> None:
    plain = tiny_models / "diffusion_models" / "tiny_wan.safetensors"
    write_quantised(plain, tmp_path / "quantised.safetensors", quantise)
    quantised = load_model(tmp_path / "quantised.safetensors")
    assert isinstance(quantised.model.diffusion_model.blocks[0].ffn[0].weight, QuantizedTensor)
    data = write_data(tmp_path / "data", "wan", roles=("train",))
    ours, reference = gradient(quantised, data), gradient(load_model(plain), data)
    assert torch.cosine_similarity(ours, reference, dim=0) > 0.99
    assert abs(ours.norm() / reference.norm() - 1) < 0.05


def test_what_is_merged_into_quantised_weights_is_quantised_anew(tmp_path: Path, tiny_models: Path) -> None:
    """In memory of its own: the file's may be mapped read-only."""
    plain = tiny_models / "diffusion_models" / "tiny_wan.safetensors"
    write_quantised(plain, tmp_path / "quantised.safetensors", int8)
    ours, reference = (make_backbone(load_model(path)).module for path in (tmp_path / "quantised.safetensors", plain))
    key, change = "blocks.1.self_attn.o.weight", torch.linspace(-0.2, 0.3, 128).expand(128, 128)
    before = ours.get_parameter(key)
    stored = before.dequantize()
    for module in (ours, reference):
        merge(module, {key: [(0.5, ("diff", (change,)), 1.0, None, None)]})
    after = ours.get_parameter(key)
    assert isinstance(after, QuantizedTensor)
    assert torch.equal(before.dequantize(), stored)
    step = reference.get_parameter(key).abs().max() / LARGEST_INT8
    torch.testing.assert_close(after.dequantize(), reference.get_parameter(key), rtol=0, atol=1.5 * float(step))


class FusedFeedForward(torch.nn.Sequential):
    """As newer versions of ComfyUI have it: the activation inside of a kernel that has no gradient, but in training."""

    def forward(self, x: Tensor) -> Tensor:
        return comfy.ops.fused_down_projection(self[2], self[0](x))


def fused_down_projection(linear: Any, x: Tensor) -> Tensor:
    if comfy.model_management.in_training:
        return linear(torch.nn.functional.gelu(x, approximate="tanh"))
    raise AssertionError("a kernel without a gradient")


@pytest.fixture
def fused_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ComfyUI with that kernel in comfy.ops, as code of that module."""
    scope = {**vars(comfy.ops)}
    function = type(fused_down_projection)(fused_down_projection.__code__, scope, "fused_down_projection")
    function.__module__ = FusedFeedForward.__module__ = "comfy.ops"
    FusedFeedForward.forward.__module__ = "comfy.ops"
    monkeypatch.setattr(comfy.ops, "fused_down_projection", function, raising=False)
    yield
    assert not comfy.model_management.in_training


def test_fused_kernels_of_the_host_are_not_used_in_training(
    tmp_path: Path, tiny_models: Path, fused_host: None
) -> None:
    model = load_model(tiny_models / "diffusion_models" / "tiny_wan.safetensors")
    data = write_data(tmp_path / "data", "wan", roles=("train",))
    reference = gradient(model, data)
    for block in model.model.diffusion_model.blocks:
        block.ffn.__class__ = FusedFeedForward
    with pytest.raises(AssertionError, match="without a gradient"), torch.inference_mode():
        model.model.diffusion_model.blocks[0].ffn(torch.zeros(1, 2, 128))
    torch.testing.assert_close(gradient(model, data), reference)
