"""Patches that nodes put on a MODEL. A training run keeps a patch, ignores it, or refuses it with its name."""

import re
from collections.abc import Iterator
from typing import Any

# Kinds of wrappers that change the model's forward. Other kinds wrap samplers, which training does not use.
FORWARD_WRAPPERS = ("apply_model", "diffusion_model")
# Callbacks that may change the model before a sampler calls it.
FORWARD_CALLBACKS = ("on_load_after", "on_pre_run", "on_prepare_state", "on_apply_hooks", "on_inject_model")
# Names of patches that only save time and do not change the model's output.
SPEED = re.compile("cache|compile", re.IGNORECASE)
SAMPLING_OBJECTS = ("model_sampling", "manual_cast_dtype", "memory_usage_factor")
SAMPLING_MODELS = ("multigpu",)
# Model type to the base class of model_sampling for its kind of prediction.
PREDICTIONS = {"EPS": "EPS", "FLOW": "CONST", "V_PREDICTION_EDM": "V_PREDICTION"}
OTHER_PREDICTIONS = ("CONST", "X0", "EDM", "V_PREDICTION", "IMG_TO_IMG", "IMG_TO_IMG_FLOW", "COSMOS_RFLOW")
MOST_NAMED = 4


def require_kept(model: Any, own: str, name: str = "model") -> None:
    """ValueError names patches on a MODEL's forward that training cannot keep. Names that start with `own` are kept."""
    if found := list(dict.fromkeys(_lost(model, own))):
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise ValueError(
            f"{name}: carries {', '.join(found[:MOST_NAMED])}{more}, which training cannot keep. Connect it as it is "
            "before those nodes to the train node"
        )


def _lost(model: Any, own: str) -> Iterator[str]:
    if "bypass_lora" in model.injections:
        yield "a bypass LoRA (use ordinary LoRA loaders)"
    yield from (f"the injection {name!r}" for name in model.injections if name != "bypass_lora")
    if model.hook_patches:
        yield "hooks"
    if model.weight_wrapper_patches:
        yield "weight wrappers"
    yield from (f"the patched part {name!r}" for name in model.object_patches if name not in SAMPLING_OBJECTS)
    if not model.is_clip:
        found = _prediction(model.get_model_object("model_sampling"))
        if found != PREDICTIONS.get(model.model.model_type.name, found):
            yield f"a model_sampling that predicts {found} where the model's own predicts another"
    for name in model.additional_models:
        if not name.startswith(own) and name not in SAMPLING_MODELS:
            yield f"the model {name!r}"
    options = model.model_options.get("transformer_options", {})
    yield from (f"the patch {name!r}" for name, patches in options.get("patches", {}).items() if patches)
    yield from (f"the replacement {name!r}" for name, patches in options.get("patches_replace", {}).items() if patches)
    if options.get("rope_options"):
        yield "'rope_options'"
    if wrapper := model.model_options.get("model_function_wrapper"):
        yield from _slow("the model function wrapper", {None: [wrapper]}, own)
    for wrappers in (model.wrappers, options.get("wrappers", {})):
        for kind in FORWARD_WRAPPERS:
            yield from _slow(f"the {kind} wrapper", wrappers.get(kind, {}), own)
    for callbacks in (model.callbacks, options.get("callbacks", {})):
        for kind in FORWARD_CALLBACKS:
            yield from _slow(f"the {kind} callback", callbacks.get(kind, {}), own)


def _slow(what: str, functions: dict[str | None, list], own: str) -> Iterator[str]:
    """Names the functions, by their keys, that do more than save time."""
    for key, function in ((key, function) for key, listed in functions.items() for function in listed):
        named = getattr(function, "__qualname__", type(function).__qualname__)
        source = f"{key} {getattr(function, '__module__', '')} {named}"
        if not str(key).startswith(own) and not SPEED.search(source):
            yield f"{what} {key or named!r}"


def _prediction(sampling: Any) -> str:
    classes = {kind.__name__ for kind in type(sampling).__mro__}
    return next((name for name in OTHER_PREDICTIONS if name in classes), "EPS")
