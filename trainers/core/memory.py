"""Gradient checkpointing per block, and the choice whether a run needs it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbones.base import Backbone
from .events import Plan

HEADROOM = 0.9  # of the free memory; the rest is fragmentation and other programs
WORKSPACE = 1.2  # saved activations -> peak: kernels' scratch space and the gradients in flight


def checkpointed_blocks(backbone: Backbone) -> None:
    """Make every block of a private module recompute its activations in backward while `backbone.checkpointing` is set.

    The generators are not replayed: nothing in a block is random, and restoring the process-wide state would disturb
    samplers that run at the same time.
    """
    for block in backbone.blocks:
        block.forward = _recomputing(block.forward, backbone)


def _recomputing(forward: Callable, backbone: Backbone) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        if backbone.checkpointing and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward(*args, **kwargs)

    return run


def make_plan(backbone: Backbone, choice: str, losses: Callable[[], Iterable], trainable: int, available: int) -> Plan:
    """Decide on checkpointing ("auto", "on", "off") for a run whose largest micro-batch's losses are `losses()`.

    One forward pass with everything checkpointed but the last block tells what a block keeps for backward.
    `trainable` is the number of trained values, `available` the free memory in bytes with the model loaded.
    """
    backbone.checkpointing = True
    kept, entry = _measure_block(backbone, losses)
    count = len(backbone.blocks)
    states = trainable * 4 * 3  # gradient and two moments in fp32
    full = int(states + WORKSPACE * kept * count)
    lean = int(states + WORKSPACE * (kept + entry * count))
    fits = full <= HEADROOM * available
    backbone.checkpointing = choice == "on" or (choice == "auto" and not fits)
    needed = lean if backbone.checkpointing else full
    reason = {"on": "asked for", "off": "turned off by request"}.get(
        choice, "the run fits" if fits else "needed to fit"
    )
    if needed > HEADROOM * available:
        reason += "; may run out of memory: use a smaller size, fewer frames or a smaller batch"
    return Plan(backbone.checkpointing, needed, available, None, None, reason)


def _measure_block(backbone: Backbone, losses: Callable[[], Iterable]) -> tuple[int, int]:
    """Bytes that the last block keeps for backward, and bytes of its input, of the forward that keeps most."""
    block, sizes = backbone.blocks[-1], []
    parameters = {p.untyped_storage().data_ptr() for p in backbone.module.parameters()}

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # an output saved as itself would be a reference cycle that is never freed

        backbone.checkpointing = False
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = run(x, *args, **kwargs)
        backbone.checkpointing = True
        sizes.append((sum(kept.values()), x.nbytes))
        return result

    run, block.forward = block.forward, forward
    try:
        for _ in losses():
            pass
    finally:
        block.forward = run
    return max(sizes)


def count_trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
