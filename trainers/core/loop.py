"""The training loop of all methods: accumulate, clip, step, check, report, save."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from .config import TrainConfig
from .data import Batch, NotFinite, PhaseData
from .events import Event, Step, Validation
from .memory import is_out_of_memory
from .optim import effective_rate, make_optimizer, make_schedule, take_up
from .recipe import Phase, Recipe
from .rng import Rng
from .state import State

QUANTILES = tuple(q / 10 for q in range(1, 10))  # of the timestep distribution, over which validation averages
VALIDATION_BATCHES = 4
SMALLEST_SCALE = 1e-4  # lower limit of the fp16 loss scale, which starts at 65536 and halves with every overflow


class Diverged(ValueError):
    """The loss or the gradient became NaN or infinite. The step was not made."""


@dataclass(frozen=True)
class Session:
    """The callbacks of the loop.

    `save(phase, state, why)` is called with why = "checkpoint", "best", "stopped", "diverged" (the weights are those
    before the bad step) or "phase", when the phase is complete; `plan(phase, batches)` before a phase's first step;
    `spare(step)` when a step ran out of memory, True if it needs less now and should be tried again;
    `release()` to free memory that is no longer referenced;
    `sample(phase, step, done)` before the run's first step, after every `sample_every` steps of a phase and its last.
    """

    emit: Callable[[Event], None]
    should_stop: Callable[[], bool]
    save: Callable[[Phase, State, str], None]
    plan: Callable[[Phase, PhaseData], None]
    spare: Callable[[int], bool] = lambda step: False
    release: Callable[[], None] = lambda: None
    sample: Callable[[Phase, int, int], None] = lambda phase, step, done: None
    sample_every: int = 0


def train(
    recipe: Recipe,
    phases: list[Phase],
    data: Callable[[Phase], PhaseData],
    config: TrainConfig,
    state: State,
    session: Session,
    scaler: torch.amp.GradScaler,
) -> bool:
    """Run the phases from `state` on. False if stopped between steps. Raises Diverged, or NotFinite for bad data."""
    for index, phase in enumerate(phases):
        recipe.start(phase)
        if index < state.phase:
            continue
        run = PhaseRun(recipe, phase, data(phase), config, state, session, scaler)
        run.batches.read_ahead()
        session.plan(phase, run.batches)
        before, total = (sum(p.steps for p in some) for some in (phases[:index], phases))
        if session.sample_every and before + state.step == 0:
            run.sample(0)
        while state.step < phase.steps:
            if session.should_stop():
                run.snapshot("stopped")
                return False
            began = time.perf_counter()
            losses, norm, rate = run.step()
            seconds, done = time.perf_counter() - began, before + state.step
            session.emit(Step(phase.name, state.step, phase.steps, done, total, {**losses}, rate, norm, seconds))
            last = state.step == phase.steps
            if config.validate_every and (last or state.step % config.validate_every == 0):
                run.validate()
            if session.sample_every and (last or state.step % session.sample_every == 0):
                run.sample(done)
            if not last and run.checkpoint_is_due:
                run.snapshot("checkpoint")
        run.snapshot("phase")
        run.finish()
        vars(state).update(vars(State(phase=index + 1, scaler=state.scaler)))
    return True


class PhaseRun:
    """The current phase, with optimizer and schedule restored from `state`, which `snapshot` updates."""

    def __init__(
        self,
        recipe: Recipe,
        phase: Phase,
        batches: PhaseData,
        config: TrainConfig,
        state: State,
        session: Session,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.recipe, self.phase, self.batches, self.config = recipe, phase, batches, config
        self.state, self.session, self.scaler = state, session, scaler
        self.optimizer = make_optimizer(recipe.param_groups(phase), config)
        self.schedule = make_schedule(self.optimizer, config, phase.steps)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if state.recipe is not None:
            recipe.load_state_dict(state.recipe)
        self.average = moving_average(self.parameters, config.ema_decay, state.average) if config.ema_decay else None
        if state.optimizer is not None and state.schedule is not None:
            take_up(self.optimizer, self.schedule, state.optimizer, state.schedule)
        if state.scaler:
            scaler.load_state_dict(state.scaler)
        self.saved_at = time.monotonic()

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether `save_every` steps or `save_minutes` have passed since the last checkpoint."""
        seconds = 60 * self.config.save_minutes
        return self.state.step % self.config.save_every == 0 or 0 < seconds <= time.monotonic() - self.saved_at

    def step(self) -> tuple[dict[str, float], float, float]:
        """Make one optimizer step. Returns mean losses, the gradient norm before clipping, and the learning rate."""
        sums = self._accumulate_or_spare()
        self.scaler.unscale_(self.optimizer)
        gradient = clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        *values, norm = read_together([*sums.values(), gradient])
        losses = dict(zip(sums, values, strict=True))
        self._require_finite({**losses, "gradient": self._judged(norm)})
        rate = effective_rate(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.average:
            self.average.step(self.parameters)
        self.state.step += 1
        return losses, norm, rate

    def _accumulate_or_spare(self) -> dict[str, Tensor]:
        """Accumulate a step's gradients. If memory runs out, tries once more if the step can need less."""
        try:
            return self._accumulate()
        except NotFinite:
            self._keep_what_was_learned()
            raise
        except Exception as error:
            if not (is_out_of_memory(error) and self.session.spare(self.state.step + 1)):
                raise
        self.optimizer.zero_grad(set_to_none=True)
        self.session.release()  # only here the traceback, which holds activations, is gone
        return self._accumulate()

    def _accumulate(self) -> dict[str, Tensor]:
        """Sum the gradients of a step's micro-batches. Returns the mean losses."""
        count, first = self.config.gradient_accumulation, self.state.step * self.config.gradient_accumulation
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.parameters[0].device))
        for micro in range(first, first + count):
            rng = Rng(self.config.seed, self.phase.name, micro * self.config.batch_size)
            for name, loss in self.recipe.losses(self.batches[micro], rng):
                self.scaler.scale(loss / count).backward()
                sums[name] += loss.detach() / count
        return sums

    def _judged(self, norm: float) -> float:
        """The gradient norm to check. An fp16 overflow is allowed until the loss scale reaches its lower limit."""
        if not self.scaler.is_enabled():
            return norm
        return 0.0 if self.scaler.get_scale() >= SMALLEST_SCALE else math.inf

    def _require_finite(self, values: dict[str, float]) -> None:
        """Raise Diverged before the step is made if a value is NaN or infinite."""
        for name, value in values.items():
            if math.isfinite(value):
                continue
            self._keep_what_was_learned()
            raise Diverged(
                f"{name} became {value} in step {self.state.step + 1} of phase {self.phase.name!r}. What was learned "
                "before that step was saved. Try a lower learning_rate, or precision bf16 or fp32."
            )

    def _keep_what_was_learned(self) -> None:
        if self.state.step:
            self.snapshot("diverged")

    def validate(self) -> None:
        began = time.perf_counter()
        with self.averaged():
            loss = validation_loss(self.recipe, self.batches.validation(), self.phase, self.config.seed)
        best = loss < self.state.best
        self.state.best = min(self.state.best, loss)
        seconds = time.perf_counter() - began
        self.session.emit(Validation(self.phase.name, self.state.step, loss, best, self.batches.held_out, seconds))
        if best:
            self.snapshot("best")

    def sample(self, done: int) -> None:
        with self.averaged():
            self.session.sample(self.phase, self.state.step, done)

    def snapshot(self, why: str) -> None:
        self.state.recipe, self.state.scaler = self.recipe.state_dict(), self.scaler.state_dict()
        self.state.optimizer, self.state.schedule = self.optimizer.state_dict(), self.schedule.state_dict()
        self.state.average = self.average and self.average.state_dict()
        with self.averaged():
            self.session.save(self.phase, self.state, why)
        if why == "checkpoint":
            self.saved_at = time.monotonic()

    def finish(self) -> None:
        """End the phase: its result is the start of the next one."""
        if self.average:
            self.average.copy_to(self.parameters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the moving average instead of the trained weights inside the `with` block, if the run keeps one."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)


def moving_average(parameters: list[nn.Parameter], decay: float, memory: dict[str, Any] | None) -> Any:
    """A moving average of the parameters, restored from `memory` if given."""
    from diffusers.training_utils import EMAModel  # imported here: it takes seconds and most runs do not need it

    average = EMAModel(parameters, decay=decay)
    if memory is not None:
        average.load_state_dict({**memory, "decay": decay})
        average.to(parameters[0].device)
    return average


def read_together(numbers: list[Tensor]) -> list[float]:
    """The values of scalar tensors, with one wait for the device."""
    return torch.stack([number.detach() for number in numbers]).tolist()


@torch.no_grad()
def validation_loss(recipe: Recipe, batches: Iterator[Batch], phase: Phase, seed: int) -> float:
    """Mean loss over fixed noise and nine quantiles of the timestep distribution, with regularisers off."""
    values = [
        loss
        for index, batch in zip(range(VALIDATION_BATCHES), batches, strict=False)
        for quantile in QUANTILES
        for _, loss in recipe.losses(batch, Rng(seed, f"{phase.name}/validation", index * 4096, quantile))
    ]
    return sum(read_together(values)) / len(values)
