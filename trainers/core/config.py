"""Options: one frozen dataclass per recipe defines widgets, defaults, checks and saved metadata."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

LARGEST_RATE = 10.0
SMALLEST_OF_PRODIGY = 0.01  # lower learning rates are meant for other optimizers; Prodigy's are around 1


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

    `file_of` marks a path: the node offers the files of that model folder as choices.
    `added` is the number of the batch of options in which a knob was added. Later batches are a node's last widgets,
    because ComfyUI saves widget values by their position.
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
    """Options of every recipe. ValueError names the option, its value and the values that are allowed."""

    learning_rate: float = knob(
        1e-4,
        "Lower it if the loss jumps or the result is over-cooked. Raise it if nothing is learned. Use 1.0 for Prodigy.",
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
        1, "Batches summed for one step: a larger effective batch without more memory.", min=1, max=256, advanced=True
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
        "Decay of the optimizer's second moment. Lower it to 0.99 for very short runs. Adafactor ignores it.",
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
        "Upper limit of the gradient norm. 0 turns clipping off.",
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
        "Number format of the frozen model. Auto is bf16 where the device supports it, else fp16 on a GPU "
        "and fp32 on a CPU. Trained weights are always fp32.",
        choices=("auto", "bf16", "fp16", "fp32"),
        advanced=True,
    )
    checkpointing: str = knob(
        "auto",
        "Gradient checkpointing: recompute activations, which saves memory and takes about a third more time. Auto "
        "turns it on only if the run would not fit.",
        choices=("auto", "on", "off"),
        advanced=True,
    )
    prior_weight: float = knob(
        1.0,
        "Weight of the prior clips' loss, if the data has any. Raise it if other subjects start to look alike.",
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
        100, "Steps between checkpoints. A crash loses at most these.", min=1, max=100_000, advanced=True
    )
    save_precision: str = knob("fp16", "Number format of the saved file.", choices=("fp16", "fp32"), advanced=True)
    trigger_words: str = knob(
        "", "Trigger words, such as [v], saved in the file's metadata for other tools to show.", advanced=True
    )
    pause_when_busy: bool = knob(
        True,
        "Wait between steps while other prompts are in the queue. Has no effect while a "
        "Training Result node waits for this run.",
        advanced=True,
    )

    ema_decay: float = knob(
        0.0,
        "Decay of an exponential moving average of the weights, which becomes the result. 0.99 averages some hundred "
        "steps: smoother, but slower to learn. 0 saves the last weights.",
        min=0.0,
        max=0.99999,
        step=1e-3,
        advanced=True,
    )
    keep_state: str = knob(
        "auto",
        "Whether a finished run keeps its state, so that it can go on with more steps. Auto keeps at most 1 GB, enough "
        "for a LoRA. The training tab can delete it at any time.",
        choices=("auto", "always", "never"),
        advanced=True,
        added=1,
    )

    save_minutes: float = knob(
        10.0,
        "Longest time between checkpoints, in minutes, for runs with slow steps. 0 counts only steps.",
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
        """Set a learning rate that is too low for Prodigy to 1, and scale the other rates with it."""
        names = (option.name for option in fields(self) if option.name.endswith("learning_rate"))
        small = {name: getattr(self, name) for name in names if 0 < getattr(self, name) < SMALLEST_OF_PRODIGY}
        for name, rate in small.items():
            shared = min(round(rate / small.get("learning_rate", rate), 6), LARGEST_RATE)
            object.__setattr__(self, name, shared)

    def check_data(self, data: Any) -> None:
        """ValueError if training data does not suit these options."""

    def check_model(self, model: Any) -> None:
        """ValueError if a file among these options does not suit a MODEL."""

    def check_text_encoder(self, encoder: Any) -> None:
        """ValueError if a text among these options does not suit a text encoder."""


def changed(config: type[TrainConfig], name: str, default: Any, tooltip: str = "") -> Any:
    """A copy of a Config's knob with another default and, if given, another tooltip."""
    extra = config.__dataclass_fields__[name].metadata
    return field(default=default, metadata={**extra, "tooltip": tooltip or extra["tooltip"]})


@dataclass(frozen=True, kw_only=True)
class LoraConfig(TrainConfig):
    """Further options of every recipe that trains a LoRA."""

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
        "A LoRA file to start from. It must have the same base model, rank and layers.",
        file_of="loras",
        advanced=True,
        added=1,
    )


@contextmanager
def naming(option: str, file: str) -> Iterator[None]:
    """Put the option and its file in front of the text of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}={Path(file).name!r}: {error}") from error


def check(option: Field, value: Any) -> None:
    """Raise ValueError if `value` does not fit the knob: type, finite, range, choices."""
    name, extra = option.name, option.metadata
    kind = type(option.default)
    accepted: tuple[type[Any], ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r}: expected {kind.__name__}")
    if extra["choices"] and value not in extra["choices"]:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(extra['choices'])}")
    low, high = extra["min"], extra["max"]
    if low is not None and not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name}={value}: expected {low}..{high}")


# Options that do not affect the trained weights, such as how often to save and how to share the GPU.
NOT_TRAJECTORY = (
    *("save_every", "save_minutes", "keep_state", "pause_when_busy", "checkpointing", "validate_every"),
    "trigger_words",
    "wan_version",
)
# Options that cannot change when a run goes on: they define the trained weights and their start.
FIXED = (
    *("seed", "optimizer", "save_precision", "rank", "alpha", "target_layers", "layers", "soft_boxes"),
    *("train", "spatial_layers", "temporal_layers", "spatial_loras"),
    *("train_image", "train_temporal", "train_cross", "image_query", "cross_query", "cross_out", "motion_embed"),
    *("positions", "query_stride", "pooled_norms", "oa_bin", "oa_bases", "frames", "stride_min", "stride_max"),
    *("identity_file", "control_file", "domain_adapter", "start_from", "start_from_motion"),
    *("word_to_learn", "initializer_token", "word_prompt"),
)


def make(config_class: type[TrainConfig], values: dict[str, Any]) -> TrainConfig:
    """A config from widget values or saved JSON; ValueError names an unknown option."""
    known = {option.name for option in fields(config_class)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown option {name!r}: expected one of {', '.join(sorted(known))}")
    return config_class(**values)
