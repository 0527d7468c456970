"""Prodigy whose parameter groups keep rates of their own."""

from typing import Any

import pytorch_optimizer
import torch


class Prodigy(pytorch_optimizer.Prodigy):
    """Every group moves at d times its own rate, where the library moves all of them at that of the first.

    The estimate d stays a lower bound of the distance to the optimum whatever the steps are (Mishchenko and Defazio
    2023, arXiv 2306.06101). Groups at rate 0 do not move, and have no part in it.
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
