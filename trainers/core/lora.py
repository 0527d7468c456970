"""Groups of LoRA layers on one module. PEFT injects the layers; this file switches, shares and masks whole groups.

A group is a PEFT adapter. Its factors are fp32 and are cast to the activation's dtype when used.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .rng import Rng, derived_generator

if TYPE_CHECKING:
    from .group_linear import GroupLinear


class LoraGroups:
    """LoRA layers on `module`, in named groups. Paths are those of `module` before injection."""

    def __init__(self, module: nn.Module, seed: int) -> None:
        self.module, self.seed = module, seed
        self.active: set[str] = set()
        self.layers: dict[str, GroupLinear] = {}

    def add_group(
        self,
        name: str,
        targets: str,
        rank: int,
        alpha: float,
        share_down: str | None = None,
        down_std: float | None = None,
    ) -> None:
        """Add a trainable group on every Linear and 1x1 convolution whose path matches the regex `targets`.

        down starts Kaiming-uniform, or normal with standard deviation `down_std`. up starts at zero, so the module's
        output is unchanged. With `share_down` the group uses (and freezes) the down factors of that other group.
        ValueError if no layer matches.
        """
        from .group_linear import inject  # takes seconds to import, which ComfyUI's start need not

        self.layers = inject(self.module, name, targets, rank, alpha)
        self.active.add(name)
        for path, layer in self.layers.items():
            layer.active = self.active
            layer.__dict__.setdefault("masks", {})
            layer.dropout = None
            if name in layer.lora_A:
                self._initialise(layer, path, name, share_down, down_std)
        self.train_only({name: ("up",) if share_down else ("down", "up")})

    def _initialise(
        self, layer: "GroupLinear", path: str, name: str, share_down: str | None, down_std: float | None
    ) -> None:
        """Set a layer's first values from own generators: samplers use the process-wide one at the same time."""
        device = layer.base_layer.weight.device
        layer.lora_B[name].weight = nn.Parameter(torch.zeros(layer.lora_B[name].weight.shape, device=device))
        if share_down:
            layer.lora_A[name] = layer.lora_A[share_down]
            return
        down = torch.empty(layer.lora_A[name].weight.shape)
        generator = derived_generator(self.seed, "down", name, path)
        if down_std is None:
            nn.init.kaiming_uniform_(down, math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(down, std=down_std, generator=generator)
        layer.lora_A[name].weight = nn.Parameter(down.to(device))

    def train_only(self, factors: dict[str, tuple[str, ...]]) -> None:
        """Train exactly these factors ("down", "up") of these groups and freeze everything else."""
        self.module.requires_grad_(False)
        for group, names in factors.items():
            for name in names:
                for parameter in self.factors(group, name).values():
                    parameter.requires_grad_(True)

    def factors(self, group: str, name: str) -> dict[str, nn.Parameter]:
        """A group's `down` [rank, in] or `up` [out, rank] factors, by module path."""
        return {
            path: (layer.lora_A if name == "down" else layer.lora_B)[group].weight
            for path, layer in self.layers.items()
            if group in layer.lora_A
        }

    def param_groups(self, group: str, learning_rate: float, up_ratio: float = 1.0) -> list[dict]:
        """The optimizer's parameter groups. up's learning rate is `up_ratio` times down's (LoRA+, arXiv 2402.12354)."""
        rates = {"down": learning_rate, "up": learning_rate * up_ratio}
        groups = [
            {"params": [p for p in self.factors(group, name).values() if p.requires_grad], "lr": rate}
            for name, rate in rates.items()
        ]
        return [g for g in groups if g["params"]]

    @contextmanager
    def without(self, *groups: str) -> Iterator[None]:
        """Turn these groups off. Forward, backward and the recompute of checkpointing must all happen inside."""
        switched_off = self.active & set(groups)
        self.active -= switched_off
        try:
            yield
        finally:
            self.active |= switched_off

    @contextmanager
    def frozen(self, *groups: str) -> Iterator[None]:
        """Keep these groups on but give them no gradient."""
        parameters = [
            p for g in groups for name in ("down", "up") for p in self.factors(g, name).values() if p.requires_grad
        ]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def set_masks(self, group: str, make: Callable[[Tensor], Tensor] | None) -> None:
        """Multiply each up factor by `make(up)`, in layer order, until the next call. None removes the masks.

        Masks are drawn before the forward and kept, so the recompute of checkpointing sees the same mask.
        """
        for layer in self.layers.values():
            if make is None:
                layer.masks.pop(group, None)
            elif group in layer.lora_B:
                layer.masks[group] = make(layer.lora_B[group].weight.detach())

    def set_dropout(self, probability: float, rng: Rng) -> None:
        """Dropout on the output of each layer's LoRA, drawn by `rng`, until the next call. 0 turns it off."""
        seed = rng.generator("dropout").initial_seed()
        for place, layer in enumerate(self.layers.values()):
            layer.dropout = (probability, seed + place) if probability else None

    def named(self, group: str) -> dict[str, nn.Parameter]:
        """A group's factors by their names in a file: `<module path>.lora_down.weight` and `.lora_up.weight`."""
        return {
            f"{path}.lora_{name}.weight": parameter
            for name in ("down", "up")
            for path, parameter in self.factors(group, name).items()
        }

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Copies of a group's factors by these names, in fp32 on the CPU."""
        return copied(self.named(group))

    def export(self, group: str) -> dict[str, Tensor]:
        """A group's tensors for an export, with `<module path>.alpha` if the scale alpha / rank is not 1."""
        scaled = {
            path: layer for path, layer in self.layers.items() if group in layer.scaling and layer.scaling[group] != 1
        }
        alphas = {f"{path}.alpha": torch.tensor(float(layer.lora_alpha[group])) for path, layer in scaled.items()}
        return {**self.tensors(group), **alphas}

    def state_dict(self) -> dict[str, Tensor]:
        """All factors of all groups, frozen ones too, for a checkpoint: `<group>/<module path>.<factor>`.

        A shared down factor is stored once, with the first group that has it.
        """
        return copied(self._state())

    def _state(self) -> dict[str, nn.Parameter]:
        state: dict[nn.Parameter, str] = {}
        for group in dict.fromkeys(group for layer in self.layers.values() for group in layer.lora_B):
            for key, parameter in self.named(group).items():
                state.setdefault(parameter, f"{group}/{key}")
        return {key: parameter for parameter, key in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a checkpoint's factors. ValueError names missing and unexpected keys."""
        fill(self._state(), state, "LoRA state: keys do not match")

    def load_group(self, group: str, tensors: dict[str, Tensor]) -> None:
        """Load a group from `<module path>.lora_down/up.weight`. ValueError names keys that do not match."""
        fill(self.named(group), tensors, "LoRA file: layers do not match this model")


def layer_shapes(module: nn.Module, targets: str) -> dict[str, tuple[int, ...]]:
    """Weight shapes, by path, of the layers that match `targets`, with or without LoRA groups on them."""
    return {path: tuple(m.weight.shape) for path, m in module.named_modules() if re.fullmatch(targets, path)}


def copied(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of the parameters' values on the CPU."""
    return {key: parameter.detach().to("cpu", copy=True) for key, parameter in parameters.items()}


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], mismatch: str) -> None:
    """Copy each tensor into the parameter of its name. ValueError names missing, extra or wrongly shaped ones."""
    if different := parameters.keys() ^ tensors.keys():
        raise ValueError(f"{mismatch}, for example {sorted(different)[:3]}")
    for key, tensor in tensors.items():
        if parameters[key].shape != tensor.shape:
            expected = tuple(parameters[key].shape)
            raise ValueError(f"LoRA {key}: shape {tuple(tensor.shape)}, expected {expected}")
        parameters[key].copy_(tensor)
