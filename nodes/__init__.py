"""The pack's nodes: the only layer that knows ComfyUI's user interface."""

import gc

from . import (
    oldest,  # noqa: F401, and first: a ComfyUI that is too old lacks what the others import
    packages,  # noqa: F401
)

# isort: split
from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from .animatediff import loras, modules
from .data import nodes as data_nodes
from .data import svd_nodes
from .svd import convert
from .tracklets import control
from .tracklets import nodes as tracklet_nodes
from .training import previews, registry, result, routes, train

# In the order in which ComfyUI lists them.
WITH_NODES = (data_nodes, svd_nodes, previews, train, result, modules, loras, convert, tracklet_nodes, control)


class Kinoloom(ComfyExtension):
    async def on_load(self) -> None:
        registry.start_registry()
        routes.add_routes(PromptServer.instance.routes)
        PromptServer.instance.app.on_startup.append(spare_collector)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in WITH_NODES for node in module.NODES]


async def spare_collector(app: object) -> None:
    """Spare the garbage collector what ComfyUI's start made, hundreds of thousands of objects that live to its end.

    Every run, and ComfyUI after prompts, walks all others. Now every pack is loaded and no prompt holds a model yet,
    which would never be freed if it were frozen.
    """
    gc.collect()
    gc.freeze()


async def comfy_entrypoint() -> Kinoloom:
    return Kinoloom()
