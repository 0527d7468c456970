"""The seam to ComfyUI, and the only file here that imports it: private model copies and memory."""

import gc
import hashlib
import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.samplers
import comfy.sd
import comfy.utils
import comfyui_version
import folder_paths
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.taesd.taehv import TAEHV
from comfy.taesd.taesd import Decoder
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor, nn

from ...lora_io.file import fingerprint, load_names
from ..run.about import project
from .patches import require_kept
from .rebound import Rebinder

TINY_DECODERS = "vae_approx"  # a model folder
# What Load Diffusion Model may have a file stored as, as ModelSource.weight_dtype says it.
WEIGHT_DTYPES = ("", "torch.float8_e4m3fn", "torch.float8_e4m3fn+fast", "torch.float8_e5m2")
SAFETENSORS = (".safetensors", ".sft")
LONGEST_METADATA = 1 << 16  # characters that are searched
PARTS = "kinoloom."  # names under which a MODEL carries models of this pack, such as a motion module


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a model file of any format that ComfyUI reads; nothing else in it is opened.

    ValueError says in one sentence that the file is missing, damaged or none of a model.
    """
    if path.suffix.lower() in SAFETENSORS:
        load_names(path)
    elif not path.is_file():
        raise ValueError(f"file {path}: not found")
    try:
        found = comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception:  # torch raises whatever a damaged pickle leads to, with advice to open it without the safeguard
        raise ValueError(
            f"file {path}: not a readable model file. It is damaged, or holds more than tensors, which is never opened"
        ) from None
    entries = found.items() if isinstance(found, dict) else ()
    tensors = {key: value for key, value in entries if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"file {path}: holds no named tensors, expected a model file")
    return tensors


@dataclass(frozen=True)
class Part:
    """A model that a MODEL carries: its file, and the LoRA patches over it by key."""

    path: str
    patches: dict[str, list]

    def state(self) -> dict[str, Any]:
        return load_tensors(Path(self.path))

    def patch(self, module: nn.Module) -> None:
        """Merge the patches into a module made of the file."""
        merge(module, self.patches)


def parts_of(model: Any) -> dict[str, Part]:
    """What a MODEL or a ModelSource carries, by name."""
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
    """How to build a private copy of a MODEL: the file it came from, or the MODEL itself while this process lives.

    `identity` changes with the file's content, the storage dtype and any upstream LoRA patch, and with those of its
    `parts`, the files of the models that it carries.
    """

    path: str
    loader: str
    weight_dtype: str
    identity: str
    patched: bool
    parts: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(model: Any, parts: dict[str, Part] | None = None) -> "ModelSource":
        """ValueError names what kind of MODEL cannot be copied. `parts` stands for what the MODEL carries itself."""
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
        """ValueError if the MODEL cannot be had again from its file alone, as after a restart."""
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
        """A MODEL from the file; ValueError if that is gone or has changed."""
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
    """ValueError names what keeps a MODEL from being copied, or what a copy would lose."""
    if model.cached_patcher_init is None:
        raise ValueError(
            f"model: a {type(model).__name__} that cannot be loaded a second time (its loader keeps no file). Use Load "
            "Diffusion Model or Load Checkpoint; GGUF and other third-party loaders cannot be trained"
        )
    require_kept(model, PARTS)


def file_of(model: Any) -> tuple[Path, str]:
    """The file that a MODEL came from, and the values of its metadata in one text."""
    path = Path(str(model.cached_patcher_init[1][0]))
    metadata = load_names(path)[1] if path.suffix.lower() in SAFETENSORS else {}
    return path, " ".join(metadata.values())[:LONGEST_METADATA]


def base_identities(model: Any) -> frozenset[str]:
    """The identities that a file may name which was trained on a MODEL's file: stored in any type, patched or not."""
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
    """Feed nested patches (tuples, adapters, tensors, numbers) to a hash."""
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


def load_private(model: Any, device: torch.device) -> Any:
    """A BaseModel of our own, upstream LoRA patches merged, frozen, on `device`; `model` is a MODEL or a ModelSource.

    ComfyUI's model manager does not know it: it is never evicted, and nothing done to it reaches other workflows.
    Must run outside inference mode, in the job's thread.
    """
    assert not torch.is_inference_mode_enabled()
    if isinstance(model, ModelSource):
        private = model.reload()
    else:
        private = model.clone(disable_dynamic=True, force_deepcopy=True)
    module = private.model.diffusion_model
    for child in module.modules():
        _cast_stored(child)
    private.patch_model(device_to=device)
    require_finite(module, f"model: {Path(str(private.cached_patcher_init[1][0])).name}")
    module.requires_grad_(False)
    for child in module.modules():
        if isinstance(child, comfy.ops.CastWeightBiasOp):
            child.comfy_cast_weights = True
    make_private(module)
    assert not any(p.is_inference() for p in module.parameters())
    logging.info("Kinoloom: private copy of %s on %s", type(private.model).__name__, device)
    return private.model


def _cast_stored(layer: nn.Module) -> None:
    """Give weights the storage type that the loader chose; with dynamic VRAM only ComfyUI's own patcher would do it."""
    for name in ("weight", "bias"):
        dtype, parameter = layer.__dict__.get(f"{name}_comfy_model_dtype"), layer._parameters.get(name)
        if dtype is not None and parameter is not None and not isinstance(parameter, QuantizedTensor):
            parameter.data = parameter.data.to(dtype)


def narrow(private: Any, dtype: torch.dtype) -> None:
    """Store matrices and 2-D kernels no narrower than the arithmetic in its type: the same numbers, cast once.

    ValueError names one that is too large for the type.
    """
    for layer in private.diffusion_model.modules():
        weight = layer._parameters.get("weight")
        plain = weight is not None and weight.ndim in (2, 4) and not isinstance(weight, QuantizedTensor)
        if plain and weight.dtype.itemsize >= dtype.itemsize:
            weight.data = weight.data.to(dtype)
    if dtype == torch.float16 and (name := not_finite(private.diffusion_model)):
        raise ValueError(f"precision='fp16': weight {name} of the model is too large for it. Choose bf16 or fp32")


def merge_lora(model: Any, path: Path) -> None:
    """Add a LoRA file, at strength 1, to the weights of a private BaseModel. ValueError if it holds other layers."""
    patches = lora_patches(model, path)
    merge(model, {key: [(1.0, patch, 1.0, None, None)] for key, patch in patches.items()})


def lora_patches(model: Any, path: Path) -> dict[str, Any]:
    """A LoRA file as ComfyUI's patches by parameter of a BaseModel. ValueError if a layer of it does not fit."""
    keys = comfy.lora.model_lora_keys_unet(model, {})
    patches = comfy.lora.load_lora(load_tensors(path), keys, log_missing=False)
    if not patches:
        raise ValueError(f"{path.name}: no layer of it fits {type(model).__name__}, expected a LoRA for this model")
    for key, patch in patches.items():
        shape = model.get_parameter(key).shape
        up, down = patch.weights[:2] if isinstance(patch, LoRAAdapter) else (None, None)
        if up is not None and (len(up), down[0].numel()) != (shape[0], shape[1:].numel()):  # which core only logs
            raise ValueError(
                f"{path.name}: made for a model of another width: {key} is {len(up)} x {down[0].numel()} in the file, "
                f"{shape[0]} x {shape[1:].numel()} in this model"
            )
        if up is not None and not (up.isfinite().all() and down.isfinite().all()):
            raise ValueError(f"{path.name}: {key} holds values that are no numbers (NaN or infinite)")
    return patches


@torch.no_grad()
def merge(module: nn.Module, patches: dict[str, list]) -> None:
    """Apply ComfyUI's weight patches, by parameter name, for good."""
    for key, patch in patches.items():
        parameter = module.get_parameter(key)
        quantised = isinstance(parameter, QuantizedTensor)
        weight = parameter.dequantize() if quantised else parameter.data
        merged = comfy.lora.calculate_weight(patch, weight.to(torch.float32, copy=True), key)
        if quantised:
            module.get_submodule(key.rpartition(".")[0]).set_weight(merged, seed=0)  # a new weight too
        else:
            parameter.data = merged.to(parameter.dtype)  # a tensor of its own: the file's may be mapped read-only


def require_finite(module: nn.Module, what: str) -> None:
    """ValueError names the first parameter of a module that holds NaN or infinite values; `what` is its file."""
    if name := not_finite(module):
        raise ValueError(
            f"{what}: weight {name} of the model holds NaN or infinity, and nothing can be trained on it. Get the file "
            "again, or leave out the LoRA that was put on it"
        )


def not_finite(module: nn.Module) -> str:
    """The name of the first parameter that holds NaN or infinite values; "" if none does."""
    extremes = {name: _extremes(parameter) for name, parameter in module.named_parameters() if parameter.numel()}
    if not extremes:
        return ""
    finite = torch.stack(list(extremes.values())).isfinite().cpu()  # one wait for the device
    return next((name for name, fine in zip(extremes, finite.tolist(), strict=True) if not fine), "")


def _extremes(parameter: Tensor) -> Tensor:
    """A number that is finite if all values are."""
    values = parameter.dequantize() if isinstance(parameter, QuantizedTensor) else parameter.data
    if values.dtype.itemsize == 1:
        values = values.to(torch.bfloat16)
    low, high = values.aminmax()
    return (high / 2).float() - (low / 2).float()


class Rope(torch.autograd.Function):
    """ComfyUI's fused rotary embedding of x [B, L, n, d], which has no gradient of its own: the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, freqs: Tensor) -> Tensor:
        ctx.freqs = freqs
        return comfy.quant_ops.ck.apply_rope1(x, freqs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        inverse = ctx.freqs.transpose(-1, -2).contiguous()
        return comfy.quant_ops.ck.apply_rope1(grad.contiguous(), inverse), None


# Values that layers of a private model find under process-wide names of ComfyUI, which prompts beside a job read too. A
# job that polled the interrupt flag would swallow a Cancel meant for a prompt. Where `in_training` is not set, ComfyUI
# takes fused kernels that have no gradient. Rope is faster than the rotary embedding that ComfyUI uses in training.
REBINDER = Rebinder(
    "comfy",
    {
        "comfy.model_management": {"in_training": True, "throw_exception_if_processing_interrupted": lambda: None},
        "comfy.ldm.flux.math": {"apply_rope1": Rope.apply},
    },
)

OPERATIONS = comfy.ops.manual_cast  # layers that cast their weights to the input's type


def make_private(module: nn.Module) -> None:
    """Have all layers of a module, of ComfyUI's classes, find the values of REBINDER."""
    for child in module.modules():
        child.__class__ = _private_class(type(child))


@cache
def _private_class(cls: type) -> type:
    private = REBINDER.cls(cls)
    linear = issubclass(cls, nn.Linear) or cls.__name__ == "Linear"  # quantised ones are no nn.Linear
    if private is cls or not linear:
        return private
    return type(cls.__name__, (private,), {"forward": _frozen_linear(private.forward)})


def _frozen_linear(host_forward: Callable) -> Callable:
    """Linear that keeps no cast or dequantised copy of a frozen weight for backward; other cases go the host's way."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.weight.requires_grad or self.weight_function or getattr(self, "pre_quant_scale", None) is not None:
            return host_forward(self, x)
        weight, bias = self.weight, self.bias
        if isinstance(weight, QuantizedTensor) or weight.dtype != x.dtype or weight.device != x.device:
            flat = CastLinear.apply(
                x.flatten(0, -2), weight, bias
            )  # 2-D: no view, which layers could not add to in place
            return flat.view(*x.shape[:-1], -1)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x))

    return forward


class CastLinear(torch.autograd.Function):
    """x W^T + b with a frozen W in another form (fp8, fp16, quantised): cast for the product, and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # a frozen parameter, alive anyway; save_for_backward would only add a version check
        return nn.functional.linear(x, _plain(weight, x), None if bias is None else bias.to(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ _plain(ctx.weight, grad), None, None


def _plain(weight: Tensor, like: Tensor) -> Tensor:
    return (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).to(like)


def sdpa(
    original: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *args: Any,
    mask: Tensor | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Attention with a gradient, for q, k, v [B, L, heads * d] (or [B, heads, L, d] with `skip_reshape`).

    Replaces whatever kernel ComfyUI was launched with: flash and sage have no backward.
    """
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask) if mask is not None else _attend(q, k, v)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. On a CPU torch's own kernel takes three times as long in bf16 as two products do."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] * k.shape[-2] <= CPU_ATTENTION_ENTRIES:
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1) @ v
    parts = zip(*(x.split(LARGEST_BATCH) for x in (q, k, v)), strict=True)
    attended = [nn.functional.scaled_dot_product_attention(*part) for part in parts]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


LARGEST_BATCH = 1 << 13  # with up to 8 heads; CUDA's kernels take 65535 pairs of clip and head
CPU_ATTENTION_ENTRIES = 1 << 22  # of one head's score matrix, which is kept for backward; longer clips go in pieces

TRANSFORMER_OPTIONS = {"optimized_attention_override": sdpa}


def device() -> torch.device:
    return comfy.model_management.get_torch_device()


def environment() -> dict[str, str]:
    """What a run is made with."""
    return {
        "ComfyUI": comfyui_version.__version__,
        "Kinoloom": project("version"),
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": comfy.model_management.get_torch_device_name(device()),
    }


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(precision: str, on: torch.device) -> str:
    """The key of DTYPES that "auto" means on a device."""
    if precision != "auto":
        return precision
    if on.type == "cpu":
        return "bf16" if _cpu_multiplies_bf16() else "fp32"
    return "bf16" if comfy.model_management.should_use_bf16(on) else "fp16"


def compute_dtype(precision: str, on: torch.device) -> torch.dtype:
    return DTYPES[resolve_precision(precision, on)]


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for bf16, which are about twice as fast as fp32; without them it is slower."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.10
        return False
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@torch.no_grad()
def decode_preview(latent_format: Any, latents: Tensor) -> Tensor:
    """Frames [F, H, W, 3] in 0..1 of latents [C, T, h, w] in the model's own space.

    By the tiny decoder of models/vae_approx where it is there, else by the factors of a linear map, one frame a latent.
    """
    files, name = folder_paths.get_filename_list(TINY_DECODERS), latent_format.taesd_decoder_name
    if file := next((file for file in files if name and file.startswith(name)), None):
        return _decode_tiny(folder_paths.get_full_path_or_raise(TINY_DECODERS, file), latent_format, latents)
    factors, bias = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    colours = torch.einsum("cthw,cr->trhw", latents, torch.tensor(factors).to(latents))
    colours = colours + (0.0 if bias is None else torch.tensor(bias).to(latents).view(3, 1, 1))
    large = nn.functional.interpolate(colours, scale_factor=latent_format.spacial_downscale_ratio, mode="bilinear")
    return (large / 2 + 0.5).clamp(0, 1).movedim(1, -1).cpu()


def _decode_tiny(path: str, latent_format: Any, latents: Tensor) -> Tensor:
    """TAESD reads latents of the model's space, frame by frame, and TAEHV those of the VAE, as ComfyUI's files do."""
    tensors = load_tensors(Path(path))
    if latent_format.latent_dimensions == 2:
        tiny = Decoder(latent_channels=latent_format.latent_channels)
        tiny.load_state_dict(tensors)
        make_private(tiny.to(latents))
        frames = torch.cat([tiny(frame.unsqueeze(0)) for frame in latents.unbind(1)])
    else:
        tiny = TAEHV(latent_format.latent_channels)
        tiny.load_state_dict(tensors)
        make_private(tiny.to(latents))
        frames = tiny.decode(latent_format.process_out(latents.unsqueeze(0)))[0].movedim(1, 0)
    return frames.clamp(0, 1).movedim(1, -1).cpu()


def levels(scheduler: str, steps: int, sigmas: Tensor) -> Tensor:
    """The levels of noise of ComfyUI's scheduler, falling to 0 [steps + 1], for a model whose own rise as `sigmas`."""
    sampling = SimpleNamespace(sigmas=sigmas, sigma_min=sigmas[0], sigma_max=sigmas[-1])
    return comfy.samplers.calculate_sigmas(sampling, scheduler, steps)


def free_memory(on: torch.device) -> int:
    """Free bytes on the device, counting what torch holds but does not use."""
    return int(comfy.model_management.get_free_memory(on))


def make_room() -> None:
    """Take ComfyUI's own models off the card, so that the shared and the private copy need not fit at once.

    For the queue's thread alone: no other may touch the model manager.
    """
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def holds_models() -> bool:
    """Whether ComfyUI's model manager has anything loaded."""
    return bool(comfy.model_management.current_loaded_models)


def release() -> None:
    """Give back the memory of a private model that is no longer referenced; its hooks make reference cycles."""
    gc.collect()
    comfy.model_management.soft_empty_cache()
