"""The training device: its number formats and its memory."""

import gc
import platform

import comfy.model_management
import comfyui_version
import torch

from ..core.about import project


def torch_device() -> torch.device:
    return comfy.model_management.get_torch_device()


def environment() -> dict[str, str]:
    """Versions of the software and the name of the device, for a run's record."""
    return {
        "ComfyUI": comfyui_version.__version__,
        "Kinoloom": project("version"),
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": comfy.model_management.get_torch_device_name(torch_device()),
    }


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(precision: str, on: torch.device) -> str:
    """`precision`, with "auto" replaced by the key of DTYPES that suits the device."""
    if precision != "auto":
        return precision
    if on.type == "cpu":
        return "bf16" if _cpu_multiplies_bf16() else "fp32"
    return "bf16" if comfy.model_management.should_use_bf16(on) else "fp16"


def compute_dtype(precision: str, on: torch.device) -> torch.dtype:
    return DTYPES[resolve_precision(precision, on)]


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 instructions. With them bf16 is about twice as fast as fp32, without them slower."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.10
        return False
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def free_memory(on: torch.device) -> int:
    """Free bytes on the device, including memory that torch has reserved but does not use."""
    return int(comfy.model_management.get_free_memory(on))


def make_room() -> None:
    """Unload ComfyUI's models from the GPU, so that a run's private copy need not fit beside them.

    Call it only in the queue's thread: ComfyUI's model manager is not safe in others.
    """
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def holds_models() -> bool:
    """Whether ComfyUI's model manager has anything loaded."""
    return bool(comfy.model_management.current_loaded_models)


def release() -> None:
    """Free a private model that is no longer referenced. Its hooks form reference cycles, so this collects garbage."""
    gc.collect()
    comfy.model_management.soft_empty_cache()
