"""The pack's nodes: the only layer that knows ComfyUI's user interface."""

from comfy_api.latest import ComfyExtension, io

from . import data, jobs, motion, tracklets, train


class Kinoloom(ComfyExtension):
    async def on_load(self) -> None:
        jobs.start_registry()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*data.NODES, *train.NODES, *jobs.NODES, *motion.NODES, *tracklets.NODES]


async def comfy_entrypoint() -> Kinoloom:
    return Kinoloom()
