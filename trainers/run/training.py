"""Runs the training loop for a recipe on a run's private model."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from ..core.config import TrainConfig
from ..core.data import PhaseData
from ..core.events import Event, Plan, Step, to_json
from ..core.loop import Session, train
from ..core.memory import checkpointed_blocks, count_trainable, make_plan
from ..core.optim import STATE_BYTES
from ..core.placement import Placement
from ..core.recipe import Export, Phase, Recipe
from ..core.rng import Rng
from ..core.state import State
from ..host.attention import TRANSFORMER_OPTIONS
from ..host.device import compute_dtype, free_memory, release
from ..host.private import Private
from .checkpoint import save_state
from .export import export_files
from .previews import Sampling
from .shown import Shown

PLANNED_SAMPLES = 3  # micro-batches that are measured, because a method may skip a loss in some steps
WARM_UP_STEPS = 3  # the first one is slow, so the plan's times come from the others


def loaded_as(exports: Iterable[Export], config: TrainConfig, device: torch.device) -> Placement:
    """The placement with which a model is loaded, before a plan. Weights of whole-model exports stay exact."""
    whole = any(export.kind != "lora" for export in exports)
    return Placement(stored=None if whole else compute_dtype(config.precision, device))


class Training:
    """The loop's callbacks for one run, from the loaded models to the end of `go`.

    models: private copies on `device`, kept as `placement` says, by the recipe's name of each.
    """

    def __init__(
        self,
        run: Shown,
        models: dict[str, Private],
        device: torch.device,
        placement: Placement,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.run, self.device, self.should_stop = run, device, should_stop
        self._emit = emit
        self._warm_up: list[float] = []
        self.dtype = compute_dtype(run.config.precision, device)
        method = run.recipe_class
        self.latent_format = next(iter(models.values())).model.latent_format
        self.backbone = method.backbone_class(models, device, self.dtype, TRANSFORMER_OPTIONS)
        self.backbone.placement = placement
        checkpointed_blocks(self.backbone)
        self.recipe: Recipe = method(self.backbone, run.config)

    def go(self, state: State) -> bool:
        """Train from `state` on. False if stopped before the end."""
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        session = Session(self.emit, self.should_stop, self.save, partial(self.plan, state), self.spare, release)
        if previews := self.run.spec.previews:
            shown = self.latent_format, self.run.samples_folder, self.emit, self.should_stop
            sampling = Sampling(previews, self.recipe, self.backbone, *shown)
            session = replace(session, sample=sampling, sample_every=previews.sample_every)
        return train(self.recipe, self.run.phases, self.data, self.run.config, state, session, scaler)

    def emit(self, event: Event) -> None:
        self._emit(event)
        if isinstance(event, Step):
            self._time(event)

    def data(self, phase: Phase) -> PhaseData:
        c, columns = self.run.config, self.recipe.columns
        return PhaseData(self.run.spec.data, phase.unit, columns, c.batch_size, c.seed, self.backbone.prepare)

    def plan(self, state: State, phase: Phase, batches: PhaseData) -> None:
        """Choose the placement for `phase` and publish the plan. The optimizer's state is already in memory."""
        c = self.run.config
        draws = [Rng(c.seed, f"{phase.name}/plan", sample) for sample in range(PLANNED_SAMPLES)]

        def losses() -> Iterator:
            return chain.from_iterable(self.recipe.losses(batches.largest(), rng) for rng in draws)

        trainable, free = count_trainable(self.backbone.module), free_memory(self.device)
        states = trainable * (4 + (0 if state.step else STATE_BYTES[c.optimizer]))  # fp32 gradients and moments
        self.backbone.placement, made = make_plan(self.backbone, c.checkpointing, losses, states, free)
        self._warm_up = []
        self._show(replace(made, note=self.run.note))

    def save(self, phase: Phase, state: State, why: str) -> None:
        run = self.run
        if why not in ("best", "diverged"):
            save_state(run.state_path, state, run.spec.run_key)
            run.checkpoint = run.done
            run.write()
        if why == "checkpoint":
            return
        for saved in export_files(self.recipe, phase, run, best=why == "best"):
            run.write()
            logging.info("Kinoloom: %s: saved %s", run.spec.run_name, saved.path)
            if to_json(saved) not in run.history:  # a resumed run may write the same file again
                self.emit(saved)

    def spare(self, step: int) -> bool:
        """Turn on checkpointing after a step ran out of memory. Returns whether the step needs less memory now."""
        placement, blocks = self.backbone.placement, len(self.backbone.blocks)
        if placement.recomputed == blocks:
            return False
        self.backbone.placement = replace(placement, recomputed=blocks)
        reason = f"step {step} ran out of memory without it"
        if plan := self.run.plan:
            self._show(replace(plan, checkpointing=True, reason=reason))
        return True

    def _time(self, event: Step) -> None:
        """After the warm-up steps publish the plan again, with the seconds per step."""
        self._warm_up.append(event.seconds)
        if len(self._warm_up) == WARM_UP_STEPS and (plan := self.run.plan):
            seconds = sum(self._warm_up[1:]) / (WARM_UP_STEPS - 1)
            self._show(replace(plan, seconds_per_step=seconds, seconds_total=seconds * event.steps))

    def _show(self, plan: Plan) -> None:
        self.run.plan = plan
        logging.info("Kinoloom: %s: %s", self.run.spec.run_name, plan)
        self.emit(plan)
