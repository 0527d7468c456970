"""The layer that carries groups of LoRA factors; imported with a run's first group, as PEFT takes seconds to import."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn


class GroupLinear(PeftLinear):
    """y = W x + sum over active groups of scale * (up * mask) down x; groups that share `down` compute it once.

    The base is a Linear, or a 1x1 convolution, which is one over channels. Unlike PEFT's own forward this casts the
    small factors instead of the activations and adds the update in one matmul.
    """

    active: set[str]  # shared by all layers of one LoraGroups
    masks: dict[str, Tensor]
    dropout: tuple[float, int] | None  # probability, seed

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.weight.shape[1], module.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.base_layer.weight.ndim == 4:
            y = self.base_layer(x)
            return y + self._update(x.movedim(1, -1), torch.zeros_like(y).movedim(1, -1)).movedim(-1, 1)
        flat = x.flatten(0, -2)  # once for base and update, whose gradients then add up in place
        return self._update(flat, self.base_layer(flat)).view(*x.shape[:-1], -1)

    def _update(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` [..., out] plus what the active groups make of x [..., in]; `y` may be changed in place."""
        flat, out = x.flatten(0, -2), y.flatten(0, -2)
        for down, up in self._active_factors().items():
            h = nn.functional.linear(flat, down.weight.to(x.dtype))
            if self.dropout:
                probability, seed = self.dropout
                update = nn.functional.linear(h, (up / (1 - probability)).to(x.dtype))
                out.add_(update.mul_(_kept(out, probability, seed)))
            else:
                out.addmm_(h, up.to(x.dtype).t())  # in place: no linear layer keeps its output for backward
        return out.view(y.shape)

    def _active_factors(self) -> dict[nn.Module, Tensor]:
        """Down factor to the sum of the up factors on it."""
        factors: dict[nn.Module, Tensor] = {}
        for group, down in self.lora_A.items():
            if group in self.active:
                up = self.lora_B[group].weight
                if group in self.masks:
                    up = up * self.masks[group]
                if self.scaling[group] != 1:
                    up = up * self.scaling[group]
                factors[down] = factors[down] + up if down in factors else up
        return factors


def _kept(like: Tensor, probability: float, seed: int) -> Tensor:
    """1 where an entry is kept, else 0, as bytes; the same again when a checkpoint computes the layer anew.

    16 random bits decide about each entry: on a CPU bernoulli_ takes four times as long.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    drawn = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()].view(like.shape)
    return (drawn >= round(probability * 2**16) - 2**15).view(torch.uint8)


def inject(module: nn.Module, name: str, targets: str, rank: int, alpha: float) -> dict[str, GroupLinear]:
    """Put a group on every layer of `module` whose path matches; path to layer of all that carry groups now."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, bias="none", init_lora_weights=False)
    config._register_custom_module({nn.Module: GroupLinear})  # ComfyUI's quantised Linear is no nn.Linear
    vars(module).pop("peft_config", None)  # PEFT warns about a second adapter, which is meant here
    inject_adapter_in_model(config, module, name, low_cpu_mem_usage=True)
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, GroupLinear)}
