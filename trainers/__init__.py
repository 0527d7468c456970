"""Training methods, one file each; `core` and `backbones` are what they share."""

import importlib
import pkgutil
from functools import cache
from typing import Any

from . import backbones
from .core.recipe import Recipe


@cache
def recipes() -> dict[str, type[Recipe]]:
    """Every method in this folder by its node id: a module belongs by having a RECIPE."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if not m.ispkg]
    return {module.RECIPE.name: module.RECIPE for module in modules}


@cache
def backbone_modules() -> dict[str, Any]:
    """Backbone name to its module: one with `check`, `latent_shape` and `load`, which makes a base.Backbone.

    `check(model, parts, rows)` raises ValueError, as does `latent_shape(parts, width, height, frames)`, of a video to
    sample. `load(model, parts, device, dtype, transformer_options)` gets the private copy of a MODEL, and what it
    carries.
    """
    names = [m.name for m in pkgutil.iter_modules(backbones.__path__)]
    modules = {name: importlib.import_module(f"{backbones.__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "load")}
