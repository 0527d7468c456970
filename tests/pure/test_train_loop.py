"""The training loop with a recipe of one number a phase, where every draw and every weight can be worked out by hand."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kinoloom.trainers.conditions.columns import LATENTS
from kinoloom.trainers.core.config import TrainConfig
from kinoloom.trainers.core.data import Batch, PhaseData, TrainingData
from kinoloom.trainers.core.events import Event, Step, Validation
from kinoloom.trainers.core.loop import Session, train
from kinoloom.trainers.core.losses import concept_and_prior
from kinoloom.trainers.core.recipe import Phase
from kinoloom.trainers.core.rng import Rng
from kinoloom.trainers.core.state import State
from torch import Tensor, nn

from ..rows import write_row


class Toy:
    """Loss (w - target)^2 + floor, with a weight for each phase. The floor is the lower limit of the phase's loss."""

    def __init__(self, *phases: Phase, floors: dict[str, float] | None = None) -> None:
        self.order, self.floors = list(phases), floors or {}
        module = nn.ParameterDict({phase.name: nn.Parameter(torch.zeros(1)) for phase in phases})
        self.backbone = SimpleNamespace(module=module, checkpointing=False)
        self.weights = module
        self.drawn: list[Rng] = []

    def phases(self, config: TrainConfig, data: TrainingData) -> list[Phase]:
        return self.order

    def start(self, phase: Phase) -> None:
        self.phase = phase

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        return [{"params": [self.weights[phase.name]], "lr": 0.25}]

    def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
        self.drawn.append(rng)
        yield "loss", (self.weights[self.phase.name] - 1).square().sum() + self.floors.get(self.phase.name, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in state.items():
                self.weights[name].copy_(value)


ONE, TWO = Phase("one", 5, "clips"), Phase("two", 3, "clips")


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    rows = [write_row(tmp_path, f"row {i}", "clips", (16, 1, 2, 2), prompt_embeds=None) for i in range(6)]
    return TrainingData(str(tmp_path), tuple(rows))


Run = Callable[..., tuple[Toy, list[Event], list[tuple[str, dict[str, Tensor], State]]]]


@pytest.fixture
def run(data: TrainingData) -> Run:
    """The events of a whole run, and its saves: the reason, the weights and a copy of the state."""

    def whole(toy: Toy, into: list | None = None, **options: Any) -> Any:
        emitted, saved = [], [] if into is None else into

        def save(phase: Phase, state: State, why: str) -> None:
            saved.append((why, toy.state_dict(), replace(state)))

        session = Session(emitted.append, lambda: False, save, lambda phase, batches: None)
        config = TrainConfig(**{"validate_every": 0, "weight_decay": 0.0, **options})

        def rows(phase: Phase) -> PhaseData:
            return PhaseData(data, "clips", (LATENTS,), config.batch_size, config.seed, dict)

        train(toy, toy.phases(config, data), rows, config, State(), session, torch.amp.GradScaler("cpu", enabled=False))
        return toy, emitted, saved

    return whole


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (2, 2), (3, 2), (1, 3)])
def test_no_two_samples_of_a_phase_share_their_draws(batch: int, accumulation: int, run: Run) -> None:
    toy, *_ = run(Toy(ONE, TWO), batch_size=batch, gradient_accumulation=accumulation)
    for phase in (ONE, TWO):
        firsts = [rng.sample for rng in toy.drawn if rng.phase == phase.name]
        assert firsts == [batch * micro for micro in range(phase.steps * accumulation)]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_has_the_mean_of_its_batches(accumulation: int, run: Run) -> None:
    _, events, _ = run(Toy(ONE), gradient_accumulation=accumulation)
    first = next(event for event in events if isinstance(event, Step))
    assert (first.losses, first.grad_norm) == (pytest.approx({"loss": 1.0}), pytest.approx(2.0)), "of (w - 1)^2 at w = 0"


def test_validation_looks_at_nine_levels_of_four_rows_with_noise_of_their_own(run: Run) -> None:
    toy, *_ = run(Toy(ONE), validate_every=5, seed=3)
    looks = [rng for rng in toy.drawn if rng.evaluating]
    assert len(looks) == 36 and {rng.seed for rng in looks} == {3}
    assert {rng.quantile for rng in looks} == {q / 10 for q in range(1, 10)}
    samples = sorted({rng.sample for rng in looks})
    assert len(samples) == 4 and min(b - a for a, b in zip(samples, samples[1:], strict=False)) >= 64


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 5]), (5, [5]), (7, [5]), (0, [])])
def test_a_phase_is_validated_at_its_last_step_too(every: int, expected: list[int], run: Run) -> None:
    _, events, _ = run(Toy(ONE), validate_every=every)
    assert [event.step for event in events if isinstance(event, Validation)] == expected


def test_validation_and_files_are_of_the_average_and_the_next_phase_keeps_it(run: Run) -> None:
    toy, events, saved = run(Toy(ONE, TWO), ema_decay=0.9, validate_every=1)
    for event, (why, weights, state) in zip(
        [e for e in events if isinstance(e, Validation)][:4], [s for s in saved if s[0] == "best"], strict=False
    ):
        assert why == "best" and event.loss == pytest.approx(float((weights["one"] - 1) ** 2))
        assert event.step == 1 or not torch.equal(weights["one"], state.recipe["one"]), "the average lags behind"
    [average] = [weights["one"] for why, weights, state in saved if why == "phase" and state.phase == 0]
    assert torch.equal(toy.weights["one"].detach(), average)


def test_each_phase_has_a_best_of_its_own(run: Run) -> None:
    """The second phase never gets below the first one's loss."""
    _, events, saved = run(Toy(ONE, TWO, floors={"two": 50.0}), validate_every=1)
    measured = {name: [e for e in events if isinstance(e, Validation) and e.phase == name] for name in ("one", "two")}
    assert min(e.loss for e in measured["two"]) > max(e.loss for e in measured["one"])
    assert all(found[0].best for found in measured.values())
    assert sum(why == "best" for why, *_ in saved) == sum(e.best for found in measured.values() for e in found)


def test_the_first_step_of_a_warm_up_is_made_at_rate_zero(run: Run) -> None:
    """The schedule advances after the step it applies to."""
    toy, events, saved = run(Toy(ONE), warmup_steps=4, save_every=1, optimizer="AdamW")
    weights = [float(weights["one"]) for _, weights, _ in saved]
    rates = [e.learning_rate for e in events if isinstance(e, Step)]
    assert rates == pytest.approx([0.0, 0.0625, 0.125, 0.1875, 0.25])
    assert weights[0] == 0.0 and weights[1] == pytest.approx(0.0625, rel=1e-3), "Adam's first move is the rate itself"


@pytest.mark.parametrize("past", [1, 2])
def test_what_diverges_is_no_checkpoint_but_what_was_learned_is_kept(past: int, run: Run) -> None:
    class Bad(Toy):
        def losses(self, batch: Batch, rng: Rng) -> Iterator[tuple[str, Tensor]]:
            for name, loss in super().losses(batch, rng):
                yield name, loss * (math.nan if rng.sample >= past else 1)

    toy, saved = Bad(ONE), []
    with pytest.raises(ValueError, match=f"loss became nan in step {past + 1} of phase 'one'.*learning_rate"):
        run(toy, into=saved)
    [(why, weights, state)] = saved
    assert (why, state.step) == ("diverged", past) and weights["one"].isfinite() and weights["one"] != 0


def test_the_prior_has_noise_of_its_own() -> None:
    seen: list[tuple[str, Rng]] = []

    def loss(batch: Batch, rng: Rng) -> Tensor:
        seen.append((batch["name"], rng))
        return torch.tensor(2.0)

    batch = {"name": "concept", "prior": {"name": "prior"}}
    found = dict(concept_and_prior(loss, batch, Rng(0, "clips", 4), 0.5))
    assert found == {"concept": 2.0, "prior": 1.0} and [name for name, _ in seen] == ["concept", "prior"]
    x = torch.zeros(1, 3, 4)
    concept, prior = (rng for _, rng in seen)
    assert not torch.equal(concept.noise_like(x), prior.noise_like(x))
    assert not torch.equal(concept.uniform(1), prior.uniform(1))
    assert list(dict(concept_and_prior(loss, batch, Rng(0, "clips", 4), 0.0))) == ["concept"]
