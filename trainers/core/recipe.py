"""The contract between the loop and a training method."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .backbone import Backbone, Grid
from .config import TrainConfig
from .data import Batch, Column, TrainingData
from .rng import Rng


@dataclass(frozen=True)
class ModelInput:
    """A MODEL that a recipe trains on or with: the input of its node, and the key of its private copy.

    text_encoder: whether it is a CLIP. option: the option that needs it; without it the input may stay empty, and it is
    not used.
    """

    name: str = "model"
    tooltip: str = "The model to train on. It is copied, never changed."
    text_encoder: bool = False
    option: str = ""


@dataclass(frozen=True)
class Phase:
    """`steps` optimizer steps on the training rows of one unit ("clips" or "frames").

    fewest_rows: below it advice warns. loss_falls: whether advice expects the loss to fall. option: the option that
    holds `steps`.
    """

    name: str
    steps: int
    unit: str
    fewest_rows: int = 1
    loss_falls: bool = True
    option: str = "steps"


@dataclass(frozen=True)
class Export:
    """One file that a recipe writes, when `phase` is complete. The last export of a recipe is its main one.

    kind: "lora" (a LoRA, which Training Result outputs), "module" (layers of this pack) or "model" (a whole one).
    format: how its keys are named, one of lora_io.keys.FORMATS. folder: ComfyUI's model folder that loaders look in.
    """

    description: str
    phase: str
    kind: str = "lora"
    format: str = "comfy"
    folder: str = "loras"


@dataclass(frozen=True)
class Generation:
    """A shipped workflow that generates with a run's files.

    loaders: the export that each loader node takes, the node by its title, or by its type if it has no own title.
    """

    template: str
    loaders: dict[str, str]


class Recipe(ABC):
    """One training method. A file in `trainers/` ends with `RECIPE = Class` to become a node.

    The loop calls `start(phase)` once per phase, in order, then `losses` for each micro-batch, running backward at
    every yield, inside any `with` block that the recipe has open. `losses` must reset the state that `predict` leaves.

    columns: columns of training rows. previews: columns of previews. models: the MODEL inputs of its node, of which the
    backbone gets private copies.
    """

    Config: ClassVar[type[TrainConfig]]
    name: ClassVar[str]
    title: ClassVar[str]
    description: ClassVar[str]
    backbone_class: ClassVar[type[Backbone]]
    columns: ClassVar[tuple[Column, ...]]
    previews: ClassVar[tuple[Column, ...]]
    models: ClassVar[tuple[ModelInput, ...]] = (ModelInput(),)

    def __init__(self, backbone: Any, config: Any) -> None:
        self.backbone, self.config = backbone, config

    @classmethod
    def used(cls, config: Any) -> tuple[ModelInput, ...]:
        """The inputs of `models` that a run with these options uses."""
        return tuple(model for model in cls.models if not model.option or getattr(config, model.option))

    @staticmethod
    @abstractmethod
    def phases(config: Any, data: TrainingData) -> list[Phase]: ...
    @staticmethod
    @abstractmethod
    def exports(config: Any, data: TrainingData) -> dict[str, Export]: ...
    @classmethod
    def generations(cls, config: Any, data: TrainingData) -> list[Generation]:
        """Workflows that generate, the best first. One can be used if the run has all exports that it loads."""
        return []

    @classmethod
    def data_grid(cls, config: Any, grid: Grid) -> Grid:
        """The shapes that training rows may have: the model's, unless the method cuts rows. ValueError for options."""
        return grid

    @abstractmethod
    def start(self, phase: Phase) -> None: ...
    @abstractmethod
    def param_groups(self, phase: Phase) -> list[dict[str, Any]]: ...
    @abstractmethod
    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]: ...
    def predict(self, noisy_latents: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The backbone's prediction with all trained factors active and regularisers off."""
        return self.backbone.predict(noisy_latents, t, batch)

    def unconditional(self, batch: Batch) -> Batch:
        """The unconditional batch for guidance, from a batch that already has the negative prompt."""
        return self.backbone.unconditional(batch)

    @abstractmethod
    def export(self, name: str) -> dict[str, Tensor]: ...
    def metadata(self, name: str) -> dict[str, str]:
        """Metadata of an export's file, in addition to that of every file of this pack."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]: ...
    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
