"""The one training loop: accumulate, clip, step, check, report, save."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .checkpoint import State
from .config import TrainConfig
from .data import PhaseData
from .events import Event, Step, Validation
from .host import training
from .noise import Rng
from .optim import make_optimizer, make_schedule
from .recipe import Batch, Phase, Recipe

QUANTILES = tuple(q / 10 for q in range(1, 10))  # of the timestep distribution; validation averages over them
VALIDATION_BATCHES = 4


class Diverged(ValueError):
    """The loss or the gradient stopped being a number; the step was not made."""


def train(recipe: Recipe, data: Callable[[Phase], PhaseData], config: TrainConfig, state: State, emit: Callable[[Event], None],
          should_stop: Callable[[], bool], save: Callable[[Phase, State, str], None], plan: Callable[[Phase, PhaseData], None],
          scaler: torch.amp.GradScaler) -> bool:
    """Run every phase from `state` on; False if `should_stop` said so between two steps.

    `save(phase, state, why)` is called with why = "checkpoint", "best", "stopped", "diverged" (the weights are those before
    the bad step) or "phase", when the phase is complete. `plan(phase, batches)` is called before a phase's first step. Raises Diverged.
    """
    phases = recipe.phases(config)
    total = sum(phase.steps for phase in phases)
    for index, phase in enumerate(phases):
        recipe.start(phase)
        if index < state.phase:
            continue
        batches = data(phase)
        optimizer = make_optimizer(recipe.param_groups(phase), config)
        schedule = make_schedule(optimizer, config, phase.steps)
        _restore(state, recipe, optimizer, schedule, scaler)
        plan(phase, batches)
        before = sum(p.steps for p in phases[:index])

        def snapshot(why: str, phase: Phase = phase, optimizer: Any = optimizer, schedule: Any = schedule) -> None:
            state.recipe, state.optimizer, state.schedule = recipe.state_dict(), optimizer.state_dict(), schedule.state_dict()
            state.scaler = scaler.state_dict()
            save(phase, state, why)

        while state.step < phase.steps:
            if should_stop():
                snapshot("stopped")
                return False
            began = time.perf_counter()
            try:
                losses, norm = _step(recipe, batches, phase, config, state.step, optimizer, scaler)
            except Diverged:
                snapshot("diverged")
                raise
            rate = optimizer.param_groups[0]["lr"]
            schedule.step()
            state.step += 1
            done = before + state.step
            emit(Step(phase.name, state.step, phase.steps, done, total, losses, rate, norm, time.perf_counter() - began))
            last = state.step == phase.steps
            if config.validate_every and (state.step % config.validate_every == 0 or last):
                loss = validation_loss(recipe, batches.validation(), phase, config.seed)
                best = loss < state.best
                state.best = min(state.best, loss)
                emit(Validation(phase.name, state.step, loss, best, batches.held_out))
                if best:
                    snapshot("best")
            if state.step % config.save_every == 0 and not last:
                snapshot("checkpoint")
        snapshot("phase")
        vars(state).update(vars(State(phase=index + 1, scaler=state.scaler)))
    return True


def _step(recipe: Recipe, batches: PhaseData, phase: Phase, config: TrainConfig, step: int, optimizer: torch.optim.Optimizer,
          scaler: torch.amp.GradScaler) -> tuple[dict[str, float], float]:
    """One optimizer step; each named loss averaged over the micro-batches, and the gradient's norm before clipping."""
    count = config.gradient_accumulation
    sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
    for micro in range(step * count, (step + 1) * count):
        rng = Rng(config.seed, phase.name, micro * config.batch_size)
        with training():
            for name, loss in recipe.losses(batches[micro], rng):
                scaler.scale(loss / count).backward()
                sums[name] = sums[name].to(loss.device) + loss.detach() / count
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
    losses = {name: float(value) for name, value in sums.items()}
    for name, value in {**losses, "gradient": 0.0 if scaler.is_enabled() else float(norm)}.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} became {value} in step {step + 1} of phase {phase.name!r}. The LoRA up to there was saved. "
                           "Try a lower learning_rate, or precision bf16 or fp32.")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return losses, float(norm)


@torch.no_grad()
def validation_loss(recipe: Recipe, batches: Iterator[Batch], phase: Phase, seed: int) -> float:
    """Mean loss over fixed noise and the nine deciles of the timestep distribution, regularisers off."""
    values = [
        float(loss)
        for index, batch in zip(range(VALIDATION_BATCHES), batches, strict=False)
        for quantile in QUANTILES
        for _, loss in recipe.losses(batch, Rng(seed, f"{phase.name}/validation", index * 4096, quantile))
    ]
    return sum(values) / len(values)


def _restore(state: State, recipe: Recipe, optimizer: Any, schedule: Any, scaler: torch.amp.GradScaler) -> None:
    if state.recipe is not None:
        recipe.load_state_dict(state.recipe)
    if state.optimizer is not None:
        optimizer.load_state_dict(state.optimizer)
        schedule.load_state_dict(state.schedule)
    if state.scaler:
        scaler.load_state_dict(state.scaler)
