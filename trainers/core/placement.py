"""How the private model of a run is kept in memory."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """recomputed: the number of blocks, from the first, whose activations are recomputed in backward.
    stored: the type to which wider matrices and 2-D kernels are cast. None keeps the file's types.
    """

    recomputed: int = 0
    stored: torch.dtype | None = None


AS_IT_IS = Placement()
