"""The pack's nodes: the only layer that knows ComfyUI's user interface."""

import gc

from . import (
    oldest,  # noqa: F401, and first: a ComfyUI that is too old lacks what the others import
    packages,  # noqa: F401
)

# isort: split
from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from .adapters import apply, loading, maps, matching, start
from .animatediff import loras, modules
from .data import nodes as data_nodes
from .data import svd_nodes
from .svd import convert
from .tracklets import control
from .tracklets import nodes as tracklet_nodes
from .training import previews, registry, result, routes, train

# In the order in which ComfyUI lists them.
WITH_NODES = (
    *(data_nodes, svd_nodes, previews, train, result, modules, loras),
    *(loading, apply, start, matching, maps),
    *(convert, tracklet_nodes, control),
)


class Kinoloom(ComfyExtension):
    async def on_load(self) -> None:
        registry.start_registry()
        routes.add_routes(PromptServer.instance.routes)
        PromptServer.instance.app.on_startup.append(spare_collector)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in WITH_NODES for node in module.NODES]


async def spare_collector(app: object) -> None:
    """Exclude the hundreds of thousands of objects of ComfyUI's start, which live to its end, from garbage collection.

    Every run, and ComfyUI after prompts, collects garbage. At this point all packs are loaded but no model, which could
    never be freed once excluded.
    """
    gc.collect()
    gc.freeze()


async def comfy_entrypoint() -> Kinoloom:
    return Kinoloom()
