"""Training methods, one file each. The subfolders hold the code that they share."""

import importlib
import pkgutil
from functools import cache

from .core.recipe import Recipe


@cache
def recipes() -> dict[str, type[Recipe]]:
    """All training methods by node id: the RECIPE of every module in this folder that has one."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if not m.ispkg]
    return {module.RECIPE.name: module.RECIPE for module in modules}
