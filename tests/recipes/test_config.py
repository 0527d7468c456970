"""Options: refused values, and the effect of each option of every method."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import execution
import pytest
import torch
from kinoloom.lora_io.file import load
from kinoloom.nodes.training import registry as jobs
from kinoloom.trainers import recipes
from kinoloom.trainers.core.config import make
from kinoloom.trainers.core.data import TrainingData
from kinoloom.trainers.run.checkpoint import RunKey, load_state
from kinoloom.trainers.run.job import Job

from ..runs import NO_DATA, RUNS, Published, events, finish, make_config, make_job, slow_but_of_wan, state_of

SNS, WAN_LORA, DIRECTOR = "KinoloomTrainSetAndSequence", "KinoloomTrainWanLora", "KinoloomTrainMotionDirector"
SVD_LORA, FINETUNE = "KinoloomTrainSvdLora", "KinoloomTrainSvdFinetune"
TRACKLETS, CA_LORA = "KinoloomTrainSvdTracklets", "KinoloomTrainCaLora"


def every_option() -> list[Any]:
    """Each with one of the methods that have it from the class that declares it."""
    declared = {id(option): (name, option) for name in sorted(recipes()) for option in fields(recipes()[name].Config)}
    return [
        pytest.param(name, option, id=f"{name.removeprefix('KinoloomTrain')}-{option.name}")
        for name, option in declared.values()
    ]


def rejected(name: str, option: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError) as raised:
        make_config(name, **{option: value})
    message = str(raised.value)
    assert message.startswith(f"{option}={value!r}") or message.startswith(f"{option}={value}"), message
    assert "expected" in message and expected in message, message


# -- checks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "option"), every_option())
def test_a_bad_value_is_refused_with_field_value_and_expectation(name: str, option: Field) -> None:
    kind, extra = type(option.default), option.metadata
    wrong = {int: ["1", 1.5, None, True], float: ["1", None, True], str: [1, None], bool: [1, "true", None]}
    for value in wrong[kind]:
        rejected(name, option.name, value, kind.__name__)
    if extra["choices"]:
        rejected(name, option.name, "nothing of the kind", extra["choices"][-1])
    if kind in (int, float):
        low, high = extra["min"], extra["max"]
        for value in (low - 1, high + 1, *([math.nan, math.inf, -math.inf] if kind is float else [])):
            rejected(name, option.name, kind(value), f"{low}..{high}")


@pytest.mark.parametrize(("name", "option"), every_option())
def test_a_default_fits_its_own_limits_and_says_when_to_change_it(name: str, option: Field) -> None:
    extra = option.metadata
    assert option.default is not MISSING and len(extra["tooltip"]) > 15
    if extra["choices"]:
        assert option.default in extra["choices"]
    if type(option.default) in (int, float):
        assert extra["min"] <= option.default <= extra["max"]
    assert make(recipes()[name].Config, {}) is not None


def test_limits_belong_to_the_range_and_whole_numbers_are_floats() -> None:
    config = make_config(WAN_LORA, rank=256, learning_rate=0, alpha=1024)
    assert (config.rank, config.learning_rate, config.alpha) == (256, 0, 1024)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_an_unknown_option_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="unknown option 'learning_rat': expected one of .*learning_rate"):
        make(recipes()[name].Config, {"learning_rat": 1.0})
    with pytest.raises(AttributeError):  # frozen
        make(recipes()[name].Config, {}).rank = 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"self_conditioning_prob": 0.9}, r"self_conditioning_prob=0.9: expected 0"),
        ({"set_steps": 0}, r"set_steps=0: expected above 0, or an identity_file"),
        ({"identity_file": "x.safetensors"}, r"identity_file='x.safetensors': expected none when set_steps=3"),
        ({"set_steps": 0, "sequence_steps": 0, "identity_file": "x"}, r"sequence_steps=0: expected above 0"),
    ],
)
def test_set_and_sequence_refuses_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(SNS, **options)


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({}, ["set", "sequence"]),
        ({"sequence_steps": 0}, ["set"]),
        ({"set_steps": 0, "identity_file": "x.safetensors"}, ["sequence"]),
    ],
)
def test_set_and_sequence_runs_the_stages_that_have_steps(options: dict[str, Any], phases: list[str]) -> None:
    assert [phase.name for phase in recipes()[SNS].phases(make_config(SNS, **options), NO_DATA)] == phases


# -- every option does something -------------------------------------------------------------------------------------------

BASE = {
    WAN_LORA: {"steps": 3},
    SNS: {"set_steps": 2, "sequence_steps": 2, "gradient_accumulation": 1},
    DIRECTOR: {"steps": 2},
    CA_LORA: {"steps": 2},
    SVD_LORA: {"steps": 3},
    FINETUNE: {"steps": 3},
    TRACKLETS: {"self_tracking_steps": 2, "clean_steps": 2},
}
STEPS, WEIGHTS, FILES, CONTENT, DTYPE, METADATA, PLAN, VALIDATIONS, SAVED = (
    "steps", "weights", "files", "content", "dtype", "metadata", "plan", "validations", "saved",
)  # fmt: skip
# option -> (another value, what it changes); None: another test shows its effect
SHARED: dict[str, tuple[Any, str]] = {
    "rank": (2, WEIGHTS),
    "learning_rate": (2e-3, WEIGHTS),
    "alpha": (1.0, WEIGHTS),
    "batch_size": (2, WEIGHTS),
    "gradient_accumulation": (3, WEIGHTS),
    "optimizer": ("Lion", WEIGHTS),
    "beta2": (0.6, WEIGHTS),
    "weight_decay": (5.0, WEIGHTS),
    "lr_schedule": ("linear", WEIGHTS),
    "warmup_steps": (2, WEIGHTS),
    "max_grad_norm": (1e-6, WEIGHTS),
    "lora_plus_ratio": (3.0, WEIGHTS),
    "stratified_timesteps": (False, WEIGHTS),
    "precision": ("bf16", WEIGHTS),
    "prior_weight": (0.25, WEIGHTS),
    "ema_decay": (0.9, CONTENT),
    "checkpointing": ("on", PLAN),
    "validate_every": (1, VALIDATIONS),
    "save_every": (1, SAVED),
    "save_minutes": (1e-9, SAVED),
    "save_precision": ("fp32", DTYPE),
    "trigger_words": ("zyx", METADATA),
}
SVD = {"noise_mean": (2.0, WEIGHTS), "noise_std": (0.8, WEIGHTS), "conditioning_dropout": (0.3, WEIGHTS)}
OWN: dict[str, dict[str, tuple[Any, str]]] = {
    WAN_LORA: {
        "steps": (2, STEPS),
        "target_layers": ("attention", FILES),
        "timestep_sampling": ("uniform", WEIGHTS),
        "shift": (5.0, WEIGHTS),
    },
    SNS: {
        "set_steps": (3, STEPS),
        "sequence_steps": (3, STEPS),
        "set_dropout": (0.3, WEIGHTS),
        "sequence_dropout": (0.3, WEIGHTS),
        "token_mask_prob": (0.0, WEIGHTS),
        "set_shift": (5.0, WEIGHTS),
        "sequence_shift": (5.0, WEIGHTS),
    },
    DIRECTOR: {
        "train": ("spatial", FILES),
        "steps": (1, STEPS),
        "spatial_learning_rate": (1e-3, WEIGHTS),
        "spatial_loras": (2, WEIGHTS),
        "spatial_layers": ("self-attention and feed-forward", WEIGHTS),
        "temporal_layers": ("attention", FILES),
        "spatial_off_prob": (1.0, WEIGHTS),
        "debias_weight": (0.0, WEIGHTS),
        "dropout": (0.0, WEIGHTS),
    },
    CA_LORA: {
        "steps": (1, STEPS),
        "train_image": (False, FILES),
        "train_temporal": (False, FILES),
        "train_cross": (False, FILES),
        "image_query": (True, FILES),
        "cross_query": (True, FILES),
        "cross_out": (False, FILES),
        "motion_embed": (True, FILES),
        "frames": (2, WEIGHTS),
        "positions": ("rope_3d", WEIGHTS),
        "query_stride": (2, WEIGHTS),
        "pooled_norms": (False, WEIGHTS),
        "oa_bin": (1, WEIGHTS),
    },
    SVD_LORA: {
        "steps": (2, STEPS),
        "target_layers": ("temporal", FILES),
        **SVD,
    },
    FINETUNE: {
        "steps": (2, STEPS),
        "layers": ("temporal", WEIGHTS),
        **SVD,
    },
    TRACKLETS: {
        "self_tracking_steps": (1, STEPS),
        "clean_steps": (1, STEPS),
        "clean_learning_rate": (1e-4, WEIGHTS),
        "soft_boxes": (0.8, WEIGHTS),
        "box_weight": (3.0, WEIGHTS),
        **SVD,
        "lr_schedule": ("constant", WEIGHTS),
    },
}
ELSEWHERE = {
    "oa_bases": "test_ca_lora_facts: a folder of bases takes the place of those of the pack",
    "domain_adapter": "test_motion_director: it is merged before training",
    "preset": "test_motion_director: it sets rank, rates and decay, and refuses other ones",
    "control_file": "test_svd_tracklets: a run goes on from it",
    "identity_file": "test_set_and_sequence: an identity file continues to the same bits",
    "seed": "test_jobs_core: another one is another run",
    "start_from": "test_start_from: a run begins with its factors",
    "start_from_motion": "test_start_from: the same for the motion",
    "keep_state": "test_continuing: it says which state is kept",
    "wan_version": "test_wan_kinds: it says what a file's name does not",
    "self_conditioning_prob": "above: only 0 is accepted",
    "stride_min": "test_cut_clips: the cuts of a step",
    "stride_max": "test_cut_clips: the same",
    "word_to_learn": "test_word_in_adapters: the text encoder learns it",
    "initializer_token": "test_learned_word: the row that it starts from",
    "word_prompt": "test_word_in_adapters: clips and samples have it",
    "pause_when_busy": "read where the queue is known: see the test below",
}


@pytest.mark.parametrize("name", sorted(recipes()))
def test_no_option_is_missing_from_the_table(name: str) -> None:
    options = {option.name for option in fields(recipes()[name].Config)}
    tabled = {*SHARED, *OWN[name], *ELSEWHERE}
    assert options <= tabled, "add the new option and what it changes"
    assert set(OWN[name]) <= options and sorted(BASE) == sorted(RUNS)


def test_what_changes_the_result_is_noticed_when_a_run_is_resumed() -> None:
    for name in RUNS:
        start = RunKey.of(name, "m", "d", make_config(name, **BASE[name]), {})
        for option, (value, changes) in {**SHARED, **OWN[name]}.items():
            if option in recipes()[name].Config.__dataclass_fields__:
                other = RunKey.of(name, "m", "d", make_config(name, **{**BASE[name], option: value}), {})
                found = other.changes(start) + other.adjusted(start)
                free = changes in (PLAN, SAVED, METADATA, VALIDATIONS)
                assert bool(found) != free, (name, option)
                assert free or found[0].startswith(f"{option} (was ")


@pytest.fixture(scope="module")
def base(inputs: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a method's run at the options of BASE shows, made once."""
    return cache(lambda name: observed(tmp_path_factory.mktemp(name), *inputs(name), name))


def observed(folder: Path, model: Any, data: TrainingData, name: str, **options: Any) -> dict[str, Any]:
    """All that a run shows."""
    saved: list[bool] = []

    def look(job: Job) -> None:
        saved.append(job.state_path.is_file() and load_state(job.state_path)[0].step == 1)

    config = make_config(name, **{"validate_every": 0, "save_every": 2, **BASE[name], **options})
    job = finish(make_job(folder, model, data, config, name, Published().at(2, look)), model)
    tensors, metadata = load(Path(job.result_files[-1]))
    return {
        WEIGHTS: state_of(job).recipe,
        FILES: sorted(tensors),
        CONTENT: float(sum(tensor.double().square().sum() for tensor in tensors.values())),
        DTYPE: {tensor.dtype for tensor in tensors.values()},
        METADATA: {k: v for k, v in metadata.items() if k != "kinoloom.config"},
        PLAN: [event["checkpointing"] for event in events(job, "plan")],
        STEPS: [event["step"] for event in events(job, "step")],
        VALIDATIONS: len(events(job, "validation")),
        SAVED: saved,
    }


def same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def is_read_by(name: str, option: str) -> bool:
    """Whether a method or its backbone reads a shared option; the others, which only the core reads, show on one method."""
    if option == "precision":
        return name in (DIRECTOR, FINETUNE)  # one method of each further backbone
    classes = {*recipes()[name].__mro__, *recipes()[name].Config.__mro__} - {object}
    own = {inspect.getmodule(cls) for cls in classes if ".core." not in cls.__module__}
    return any(re.search(rf"\b{option}\b", inspect.getsource(module)) for module in own)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        pytest.param(name, option, id=f"{name.removeprefix('KinoloomTrain')}-{option}", marks=slow_but_of_wan(name))
        for name in sorted(recipes())
        for option in {**SHARED, **OWN[name]}
        if option in recipes()[name].Config.__dataclass_fields__
        if option in OWN[name] or name == WAN_LORA or is_read_by(name, option)
    ],
)
def test_an_option_changes_what_it_says(
    name: str, option: str, base: Callable[[str], dict[str, Any]], model: Any, data: TrainingData, tmp_path: Path
) -> None:
    value, changes = {**SHARED, **OWN[name]}[option]
    before, after = base(name), observed(tmp_path, model, data, name, **{option: value})
    if changes == WEIGHTS:
        assert not same_weights(after[WEIGHTS], before[WEIGHTS])
    else:
        assert after[changes] != before[changes]
    if changes in (PLAN, SAVED, METADATA, VALIDATIONS):
        assert same_weights(after[WEIGHTS], before[WEIGHTS]), "it only changes how the run is watched"


@pytest.mark.parametrize(("option", "stage"), [("set_dropout", "set"), ("sequence_dropout", "sequence"),
                                               ("set_shift", "set"), ("sequence_shift", "sequence")])  # fmt: skip
def test_an_option_of_one_stage_leaves_the_other_alone(
    option: str,
    stage: str,
    base: Callable[[str], dict[str, Any]],
    model: Any,
    data: TrainingData,
    tmp_path: Path,
) -> None:
    """Stage 1 is the identity group. An option of stage 2 does not change it."""
    after = observed(tmp_path, model, data, SNS, **{option: OWN[SNS][option][0]})[WEIGHTS]
    same = all(
        torch.equal(after[key], weight) for key, weight in base(SNS)[WEIGHTS].items() if key.startswith("identity")
    )
    assert same == (stage == "sequence")


def test_a_polite_run_waits_while_the_queue_has_work_that_does_not_wait_for_a_run(
    model: Any, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = execution.PromptQueue(SimpleNamespace(queue_updated=lambda: None))
    monkeypatch.setattr(jobs.PromptServer, "instance", SimpleNamespace(prompt_queue=queue), raising=False)
    registry = jobs.Registry(tmp_path / "jobs")
    polite, pushy = (
        make_job(tmp_path / str(waits), model, data, make_config(WAN_LORA, pause_when_busy=waits), WAN_LORA)
        for waits in (True, False)
    )
    assert not registry.busy(polite)
    queue.put((0, "id", {}, {}, []))
    assert registry.busy(polite) and not registry.busy(pushy)
    with registry.waiting():
        assert not registry.busy(polite)
    assert registry.busy(polite)
