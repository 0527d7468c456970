"""Motion LoRAs: put on a motion module, read in every spelling, merged."""

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folder_paths
import pytest
import tiny
import torch
from kinoloom.lora_io.file import load, save
from kinoloom.lora_io.keys import from_motion_lora, to_motion_lora
from kinoloom.lora_io.merge import merge
from kinoloom.nodes import folders
from kinoloom.nodes.animatediff import loras as motion_loras
from kinoloom.nodes.animatediff import modules as motion
from kinoloom.nodes.widgets import NO_FILE
from kinoloom.trainers.backbones.animatediff.motion_module import MID, PART, Layout, MotionModules
from kinoloom.trainers.host.source import carried_files
from tiny import sd as tiny_sd
from torch import Tensor
from toyworld.pack import unet as toy_unet

from ..runs import load_animatediff, make_backbone, motion_lora

BLOCK = "{}.temporal_transformer.transformer_blocks.0"
QUERY = BLOCK.format("down_blocks.1.motion_modules.0") + ".attention_blocks.1.to_q"
MID_QUERY = BLOCK.format(MID) + ".attention_blocks.0.to_q"
OUT = BLOCK.format("up_blocks.0.motion_modules.1") + ".attention_blocks.0.to_out.0"
LAYERS = {
    QUERY: (8, 8),
    OUT: (8, 8),
    BLOCK.format("up_blocks.3.motion_modules.2") + ".ff.net.0.proj": (16, 8),
    BLOCK.format("down_blocks.2.motion_modules.0") + ".ff.net.2": (8, 12),
}
LORA, OTHER = (motion_lora({QUERY: (64, 64)}, 3, name) for name in ("lora", "other"))


@pytest.fixture(scope="module")
def applied(tiny_models: Path) -> Any:
    """The MODEL that Apply Motion Module makes with v3."""
    return load_animatediff(tiny_models)


def query_of(model: Any) -> Tensor:
    return make_backbone(model).module["motion"].get_parameter(f"{QUERY}.weight")


def deltas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    paths = {key.partition(".lora_")[0] for key in tensors}
    return {p: tensors[f"{p}.lora_up.weight"].float() @ tensors[f"{p}.lora_down.weight"].float() for p in paths}


# -- on a motion module ---------------------------------------------------------------------------------------------------


def test_a_motion_lora_adds_strength_times_up_down_and_a_second_one_adds_to_it(applied: Any) -> None:
    plain = query_of(applied)
    for strength in (1.0, 0.7, -2.0):
        once = motion_loras.with_motion_lora(applied, LORA, strength, "lora")
        torch.testing.assert_close(query_of(once), plain + strength * deltas(LORA)[QUERY], rtol=1e-5, atol=1e-6)
        twice = motion_loras.with_motion_lora(once, OTHER, 0.5, "other")
        expected = plain + strength * deltas(LORA)[QUERY] + 0.5 * deltas(OTHER)[QUERY]
        torch.testing.assert_close(query_of(twice), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(query_of(applied), plain)
    assert motion_loras.with_motion_lora(applied, LORA, 0.0, "lora") is applied


def test_motion_loras_without_a_place_are_refused(applied: Any, tiny_models: Path) -> None:
    base = toy_unet.load(tiny_models / "diffusion_models" / "tiny_sd.safetensors")
    with pytest.raises(ValueError, match="model: has no motion module. Put Apply Motion Module before the motion LoRA"):
        motion_loras.with_motion_lora(base, LORA, 1.0, "lora.ckpt")
    unknown = QUERY.replace("motion_modules.0", "motion_modules.5")
    with pytest.raises(ValueError, match=f"lora.ckpt: 1 of its layers are not in .*, such as {unknown}"):
        motion_loras.with_motion_lora(applied, motion_lora({QUERY: (64, 64), unknown: (64, 64)}, 3, "lora"), 1.0, "lora.ckpt")
    image = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(1, 64)}
    with pytest.raises(ValueError, match="lora.ckpt: no layers of a motion module in it, expected a motion LoRA"):
        motion_loras.with_motion_lora(applied, image, 1.0, "lora.ckpt")
    halves = {key: value for key, value in LORA.items() if "lora_down" in key}
    with pytest.raises(ValueError, match=f"lora.ckpt: motion LoRA: {QUERY}.lora_down.weight has no {QUERY}.lora_up"):
        motion_loras.with_motion_lora(applied, halves, 1.0, "lora.ckpt")
    with pytest.raises(ValueError, match="lora.ckpt: motion LoRA key .*to_q.weight': expected a down or up factor"):
        motion_loras.with_motion_lora(applied, {f"{QUERY}.weight": torch.zeros(64, 64)}, 1.0, "lora.ckpt")


def test_middle_layers_of_a_v2_lora_are_left_out_elsewhere_with_a_warning(
    applied: Any, tiny_models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = motion_lora({QUERY: (64, 64), MID_QUERY: (64, 64)}, 3, "lora")
    with caplog.at_level(logging.WARNING):
        patched = motion_loras.with_motion_lora(applied, tensors, 1.0, "lora.ckpt")
    assert "lora.ckpt was made for a v2 motion module; this one is v3" in caplog.text
    assert list(carried_files(patched)[PART].patches) == [f"{QUERY}.weight"]
    caplog.clear()
    (tmp_path / "diffusion_models").symlink_to(tiny_models / "diffusion_models")
    tiny_sd.write_motion_module(tmp_path / "animatediff_models" / "v2.safetensors", tiny.SD_WIDTHS, mid=True)
    with caplog.at_level(logging.WARNING):
        patched = motion_loras.with_motion_lora(load_animatediff(tmp_path, "v2"), tensors, 1.0, "lora.ckpt")
    assert not caplog.text
    assert sorted(carried_files(patched)[PART].patches) == sorted([f"{QUERY}.weight", f"{MID_QUERY}.weight"])


def test_a_motion_model_of_animatediff_evolved_is_the_same_file_and_loras(
    applied: Any, tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read of theirs: the name of the file, and patches, each a difference in a tuple of its own."""
    found = ([str(tiny_models / "animatediff_models")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.MOTION_MODELS, found)
    theirs = SimpleNamespace(
        model=SimpleNamespace(mm_info=SimpleNamespace(mm_name="tiny_motion.safetensors")),
        patches={f"{QUERY}.weight": [(0.5, (deltas(LORA)[QUERY],), 1.0, None, None)]},
    )
    base = toy_unet.load(tiny_models / "diffusion_models" / "tiny_sd.safetensors")
    converted = motion.ApplyMotionModule.execute(base, theirs, 16, 4, motion.LINEAR).args[0]
    ours, theirs = (make_backbone(m).module for m in (motion_loras.with_motion_lora(applied, LORA, 0.5, "lora"), converted))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(theirs.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)


# -- spellings -------------------------------------------------------------------------------------------------------------


def motion_directors(key: str) -> str:
    """.X.lora_down.weight to .processor.X_lora.down.weight, whatever X is."""
    return re.sub(r"\.(\w+)\.lora_(down|up)\.weight", r".processor.\1_lora.\2.weight", key)


SPELLINGS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "official": to_motion_lora,
    "MotionDirector's": lambda lora: {motion_directors(key): value for key, value in lora.items()},
    "prefixed": lambda lora: {f"unet.{key}": value for key, value in to_motion_lora(lora).items()},
    "plain": dict,
    "A and B": lambda lora: {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in lora.items()},
    "with alpha": lambda lora: {
        **{key: value * 2 if "lora_up" in key else value for key, value in lora.items()},
        **{f"{path}.alpha": torch.tensor(1.5) for path in LAYERS},
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", list(SPELLINGS))
def test_every_spelling_is_read_to_the_same_tensors(spelling: str) -> None:
    plain = motion_lora(LAYERS, 3, "spelled")
    spelled = SPELLINGS[spelling](plain)
    if spelling == "MotionDirector's":
        assert f"{OUT.removesuffix('.0')}.processor.0_lora.down.weight" in spelled
    read = from_motion_lora({**spelled, "other.weight": torch.zeros(1)})
    assert read.keys() == plain.keys() and all(torch.equal(read[key], plain[key]) for key in plain)


# -- merging ---------------------------------------------------------------------------------------------------------------


def test_merging_adds_the_updates_at_their_strengths() -> None:
    first, second = motion_lora(LAYERS, 3, "first"), motion_lora(dict(list(LAYERS.items())[1:]), 2, "second")
    merged = deltas(merge([(first, 0.7), (second, -1.5)]))
    assert merged.keys() == LAYERS.keys()
    for path in LAYERS:
        expected = 0.7 * deltas(first)[path] - 1.5 * deltas(second).get(path, torch.zeros(()))
        torch.testing.assert_close(merged[path], expected, rtol=1e-4, atol=1e-5)
    half = {key: value.half() for key, value in first.items()}
    assert {value.dtype for value in merge([(half, 1.0)]).values()} == {torch.float32}


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_a_lower_rank_is_the_best_approximation_of_the_whole_update(rank: int) -> None:
    loras = [(motion_lora(LAYERS, 4, "first"), 1.0), (motion_lora(LAYERS, 3, "second"), 0.5)]
    whole, merged = deltas(merge(loras)), merge(loras, rank)
    for path, matrix in whole.items():
        assert merged[f"{path}.lora_down.weight"].shape[0] == merged[f"{path}.lora_up.weight"].shape[1] == rank
        u, s, v = torch.linalg.svd(matrix.double())
        expected = (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close(deltas(merged)[path].double(), expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of motion LoRAs, with two in it and another file."""
    paths = {**folder_paths.folder_names_and_paths, folders.MOTION_LORAS: ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)
    save(tmp_path / "zoom.safetensors", SPELLINGS["MotionDirector's"](motion_lora(LAYERS, 3, "zoom")))
    save(tmp_path / "mine" / "pan.safetensors", to_motion_lora(motion_lora(LAYERS, 2, "pan")))
    save(tmp_path / "look.safetensors", {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0)})
    yield tmp_path


def merge_node(*widgets: Any) -> tuple[dict[str, Tensor], str]:
    return motion_loras.MergeMotionLoras.execute(*widgets).args


def test_the_merge_node_writes_a_new_file_each_time(library: Path) -> None:
    lora, path = merge_node("zoom.safetensors", 0.5, "mine/pan.safetensors", 2.0, "both", 0)
    assert Path(path) == library / "kinoloom" / "both.safetensors"
    tensors, metadata = load(Path(path))
    assert metadata["kinoloom.merged"] == "zoom.safetensors x 0.5, pan.safetensors x 2"
    assert tensors.keys() == lora.keys() and all(torch.equal(tensors[key], lora[key]) for key in lora)
    zoom, pan = deltas(motion_lora(LAYERS, 3, "zoom")), deltas(motion_lora(LAYERS, 2, "pan"))
    for layer, delta in deltas(from_motion_lora(tensors)).items():
        torch.testing.assert_close(delta, 0.5 * zoom[layer] + 2 * pan[layer], rtol=1e-4, atol=1e-5)
    before = Path(path).read_bytes()
    others = [merge_node("zoom.safetensors", 1.0, NO_FILE, 1.0, "both", 2)[1] for _ in range(2)]
    assert [Path(other).name for other in others] == ["both-2.safetensors", "both-3.safetensors"]
    assert Path(path).read_bytes() == before
    assert {len(t) for key, t in load(Path(others[0]))[0].items() if ".down." in key} == {2}


def test_the_merge_node_converts_to_the_official_spelling(library: Path) -> None:
    lora, _ = merge_node("zoom.safetensors", 1.0, NO_FILE, 1.0, "official", 0)
    expected = to_motion_lora(motion_lora(LAYERS, 3, "zoom"))
    assert lora.keys() == expected.keys() and all(torch.equal(lora[key], expected[key]) for key in lora)


@pytest.mark.parametrize("name", ["", " ", "../out", "a/b", "a\\b", ".hidden", "end.", "x" * 101, "a\nb"])
def test_the_merge_node_refuses_names_that_are_no_file_names(name: str, library: Path) -> None:
    with pytest.raises(ValueError, match="expected letters, digits"):
        merge_node("zoom.safetensors", 1.0, NO_FILE, 1.0, name, 0)
    assert not (library / "kinoloom").exists()


def test_the_merge_node_names_a_file_that_is_no_motion_lora(library: Path) -> None:
    with pytest.raises(ValueError, match="lora_2='look.safetensors': no layers of a motion module in it, expected"):
        merge_node("zoom.safetensors", 1.0, "look.safetensors", 1.0, "both", 0)


# -- diffusers -------------------------------------------------------------------------------------------------------------


def in_diffusers(key: str) -> str:
    """AnimateDiff's path of a layer as diffusers' UNetMotionModel has it."""
    path = key.replace(".temporal_transformer", "")
    return path.replace("attention_blocks.0", "attn1").replace("attention_blocks.1", "attn2")


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("", ".lora_A.weight", ".lora_B.weight"),
        ("unet.", ".lora_A.weight", ".lora_B.weight"),
        ("unet.", ".lora.down.weight", ".lora.up.weight"),
        ("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"),
        ("unet.", ".processor_lora.down.weight", ".processor_lora.up.weight"),
    ],
)
def test_diffusers_names_give_the_same_layers(prefix: str, down: str, up: str) -> None:
    native = motion_lora(LAYERS, 3, "zoom")
    spelled = {}
    for key, tensor in native.items():
        path, _, side = key.partition(".lora_")
        spelled[prefix + in_diffusers(path) + (down if side.startswith("down") else up).replace(".processor", "")] = tensor
    read = from_motion_lora(spelled)
    assert read.keys() == native.keys() and all(torch.equal(read[key], tensor) for key, tensor in native.items())


def test_the_layers_of_diffusers_own_motion_unet_are_all_known() -> None:
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

    block = AnimateDiffTransformer3D(2, 4, 8, activation_fn="geglu", double_self_attention=True, norm_num_groups=4)
    names = [name for name, layer in block.named_modules() if isinstance(layer, torch.nn.Linear)]
    root = "down_blocks.1.motion_modules.0"
    factors = {f"{root}.{name}.lora_{side}.weight": torch.ones(2, 2) for name in names for side in "AB"}
    found = {key.partition(".lora_")[0] for key in from_motion_lora(factors)}
    module = MotionModules(Layout("v3", (32, 32, 32, 32), 32), device="meta")
    own = {name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert found == {name for name in own if name.startswith(root + ".")}


def test_a_motion_lora_of_another_width_names_the_option_and_both_widths(applied: Any, library: Path) -> None:
    with pytest.raises(ValueError, match=r"lora_name='zoom\.safetensors': made for .* another width: .* \(8, 8\), this .* \(64, 64\)"):
        motion_loras.LoadMotionLora.execute(applied, "zoom.safetensors", 1.0)


def test_motion_loras_of_two_widths_are_not_merged(library: Path) -> None:
    save(library / "wide.safetensors", to_motion_lora(motion_lora({QUERY: (12, 12)}, 2, "wide")))
    with pytest.raises(ValueError, match=r"lora_2: made for a motion module of another width than lora_1: .*to_q"):
        merge_node("zoom.safetensors", 1.0, "wide.safetensors", 1.0, "both", 0)
