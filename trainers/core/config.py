"""Options: one frozen dataclass per recipe is the widget, the default, the check and the saved metadata."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

LARGEST_RATE = 10.0
SMALLEST_OF_PRODIGY = 0.01  # rates that make sense for it are around 1


def knob(
    default: Any,
    tooltip: str,
    *,
    min: float | None = None,
    max: float | None = None,
    step: float | None = None,
    choices: tuple[str, ...] = (),
    advanced: bool = False,
    file_of: str = "",
    added: int = 0,
) -> Any:
    """A dataclass field that is also a widget; the tooltip says when to change it.

    `file_of` marks a path, which the node offers as a choice of the files in the model folders of that name.
    `added` numbers the batch of options that a knob came with. Later ones are the last widgets of a node, because
    ComfyUI saves the values of a node's widgets by their position.
    """
    extra = {
        "tooltip": tooltip,
        "min": min,
        "max": max,
        "step": step,
        "choices": choices,
        "advanced": advanced,
        "file_of": file_of,
        "added": added,
    }
    return field(default=default, metadata=extra)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every recipe can be told. ValueError names the field, the value and what was expected."""

    learning_rate: float = knob(
        1e-4,
        "Lower it if the loss jumps or the result is over-cooked; raise it if nothing is learned. Prodigy wants 1.0.",
        min=0.0,
        max=LARGEST_RATE,
        step=1e-6,
    )
    seed: int = knob(
        0,
        "Start value of every random draw of the run. Change it for another try at the same settings.",
        min=0,
        max=2**53,
    )
    batch_size: int = knob(
        1,
        "Clips per forward pass. Raise it for photos or short clips when memory is left.",
        min=1,
        max=64,
        advanced=True,
    )
    gradient_accumulation: int = knob(
        1, "Batches per step, for a larger effective batch without more memory.", min=1, max=256, advanced=True
    )
    optimizer: str = knob(
        "AdamW",
        "AdamW suits most runs. AdamW8bit saves memory (needs bitsandbytes). Prodigy finds its "
        "own rate, and multiplies it by learning_rate: a value below 0.01 counts as 1.",
        choices=("AdamW", "AdamW8bit", "Lion", "Prodigy", "Adafactor"),
        advanced=True,
    )
    beta2: float = knob(
        0.999,
        "Memory of the optimizer's second moment. Lower it to 0.99 for very short runs. "
        "Adafactor has none and ignores it.",
        min=0.5,
        max=0.99999,
        step=1e-3,
        advanced=True,
    )
    weight_decay: float = knob(
        0.01,
        "Pull of the trained weights towards zero. Raise it against over-fitting.",
        min=0.0,
        max=10.0,
        step=1e-3,
        advanced=True,
    )
    lr_schedule: str = knob(
        "constant",
        "How the learning rate develops after the warm-up. Cosine or linear end at zero.",
        choices=("constant", "linear", "cosine"),
        advanced=True,
    )
    warmup_steps: int = knob(
        0,
        "Steps over which the learning rate rises from zero. Use 10 to 100 if the start is rough.",
        min=0,
        max=100_000,
        advanced=True,
    )
    max_grad_norm: float = knob(
        1.0,
        "Gradients longer than this are shortened to it. 0 turns clipping off.",
        min=0.0,
        max=1000.0,
        step=0.01,
        advanced=True,
    )
    stratified_timesteps: bool = knob(
        True, "Spread the noise levels evenly over consecutive samples: a calmer loss curve at no cost.", advanced=True
    )
    precision: str = knob(
        "auto",
        "Arithmetic of the frozen model. Auto is bf16 where the device has it, else fp16 on a GPU "
        "and fp32 on a CPU. What is trained is always fp32.",
        choices=("auto", "bf16", "fp16", "fp32"),
        advanced=True,
    )
    checkpointing: str = knob(
        "auto",
        "Recompute activations to save memory, about a third more time. Auto turns it on only "
        "when the run would not fit.",
        choices=("auto", "on", "off"),
        advanced=True,
    )
    prior_weight: float = knob(
        1.0,
        "Weight of the prior clips' loss, where the data has any. Raise it if other subjects start to look alike.",
        min=0.0,
        max=100.0,
        step=0.05,
        advanced=True,
    )
    validate_every: int = knob(
        100,
        "Steps between measurements of the loss on fixed noise, which pick the best checkpoint. 0 turns them off.",
        min=0,
        max=100_000,
        advanced=True,
    )
    save_every: int = knob(
        100, "Steps between checkpoints: what a crash can lose at most.", min=1, max=100_000, advanced=True
    )
    save_precision: str = knob("fp16", "Number format of the saved file.", choices=("fp16", "fp32"), advanced=True)
    trigger_words: str = knob(
        "", "Words that call the concept, written into the file for other tools to show, such as [v].", advanced=True
    )
    pause_when_busy: bool = knob(
        True,
        "Wait between steps while other prompts are in the queue. Has no effect while a "
        "Training Result node waits for this run.",
        advanced=True,
    )

    ema_decay: float = knob(
        0.0,
        "Above 0 the result is a moving average of the weights, at 0.99 over some hundred steps: calmer, but later. 0 "
        "takes the last weights.",
        min=0.0,
        max=0.99999,
        step=1e-3,
        advanced=True,
    )
    keep_state: str = knob(
        "auto",
        "Whether a finished run keeps its state, from which more steps can go on. Auto keeps up to 1 GB, so that of a "
        "LoRA. The training tab frees it at any time.",
        choices=("auto", "always", "never"),
        advanced=True,
        added=1,
    )

    save_minutes: float = knob(
        10.0,
        "Minutes after which a checkpoint is made at the latest, for runs of slow steps. 0 counts steps alone.",
        min=0.0,
        max=1440.0,
        step=0.5,
        advanced=True,
        added=1,
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            check(option, getattr(self, option.name))
        if self.optimizer == "Prodigy":
            self._set_rates_of_prodigy()

    def _set_rates_of_prodigy(self) -> None:
        """Rates for other optimizers, at which Prodigy learns nothing, become 1; others keep their ratio to it."""
        names = (option.name for option in fields(self) if option.name.endswith("learning_rate"))
        small = {name: getattr(self, name) for name in names if 0 < getattr(self, name) < SMALLEST_OF_PRODIGY}
        for name, rate in small.items():
            shared = min(round(rate / small.get("learning_rate", rate), 6), LARGEST_RATE)
            object.__setattr__(self, name, shared)

    def check_data(self, data: Any) -> None:
        """ValueError if training data does not suit these options."""

    def check_model(self, model: Any) -> None:
        """ValueError if a file among these options does not suit a MODEL."""


def changed(config: type[TrainConfig], name: str, default: Any, tooltip: str = "") -> Any:
    """That Config's knob with another default, and another tooltip if one is given."""
    extra = config.__dataclass_fields__[name].metadata
    return field(default=default, metadata={**extra, "tooltip": tooltip or extra["tooltip"]})


@dataclass(frozen=True, kw_only=True)
class LoraConfig(TrainConfig):
    """What every recipe that trains LoRAs can be told besides."""

    rank: int = knob(
        16, "Size of the LoRA. Raise it if detail is missing, lower it if the clip is memorised.", min=1, max=256
    )
    alpha: float = knob(
        0.0,
        "LoRA scale is alpha / rank. 0 means alpha = rank, a scale of 1, which suits most runs.",
        min=0.0,
        max=1024.0,
        step=0.5,
        advanced=True,
    )
    lora_plus_ratio: float = knob(
        1.0,
        "Learning rate of the up factor relative to the down factor (LoRA+). Try 4 to learn in fewer steps.",
        min=0.1,
        max=64.0,
        step=0.1,
        advanced=True,
    )
    start_from: str = knob(
        "",
        "A LoRA to begin from instead of from nothing: of the same base model, rank and layers.",
        file_of="loras",
        advanced=True,
        added=1,
    )


@contextmanager
def naming(option: str, file: str) -> Iterator[None]:
    """A ValueError within names the option and its file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}={Path(file).name!r}: {error}") from error


def check(option: Field, value: Any) -> None:
    """Raise ValueError if `value` does not fit the knob: type, finite, range, choices."""
    name, extra = option.name, option.metadata
    kind = type(option.default)
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r}: expected {kind.__name__}")
    if extra["choices"] and value not in extra["choices"]:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(extra['choices'])}")
    low, high = extra["min"], extra["max"]
    if low is not None and not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name}={value}: expected {low}..{high}")


# What only says when to look at the run or how to share the machine: the weights are the same at any value.
NOT_TRAJECTORY = (
    *("save_every", "save_minutes", "keep_state", "pause_when_busy", "checkpointing", "validate_every"),
    "trigger_words",
    "wan_version",
)
# What the trained weights are and begin from: another value makes another run. All others may change on the way.
FIXED = (
    *("seed", "optimizer", "save_precision", "rank", "alpha", "target_layers", "layers", "soft_boxes"),
    *("train", "spatial_layers", "temporal_layers", "spatial_loras"),
    *("identity_file", "control_file", "domain_adapter", "start_from", "start_from_motion"),
)


def make(config_class: type[TrainConfig], values: dict[str, Any]) -> TrainConfig:
    """A config from widget values or saved JSON; ValueError names an unknown option."""
    known = {option.name for option in fields(config_class)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown option {name!r}: expected one of {', '.join(sorted(known))}")
    return config_class(**values)
