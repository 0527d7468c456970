"""A LoRA's scale from PEFT's adapter_config.json or from diffusers' metadata."""

import json
from pathlib import Path
from typing import Any

METADATA = "lora_adapter_metadata"


def config_of(source: Path, metadata: dict[str, str], root: str) -> dict[str, Any]:
    """The LoraConfig of a LoRA file, or {} if it has none.

    PEFT writes it to adapter_config.json beside the file; diffusers into metadata keys that start with `root`, the
    name of a pipeline component.
    """
    beside = source.with_name("adapter_config.json")
    try:
        if source.stem == "adapter_model" and beside.is_file():
            return dict(json.loads(beside.read_text(encoding="utf-8")))
        return {name.removeprefix(root): value for name, value in json.loads(metadata.get(METADATA, "{}")).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{source.name}: its LoRA settings are not readable JSON ({error})") from error


def alpha_of(config: dict[str, Any]) -> float | None:
    """The alpha in a PEFT LoraConfig, or None. ValueError if the config scales layers in another way."""
    other = [name for name in ("alpha_pattern", "use_rslora", "use_dora") if config.get(name)]
    if other:
        raise ValueError(f"LoRA with {', '.join(other)}: expected one alpha for all layers, divided by the rank")
    return config.get("lora_alpha")
