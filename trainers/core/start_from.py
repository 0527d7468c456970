"""Training that starts from a LoRA file."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...lora_io.fitting import require_layers
from ...lora_io.keys import scale_of
from .lora import layer_shapes

# (file, paths of the layers, model keys of the base model) -> <module>.lora_down/lora_up.weight, <module>.alpha
Reader = Callable[[Path, Collection[str], Collection[str]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Start:
    """A file from which a group starts. `option` names it; the group's layers match the regex `targets`."""

    option: str
    file: str
    targets: str
    read: Reader

    def tensors(self, config: Any, module: nn.Module, bases: Collection[str] = ()) -> dict[str, Tensor]:
        """The file's factors, scaled for this run's alpha. ValueError if they do not fit `module`."""
        path, layers = Path(self.file), layer_shapes(module, self.targets)
        try:
            named = self.read(path, layers.keys(), bases)
            require_layers(named, layers, config.rank)
            alphas = {key: scale_of(key, tensor) for key, tensor in named.items() if key.endswith(".alpha")}
        except ValueError as error:
            raise ValueError(f"{self.option}={path.name!r}: {error}") from error
        scale = (config.alpha or config.rank) / config.rank
        if other := {alpha for alpha in alphas.values() if alpha / config.rank != scale}:
            text = "Kinoloom: %s=%r has alpha %g, the run %g: its up factors are scaled, so that it has the same effect"
            logging.info(text, self.option, path.name, min(other), scale * config.rank)
        factors = {}
        for key, tensor in named.items():
            path_of, _, side = key.partition(".lora_")
            if side:
                own = alphas.get(f"{path_of}.alpha", config.rank) / config.rank
                factors[key] = tensor * (own / scale) if side == "up.weight" and own != scale else tensor
        return factors


def check_starts(starts: Mapping[str, Start], config: Any, module: nn.Module, bases: Collection[str]) -> None:
    """ValueError if a file that the run starts from does not fit `module` or was trained on a base not in `bases`."""
    for start in starts.values():
        start.tensors(config, module, bases)
