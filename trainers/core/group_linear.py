"""The layer with LoRA groups. It is imported with a run's first group, because importing PEFT takes seconds."""

from collections.abc import MutableMapping
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn


class Factor(Protocol):
    """A linear layer without bias, as PEFT makes it."""

    weight: nn.Parameter


class GroupLinear(PeftLinear):
    """y = W x + sum over active groups of scale * (up * mask) down x. Groups that share `down` compute it once.

    The base layer is a Linear or a 1x1 convolution, which is a Linear over channels. Unlike PEFT's forward, this casts
    the small factors instead of the activations and adds the update in one matmul.
    """

    lora_A: MutableMapping[str, Factor]
    lora_B: MutableMapping[str, Factor]
    active: set[str]  # shared by all layers of one LoraGroups
    masks: dict[str, Tensor]
    dropout: tuple[float, int] | None  # probability, seed

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.weight.shape[1], module.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.base_layer.weight.ndim == 4:
            y = self.base_layer(x)
            return y + self._update(x.movedim(1, -1), torch.zeros_like(y).movedim(1, -1)).movedim(-1, 1)
        flat = x.flatten(0, -2)  # base and update share it, so their gradients are summed in place
        return self._update(flat, self.base_layer(flat)).view(*x.shape[:-1], -1)

    def _update(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` [..., out] plus the active groups' update for x [..., in]. May change `y` in place."""
        flat, out = x.flatten(0, -2), y.flatten(0, -2)
        for down, up in self._active_factors().items():
            h = nn.functional.linear(flat, down.weight.to(x.dtype))
            if self.dropout:
                probability, seed = self.dropout
                update = nn.functional.linear(h, (up / (1 - probability)).to(x.dtype))
                out.add_(update.mul_(_kept(out, probability, seed)))
            else:
                out.addmm_(h, up.to(x.dtype).t())  # in place: a linear layer's backward does not need its output
        return out.view(y.shape)

    def _active_factors(self) -> dict[Factor, Tensor]:
        """Each down factor with the sum of the up factors that share it."""
        factors: dict[Factor, Tensor] = {}
        for group, down in self.lora_A.items():
            if group in self.active:
                up: Tensor = self.lora_B[group].weight
                if group in self.masks:
                    up = up * self.masks[group]
                if self.scaling[group] != 1:
                    up = up * self.scaling[group]
                factors[down] = factors[down] + up if down in factors else up
        return factors


def _kept(like: Tensor, probability: float, seed: int) -> Tensor:
    """The dropout mask as bytes: 1 keeps an entry, 0 drops it. `seed` makes the recompute of checkpointing equal.

    Each entry compares 16 random bits, which on a CPU is four times faster than bernoulli_.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    drawn = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()].view(like.shape)
    return (drawn >= round(probability * 2**16) - 2**15).view(torch.uint8)


def inject(module: nn.Module, name: str, targets: str, rank: int, alpha: float) -> dict[str, GroupLinear]:
    """Add a group to every layer of `module` whose path matches `targets`. Returns all layers with groups, by path."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, bias="none", init_lora_weights=False)
    config._register_custom_module({nn.Module: GroupLinear})  # ComfyUI's quantised Linear is not an nn.Linear
    vars(module).pop("peft_config", None)  # so that PEFT does not warn about a second adapter
    inject_adapter_in_model(config, module, name, low_cpu_mem_usage=True)
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, GroupLinear)}
