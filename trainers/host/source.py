"""A run's MODEL: the file it came from, how to load it again, and its identity."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from torch import Tensor, nn

from ...lora_io.file import fingerprint, load_names
from .patches import require_kept
from .weights import SAFETENSORS, load_tensors, merge

# Values of ModelSource.weight_dtype: the storage types that Load Diffusion Model offers.
WEIGHT_DTYPES = ("", "torch.float8_e4m3fn", "torch.float8_e4m3fn+fast", "torch.float8_e5m2")
LONGEST_METADATA = 1 << 16  # characters that are searched
PARTS = "kinoloom."  # prefix of attachment names for models of this pack on a MODEL, such as a motion module


@dataclass(frozen=True)
class Part:
    """A second model carried by a MODEL, such as a motion module: its file and its LoRA patches by key."""

    path: str
    patches: dict[str, list]

    def state(self) -> dict[str, Any]:
        return load_tensors(Path(self.path))

    def patch(self, module: nn.Module) -> None:
        """Merge the patches into a module loaded from the file."""
        merge(module, self.patches)


def parts_of(model: Any) -> dict[str, Part]:
    """The parts that a MODEL or a ModelSource carries, by name."""
    if isinstance(model, ModelSource):
        return {name: Part(path, {}) for name, path in model.parts.items()}
    found = _patchers(model).items()
    return {name: Part(patcher.cached_patcher_init[1][0], patcher.patches) for name, patcher in found}


def carried(model: Any) -> dict[str, nn.Module]:
    """The modules that a MODEL carries, by name."""
    return {name: patcher.model for name, patcher in _patchers(model).items()}


def _patchers(model: Any) -> dict[str, Any]:
    return {name: patchers[0] for name, patchers in model.additional_models.items() if name.startswith(PARTS)}


@dataclass(frozen=True)
class ModelSource:
    """The source of a private copy: the MODEL's file, or the MODEL itself while this process lives.

    `identity` is a hash of the file's content, the storage type, upstream LoRA patches, and the same of every part.
    """

    path: str
    loader: str
    weight_dtype: str
    identity: str
    patched: bool
    parts: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(model: Any, parts: dict[str, Part] | None = None) -> "ModelSource":
        """The source of a MODEL. ValueError if it cannot be copied. `parts` replaces the parts that it carries."""
        require_trainable(model)
        factory, arguments = model.cached_patcher_init[:2]
        path = str(arguments[0])
        options = next((a for a in arguments[1:] if isinstance(a, dict)), {})
        weight_dtype = str(options.get("dtype", "")) + ("+fast" if options.get("fp8_optimizations") else "")
        parts = parts_of(model) if parts is None else parts
        identity = _identity(fingerprint(Path(path)), weight_dtype, model.patches, parts)
        patched = any([model.patches, *(part.patches for part in parts.values())])
        files = {name: part.path for name, part in parts.items()}
        return ModelSource(path, factory.__name__, weight_dtype, identity, patched, files)

    def require_reloadable(self) -> None:
        """ValueError if the MODEL cannot be loaded from its file alone, which a restart requires."""
        if self.patched:
            raise ValueError(
                "this run was started on a model with LoRAs applied: run its Train node again to resume it"
            )
        if self.loader not in ("load_diffusion_model", "load_checkpoint_guess_config"):
            raise ValueError(f"this run's model came from {self.loader}: run its Train node again to resume it")
        for path in (self.path, *self.parts.values()):
            if not Path(path).is_file():
                raise ValueError(f"base model {path}: not found")

    def reload(self) -> Any:
        """Load the MODEL from its file. ValueError if the file is missing or has changed."""
        self.require_reloadable()
        if self.loader == "load_diffusion_model":
            dtypes = {str(d): d for d in (torch.float8_e4m3fn, torch.float8_e5m2)}
            name, _, fast = self.weight_dtype.partition("+")
            options = ({"dtype": dtypes[name]} if name else {}) | ({"fp8_optimizations": True} if fast else {})
            model = comfy.sd.load_diffusion_model(self.path, options, disable_dynamic=True)
        else:
            parts = {"output_vae": False, "output_clip": False}
            model = comfy.sd.load_checkpoint_guess_config(self.path, **parts, disable_dynamic=True)[0]
        if (now := ModelSource.of(model, parts_of(self))).identity != self.identity:
            raise ValueError(f"base model {now.path}: its content changed since the run was started")
        return model


def require_trainable(model: Any) -> None:
    """ValueError if a MODEL cannot be copied, or names the patches that a copy would lose."""
    if model.cached_patcher_init is None:
        raise ValueError(
            f"model: a {type(model).__name__} that cannot be loaded a second time (its loader keeps no file). Use Load "
            "Diffusion Model or Load Checkpoint; GGUF and other third-party loaders cannot be trained"
        )
    require_kept(model, PARTS)


def file_of(model: Any) -> tuple[Path, str]:
    """The path of a MODEL's file, and the values of its metadata as one string."""
    path = Path(str(model.cached_patcher_init[1][0]))
    metadata = load_names(path)[1] if path.suffix.lower() in SAFETENSORS else {}
    return path, " ".join(metadata.values())[:LONGEST_METADATA]


def base_identities(model: Any) -> frozenset[str]:
    """Identities of a MODEL's file in every storage type, patched and not. A LoRA trained on it names one of them."""
    parts, file = parts_of(model), fingerprint(Path(str(model.cached_patcher_init[1][0])))
    stored = [(weight_dtype, patches) for weight_dtype in WEIGHT_DTYPES for patches in (model.patches, {})]
    return frozenset(_identity(file, *how, parts) for how in stored)


def _identity(file: str, weight_dtype: str, patches: dict[str, list], parts: dict[str, Part]) -> str:
    digest = hashlib.sha256(f"{file}{weight_dtype}".encode())
    _digest(patches, digest)
    for name, part in parts.items():
        digest.update(f"{name}{fingerprint(Path(part.path))}".encode())
        _digest(part.patches, digest)
    return digest.hexdigest()


def _digest(value: Any, digest: Any) -> None:
    """Add nested patches (tuples, adapters, tensors, numbers) to a hash."""
    if isinstance(value, Tensor):
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _digest(value[key], digest)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _digest(item, digest)
    elif hasattr(value, "weights"):
        _digest(value.weights, digest)
    else:
        digest.update(repr(value).encode())
