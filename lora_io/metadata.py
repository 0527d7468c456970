"""The metadata of exported files: plain strings in the safetensors header."""

import json
from typing import Any

VERSION = "1"


def describe(
    *,
    recipe: str,
    export: str,
    config: dict[str, Any],
    step: int,
    steps: int,
    base_model: str,
    base_model_name: str,
    backbone: str,
    extra: dict[str, str],
) -> dict[str, str]:
    """Metadata: `kinoloom.*` for this pack, `modelspec.*` and `ss_*` for other tools. `step` counts all phases."""
    words = [word.strip() for word in config["trigger_words"].split(",")]
    return {
        "format": "pt",
        "kinoloom.version": VERSION,
        "kinoloom.recipe": recipe,
        "kinoloom.export": export,
        "kinoloom.config": json.dumps(config, sort_keys=True),
        "kinoloom.step": str(step),
        "kinoloom.steps": str(steps),
        "kinoloom.base_model": base_model,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{backbone}/lora",
        "modelspec.title": f"{recipe} {export}",
        "modelspec.trigger_phrase": ", ".join(word for word in words if word),
        "ss_base_model_version": backbone,
        "ss_sd_model_name": base_model_name,
        **_network(config),
        **extra,
    }


def _network(config: dict[str, Any]) -> dict[str, str]:
    """Rank and alpha of a LoRA; empty for a fine-tune, which has neither."""
    if "rank" not in config:
        return {}
    return {"ss_network_dim": str(config["rank"]), "ss_network_alpha": str(config["alpha"] or config["rank"])}
