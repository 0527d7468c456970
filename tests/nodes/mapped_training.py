"""Trains tiny models whose files are mapped read-only: python mapped_training.py MODELS FOLDER

ComfyUI's loader gives such weights with dynamic VRAM, the default on NVIDIA cards. A write into one ends the process.
"""

import faulthandler
import json
import mmap
import sys
import warnings
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]
models, folder = map(Path, sys.argv[1:])

from comfy_client import make_base  # noqa: E402
from comfy_library import PACK, register_pack, start_comfyui  # noqa: E402

start_comfyui(make_base(folder / "base", PACK))
register_pack()

import comfy.model_base  # noqa: E402
import comfy.utils  # noqa: E402
import runs  # noqa: E402
import torch  # noqa: E402
from kinoloom.nodes.animatediff import loras as motion_loras  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

faulthandler.enable()  # says where a process was that ends by a write

MOTION = "down_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_k"
SPATIAL = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"


def load_mapped(path: str, safe_load: bool = False, device: Any = None, return_metadata: bool = False) -> Any:
    """In place of comfy.utils.load_torch_file."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size = int.from_bytes(mapped[:8], "little")
    header, tensors = json.loads(mapped[8 : 8 + size]), {}
    with safe_open(path, "pt") as opened, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        for key in opened.keys():
            like, start = opened.get_tensor(key), 8 + size + header[key]["data_offsets"][0]
            values = torch.frombuffer(mapped, dtype=like.dtype, count=like.numel(), offset=start)
            tensors[key] = values.view(like.shape)
        metadata = opened.metadata()
    return (tensors, metadata) if return_metadata else tensors


def patched_wan() -> Any:
    """With differences on it to a matrix, a bias and a norm, as LoRA files hold."""
    model = runs.load_model(models / "diffusion_models" / "tiny_wan.safetensors")
    block = model.model.diffusion_model.blocks[0]
    weights = {"self_attn.q.weight": block.self_attn.q.weight, "self_attn.q.bias": block.self_attn.q.bias}
    weights["norm3.weight"] = block.norm3.weight
    patches = {
        f"diffusion_model.blocks.0.{name}": ("diff", (torch.full_like(weight, 0.1),)) for name, weight in weights.items()
    }
    assert len(model.add_patches(patches)) == len(weights)
    return model


def patched_animatediff() -> Any:
    """With a motion LoRA on its motion module."""
    lora = runs.motion_lora({MOTION: (64, 64)}, 3, "lora")
    return motion_loras.with_motion_lora(runs.load_animatediff(models), lora, 0.5, "lora")


def adapter() -> str:
    """A LoRA for the image model, which is merged before training."""
    tensors = {f"{SPATIAL}.lora_{side}.weight": torch.ones(size) for side, size in {"down": (2, 768), "up": (32, 2)}.items()}
    save_file(tensors, folder / "adapter.safetensors")
    return str(folder / "adapter.safetensors")


def train(method: str, model: Any, **options: Any) -> None:
    """Stop after two steps, and go on from the checkpoint to the end."""
    place = folder / method
    data = runs.write_data(place / "data", runs.recipes()[method].backbone_class.name, roles=("train",))
    config = runs.make_config(method, validate_every=0, **options)
    stopped = runs.Published().at(2, lambda job: job.stop())
    runs.finish(runs.make_job(place, model, data, config, method, stopped), model, "stopped")
    runs.finish(runs.make_job(place, model, data, config, method), model)


comfy.utils.load_torch_file = load_mapped
load_weights = comfy.model_base.BaseModel.load_model_weights
comfy.model_base.BaseModel.load_model_weights = lambda *args, **kwargs: load_weights(*args, **{**kwargs, "assign": True})
svd = runs.load_svd(models, "shallow_svd")
train("KinoloomTrainWanLora", patched_wan())
train("KinoloomTrainMotionDirector", patched_animatediff(), domain_adapter=adapter())
train("KinoloomTrainSvdFinetune", svd, layers="all")
train("KinoloomTrainSvdTracklets", svd)
