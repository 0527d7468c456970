"""Random weights for the tiny models, scaled so that activations neither vanish nor explode."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

StateDict = dict[str, Tensor]


class Weights:
    """A seeded source of named layers."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=self.rng).mul_(std)

    def linear(self, name: str, out_features: int, in_features: int) -> StateDict:
        return {
            f"{name}.weight": self.normal(out_features, in_features, std=in_features**-0.5),
            f"{name}.bias": self.normal(out_features, std=0.02),
        }

    def norm(self, name: str, features: int) -> StateDict:
        return {
            f"{name}.weight": 1 + self.normal(features, std=0.1),
            f"{name}.bias": self.normal(features, std=0.02),
        }


def save(path: Path, tensors: StateDict, metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
