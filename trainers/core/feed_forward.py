"""The feed-forward layers of transformers."""

from typing import Any

from torch import Tensor, nn


class Geglu(nn.Module):
    """A projection, half of which gates the other half."""

    def __init__(self, width: int, operations: Any, made: dict[str, Any]) -> None:
        super().__init__()
        self.proj = operations.Linear(width, 8 * width, **made)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * nn.functional.gelu(gate)


class FeedForward(nn.Module):
    """Module paths are those of diffusers: `net.0.proj` and `net.2`. `made` goes to the layers of `operations`."""

    def __init__(self, width: int, operations: Any, made: dict[str, Any]) -> None:
        super().__init__()
        gated = Geglu(width, operations, made)
        self.net = nn.Sequential(gated, nn.Identity(), operations.Linear(4 * width, width, **made))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
