"""Groups of LoRA layers: closed forms, PEFT's own layer, gradient checkpointing, base weights of every storage type."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from comfy.ldm.wan.model import WanModel
from comfy.ops import disable_weight_init
from kinoloom.lora_io.keys import from_comfy, to_comfy
from kinoloom.trainers.backbones.flow.wan import Wan
from kinoloom.trainers.core.lora import LoraGroups
from kinoloom.trainers.core.rng import Rng
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..runs import leaves, load_model, make_backbone, make_batch, random, write_data

SPATIAL, TEMPORAL = r"blocks\.\d+\.spatial", r"blocks\.\d+\.temporal"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spatial, self.temporal = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.temporal(torch.tanh(self.spatial(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


def net(dtype: torch.dtype = torch.float64) -> Net:
    """fp64, so that closed forms hold to 1e-12; the factors stay fp32."""
    made = Net().to(dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(random(*parameter.shape, name=name) / 3)
    return made


def two_groups(module: nn.Module, alpha: float = 4.0) -> LoraGroups:
    lora = LoraGroups(module, seed=0)
    lora.add_group("spatial", SPATIAL, 4, alpha)
    lora.add_group("temporal", TEMPORAL, 4, alpha)
    lora.train_only({"spatial": ("down", "up"), "temporal": ("down", "up")})
    fill(lora, "spatial", "temporal")
    return lora


def fill(lora: LoraGroups, *groups: str) -> None:
    """Up factors start at zero; give them values."""
    with torch.no_grad():
        for group in groups:
            for path, up in lora.factors(group, "up").items():
                up.copy_(random(*up.shape, name=f"{group} {path}"))


def x(dtype: torch.dtype = torch.float64) -> Tensor:
    return random(2, 5, 6, name="x").to(dtype)


def merged(
    lora: LoraGroups,
    module: Net,
    scale: float,
    masks: dict[str, Tensor] | None = None,
    groups: tuple[str, ...] = ("spatial", "temporal"),
) -> Callable[[Tensor], Tensor]:
    """The same network with scale * (up * mask) down added to its weights, differentiable in the factors."""
    weights = {}
    for path, layer in lora.layers.items():
        weight = layer.base_layer.weight.detach()
        for group in groups:
            if path in (ups := lora.factors(group, "up")):
                up = ups[path] * masks[path] if masks else ups[path]
                weight = weight + scale * (up.double() @ lora.factors(group, "down")[path].double())
        weights[path] = weight

    def forward(value: Tensor) -> Tensor:
        for i, block in enumerate(module.blocks):
            bias = block.spatial.base_layer.bias.detach()
            hidden = torch.tanh(value @ weights[f"blocks.{i}.spatial"].T + bias)
            value = value + hidden @ weights[f"blocks.{i}.temporal"].T
        return value

    return forward


def gradients(lora: LoraGroups) -> dict[str, Tensor]:
    return {
        f"{group} {factor} {path}": parameter.grad
        for group in ("spatial", "temporal")
        for factor in ("down", "up")
        for path, parameter in lora.factors(group, factor).items()
    }


# -- construction ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_group_leaves_the_output_bit_equal(dtype: torch.dtype) -> None:
    module = net(dtype)
    before = module(x(dtype))
    lora = LoraGroups(module, seed=0)
    lora.add_group("spatial", SPATIAL, 4, 4)
    assert torch.equal(module(x(dtype)), before)
    fill(lora, "spatial")
    with_spatial = module(x(dtype))
    assert not torch.equal(with_spatial, before)
    lora.add_group("temporal", TEMPORAL, 4, 4)
    lora.add_group("residual", SPATIAL, 4, 4, share_down="spatial")
    assert torch.equal(module(x(dtype)), with_spatial)


def test_paths_are_those_before_injection_and_only_matches_get_a_layer() -> None:
    module = net()
    lora = LoraGroups(module, seed=0)
    lora.add_group("spatial", SPATIAL, 4, 4)
    assert list(lora.layers) == ["blocks.0.spatial", "blocks.1.spatial"]
    lora.add_group("temporal", r"blocks\.1\.temporal", 2, 2)
    assert list(lora.factors("temporal", "down")) == ["blocks.1.temporal"]
    assert lora.factors("temporal", "down")["blocks.1.temporal"].shape == (2, 10)
    assert lora.factors("temporal", "up")["blocks.1.temporal"].shape == (6, 2)
    assert list(lora.factors("spatial", "up")) == ["blocks.0.spatial", "blocks.1.spatial"]


def test_a_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(ValueError, match="block"):
        LoraGroups(net(), seed=0).add_group("spatial", r"block\.\d+", 4, 4)


def test_down_is_kaiming_uniform_from_its_own_generator_and_up_is_zero() -> None:
    wide = nn.Sequential(nn.Linear(300, 20), nn.Linear(20, 300))
    state = torch.random.get_rng_state()
    lora = LoraGroups(wide, seed=3)
    lora.add_group("g", r"\d", 256, 256)
    assert torch.equal(torch.random.get_rng_state(), state), "the process-wide generator belongs to the samplers"
    for path, down in lora.factors("g", "down").items():
        bound = down.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5)) is U(-1/sqrt(in), 1/sqrt(in))
        assert down.dtype == torch.float32
        assert bound * 0.99 < down.abs().max() <= bound
        assert down.mean().abs() < 4 * bound / math.sqrt(3 * down.numel())
        assert down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert torch.count_nonzero(lora.factors("g", "up")[path]) == 0
    assert not torch.equal(*(down.flatten()[:20] / down.abs().max() for down in lora.factors("g", "down").values()))

    torch.manual_seed(99)
    again, other = (
        LoraGroups(nn.Sequential(nn.Linear(300, 20)), seed=3),
        LoraGroups(nn.Sequential(nn.Linear(300, 20)), 4),
    )
    again.add_group("g", r"\d", 256, 256)
    other.add_group("g", r"\d", 256, 256)
    first = lora.factors("g", "down")["0"]
    assert torch.equal(again.factors("g", "down")["0"], first)
    assert not torch.equal(other.factors("g", "down")["0"], first)


# -- forward and gradient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "scale"), [(4.0, 1.0), (2.0, 0.5), (16.0, 4.0)])
def test_forward_and_gradient_equal_the_merged_weight(alpha: float, scale: float) -> None:
    module = net()
    lora = two_groups(module, alpha)
    masks = {
        path: (random(*up.shape, name=f"mask {path}") > 0) * 2.5
        for group in ("spatial", "temporal")
        for path, up in lora.factors(group, "up").items()
    }
    for group in ("spatial", "temporal"):
        drawn = iter([masks[path] for path in lora.layers if path in lora.factors(group, "up")])
        lora.set_masks(group, lambda up, drawn=drawn: next(drawn))
    reference = merged(lora, module, scale, masks)(x())
    torch.testing.assert_close(module(x()), reference, rtol=1e-12, atol=1e-12)

    reference.square().sum().backward()
    expected = {name: grad.clone() for name, grad in gradients(lora).items()}
    for parameter in module.parameters():
        parameter.grad = None
    module(x()).square().sum().backward()
    for name, grad in gradients(lora).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")

    for group in ("spatial", "temporal"):
        lora.set_masks(group, None)
    torch.testing.assert_close(module(x()), merged(lora, module, scale)(x()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_equal_pefts_own_layer(dtype: torch.dtype) -> None:
    base = nn.Linear(6, 10, dtype=dtype).requires_grad_(False)
    lora = LoraGroups(nn.ModuleDict({"layer": base}), seed=0)
    lora.add_group("g", "layer", 4, 8)
    fill(lora, "g")
    reference = PeftLinear(base, "g", LoraConfig(r=4, lora_alpha=8), r=4, lora_alpha=8)
    reference.lora_A["g"].weight.data = lora.factors("g", "down")["layer"].detach().clone()
    reference.lora_B["g"].weight.data = lora.factors("g", "up")["layer"].detach().clone()
    exact = dtype == torch.float32
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": 0.03, "atol": 0.1}
    ours, theirs = lora.module["layer"](x(dtype)), reference(x(dtype))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs.to(dtype), **tolerance)
    ours.float().square().sum().backward()
    theirs.float().square().sum().backward()
    pairs = [
        (lora.factors("g", "down")["layer"], reference.lora_A["g"].weight),
        (lora.factors("g", "up")["layer"], reference.lora_B["g"].weight),
    ]
    for own, other in pairs:
        assert own.grad.dtype == torch.float32
        scale = other.grad.abs().max()
        torch.testing.assert_close(own.grad / scale, other.grad / scale, rtol=0, atol=1e-6 if exact else 0.02)


def test_a_shared_down_is_one_frozen_parameter_and_the_ups_add() -> None:
    module = net()
    lora = LoraGroups(module, seed=0)
    lora.add_group("identity", SPATIAL, 4, 4)
    fill(lora, "identity")
    lora.add_group("motion", SPATIAL, 4, 4, share_down="identity")
    fill(lora, "motion")
    for path, down in lora.factors("identity", "down").items():
        assert lora.factors("motion", "down")[path] is down
        assert not down.requires_grad
        assert not lora.factors("identity", "up")[path].requires_grad
        assert lora.factors("motion", "up")[path].requires_grad
    layer = module.blocks[0].spatial
    u1, u2 = (lora.factors(g, "up")["blocks.0.spatial"].double() for g in ("identity", "motion"))
    down = lora.factors("identity", "down")["blocks.0.spatial"].double()
    both = (u1.float() + u2.float()).double()
    expected = layer.base_layer(x()) + x() @ (both @ down).T
    torch.testing.assert_close(layer(x()), expected, rtol=1e-12, atol=1e-12)
    with lora.without("motion"):
        torch.testing.assert_close(layer(x()), layer.base_layer(x()) + x() @ (u1 @ down).T, rtol=1e-12, atol=1e-12)
    with lora.without("identity"):
        torch.testing.assert_close(layer(x()), layer.base_layer(x()) + x() @ (u2 @ down).T, rtol=1e-12, atol=1e-12)


def test_frozen_weights_are_no_part_of_the_backward_graph() -> None:
    module = net()
    lora = LoraGroups(module, seed=0)
    lora.add_group("identity", SPATIAL, 4, 4)
    fill(lora, "identity")
    assert leaves(module(x()).sum()) == {p for n in ("down", "up") for p in lora.factors("identity", n).values()}
    lora.add_group("motion", SPATIAL, 4, 4, share_down="identity")
    assert leaves(module(x()).sum()) == set(lora.factors("motion", "up").values())
    lora.train_only({"identity": ("up",)})
    assert leaves(module(x()).sum()) == set(lora.factors("identity", "up").values())


# -- switching -------------------------------------------------------------------------------------------------------------


def test_without_and_frozen_and_their_end() -> None:
    module = net()
    lora = two_groups(module)
    everything = module(x())
    with lora.without("temporal"):
        torch.testing.assert_close(
            module(x()), merged(lora, module, 1.0, groups=("spatial",))(x()), rtol=1e-12, atol=1e-12
        )
    with lora.frozen("spatial"):
        assert torch.equal(module(x()), everything)
        assert leaves(module(x()).sum()) == {p for n in ("down", "up") for p in lora.factors("temporal", n).values()}
    assert torch.equal(module(x()), everything)
    assert len(leaves(module(x()).sum())) == 8

    with pytest.raises(KeyError), lora.without("temporal"), lora.frozen("spatial"):
        raise KeyError
    assert torch.equal(module(x()), everything)
    assert len(leaves(module(x()).sum())) == 8


def test_switches_nest() -> None:
    module = net()
    lora = two_groups(module)
    lora.train_only({"spatial": ("up",), "temporal": ("down", "up")})
    trainable = leaves(module(x()).sum())
    with lora.without("temporal"):
        spatial_only = module(x())
        with lora.without("spatial", "temporal"):
            assert torch.equal(module(x()), merged(lora, module, 1.0, groups=())(x()))
        assert torch.equal(module(x()), spatial_only), (
            "the inner end must not switch on what the outer one switched off"
        )
    with lora.frozen("spatial"):
        with lora.frozen("spatial", "temporal"):
            assert not module(x()).requires_grad
        assert leaves(module(x()).sum()) == {p for n in ("down", "up") for p in lora.factors("temporal", n).values()}
    assert leaves(module(x()).sum()) == trainable, "a down factor that was frozen before must stay frozen"


@pytest.mark.parametrize("recompute", [False, True])
def test_yielding_inside_the_switch_gives_the_right_gradient_under_recompute(recompute: bool) -> None:
    """The loop calls backward at each yield, inside the `with`; each loss must see its own switch in the recompute too."""
    module = net()
    lora = two_groups(module)

    def losses() -> Iterator[Tensor]:
        with lora.without("temporal"):
            yield module(x()).square().sum()
        with lora.frozen("spatial"):
            yield module(x()).exp().sum()

    (merged(lora, module, 1.0, groups=("spatial",))(x()).square().sum()).backward()
    with lora.frozen("spatial"):
        merged(lora, module, 1.0)(x()).exp().sum().backward()
    expected = {name: grad.clone() for name, grad in gradients(lora).items()}
    for parameter in module.parameters():
        parameter.grad = None

    module.recompute = recompute
    for loss in losses():
        loss.backward()
    for name, grad in gradients(lora).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# -- masks -----------------------------------------------------------------------------------------------------------------


def test_masks_reach_each_layer_of_their_group_in_order_and_stay_for_the_recompute() -> None:
    module = net()
    lora = two_groups(module)
    seen = []

    def draw(up: Tensor) -> Tensor:
        seen.append(up)
        return torch.full_like(up, float(len(seen)))

    lora.set_masks("spatial", draw)
    assert [up.data_ptr() for up in seen] == [up.data_ptr() for up in lora.factors("spatial", "up").values()]
    assert not any(up.requires_grad for up in seen)
    factors = {"blocks.0.spatial": 1.0, "blocks.1.spatial": 2.0, "blocks.0.temporal": 1.0, "blocks.1.temporal": 1.0}
    masks = {path: torch.tensor(value) for path, value in factors.items()}
    torch.testing.assert_close(module(x()), merged(lora, module, 1.0, masks)(x()), rtol=1e-12, atol=1e-12)

    grads = []
    for module.recompute in (False, True):
        lora.set_masks("spatial", lambda up: (random(*up.shape, name="mask") > 0) / 0.5)
        module(x()).square().sum().backward()
        grads.append({name: grad.clone() for name, grad in gradients(lora).items()})
        for parameter in module.parameters():
            parameter.grad = None
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    kept = random(10, 4, name="mask") > 0
    grad = grads[0]["spatial up blocks.0.spatial"]
    assert torch.equal(grad != 0, kept), "a masked entry gets no gradient, a kept one does"
    assert len(seen) == 2, "the forward must not draw"


# -- state and files -------------------------------------------------------------------------------------------------------


def test_dropout_is_another_in_each_layer_and_leaves_the_mean_as_it_was() -> None:
    """What is kept is larger by as much as is dropped; a recompute drops the same."""
    module = net()
    lora = two_groups(module)
    inputs = random(400, 6, name="many").double()
    layers = [lora.layers[f"blocks.{i}.spatial"] for i in range(2)]

    def updates() -> list[Tensor]:
        return [(layer(inputs) - layer.base_layer(inputs)).detach() for layer in layers]

    full = updates()
    lora.set_dropout(0.3, Rng(0, "clips", 7))
    dropped, again = updates(), updates()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(dropped, again, strict=True))
    kept = [update != 0 for update in dropped]
    for whole, part, mask in zip(full, dropped, kept, strict=True):
        assert float(mask.double().mean()) == pytest.approx(0.7, abs=0.04)
        torch.testing.assert_close(part, torch.where(mask, whole / 0.7, 0.0), rtol=1e-5, atol=1e-7)
    assert float((kept[0] != kept[1]).double().mean()) == pytest.approx(2 * 0.3 * 0.7, abs=0.06)
    lora.set_dropout(0.3, Rng(0, "clips", 8))
    assert not torch.equal(updates()[0] != 0, kept[0]), "another step"
    lora.set_dropout(0.0, Rng(0, "clips", 9))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(updates(), full, strict=True))


def test_state_round_trip_is_bit_exact_and_holds_frozen_groups() -> None:
    module = net()
    lora = LoraGroups(module, seed=0)
    lora.add_group("identity", SPATIAL, 4, 4)
    fill(lora, "identity")
    lora.add_group("motion", SPATIAL, 4, 4, share_down="identity")
    fill(lora, "motion")
    state = lora.state_dict()
    paths = ["blocks.0.spatial", "blocks.1.spatial"]
    identity = {f"identity/{path}.lora_{factor}.weight" for path in paths for factor in ("down", "up")}
    assert set(state) == identity | {f"motion/{path}.lora_up.weight" for path in paths}, "a shared down once"
    expected = module(x())
    with torch.no_grad():
        for group in ("identity", "motion"):
            for up in lora.factors(group, "up").values():
                up.zero_()
    assert all(torch.count_nonzero(t) for t in state.values()), "a state is a copy"

    fresh = net()
    other = LoraGroups(fresh, seed=1)
    other.add_group("identity", SPATIAL, 4, 4)
    other.add_group("motion", SPATIAL, 4, 4, share_down="identity")
    other.load_state_dict(state)
    assert torch.equal(fresh(x()), expected)
    trainable = leaves(fresh(x()).sum())
    assert trainable == set(other.factors("motion", "up").values()), "loading keeps the very parameters that train"


def test_load_errors_name_the_key() -> None:
    lora = two_groups(net())
    state = lora.state_dict()
    missing = "spatial/blocks.1.spatial.lora_up.weight"
    with pytest.raises(ValueError, match=missing):
        lora.load_state_dict({key: value for key, value in state.items() if key != missing})
    with pytest.raises(ValueError, match="spatial/blocks.7.spatial.lora_up.weight"):
        lora.load_state_dict({**state, "spatial/blocks.7.spatial.lora_up.weight": torch.zeros(1)})
    tensors = lora.tensors("spatial")
    with pytest.raises(ValueError, match="blocks.0.spatial.lora_down.weight"):
        lora.load_group("spatial", {k: v for k, v in tensors.items() if k != "blocks.0.spatial.lora_down.weight"})
    wrong = {**tensors, "blocks.0.spatial.lora_down.weight": torch.zeros(8, 6)}
    with pytest.raises(ValueError, match=r"blocks.0.spatial.lora_down.weight: shape \(8, 6\), expected \(4, 6\)"):
        lora.load_group("spatial", wrong)


@pytest.mark.parametrize(("alpha", "written"), [(4.0, None), (2.0, 2.0)])
def test_export_writes_alpha_only_when_the_scale_is_not_one(alpha: float, written: float | None) -> None:
    lora = two_groups(net(), alpha)
    exported = lora.export("spatial")
    alphas = {key: float(value) for key, value in exported.items() if key.endswith(".alpha")}
    assert alphas == ({} if written is None else {f"blocks.{i}.spatial.alpha": written for i in (0, 1)})
    assert {key for key in exported if not key.endswith(".alpha")} == set(lora.tensors("spatial"))
    file = to_comfy(exported)
    assert all(key.startswith("diffusion_model.blocks.") for key in file)
    assert {key.split(".", 4)[-1] for key in file} - {"alpha"} == {"lora_A.weight", "lora_B.weight"}
    back = from_comfy(file)
    assert back.keys() == exported.keys() and all(torch.equal(back[key], exported[key]) for key in back)


@pytest.mark.parametrize("key", ["transformer.blocks.0.q.lora_A.weight", "diffusion_model.blocks.0.q.lora_C.weight"])
def test_from_comfy_names_a_foreign_key(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        from_comfy({key: torch.zeros(1)})


def test_up_factors_learn_lora_plus_times_faster() -> None:
    lora = two_groups(net())
    groups = lora.param_groups("spatial", 1e-3, 4.0)
    assert [(g["lr"], g["params"]) for g in groups] == [
        (1e-3, list(lora.factors("spatial", "down").values())),
        (4e-3, list(lora.factors("spatial", "up").values())),
    ]
    lora.train_only({"spatial": ("up",)})
    assert [g["lr"] for g in lora.param_groups("spatial", 1e-3, 4.0)] == [4e-3]


# -- base weights of every storage type ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_gradient_on_a_compressed_model_is_that_of_the_dequantised_one(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny.write_wan(tmp_path / "small.safetensors", dtype=dtype)
    with safe_open(str(tmp_path / "small.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    data = write_data(tmp_path / "data", "wan")
    compressed = make_backbone(load_model(tmp_path / "small.safetensors", dtype=dtype))
    assert compressed.module.blocks[0].ffn[0].weight.dtype == dtype, "the test must compare what it means to compare"
    weights = {name: weight.float().contiguous() for name, weight in compressed.module.state_dict().items()}
    save_file(weights, tmp_path / "full.safetensors", metadata)
    grads = []
    for backbone in (compressed, make_backbone(load_model(tmp_path / "full.safetensors"))):
        lora = LoraGroups(backbone.module, seed=0)
        lora.add_group("lora", backbone.lora_targets["all"], 4, 4)
        fill(lora, "lora")
        batch = make_batch(backbone, data)
        prompt = {**batch, "prompt_embeds": batch["prompt_embeds"][:, 0]}
        parameters = [p for factor in ("down", "up") for p in lora.factors("lora", factor).values()]
        pred = backbone.predict(batch["latents"], torch.tensor([0.3]), prompt)
        assert leaves(pred.sum()) == set(parameters), "the frozen weights are no part of the backward graph"
        grads.append(torch.autograd.grad(pred.square().mean(), parameters))
    for small, full in zip(*grads, strict=True):
        assert full.abs().max() > 0
        torch.testing.assert_close(small, full, rtol=1e-4, atol=1e-6 * float(full.abs().max()))


@pytest.mark.parametrize(
    ("dim", "ffn", "heads", "blocks", "layers", "per_rank"),
    [(1536, 8960, 12, 30, 300, 1_367_040), (5120, 13824, 40, 40, 400, 4_792_320)],
    ids=["1.3B", "14B"],
)
def test_layers_and_parameters_of_the_published_sizes(
    dim: int, ffn: int, heads: int, blocks: int, layers: int, per_rank: int
) -> None:
    """Without storage: the modules that get a LoRA, and its size at rank r, half of it up factors."""
    module = WanModel(
        dim=dim, ffn_dim=ffn, num_heads=heads, num_layers=blocks, operations=disable_weight_init, device="meta"
    )
    lora = LoraGroups(module, seed=0)
    lora.add_group("lora", Wan.lora_targets["all"], 2, 2)
    parts = [f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
    assert set(lora.layers) == {f"blocks.{i}.{part}" for i in range(blocks) for part in parts}
    assert len(lora.layers) == layers
    sizes = {name: sum(p.numel() for p in lora.factors("lora", name).values()) for name in ("down", "up")}
    assert sizes["down"] == sizes["up"] == per_rank  # rank 2: half of 2 * per_rank each
