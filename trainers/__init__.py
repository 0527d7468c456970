"""Training methods, one file each; `core` and `backbones` are what they share."""

import importlib
import pkgutil
from functools import cache

from .core.recipe import Recipe


@cache
def recipes() -> dict[str, type[Recipe]]:
    """Every method in this folder by its node id: a module belongs by having a RECIPE."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if not m.ispkg]
    return {module.RECIPE.name: module.RECIPE for module in modules}
