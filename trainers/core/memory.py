"""Gradient checkpointing for each block, and the decision if a run needs it."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .backbone import Backbone
from .events import Plan
from .placement import Placement

HEADROOM = 0.9  # share of the free memory that a plan uses; the rest is for fragmentation and other programs
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "could not allocate", "alloc_failed")  # as backends say it
WORKSPACE = 1.2  # peak memory relative to saved activations: adds kernels' workspace and temporary gradients


def checkpointed_blocks(backbone: Backbone) -> None:
    """Make blocks recompute their activations in backward if `backbone.placement` says so.

    Random states are not restored: blocks are not random, and restoring the process-wide state would disturb samplers
    that run at the same time.
    """
    for index, block in enumerate(backbone.blocks):
        block.forward = _recomputing(block.forward, backbone, index)


def _recomputing(forward: Callable, backbone: Backbone, index: int) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        if index < backbone.placement.recomputed and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward(*args, **kwargs)

    return run


def make_plan(
    backbone: Backbone, choice: str, losses: Callable[[], Iterable], states: int, available: int
) -> tuple[Placement, Plan]:
    """Decide on checkpointing ("auto", "on", "off") for a run whose largest micro-batch's losses are `losses()`.

    A forward pass of each, which keeps no block's activations, measures what the blocks would keep for backward.
    `states` is the memory of gradients and optimizer, `available` the free memory with the model loaded, in bytes.
    """
    backbone.placement = replace(backbone.placement, recomputed=0)
    kept, entries = _measure_blocks(backbone, losses)
    full = int(states + WORKSPACE * sum(kept))
    lean = int(states + WORKSPACE * (max(kept) + sum(entries)))
    fits = full <= HEADROOM * available
    recompute = choice == "on" or (choice == "auto" and not fits)
    needed = lean if recompute else full
    reason = {"on": "asked for", "off": "turned off by request"}.get(
        choice, "the run fits" if fits else "needed to fit"
    )
    if needed > HEADROOM * available:
        reason += "; may run out of memory: use a smaller size, fewer frames or a smaller batch"
    plan = Plan(recompute, needed, available, None, None, reason)
    return replace(backbone.placement, recomputed=len(backbone.blocks) if recompute else 0), plan


def _measure_blocks(backbone: Backbone, losses: Callable[[], Iterable]) -> tuple[list[int], list[int]]:
    """Bytes that each block keeps for backward, and of its input, in the largest forward of `losses`."""
    parameters = {p.untyped_storage().data_ptr() for p in backbone.module.parameters()}
    forwards: list[tuple[list[int], list[int]]] = []

    def measured(run: Callable) -> Callable:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen: dict[int, Tensor] = {}  # keeps counted tensors alive, so that no address is reused

            def pack(tensor: Tensor) -> None:
                address = tensor.untyped_storage().data_ptr()
                if address not in parameters:
                    seen[address] = tensor.detach()

            with torch.autograd.graph.saved_tensors_hooks(pack, _never_unpacked):
                result = run(x, *args, **kwargs)
            kept, entries = forwards[-1]
            kept.append(sum(tensor.untyped_storage().nbytes() for tensor in seen.values()))
            entries.append(x.nbytes)
            seen.clear()  # the graph keeps the hooks, which would keep every block's activations
            return result

        return forward

    runs = [block.forward for block in backbone.blocks]
    for block, run in zip(backbone.blocks, runs, strict=True):
        block.forward = measured(run)
    try:
        forwards.append(([], []))
        for _ in losses():
            forwards.append(([], []))
    finally:
        for block, run in zip(backbone.blocks, runs, strict=True):
            block.forward = run
    return max((forward for forward in forwards if forward[0]), key=lambda forward: sum(forward[0]))


def _never_unpacked(_: None) -> Tensor:
    raise AssertionError("nothing is run backward while planning")


def count_trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out. Each of torch's backends has its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)
