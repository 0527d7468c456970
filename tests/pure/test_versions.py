"""What earlier versions wrote, in the words of this one."""

from copy import deepcopy

import pytest
from kinoloom.trainers.run.versions import VERSION, current

SHAPE = [4, 8, 32, 48]
SHOWN = {"cfg": 7.5, "sample_every": 50}
SAMPLES = {"names": ["a cat", "a dog"], "stems": ["c1", "d2"], "column": "prompt_embeds", "negative": "n3", "shape": SHAPE}
SOURCE = {"path": "sd.safetensors", "identity": "5e7", "parts": {"kinoloom.motion": "mm.safetensors"}}
RECORD = {
    "status": "stopped",
    "spec": {
        "data": {"folder": "f", "rows": [{"name": "walk", "split": "clips"}, {"name": "pose", "split": "frames"}]},
        "source": SOURCE,
        "identity": {"recipe": "r"},
        "samples": {**SAMPLES, **SHOWN},
    },
}


def preview(name: str, stem: str) -> dict:
    columns = {"prompt_embeds": stem}
    return {"name": name, "unit": "clips", "role": "preview", "shape": SHAPE, "columns": columns}


def test_a_record_of_version_1_has_its_new_words() -> None:
    rows = [preview("a cat", "c1"), preview("a dog", "d2")]
    made = current("record", deepcopy(RECORD))
    assert made == {
        "status": "stopped",
        "spec": {
            "data": {"folder": "f", "rows": [{"name": "walk", "unit": "clips"}, {"name": "pose", "unit": "frames"}]},
            "sources": {"model": {"path": "sd.safetensors", "key": "5e7", "carried": SOURCE["parts"]}},
            "run_key": {"recipe": "r"},
            "previews": {**SHOWN, "rows": rows, "negative": preview("negative", "n3")},
        },
    }
    assert current("record", deepcopy(made), VERSION) == made


def test_samples_of_version_1_may_have_no_negative_and_a_run_no_samples() -> None:
    without = {"spec": {"samples": {**SAMPLES, "negative": ""}}}
    assert current("record", without)["spec"]["previews"]["negative"] is None
    assert current("record", {"spec": {"samples": None}}) == {"spec": {"previews": None}}


@pytest.mark.parametrize("version", [0, VERSION + 1, True, "2", None])
def test_a_version_that_is_not_known_is_refused(version: object) -> None:
    with pytest.raises(ValueError, match=f"version={version}: expected 1 to {VERSION}"):
        current("record", deepcopy(RECORD), version)
