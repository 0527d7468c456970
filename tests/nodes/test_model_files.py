"""Wrong model files: the error is one sentence that names the file, and nothing is unpickled."""

import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import tiny
import torch
from kinoloom.lora_io.file import load, save
from kinoloom.nodes import folders
from kinoloom.nodes.animatediff import loras as motion_loras
from kinoloom.nodes.animatediff import modules as motion
from kinoloom.nodes.svd.convert import convert_lora_file, convert_unet_file
from kinoloom.nodes.tracklets import control
from kinoloom.trainers.host.private import load_private
from kinoloom.trainers.host.weights import extremes, merge, require_finite
from safetensors.torch import load_file, save_file
from tiny import sd as tiny_sd
from torch import nn

from ..runs import load_animatediff, load_model, load_svd, make_backbone, make_config, motion_lora, random

OPENED: list[str] = []


class Payload:
    """What a hostile pickle does when it is opened without safeguard."""

    def __reduce__(self) -> tuple:
        return OPENED.append, ("opened",)


def text(path: Path) -> None:
    path.write_text("404: not found\n")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    save_file({"down_blocks.0.motion_modules.0.x": torch.zeros(64, 64)}, path)
    path.write_bytes(path.read_bytes()[:900])


def wrong_shape(path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


def no_tensors(path: Path) -> None:
    save_file({}, path)


def whole_numbers(path: Path) -> None:
    torch.save({7: torch.zeros(2), 8: torch.ones(3)}, path)


def payload(path: Path) -> None:
    torch.save({"state_dict": Payload()}, path)


def bare_payload(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload()))


def a_list(path: Path) -> None:
    torch.save([torch.zeros(2)], path)


def cut_zip(path: Path) -> None:
    torch.save({"down_blocks.0.motion_modules.0.x": torch.zeros(640)}, path)
    path.write_bytes(path.read_bytes()[:1500])


SAFETENSORS = [text, nothing, cut, wrong_shape, no_tensors]
PICKLES = [text, nothing, whole_numbers, payload, bare_payload, a_list, cut_zip]
DAMAGED = [("safetensors", make) for make in SAFETENSORS] + [("ckpt", make) for make in PICKLES]


@pytest.fixture(params=DAMAGED, ids=[f"{make.__name__}.{suffix}" for suffix, make in DAMAGED])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    suffix, make = request.param
    path = tmp_path / f"damaged file.{suffix}"
    make(path)
    return path


@pytest.fixture(scope="module")
def models(tiny_models: Path) -> dict[str, Any]:
    return {
        "animatediff": load_animatediff(tiny_models),
        "svd": load_svd(tiny_models, "shallow_svd"),
        "wan": load_model(tiny_models / "diffusion_models" / "tiny_wan.safetensors"),
    }


def loads(models: dict[str, Any]) -> dict[str, Callable[[Path], Any]]:
    """Each place that reads a model file, by the option that names it."""
    sns, md, svd = "KinoloomTrainSetAndSequence", "KinoloomTrainMotionDirector", "KinoloomTrainSvdTracklets"
    return {
        "Load Motion Module": lambda path: motion.load_motion_module(str(path)),
        "Load Motion LoRA": lambda path: motion_loras.LoadMotionLora.execute(models["animatediff"], path.name, 1.0),
        "Merge Motion LoRAs": lambda path: motion_loras.MergeMotionLoras.execute(path.name, 1.0, "none", 1.0, "merged", 0),
        "Load Tracklet Control": lambda path: control.load_control(str(path)),
        "identity_file": lambda path: make_config(sns, set_steps=0, identity_file=str(path)).check_model(models["wan"]),
        "domain_adapter": lambda path: make_config(md, domain_adapter=str(path)).check_model(models["animatediff"]),
        "control_file": lambda path: make_config(svd, control_file=str(path)).check_model(models["svd"]),
        "Convert SVD Model": lambda path: convert_unet_file(path, "title", path.parent),
        "Convert SVD LoRA": lambda path: convert_lora_file(path, "title", path.parent),
    }  # fmt: skip


def test_every_loader_names_the_file_and_opens_nothing(
    damaged: Path, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (folders.MOTION_LORAS, folders.MOTION_MODELS):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, ([str(damaged.parent)], set()))
    for place, read in loads(models).items():
        with warnings.catch_warnings(), pytest.raises(ValueError) as error:
            warnings.simplefilter("ignore")  # torch's on old formats
            read(damaged)
        said = str(error.value)
        own = place.startswith("Convert")  # whose node puts the name before
        assert own or damaged.name in said, f"{place}: {said}"
        assert "\n" not in said and "weights_only" not in said and "unpickl" not in said.lower(), f"{place}: {said}"
        assert error.value.__context__ is None or error.value.__suppress_context__ or "weights_only" not in str(error.value.__context__)
    assert not OPENED


def test_a_motion_module_of_wrong_shapes_is_named(tiny_models: Path, tmp_path: Path) -> None:
    whole = load_file(tiny_models / "animatediff_models" / "tiny_motion.safetensors")
    table = next(key for key in whole if key.endswith("down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.pos_encoder.pe"))
    for change in (torch.zeros(3), torch.zeros(()), torch.zeros(1, 32, 32, dtype=torch.int32)):
        save(tmp_path / "shapes.safetensors", {**whole, table: change})
        with pytest.raises(ValueError, match=r"motion_module='shapes\.safetensors': found a "):
            motion.load_motion_module(str(tmp_path / "shapes.safetensors"))


# -- what is known before a run starts -------------------------------------------------------------------------------------


def test_a_domain_adapter_of_another_width_is_refused_which_core_only_logs(models: dict[str, Any], tmp_path: Path) -> None:
    key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    config = make_config("KinoloomTrainMotionDirector", domain_adapter=str(tmp_path / "adapter.safetensors"))
    for width, message in ((32, ""), (48, r"domain_adapter='adapter\.safetensors': .*is 48 x 48 in the file, 32 x 32")):
        factors = {f"{key}.lora_down.weight": random(2, width, name="d"), f"{key}.lora_up.weight": random(width, 2, name="u")}
        save(tmp_path / "adapter.safetensors", factors)
        if message:
            with pytest.raises(ValueError, match=message):
                config.check_model(models["animatediff"])
        else:
            config.check_model(models["animatediff"])


# -- numbers that are none -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_model_with_values_that_are_no_numbers_is_named(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    tiny.write_wan(path, dtype=dtype)
    tensors, metadata = load(path)
    tensors["blocks.1.ffn.2.weight"].view(-1)[5] = value
    save(path, tensors, metadata)
    with pytest.raises(ValueError, match=r"model: broken\.safetensors: weight blocks\.1\.ffn\.2\.weight of the model holds NaN"):
        load_private(load_model(path), torch.device("cpu"))


def test_extremes_of_a_type_are_numbers() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
        layer = nn.Linear(2, 1, bias=False)
        limits = torch.finfo(dtype)
        layer.weight = nn.Parameter(torch.tensor([[limits.min, limits.max]]).to(dtype), requires_grad=False)
        require_finite(extremes(layer), "file")
        if dtype != torch.float8_e4m3fn:  # which has no infinity
            layer.weight.data[0, 1] = float("inf")
            with pytest.raises(ValueError, match="file: weight weight of the model"):
                require_finite(extremes(layer), "file")


def test_a_motion_module_with_values_that_are_no_numbers_is_named(tiny_models: Path, tmp_path: Path) -> None:
    path = tmp_path / "animatediff_models" / "broken_motion.safetensors"
    path.parent.mkdir()
    tiny_sd.write_motion_module(path, tiny.SD_WIDTHS)
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("ff.net.2.weight"))
    tensors[key][3, 4] = float("nan")
    save(path, tensors)
    model = load_animatediff(tiny_models)
    module = motion.load_motion_module(str(path))
    model.set_additional_models(motion.PART, [module])
    with pytest.raises(ValueError, match=rf"motion_module: broken_motion\.safetensors: weight {key} of the model holds NaN"):
        make_backbone(model)


def test_a_lora_file_with_values_that_are_no_numbers_is_refused(models: dict[str, Any]) -> None:
    query = "down_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.to_q"
    tensors = motion_lora({query: (64, 64)}, 3, "lora")
    tensors[f"{query}.lora_down.weight"] = tensors[f"{query}.lora_down.weight"] * float("inf")
    with pytest.raises(ValueError, match="lora: motion LoRA: .*lora_down.weight holds NaN or infinite values"):
        motion_loras.with_motion_lora(models["animatediff"], tensors, 1.0, "lora")


# -- memory of the file ----------------------------------------------------------------------------------------------------


def test_a_merge_writes_into_memory_of_its_own(tmp_path: Path) -> None:
    """ComfyUI's loaders may give tensors that are mapped from the file, which cannot be written to."""
    (tmp_path / "weights").write_bytes(torch.ones(12).numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=12).view(3, 4)
    layer = nn.Linear(4, 3, bias=False)
    layer.weight = nn.Parameter(mapped, requires_grad=False)
    merge(layer, {"weight": [(2.0, ("diff", (torch.ones(3, 4),)), 1.0, None, None)]})
    assert torch.equal(layer.weight, torch.full((3, 4), 3.0)) and torch.equal(mapped, torch.ones(3, 4))


@pytest.mark.slow
def test_training_writes_into_no_mapped_file(tiny_models: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("mapped_training.py")), str(tiny_models), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]  # that of a segmentation fault where something is written
