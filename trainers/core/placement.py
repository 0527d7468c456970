"""How a run keeps its private model in memory."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """recomputed: the number of blocks, from the first, whose activations are computed again in backward, not kept.
    stored: the type of matrices and 2-D kernels, where the file has them no narrower. None keeps the file's types.
    """

    recomputed: int = 0
    stored: torch.dtype | None = None


AS_IT_IS = Placement()
