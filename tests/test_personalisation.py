"""Training learns a concept: one toy concept, few steps, margins that a trainer with a broken part misses."""

from pathlib import Path

import pytest
from toyworld import personalise, score, studio, world

CONCEPT, SEEDS = "star", (11, 12)
OPTIONS = {"rank": 32, "learning_rate": 3e-3, "batch_size": 4, "gradient_accumulation": 1, "validate_every": 0}


@pytest.fixture(scope="module")
def base() -> studio.Studio:
    return studio.Studio()


def test_set_and_sequence_learns_look_and_motion_and_keeps_the_rest(base: studio.Studio, tmp_path: Path) -> None:
    scene = world.CONCEPTS[CONCEPT]
    data = personalise.training_data(base, CONCEPT)
    options = {**OPTIONS, "set_steps": 120, "sequence_steps": 160, "set_dropout": 0.5}
    file = personalise.train(base, data, personalise.TWO_STAGES, options, tmp_path)
    before, after = (score.generate(base, model, scene, SEEDS) for model in (base.model, base.with_loras(file)))
    without, learned = score.score(scene, before, before), score.score(scene, after, before)
    assert learned.identity > without.identity + 0.25, (without, learned)
    assert learned.motion > without.motion + 0.3, (without, learned)
    assert learned.background >= 0.5 and learned.leak < 20, (without, learned)
