"""Optimizers and learning-rate schedules, made by libraries from the names in the config."""

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import TrainConfig

BETA1 = 0.9
OPTIONS = ("initial_lr", "betas", "weight_decay")  # entries of a parameter group set by the config; the rest is state
STATE_BYTES = {"AdamW": 8, "AdamW8bit": 2, "Lion": 4, "Prodigy": 16, "Adafactor": 8}  # upper limit per trained value


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> Optimizer:
    """The optimizer that the config names. ValueError names a package that it needs and that is not installed."""
    betas, decay, rate = (BETA1, config.beta2), config.weight_decay, config.learning_rate
    if config.optimizer == "AdamW":
        return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=decay)
    if config.optimizer == "AdamW8bit":
        return _bitsandbytes().AdamW8bit(groups, lr=rate, betas=betas, weight_decay=decay)
    import pytorch_optimizer  # imported here because it takes a second and most runs do not need it

    if config.optimizer == "Lion":
        return pytorch_optimizer.Lion(groups, lr=rate, betas=betas, weight_decay=decay)
    if config.optimizer == "Prodigy":
        from .prodigy import Prodigy

        return Prodigy(groups, lr=rate, betas=betas, weight_decay=decay)
    without_momentum = (None, 0.999)
    return pytorch_optimizer.AdaFactor(
        groups, lr=rate, betas=without_momentum, weight_decay=decay, scale_parameter=False, relative_step=False
    )


def take_up(optimizer: Optimizer, schedule: LambdaLR, memory: dict[str, Any], place: dict[str, Any]) -> None:
    """Restore an optimizer's and a schedule's state from a checkpoint, but keep the current options and rates."""
    own = [{name: group[name] for name in OPTIONS if name in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(memory)
    schedule.load_state_dict(place)
    schedule.base_lrs = [options["initial_lr"] for options in own]
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, options, rate in zip(optimizer.param_groups, own, schedule._last_lr, strict=True):
        group.update(options, lr=rate)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "optimizer=AdamW8bit: needs the package bitsandbytes (pip install bitsandbytes), which is not "
            "installed; or choose AdamW"
        ) from error
    return bitsandbytes.optim


def make_schedule(optimizer: Optimizer, config: TrainConfig, steps: int) -> LambdaLR:
    from diffusers.optimization import get_scheduler  # imported here to keep ComfyUI's start fast

    name = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)


def effective_rate(optimizer: Optimizer) -> float:
    """The next step's learning rate of the first group that trains. Prodigy's rate is multiplied by its estimate d."""
    groups = optimizer.param_groups
    group = next((group for group in groups if group["lr"]), groups[0])
    return float(group["lr"]) * float(group.get("d", 1.0))
