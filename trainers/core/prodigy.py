"""Prodigy with a separate learning rate for each parameter group."""

from typing import Any

import pytorch_optimizer
import torch


class Prodigy(pytorch_optimizer.Prodigy):
    """Each group steps with d times its own rate. The library uses the first group's rate for all groups.

    The estimate d stays a lower bound of the distance to the optimum for any step sizes (Mishchenko and Defazio 2023,
    arXiv 2306.06101). Groups with rate 0 do not move and do not count in the estimate.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        fastest, first = max(rates), self.param_groups[0]
        slower = [
            (parameter, rate / fastest, parameter.clone())
            for group, rate in zip(self.param_groups, rates, strict=True)
            for parameter in group["params"]
            if rate < fastest and parameter.grad is not None
        ]
        for parameter, share, _ in slower:
            if share == 0:
                parameter.grad = None
        first["lr"] = fastest
        loss = super().step(closure)
        first["lr"] = rates[0]
        for parameter, share, before in slower:
            parameter.copy_(before.lerp(parameter, share))
        return loss
