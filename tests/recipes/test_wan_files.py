"""Wan LoRA files with the key names of other trainers, and the models that their metadata names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from kinoloom.lora_io.file import load, save
from kinoloom.lora_io.keys import to_comfy
from kinoloom.lora_io.wan import MOTION_STAGES, from_any_wan, read_wan_lora, require_made_for
from kinoloom.nodes.training.train import train_node
from kinoloom.trainers import recipes
from torch import Tensor

from ..runs import finish, load_model, make_config, make_job, random

NAME = "KinoloomTrainSetAndSequence"
SHAPES = {
    f"blocks.{block}.{layer}": {"ffn.0": (48, 32), "ffn.2": (32, 48)}.get(layer, (32, 32))
    for block in range(12)
    for layer in (*(f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkvo"), "ffn.0", "ffn.2")
}
DIFFUSERS = {"self_attn.": "attn1.to_", "cross_attn.": "attn2.to_", "to_o": "to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}  # fmt: skip


def native(rank: int = 3) -> dict[str, Tensor]:
    factors = {}
    for path, (width_out, width_in) in SHAPES.items():
        factors[f"{path}.lora_down.weight"] = random(rank, width_in, name=f"{path} down")
        factors[f"{path}.lora_up.weight"] = random(width_out, rank, name=f"{path} up")
    return factors


def diffusers_path(path: str) -> str:
    block, _, layer = path.partition(".")[2].partition(".")
    for ours, theirs in DIFFUSERS.items():
        layer = layer.replace(ours, theirs)
    return f"blocks.{block}.{layer}"


def spelled(form: str, down: str, up: str, path: Callable[[str], str] = str) -> dict[str, Tensor]:
    """`form` with {} for the path, or {_} for the path with underscores."""
    named = {}
    for key, tensor in native().items():
        module, _, side = key.partition(".lora_")
        own = form.format(path(module), _=path(module).replace(".", "_"))
        named[own + (down if side.startswith("down") else up)] = tensor
    return named


A, B = ".lora_A.weight", ".lora_B.weight"
DOWN, UP = ".lora_down.weight", ".lora_up.weight"
SPELLINGS = {
    "ComfyUI": spelled("diffusion_model.{}", A, B),
    "ComfyUI, kohya's factors": spelled("diffusion_model.{}", DOWN, UP),
    "musubi": spelled("lora_unet_{_}", DOWN, UP),
    "Wan-Fun": spelled("lora_unet__{_}", DOWN, UP),
    "diffusers": spelled("transformer.{}", A, B, diffusers_path),
    "diffusers, old": spelled("transformer.{}", ".lora.down.weight", ".lora.up.weight", diffusers_path),
    "PEFT of diffusers": spelled("base_model.model.{}", A, B, diffusers_path),
    "PEFT of Wan, with the adapter's name": spelled("base_model.model.{}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "DiffSynth": spelled("pipe.dit.{}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "bare": spelled("{}", A, B),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_layers(spelling: str) -> None:
    read, expected = from_any_wan(SPELLINGS[spelling]), native()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in expected.items())


def test_diffusers_own_conversions_of_other_spellings_are_read_to_the_same() -> None:
    """Its converters are the judge of which of Wan's layers each of its own names means."""
    alphas = {f"lora_unet_{path.replace('.', '_')}.alpha": torch.tensor(3.0) for path in SHAPES}
    musubi = _convert_musubi_wan_lora_to_diffusers({**SPELLINGS["musubi"], **alphas})
    other = _convert_non_diffusers_wan_lora_to_diffusers(dict(SPELLINGS["ComfyUI"]))
    for converted in (musubi, {key: value for key, value in other.items() if ".blocks." in key}):
        read = from_any_wan(converted)
        assert read.keys() <= native().keys() and len(read) >= len(SHAPES)
        assert all(torch.equal(tensor, native()[key]) for key, tensor in read.items())


def test_alphas_of_the_file_go_before_those_of_its_settings() -> None:
    path = "blocks.11.cross_attn.v"
    musubi = {**SPELLINGS["musubi"], f"lora_unet_{path.replace('.', '_')}.alpha": torch.tensor(1.5)}
    assert float(from_any_wan(musubi)[f"{path}.alpha"]) == 1.5
    read = from_any_wan(musubi, alpha=6.0)
    assert float(read[f"{path}.alpha"]) == 1.5 and float(read["blocks.0.ffn.2.alpha"]) == 6.0
    assert not any(key.endswith("alpha") for key in from_any_wan(SPELLINGS["musubi"]))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "expected a layer of a Wan block"),
        ("diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight", "expected a layer of a Wan block"),
        ("diffusion_model.vace_blocks.0.ffn.0.lora_A.weight", "expected a layer of a Wan block"),
        ("diffusion_model.blocks.0.ffn.0.diff_b", "expected a LoRA's down or up factor, found none"),
        ("lora_unet_blocks_0_ffn_0.lokr_w1", "found LoKr"),
        ("lora_unet_blocks_0_ffn_0.hada_w1_a", "found LoHa"),
        ("diffusion_model.blocks.0.ffn.0.dora_scale", "found DoRA"),
        ("diffusion_model.blocks.17.ffn.0.lora_A.weight", r"blocks\.17\.ffn\.0\.lora_down\.weight has no blocks\.17"),
    ],
)
def test_other_layers_and_other_kinds_are_named(key: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        from_any_wan({**SPELLINGS["ComfyUI"], key: torch.zeros(3, 32)})
    assert "blocks.17" in key or key in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"ss_base_model_version": "sd_v1"}, "ss_base_model_version='sd_v1'"),
        ({"ss_base_model_version": "wan", "modelspec.architecture": "wan2.2/lora"}, "modelspec.architecture"),
        ({"ss_base_model_version": "wan21_14b_i2v"}, "expected a LoRA for Wan 2.1 text-to-video"),
        ({"sns.stage": "motion"}, "a motion file: motion alone"),
        ({"sns.stage": "combined"}, "a combined file: look and motion in one"),
        ({"kinoloom.base_model": "c" * 64, "ss_sd_model_name": "other.safetensors"}, r"another base .*other\.safet"),
    ],
)
def test_files_for_something_else_are_refused_by_their_metadata(metadata: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_made_for(metadata, MOTION_STAGES, {"a" * 64, "b" * 64})


@pytest.mark.parametrize(
    "metadata",
    [{}, {"ss_base_model_version": "wan"}, {"ss_base_model_version": "Wan2.1-T2V-14B"}, {"sns.stage": "identity"}, {"kinoloom.base_model": "b" * 64}],
)  # fmt: skip
def test_files_for_this_model_pass(metadata: dict[str, str]) -> None:
    require_made_for(metadata, MOTION_STAGES, {"a" * 64, "b" * 64})


def test_what_does_not_fit_names_the_value_to_set(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save(path, SPELLINGS["musubi"])
    assert read_wan_lora(path, SHAPES, 3, MOTION_STAGES).keys() == native().keys()
    with pytest.raises(ValueError, match="has rank 3, but rank=16: set rank to 3"):
        read_wan_lora(path, SHAPES, 16, MOTION_STAGES)
    with pytest.raises(ValueError, match=r"another width: blocks\.0\.self_attn\.q is 32 x 32 in the file, 64 x 64"):
        read_wan_lora(path, {module: (64, 64) for module in SHAPES}, 3, MOTION_STAGES)
    with pytest.raises(ValueError, match=r"does not train, for example blocks\.1\.cross_attn\.k: expected 10 .* 120"):
        read_wan_lora(path, {m: s for m, s in SHAPES.items() if m.startswith("blocks.0.")}, 3, MOTION_STAGES)
    with pytest.raises(ValueError, match=r"leaves out layers, for example blocks\.12\.ffn\.0: expected 121"):
        read_wan_lora(path, {**SHAPES, "blocks.12.ffn.0": (48, 32)}, 3, MOTION_STAGES)


def test_the_scale_that_diffusers_keeps_in_metadata_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save(path, SPELLINGS["diffusers"], {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 12})})
    read = read_wan_lora(path, SHAPES, 3, MOTION_STAGES)
    assert {float(value) for key, value in read.items() if key.endswith(".alpha")} == {12.0}


# -- identity_file ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(inputs: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, (model, data) = tmp_path_factory.mktemp("first"), inputs(NAME)
    return finish(make_job(folder, model, data, make_config(NAME), NAME), model)


def start_node(model: Any, data: Any, monkeypatch: pytest.MonkeyPatch, file: Path, **options: Any) -> None:
    """The node up to the start of a run: its errors come before that."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(file.parent)], {".safetensors"}))
    config = {**vars(make_config(NAME, set_steps=0, identity_file="x")), "identity_file": file.name, **options}
    train_node(recipes()[NAME]).execute(model=model, data=data, run_name="unused", **config)


@pytest.mark.parametrize("label", ["motion", "combined"])
def test_the_node_refuses_other_stages_as_identity(
    label: str, first: Any, model: Any, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=rf"identity_file='.*{label}.*': a {label} file"):
        start_node(model, data, monkeypatch, Path(first.files[label]))


def test_the_node_refuses_an_identity_of_another_base(
    first: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_wan(tmp_path / "other.safetensors", seed=3)
    other = load_model(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"identity_file=.*another base model .*tiny_wan\.safetensors"):
        start_node(other, data, monkeypatch, Path(first.files["identity"]))


def test_the_node_says_rank_and_alpha_before_a_run_starts(
    first: Any, model: Any, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="identity_file=.* has rank 4, but rank=32: set rank to 4"):
        start_node(model, data, monkeypatch, Path(first.files["identity"]), rank=32)
    with pytest.raises(ValueError, match=r"identity_file=.* alpha 4 at rank 4, but alpha=1 .* set alpha to 4"):
        start_node(model, data, monkeypatch, Path(first.files["identity"]), alpha=1.0)


def test_the_same_base_in_another_storage_or_with_a_lora_is_no_other_base(
    first: Any, model: Any, tiny_models: Path
) -> None:
    import comfy.sd

    config = make_config(NAME, set_steps=0, identity_file=first.files["identity"])
    file = tiny_models / "diffusion_models" / "tiny_wan.safetensors"
    lora = to_comfy({
        "blocks.0.ffn.0.lora_down.weight": random(2, 128, name="down"),
        "blocks.0.ffn.0.lora_up.weight": random(256, 2, name="up"),
    })  # fmt: skip
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
    for same in (model, load_model(file, dtype=torch.float8_e4m3fn), patched):
        config.check_model(same)


def test_an_identity_in_other_spellings_continues_to_the_same_bits(
    first: Any, model: Any, data: Any, tmp_path: Path
) -> None:
    tensors = from_any_wan(load(Path(first.files["identity"]))[0])
    musubi = {f"lora_unet_{key.partition('.lora_')[0].replace('.', '_')}.lora_{key.partition('.lora_')[2]}": value for key, value in tensors.items()}  # fmt: skip
    diffusers = {f"transformer.{diffusers_path(key.partition('.lora_')[0])}.lora_{'A' if 'down' in key else 'B'}.weight": value for key, value in tensors.items()}  # fmt: skip
    for name, spelled_file in {"musubi": musubi, "diffusers": diffusers}.items():
        file = tmp_path / f"{name}.safetensors"
        save(file, spelled_file)
        config = make_config(NAME, set_steps=0, identity_file=str(file))
        second = finish(make_job(tmp_path / name, model, data, config, NAME), model)
        ours, theirs = (load(Path(job.files["combined"]))[0] for job in (second, first))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
