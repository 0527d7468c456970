"""The contract between the loop and a training method."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from .backbone import Backbone
from .data import Batch
from .rng import Rng


@dataclass(frozen=True)
class Phase:
    """`steps` optimizer steps on the rows of one split of the data ("clips" or "frames").

    clips: with fewer rows advice warns. loss_falls: whether advice expects the loss to fall. option: the name of the
    option that holds `steps`.
    """

    name: str
    steps: int
    split: str
    clips: int = 1
    loss_falls: bool = True
    option: str = "steps"


@dataclass(frozen=True)
class Export:
    """One file that a recipe writes. keys: its key format, one of lora_io.keys.FORMATS or "model" for a whole model.
    folder: ComfyUI's model folder for it.

    The last export of a recipe is its main one.
    """

    description: str
    phase: str
    keys: str = "comfy"
    folder: str = "loras"


@dataclass(frozen=True)
class Generation:
    """A shipped workflow that generates with a run's files.

    loaders: the export that each loader node takes, the node by its title, or by its type if it has no own title.
    """

    template: str
    loaders: dict[str, str]


class Recipe(Protocol):
    """One training method. A file in `trainers/` ends with `RECIPE = Class` to become a node.

    The loop calls `start(phase)` once per phase, in order, then `losses` for each micro-batch. It runs backward at
    every yield, inside any `with` block that the recipe has open. `predict` calls the backbone with all trained factors
    active and regularisers off. `losses` must reset the state that `predict` leaves.
    """

    Config: ClassVar[type]
    name: ClassVar[str]
    title: ClassVar[str]
    description: ClassVar[str]
    backbone_class: ClassVar[type[Backbone]]
    columns: ClassVar[tuple[str, ...]]
    config: Any

    def __init__(self, backbone: Any, config: Any) -> None: ...
    @staticmethod
    def phases(config: Any) -> list[Phase]: ...
    @staticmethod
    def exports(config: Any) -> dict[str, Export]: ...
    @staticmethod
    def generations(config: Any) -> list[Generation]:
        """The best first; one serves if the run made all that it loads."""
        ...

    def start(self, phase: Phase) -> None: ...
    def param_groups(self, phase: Phase) -> list[dict[str, Any]]: ...
    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]: ...
    def predict(self, noisy_latents: Tensor, t: Tensor, batch: Batch) -> Tensor: ...
    def export(self, name: str) -> dict[str, Tensor]: ...
    def metadata(self, name: str) -> dict[str, str]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
