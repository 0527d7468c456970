"""Model keys of loaded models, for cache keys."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ....lora_io.file import fingerprint


def of_patcher(patcher: Any) -> str:
    """Model key of a ComfyUI model patcher: a hash of its files (or weights) and its patches."""
    factory = patcher.cached_patcher_init
    paths = [path for path in _paths(factory[1]) if path.is_file()] if factory else []
    weights = [_file(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths] or [_weights(patcher.model)]
    patches = [str(patcher.patches_uuid)] if patcher.patches else []
    return _digest(type(patcher.model).__name__, patcher.model_dtype(), *weights, *patches)


def of_vae(vae: Any) -> str:
    return _digest(of_patcher(vae.patcher), vae.vae_dtype)


def of_text_encoder(text_encoder: Any) -> str:
    kind, settings = type(text_encoder.tokenizer).__name__, (text_encoder.layer_idx, text_encoder.tokenizer_options)
    return _digest(of_patcher(text_encoder.patcher), kind, *settings)


def of_model(model: Any) -> str:
    """Model key of a diffusion model and its noise schedule, which nodes such as ModelSamplingSD3 change."""
    sampling = model.get_model_object("model_sampling")
    return _digest(of_patcher(model), type(sampling).__name__, sampling.sigmas.tolist())


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _paths(arguments: tuple) -> list[Path]:
    """The files in a loader's arguments. The first argument is one name or a list of names."""
    first = arguments[0]
    return [Path(name) for name in ([first] if isinstance(first, str) else first)]


@lru_cache(maxsize=256)
def _file(path: Path, size: int, mtime_ns: int) -> str:
    return fingerprint(path)


def _weights(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
