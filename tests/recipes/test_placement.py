"""A private model follows its placement: recomputed blocks, and memory on the device while it loads."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from kinoloom.trainers import recipes
from kinoloom.trainers.core.data import TrainingData
from kinoloom.trainers.core.placement import Placement
from kinoloom.trainers.core.rng import Rng, derived_generator
from kinoloom.trainers.host.private import load_private
from kinoloom.trainers.run.training import loaded_as
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..runs import NO_DATA, load_model, make_backbone, make_batch, make_config, placements, random
from .test_quantised import int8, write_quantised

GPU = torch.device("meta")
METHODS = pytest.mark.parametrize("name", ["KinoloomTrainWanLora", "KinoloomTrainMotionDirector", "KinoloomTrainSvdLora"])


@METHODS
def test_blocks_from_the_first_are_computed_twice_and_nothing_else_changes(
    name: str, model: Any, data: TrainingData
) -> None:
    recipe = recipes()[name](make_backbone(model), make_config(name))
    recipe.start(recipe.phases(recipe.config, NO_DATA)[0])
    for group in sorted(recipe.lora.active):
        for path, up in recipe.lora.factors(group, "up").items():
            up.data.normal_(0, 0.1, generator=derived_generator("up", path))
    backbone, batch, calls = recipe.backbone, make_batch(recipe.backbone, data), Counter()
    parameters = [p for p in backbone.module.parameters() if p.requires_grad]
    for index, block in enumerate(backbone.blocks):
        layer = next(layer for layer in block.modules() if layer is not block and layer._parameters)
        layer.register_forward_pre_hook(lambda *_, index=index: calls.update([index]))
    found = []
    for _ in placements(backbone):
        calls.clear()
        losses = []
        for _, loss in recipe.losses(batch, Rng(0, "clips", 0)):
            loss.backward()
            losses.append(loss.detach())
        found.append((losses, [p.grad for p in parameters], [calls[index] for index in range(len(backbone.blocks))]))
        backbone.module.zero_grad(set_to_none=True)
    (losses, gradients, once), (_, _, half), (_, _, twice) = found
    middle = len(once) // 2
    assert half == twice[:middle] + once[middle:]
    assert all(once) and once[0] <= twice[0], "nothing goes back through the first block but to its own LoRA"
    assert all(after > before for before, after in list(zip(once, twice, strict=True))[1:])
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    for other_losses, other_gradients, _ in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(losses + gradients, other_losses + other_gradients, strict=True))


@pytest.mark.parametrize(("name", "stored"), [
    ("KinoloomTrainWanLora", torch.bfloat16),
    ("KinoloomTrainSvdFinetune", None),
    ("KinoloomTrainSvdTracklets", None),
])  # fmt: skip
def test_weights_that_a_run_saves_are_loaded_as_they_are_in_their_file(name: str, stored: torch.dtype | None) -> None:
    config = make_config(name, precision="bf16")
    exports = recipes()[name].exports(config, NO_DATA).values()
    assert loaded_as(exports, config, torch.device("cpu")) == Placement(recomputed=0, stored=stored)


class Held(TorchDispatchMode):
    """The meta device as a GPU, and the most bytes that it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if operation._schema.name == "aten::_to_copy" and args[0].device == GPU and kwargs.get("device", GPU) != GPU:
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = operation(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == GPU:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.parametrize("patched", [False, True])
@METHODS
def test_a_model_goes_to_the_device_layer_by_layer_in_the_type_it_is_stored_in(
    name: str, patched: bool, model: Any
) -> None:
    model, wide = model.clone(), model.model.diffusion_model
    matrices = [f"diffusion_model.{path}" for path, weight in wide.named_parameters() if weight.ndim == 2]
    if patched:
        model.add_patches({key: ("diff", (torch.ones_like(model.model.get_parameter(key)),)) for key in matrices})
    with Held() as held:
        private = load_private(model, GPU, Placement(stored=torch.bfloat16)).diffusion_model
    assert all(p.device == GPU for p in private.parameters())
    stored, layers = size(private), [size(layer, recurse=False) for layer in wide.modules()]
    assert stored < 0.6 * size(wide), "the file is in fp32"
    room = stored + (3 if patched else 2) * max(layers)
    assert stored <= held.most < room < size(wide), (held.most, room, size(wide))


def size(module: torch.nn.Module, recurse: bool = True) -> int:
    return sum(p.nbytes for p in module.parameters(recurse))


@pytest.mark.parametrize("stored", ["fp32", "fp8", "int8"])
def test_patches_are_merged_layer_by_layer_to_the_bits_that_comfyui_merges(
    stored: str, tiny_models: Path, tmp_path: Path
) -> None:
    path, options = tiny_models / "diffusion_models" / "tiny_wan.safetensors", {}
    if stored == "int8":
        write_quantised(path, path := tmp_path / "int8.safetensors", int8)
    if stored == "fp8":
        options = {"dtype": torch.float8_e4m3fn}
    model = load_model(path, **options)
    keys = [f"diffusion_model.blocks.1.{own}" for own in ("self_attn.q.weight", "ffn.0.bias", "norm3.weight", "modulation")]
    shapes = {key: model.model.get_parameter(key).shape for key in keys}
    model.add_patches({key: ("diff", (random(*shape, name=key),)) for key, shape in shapes.items()}, 0.3)
    theirs = model.clone(disable_dynamic=True, force_deepcopy=True)
    theirs.patch_model(device_to=torch.device("cpu"))
    plain = model.clone(disable_dynamic=True, force_deepcopy=True).model
    ours = load_private(model, torch.device("cpu"))
    expected, found, without = (dict(bits(module)) for module in (theirs.model, ours, plain))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    merged = {name for name in found if not torch.equal(found[name], without[name])}
    assert merged == set(keys[:-1]), "ComfyUI leaves out the modulation, which stands beside other layers"


def bits(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers in a type that can be compared."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        plain = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor.data
        yield name, plain.float()
