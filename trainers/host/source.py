"""A run's MODEL: the file it came from, how to load it again, and its model key."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from torch import Tensor, nn

from ...lora_io.file import fingerprint, load_names
from .patches import require_kept
from .text import LOADERS as TEXT_LOADERS
from .weights import SAFETENSORS, load_tensors, merge

# Values of ModelSource.weight_dtype: the storage types that Load Diffusion Model offers.
WEIGHT_DTYPES = ("", "torch.float8_e4m3fn", "torch.float8_e4m3fn+fast", "torch.float8_e5m2")
LOADERS = ("load_diffusion_model", "load_checkpoint_guess_config")  # of MODELs that can be loaded from a file alone
LONGEST_METADATA = 1 << 16  # characters that are searched
CARRIED = "kinoloom."  # prefix of attachment names for models of this pack on a MODEL, such as a motion module


@dataclass(frozen=True)
class Carried:
    """A second model carried by a MODEL, such as a motion module: its file and its LoRA patches by key."""

    path: str
    patches: dict[str, list]

    def state(self) -> dict[str, Any]:
        return load_tensors(Path(self.path))

    def patch(self, module: nn.Module) -> None:
        """Merge the patches into a module loaded from the file."""
        merge(module, self.patches)


def carried_files(model: Any) -> dict[str, Carried]:
    """The models that a MODEL or a ModelSource carries, by name."""
    if isinstance(model, ModelSource):
        return {name: Carried(path, {}) for name, path in model.carried.items()}
    found = _patchers(model).items()
    return {name: Carried(patcher.cached_patcher_init[1][0], patcher.patches) for name, patcher in found}


def carried_modules(model: Any) -> dict[str, nn.Module]:
    """The modules that a MODEL carries, by name."""
    return {name: patcher.model for name, patcher in _patchers(model).items()}


def _patchers(model: Any) -> dict[str, Any]:
    return {name: patchers[0] for name, patchers in model.additional_models.items() if name.startswith(CARRIED)}


@dataclass(frozen=True)
class ModelSource:
    """The source of a private copy: the MODEL's file, or the MODEL itself while this process lives.

    A MODEL may also be the model patcher of a CLIP, whose text encoder is then copied.
    `key` is a hash of the file's content, the storage type, upstream LoRA patches, and the same of every carried model.
    """

    path: str
    loader: str
    weight_dtype: str
    key: str
    patched: bool
    carried: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(model: Any, carried: dict[str, Carried] | None = None) -> "ModelSource":
        """The source of a MODEL. ValueError if it cannot be copied. `carried` replaces the models that it carries."""
        require_trainable(model)
        factory, arguments = model.cached_patcher_init[:2]
        path = path_of(model)
        options = next((a for a in arguments[1:] if isinstance(a, dict)), {})
        weight_dtype = str(options.get("dtype", "")) + ("+fast" if options.get("fp8_optimizations") else "")
        carried = carried_files(model) if carried is None else carried
        key = _key(fingerprint(path), weight_dtype, model.patches, carried)
        patched = any([model.patches, *(each.patches for each in carried.values())])
        files = {name: each.path for name, each in carried.items()}
        return ModelSource(str(path), factory.__name__, weight_dtype, key, patched, files)

    @property
    def is_text_encoder(self) -> bool:
        return self.loader in TEXT_LOADERS

    def require_reloadable(self) -> None:
        """ValueError if the MODEL cannot be loaded from its file alone, which a restart requires."""
        if self.patched:
            raise ValueError(
                "this run was started on a model with LoRAs applied: run its Train node again to resume it"
            )
        if self.loader not in (*LOADERS, *TEXT_LOADERS):
            raise ValueError(f"this run's model came from {self.loader}: run its Train node again to resume it")
        for path in (self.path, *self.carried.values()):
            if not Path(path).is_file():
                raise ValueError(f"{'text encoder' if self.is_text_encoder else 'base model'} {path}: not found")

    def reload(self) -> Any:
        """Load the MODEL from its file. ValueError if the file is missing or has changed."""
        self.require_reloadable()
        model = self.load()
        if (now := ModelSource.of(model, carried_files(self))).key != self.key:
            what = "text encoder" if self.is_text_encoder else "base model"
            raise ValueError(f"{what} {now.path}: its content changed since the run was started")
        return model

    def load(self) -> Any:
        """Load the file as it is now, without patches."""
        if self.is_text_encoder:
            return TEXT_LOADERS[self.loader](self.path)
        if self.loader == "load_diffusion_model":
            dtypes = {str(d): d for d in (torch.float8_e4m3fn, torch.float8_e5m2)}
            name, _, fast = self.weight_dtype.partition("+")
            options = ({"dtype": dtypes[name]} if name else {}) | ({"fp8_optimizations": True} if fast else {})
            return comfy.sd.load_diffusion_model(self.path, options, disable_dynamic=True)
        without = {"output_vae": False, "output_clip": False}
        return comfy.sd.load_checkpoint_guess_config(self.path, **without, disable_dynamic=True)[0]


def base_key(sources: dict[str, ModelSource]) -> str:
    """The model key of what a run trains on: that of its MODEL, or one of all of them together. No text encoder's."""
    keys = {name: source.key for name, source in sources.items() if not source.is_text_encoder}
    if len(keys) == 1:
        return next(iter(keys.values()))
    return hashlib.sha256(repr(sorted(keys.items())).encode()).hexdigest()


def text_keys(sources: dict[str, ModelSource]) -> dict[str, str]:
    """The model keys of the text encoders that a run uses, by the recipe's name of each."""
    return {name: source.key for name, source in sources.items() if source.is_text_encoder}


def require_trainable(model: Any, name: str = "model") -> None:
    """ValueError if the MODEL of that input cannot be copied, or names the patches that a copy would lose."""
    factory = model.cached_patcher_init and model.cached_patcher_init[0].__name__
    if model.is_clip and factory not in TEXT_LOADERS:
        raise ValueError(
            f"{name}: a text encoder from {factory or 'a loader that keeps no file'}, which cannot be loaded a second "
            "time. Use Load CLIP or Load Checkpoint"
        )
    if factory is None:
        raise ValueError(
            f"{name}: a {type(model).__name__} that cannot be loaded a second time (its loader keeps no file). Use "
            "Load Diffusion Model or Load Checkpoint; GGUF and other third-party loaders cannot be trained"
        )
    require_kept(model, CARRIED, name)


def path_of(model: Any) -> Path:
    """The path of a MODEL's file. A CLIP's loader has a list of paths, of which Stable Diffusion 1.5 has one."""
    first = model.cached_patcher_init[1][0]
    return Path(first[0] if isinstance(first, list) else first)


def file_of(model: Any) -> tuple[Path, str]:
    """The path of a MODEL's file, and the values of its metadata as one string."""
    path = path_of(model)
    metadata = load_names(path)[1] if path.suffix.lower() in SAFETENSORS else {}
    return path, " ".join(metadata.values())[:LONGEST_METADATA]


def model_keys(model: Any) -> frozenset[str]:
    """Model keys of a MODEL's file in every storage type, patched and not. A LoRA trained on it names one of them."""
    carried, file = carried_files(model), fingerprint(path_of(model))
    patches: tuple[dict[str, list], ...] = (model.patches, {})
    return frozenset(_key(file, stored, some, carried) for stored in WEIGHT_DTYPES for some in patches)


def _key(file: str, weight_dtype: str, patches: dict[str, list], carried: dict[str, Carried]) -> str:
    digest = hashlib.sha256(f"{file}{weight_dtype}".encode())
    _digest(patches, digest)
    for name, each in carried.items():
        digest.update(f"{name}{fingerprint(Path(each.path))}".encode())
        _digest(each.patches, digest)
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
