"""Checks that a LoRA file fits a run: its base model, its layers and its rank."""

from collections.abc import Collection, Mapping

from torch import Tensor


def require_base(metadata: Mapping[str, str], bases: Collection[str]) -> None:
    """ValueError if the metadata names a base model that is not in `bases`. Empty `bases` allow any."""
    base = metadata.get("kinoloom.base_model")
    if base and bases and base not in bases:
        name = metadata.get("ss_sd_model_name", "another model")
        raise ValueError(
            f"trained on another base model ({name}, by the hash in its metadata) than the one connected"
        )


def require_layers(named: Mapping[str, Tensor], layers: Mapping[str, tuple[int, ...]], rank: int) -> None:
    """ValueError unless the factors `<module>.lora_down/lora_up.weight` cover exactly `layers`, with this rank.

    `layers` maps a module path to its weight's shape. The error says what the file holds instead.
    """
    found = {key.partition(".lora_")[0] for key in named if ".lora_" in key}
    if different := layers.keys() ^ found:
        what = "has layers that this model does not train" if different - layers.keys() else "leaves out layers"
        raise ValueError(f"{what}, for example {min(different)}: expected {len(layers)} layers, found {len(found)}")
    for module, (width_out, width_in, *_) in layers.items():
        down, up = named[f"{module}.lora_down.weight"], named[f"{module}.lora_up.weight"]
        if (up.shape[0], down.shape[1]) != (width_out, width_in):
            raise ValueError(
                f"made for a model of another width: {module} is {up.shape[0]} x {down.shape[1]} in the file, "
                f"{width_out} x {width_in} in the model that is connected"
            )
        if len(down) != rank:
            raise ValueError(f"has rank {len(down)}, but rank={rank}: set rank to {len(down)}")
