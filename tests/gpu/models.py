"""Models of random weights and runs on them: real shapes on a GPU, tiny ones on a CPU."""

import importlib.util
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from steps import TESTS, batches, enter_comfyui, phases, prompt
from tiny import svd as tiny_svd
from tiny import write_wan
from tiny.sd import write_motion_module, write_unet
from torch import Tensor

SD = (320, 640, 1280, 1280)
TINY_SD, TINY_SVD, TINY_WAN = (32, 64, 64, 64), (64, 64), {"dim": 128, "blocks": 2, "ffn": 256, "num_heads": 2}
WAN_1B = {"dim": 1536, "blocks": 30, "ffn": 8960, "num_heads": 12, "text_dim": 4096}
WAN_14B = {"dim": 5120, "blocks": 40, "ffn": 13824, "num_heads": 40, "text_dim": 4096}
FRAMES = {"wan": 4, "animatediff": 1, "svd": 1}  # of a latent, but Wan's first


class Bench:
    """`folder` for files, `models` for those of all checks; `full`: whether models have their real shapes."""

    def __init__(self, folder: Path, models: Path, device: str) -> None:
        self.folder, self.models, self.full = folder, models, device == "cuda"
        self.rows: list[dict[str, Any]] = []
        if self.full and not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device: --device cpu runs the checks on tiny models")
        for name in ("models", "input", "output", "user", "temp"):
            (folder / name).mkdir()
        enter_comfyui(folder)
        _without_server()

    def model(self, kind: str, dtype: torch.dtype = torch.float16) -> tuple[Any, dict[str, Any]]:
        """A MODEL as ComfyUI loads it, and the parts it carries. `kind` is a backbone's name or "wan 14B"."""
        import comfy.sd
        from kinoloom.trainers.backbones.animatediff.motion_module import PART
        from kinoloom.trainers.host.source import Carried
        from toyworld.pack import unet, video_unet

        path, load, parts = self.models / f"{kind}.safetensors", comfy.sd.load_diffusion_model, {}
        if kind == "animatediff":
            widths, load, motion = SD if self.full else TINY_SD, unet.load, self.models / "motion.safetensors"
            write = partial(write_unet, widths=widths)
            parts = {PART: Carried(str(motion), {})}
            _once(motion, partial(write_motion_module, widths=widths))
        elif kind == "svd":
            shape = {"widths": SD} if self.full else {"widths": TINY_SVD, "blocks": 1}
            write, load = partial(tiny_svd.write_unet, dtype=dtype, **shape), video_unet.load_unet
        else:
            shape = TINY_WAN if not self.full else WAN_14B if kind == "wan 14B" else WAN_1B
            write = partial(write_wan, **shape, dtype=dtype, same_blocks=True)
        _once(path, write)
        with torch.inference_mode():
            return load(str(path)), parts

    def recipe(self, name: str, device: str | None = None, dtype: torch.dtype = torch.float16, **options: Any) -> Any:
        """A method on a private copy of its model, as a job makes it, its first phase begun."""
        from kinoloom.trainers import recipes

        kind = options.pop("kind", recipes()[name].backbone_class.name)
        recipe = make_recipe(name, *self.model(kind, dtype), device=torch.device(device or host().torch_device()), **options)
        recipe.start(phases(recipe)[0])
        return recipe

    def columns(self, recipe: Any, frames: int, height: int, width: int) -> tuple[Tensor, dict[str, Any]]:
        """Latents of a clip in pixels, and the other columns that the recipe needs."""
        kind = type(recipe).backbone_class.name
        channels = 16 if kind == "wan" else 4
        shape = (channels, 1 + (frames - 1) // FRAMES[kind], height // 8, width // 8)
        made: dict[str, Callable[[], dict[str, Tensor]]] = {
            "prompt_embeds": lambda: _prompt(text_width(recipe)),
            "image": lambda: _image(shape),
            "tracklets": lambda: _tracklets(shape),
        }
        return _random(1, *shape), {name: made[name]() for name in (column.name for column in recipe.columns) if name in made}

    def batch(self, recipe: Any, frames: int, height: int, width: int) -> Any:
        """One micro-batch of one clip."""
        latents, columns = self.columns(recipe, frames, height, width)
        unit = phases(recipe)[0].unit
        folder = self.folder / f"data-{time.time_ns()}"
        return batches(recipe, folder, latents[:, :1] if unit == "frames" else latents, unit=unit, **columns)


def _once(path: Path, write: Callable[[Path], None]) -> None:
    """Make a file if it does not exist. A file whose writer was killed does not count."""
    if not path.is_file():
        write(part := path.with_suffix(".part"))
        part.rename(path)


def make_recipe(name: str, model: Any, parts: dict[str, Any], device: torch.device, **options: Any) -> Any:
    from kinoloom.trainers import recipes
    from kinoloom.trainers.core import memory
    from kinoloom.trainers.core.placement import Placement

    method = recipes()[name]
    config = method.Config(validate_every=0, **options)
    dtype = host().compute_dtype(config.precision, device)
    private = host().load_private(model, device, Placement(stored=dtype))
    backbone = method.backbone_class({"model": host().Private(private, parts)}, device, dtype, host().TRANSFORMER_OPTIONS)
    memory.checkpointed_blocks(backbone)
    backbone.placement = Placement(len(backbone.blocks) if config.checkpointing == "on" else 0, dtype)
    return method(backbone, config)


def host() -> SimpleNamespace:
    """The seam to ComfyUI, which only a started ComfyUI lets import."""
    from kinoloom.trainers.host import attention, device, layers, private, source, weights

    modules = (attention, device, layers, private, source, weights)
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


def text_width(recipe: Any) -> int:
    backbone = recipe.backbone
    return backbone.module.text_dim if hasattr(backbone.module, "text_dim") else backbone.width


def _without_server() -> None:
    """Make the toy world's loaders importable without its nodes, which need a server's packages."""
    pack = ModuleType("toyworld.pack")
    pack.__path__ = [str(TESTS / "toyworld" / "pack")]
    pack.__spec__ = importlib.util.spec_from_loader("toyworld.pack", None, is_package=True)
    sys.modules["toyworld.pack"] = pack


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _prompt(width: int) -> dict[str, Tensor]:
    """A caption without variants."""
    more = {"prompt_tokens": torch.tensor([77]), "token_mask_prob": torch.tensor(0.0)}
    return {**prompt(_random(2, 77, width)), **more}


def _image(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        "image_embeds": _random(3, tiny_svd.CONTEXT),
        "first_frames": _random(4, 2, 4, *shape[-2:]),
        "augmentations": torch.tensor([0.0, 0.05]),
        "fps": torch.tensor(7.0),
        "motion_bucket": torch.tensor(127.0),
    }


def _tracklets(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """One box that stays."""
    mask = torch.zeros(shape[1], 20)
    mask[:, 0] = 1
    box = torch.tensor([0.2, 0.2, 0.6, 0.6, 0.0, 0.0, 0.0, 1.0])
    return {
        "boxes": mask.unsqueeze(-1) * box,
        "box_mask": mask,
        "colors": _random(5, 2, 20, 3).sigmoid(),
        "painted": _random(6, 2, *shape),
    }
