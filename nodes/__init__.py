"""The pack's nodes: the only layer that knows ComfyUI's user interface."""

import gc

from . import (
    oldest,  # noqa: F401, and first: a ComfyUI that is too old lacks what the others import
    packages,  # noqa: F401
)

# isort: split
from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from . import control, data, jobs, motion, motion_loras, result, routes, samples, svd, svd_data, tracklets, train


class Kinoloom(ComfyExtension):
    async def on_load(self) -> None:
        jobs.start_registry()
        routes.add_routes(PromptServer.instance.routes)
        PromptServer.instance.app.on_startup.append(spare_collector)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        modules = (data, svd_data, samples, train, result, motion, motion_loras, svd, tracklets, control)
        return [node for module in modules for node in module.NODES]


async def spare_collector(app: object) -> None:
    """Spare the garbage collector what ComfyUI's start made, hundreds of thousands of objects that live to its end.

    Every run, and ComfyUI after prompts, walks all others. Now every pack is loaded and no prompt holds a model yet,
    which would never be freed if it were frozen.
    """
    gc.collect()
    gc.freeze()


async def comfy_entrypoint() -> Kinoloom:
    return Kinoloom()
