"""Optimizers: groups with rates of their own, and the rate of Prodigy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kinoloom.trainers import recipes
from kinoloom.trainers.core.config import TrainConfig
from kinoloom.trainers.core.data import TrainingData
from kinoloom.trainers.core.optim import effective_rate, make_optimizer, make_schedule
from kinoloom.trainers.run.job import Job
from torch import Tensor, nn

from ..runs import assert_same, events, finish, make_config, make_job, random, state_of

WAN_LORA, DIRECTOR, TRACKLETS = "KinoloomTrainWanLora", "KinoloomTrainMotionDirector", "KinoloomTrainSvdTracklets"
START = 1e-3 * random(3, 5, name="parameter")
OPTIMIZERS = TrainConfig.__dataclass_fields__["optimizer"].metadata["choices"]


def stepped(optimizer: str, rates: list[float], steps: int = 1, **options: Any) -> tuple[list[Tensor], Any]:
    """The distance that one parameter of each group moved, and the optimizer."""
    parameters = [nn.Parameter(START.clone()) for _ in rates]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    config = make_config(WAN_LORA, optimizer=optimizer, learning_rate=1.0, **options)
    made = make_optimizer(groups, config)
    schedule = make_schedule(made, config, steps)
    before = [p.detach().clone() for p in parameters]
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = random(3, 5, name="gradient")
        made.step()
        made.zero_grad(set_to_none=True)
        schedule.step()
    return [p.detach() - start for p, start in zip(parameters, before, strict=True)], made


@pytest.mark.parametrize("rates", [[0.0, 1.0], [1.0, 0.0], [0.5, 0.0, 1.0]])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_group_at_rate_zero_does_not_move_and_others_do(optimizer: str, rates: list[float]) -> None:
    moved, _ = stepped(optimizer, rates, steps=6, weight_decay=0.3)
    assert [bool(change.any()) for change in moved] == [rate > 0 for rate in rates]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_group_with_three_times_the_rate_goes_three_times_as_far(optimizer: str) -> None:
    (slow, fast), _ = stepped(optimizer, [0.5, 1.5], weight_decay=0.5)
    torch.testing.assert_close(fast, 3 * slow, rtol=0, atol=0.02 * float(fast.abs().max()))


def test_a_frozen_group_is_no_part_of_what_prodigy_estimates() -> None:
    """Nor does it matter which group comes first."""
    (alone,), one = stepped("Prodigy", [0.7], steps=8, warmup_steps=3)
    (still, moved), two = stepped("Prodigy", [0.0, 0.7], steps=8, warmup_steps=3)
    assert not still.any() and torch.equal(moved, alone)
    assert one.param_groups[0]["d"] == two.param_groups[0]["d"] > 1e-6
    assert effective_rate(two) == effective_rate(one) == pytest.approx(0.7 * one.param_groups[0]["d"])


def test_prodigy_with_one_rate_is_that_of_the_library() -> None:
    import pytorch_optimizer

    (ours, _), made = stepped("Prodigy", [1.0, 1.0], steps=9, lr_schedule="cosine", warmup_steps=2)
    parameters = [nn.Parameter(START.clone()) for _ in range(2)]
    theirs = pytorch_optimizer.Prodigy([{"params": [p]} for p in parameters], 1.0, (0.9, 0.999), weight_decay=0.01)
    config = make_config(WAN_LORA, lr_schedule="cosine", warmup_steps=2)
    schedule = make_schedule(theirs, config, 9)
    for _ in range(9):
        for parameter in parameters:
            parameter.grad = random(3, 5, name="gradient")
        theirs.step()
        schedule.step()
    assert torch.equal(ours, parameters[0].detach() - START)
    assert_same(made.state_dict()["param_groups"], theirs.state_dict()["param_groups"])


def far(job: Job) -> float:
    """How far the up factors, which begin at zero, are."""
    state = state_of(job).recipe
    return float(torch.cat([v.flatten() for k, v in state.items() if k.endswith("lora_up.weight")]).abs().mean())


def test_lora_plus_works_with_prodigy(model: Any, data: TrainingData, tmp_path: Path) -> None:
    """In the first step d is its start value, so up moves `ratio` times as far."""
    options = {"optimizer": "Prodigy", "learning_rate": 1.0, "steps": 1, "validate_every": 0}
    plain, faster = (
        make_job(tmp_path / str(ratio), model, data, make_config(WAN_LORA, lora_plus_ratio=ratio, **options), WAN_LORA)
        for ratio in (1.0, 5.0)
    )
    assert far(finish(faster, model)) == pytest.approx(5 * far(finish(plain, model)), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("still", ["learning_rate", "spatial_learning_rate"])
@pytest.mark.parametrize("name", [DIRECTOR])
def test_a_method_whose_rate_is_zero_leaves_that_part_as_it_was(
    name: str, still: str, model: Any, data: TrainingData, tmp_path: Path
) -> None:
    rates = {"learning_rate": 1.0, "spatial_learning_rate": 1.0, still: 0.0}
    config = make_config(name, optimizer="Prodigy", weight_decay=0.2, validate_every=0, steps=3, **rates)
    job = finish(make_job(tmp_path, model, data, config, name), model)
    ups = {key: bool(v.any()) for key, v in state_of(job).recipe.items() if key.endswith("lora_up.weight")}
    part = "temporal" if still == "learning_rate" else "spatial"
    assert ups and all(moved == (not key.startswith(part)) for key, moved in ups.items())
    assert all(e["learning_rate"] > 0 for e in events(job, "step")), "the rate of the part that moves"


@pytest.mark.parametrize(
    ("name", "typed", "rates"),
    [
        (WAN_LORA, {}, {"learning_rate": 1.0}),
        (WAN_LORA, {"learning_rate": 0.003}, {"learning_rate": 1.0}),
        (WAN_LORA, {"learning_rate": 0.5}, {"learning_rate": 0.5}),
        (WAN_LORA, {"learning_rate": 0.0}, {"learning_rate": 0.0}),
        (DIRECTOR, {}, {"learning_rate": 1.0, "spatial_learning_rate": 0.2}),
        (DIRECTOR, {"learning_rate": 2.0}, {"learning_rate": 2.0, "spatial_learning_rate": 1.0}),
        (DIRECTOR, {"spatial_learning_rate": 0.0}, {"learning_rate": 1.0, "spatial_learning_rate": 0.0}),
        (DIRECTOR, {"learning_rate": 0.0}, {"learning_rate": 0.0, "spatial_learning_rate": 1.0}),
        (TRACKLETS, {}, {"learning_rate": 1.0, "clean_learning_rate": 0.15}),
        (TRACKLETS, {"learning_rate": 1e-6}, {"learning_rate": 1.0, "clean_learning_rate": 10.0}),
    ],
)
def test_prodigy_takes_rates_of_other_optimizers_as_one(name: str, typed: dict, rates: dict) -> None:
    own = {"preset": "custom"} if name == DIRECTOR else {}
    config = recipes()[name].Config(optimizer="Prodigy", **own, **typed)
    assert {option: getattr(config, option) for option in rates} == rates
    again = recipes()[name].Config(**vars(config))
    assert again == config
    other = recipes()[name].Config(optimizer="Adafactor", **own, **typed)
    defaults = recipes()[name].Config.__dataclass_fields__
    assert all(getattr(other, option) == typed.get(option, defaults[option].default) for option in rates)


def test_prodigy_left_at_the_default_rate_learns_and_shows_its_rate(
    model: Any, data: TrainingData, tmp_path: Path
) -> None:
    config = make_config(WAN_LORA, optimizer="Prodigy", learning_rate=1e-4, steps=12, validate_every=0)
    job = finish(make_job(tmp_path, model, data, config, WAN_LORA), model)
    rates = [e["learning_rate"] for e in events(job, "step")]
    assert rates[0] == pytest.approx(1e-6) and rates == sorted(rates) and rates[-1] > 10 * rates[0]
    assert far(job) > 1e-6
