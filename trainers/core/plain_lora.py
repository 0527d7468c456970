"""The shared parts of recipes that train LoRAs: their state, and one LoRA with one loss in one phase."""

from typing import Any, ClassVar

from torch import Tensor

from .data import TrainingData
from .lora import LoraGroups
from .recipe import Export, Generation, Phase, Recipe
from .start_from import Reader, Start

GROUP = "lora"


class LoraRecipe(Recipe):
    """A recipe whose trained weights are the groups of `lora`."""

    def __init__(self, backbone: Any, config: Any) -> None:
        super().__init__(backbone, config)
        self.lora = LoraGroups(backbone.module, config.seed)

    def export(self, name: str) -> dict[str, Tensor]:
        return self.lora.export(name)

    def state_dict(self) -> dict[str, Tensor]:
        return self.lora.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.lora.load_state_dict(state)


class PlainLora(LoraRecipe):
    """A recipe without its name, options and `losses`. Its Config is a LoraConfig with `steps` and `target_layers`."""

    template: ClassVar[str]  # the workflow that generates videos with the LoRA

    @staticmethod
    def phases(config: Any, data: TrainingData) -> list[Phase]:
        return [Phase("clips", config.steps, "clips")]

    @staticmethod
    def exports(config: Any, data: TrainingData) -> dict[str, Export]:
        return {GROUP: Export("the trained LoRA", "clips")}

    @classmethod
    def generations(cls, config: Any, data: TrainingData) -> list[Generation]:
        return [Generation(cls.template, {"LoraLoaderModelOnly": GROUP})]

    def start(self, phase: Phase) -> None:
        c = self.config
        self.lora.add_group(GROUP, self.backbone.lora_targets[c.target_layers], c.rank, c.alpha or c.rank)
        for group, start in c.starts().items():
            self.lora.load_group(group, start.tensors(c, self.backbone.module))

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        return self.lora.param_groups(GROUP, self.config.learning_rate, self.config.lora_plus_ratio)


def plain_start(config: Any, targets: dict[str, str], read: Reader) -> dict[str, Start]:
    """The tensors that the group starts from, if `start_from` is set."""
    if not config.start_from:
        return {}
    return {GROUP: Start("start_from", config.start_from, targets[config.target_layers], read)}
