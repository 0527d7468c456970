"""The pack's nodes: the only layer that knows ComfyUI's user interface."""

from comfy_api.latest import ComfyExtension, io

from . import data, jobs, motion, svd, svd_data, train


class Kinoloom(ComfyExtension):
    async def on_load(self) -> None:
        jobs.start_registry()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*data.NODES, *svd_data.NODES, *train.NODES, *jobs.NODES, *motion.NODES, *svd.NODES]


async def comfy_entrypoint() -> Kinoloom:
    return Kinoloom()
