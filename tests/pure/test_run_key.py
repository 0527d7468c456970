"""What must not change when a run goes on, and what may."""

import pytest
from kinoloom.trainers.run.checkpoint import RunKey

SAME = {
    *("seed", "optimizer", "save_precision", "rank", "alpha", "target_layers", "layers", "soft_boxes", "train"),
    *("spatial_layers", "temporal_layers", "spatial_loras", "identity_file", "control_file", "domain_adapter"),
    *("start_from", "start_from_motion", "word_to_learn", "initializer_token", "word_prompt"),
}


def key(**config: int) -> RunKey:
    return RunKey("method", "model", "data", config, {})


@pytest.mark.parametrize("option", sorted(SAME | {"learning_rate", "steps", "batch_size", "lr_schedule"}))
def test_options_that_the_weights_are_made_of_stay(option: str) -> None:
    earlier, now = key(**{option: 1}), key(**{option: 2})
    said = [f"{option} (was 1, now 2)"]
    assert (now.changes(earlier), now.adjusted(earlier)) == ((said, []) if option in SAME else ([], said))
    assert key().changes(earlier) == [f"{option} (was 1, now None)"] * (option in SAME)
    assert now.changes(key()) == [], "the earlier version did not have it"
