"""Nodes that record which words adapters look at while a sampler runs, and that show it."""

import re
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ...trainers.conditions.adapter_cross import WATCH
from ...trainers.conditions.attention_maps import LEVELS, AttentionMaps
from ..folders import I2V_ADAPTERS
from ..wires import AttentionMapsType
from .start import CATEGORY

RECORD = "kinoloom.attention_maps"
ALL = "all"
PER_FRAME, GLOBAL = SCALES = ("per_frame", "global")


class RecordAttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomRecordAttentionMaps",
            display_name="Record Attention Maps",
            category=CATEGORY,
            description="Records which words of their prompts adapters look at while a sampler runs, for Attention "
            "Maps. The video stays the same.",
            search_aliases=["cross attention", "heat map", "DAAM", "CA_Map_visualization"],
            inputs=[io.Model.Input("model", tooltip="A model from Apply I2V Adapters.")],
            outputs=[
                io.Model.Output(tooltip="For a sampler."),
                AttentionMapsType.Output("maps", tooltip="For Attention Maps."),
            ],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        adapters = model.get_attachment(I2V_ADAPTERS)
        if adapters is None:
            raise ValueError("model: has no adapters, of whose prompts maps show the words. Connect Apply I2V Adapters")
        maps = AttentionMaps([one.places for one in adapters])

        def sample(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            maps.start(len(noise), *noise.shape[-2:])
            return executor(noise, *args, **kwargs)

        made = model.clone()
        made.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, RECORD)
        made.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, RECORD, sample)
        made.model_options["transformer_options"][WATCH] = maps.see
        return io.NodeOutput(made, maps)


class ShowAttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomAttentionMaps",
            display_name="Attention Maps",
            category=CATEGORY,
            description="Shows where in each frame an adapter looks at a word of its prompt: a strip of all frames "
            "for each word.",
            search_aliases=["cross attention", "heat map", "DAAM", "CA_Map_visualization"],
            inputs=[
                AttentionMapsType.Input("maps", tooltip="From Record Attention Maps."),
                io.Latent.Input("samples", tooltip="From the sampler that used its model, so that this runs after it."),
                io.Int.Input("adapter", default=1, min=1, max=64, tooltip="Its number in the chain of loaders."),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words of the adapter's prompt, separated by spaces or commas. Empty shows all of them.",
                ),
                io.Combo.Input(
                    "resolution",
                    options=[ALL, *LEVELS],
                    default="middle",
                    tooltip="Layers of this size: high has the latent's width and height, middle half of them, low a "
                    "quarter. all shows a strip of each.",
                ),
                io.Combo.Input(
                    "scale",
                    options=list(SCALES),
                    default=GLOBAL,
                    tooltip="What is white: the largest value of all frames, or of each frame by itself.",
                ),
                io.Int.Input(
                    "frame_height", default=96, min=16, max=1024, tooltip="Height of a strip in pixels."
                ),
            ],
            outputs=[
                io.Image.Output("strips", tooltip="For Preview Image: one for each word, frames from left to right."),
                io.String.Output("labels", tooltip="The word and the resolution of each strip, a line each."),
            ],
        )

    @classmethod
    def execute(
        cls, maps: AttentionMaps, samples: dict[str, Any], adapter: int, words: str, resolution: str, scale: str,
        frame_height: int,
    ) -> io.NodeOutput:  # fmt: skip
        latents = samples["samples"]
        number = adapter_number(maps, adapter, len(latents))
        width = max(1, round(frame_height * latents.shape[-1] / latents.shape[-2]))
        strips, labels = [], []
        for word in chosen_words(maps.words_of(number), words):
            for level in LEVELS if resolution == ALL else [resolution]:
                found = maps.of_word(number, word, level, (frame_height, width))
                if found is None:
                    raise ValueError(
                        f"adapter={adapter}: nothing was recorded for it. Its weight must not be 0, and samples must "
                        "come from a sampler with the model of Record Attention Maps. Run that sampler again, with "
                        "another seed if it is cached"
                    )
                strips.append(strip(found, scale))
                labels.append(f"{word}, {level}")
        return io.NodeOutput(torch.stack(strips), "\n".join(labels))


def adapter_number(maps: AttentionMaps, adapter: int, frames: int) -> int:
    """The number of an adapter from 0 on. ValueError if it is not there, has no words, or is of another video."""
    if adapter > len(maps.words):
        raise ValueError(f"adapter={adapter}: expected 1..{len(maps.words)}, as many as Apply I2V Adapters has")
    if not maps.places[adapter - 1]:
        raise ValueError(f"adapter={adapter}: has no prompt of its own. Write it into prompt of Load I2V Adapter")
    if maps.frames not in (0, frames):
        raise ValueError(f"samples: {frames} frames, expected the {maps.frames} of the sampler that was recorded last")
    return adapter - 1


def chosen_words(known: list[str], text: str) -> list[str]:
    """The words of a text, or all known ones if there are none. ValueError for a word that is not known."""
    names = {word.lower(): word for word in known}
    chosen = [word for word in re.split(r"[\s,]+", text) if word]
    for word in chosen:
        if word.lower() not in names:
            raise ValueError(f"words={text!r}: {word!r} is not in the prompt, expected some of {', '.join(known)}")
    return [names[word.lower()] for word in chosen] or known


def strip(maps: Tensor, scale: str) -> Tensor:
    """Maps [F, H, W] as an image [H, F W, 3] of frames from left to right, with the largest value in white."""
    largest = maps.amax(dim=(1, 2), keepdim=True) if scale == PER_FRAME else maps.max()
    grey = maps / largest.clamp_min(torch.finfo(maps.dtype).tiny)
    return grey.transpose(0, 1).flatten(1).unsqueeze(-1).repeat(1, 1, 3)


NODES: list[type[io.ComfyNode]] = [RecordAttentionMaps, ShowAttentionMaps]
