"""Nodes that choose the samples of a run: prompts, first frames, or both."""

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..data.encoding.preview_rows import (
    FirstFrameOptions,
    PromptOptions,
    StartOptions,
    read_prompts,
    sample_first_frames,
    sample_prompts,
    sample_starts,
)
from ..data.inputs import encoders
from ..lists import joined, listed, only, only_each
from ..widgets import widgets
from ..wires import TrackletsType, TrainingSamplesType


class PromptedNode(io.ComfyNode):
    """A node with one prompt per line."""

    @classmethod
    def validate_inputs(cls, prompts: Any = None) -> bool:
        if None not in listed(prompts):  # not a connected input
            read_prompts(joined(prompts))
        return True


class SamplePrompts(PromptedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomSamplePrompts",
            display_name="Sample Prompts",
            category="Kinoloom/training",
            description="Samples small videos of your prompts while a run trains, for Wan and AnimateDiff. Connect it "
            "to samples of a Train node. It does not change the trained weights.",
            is_input_list=True,
            search_aliases=["preview", "validation prompts"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model that is trained."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    tooltip="One prompt per line, with [v] and [u] if the captions have them. Try one like the "
                    "captions, one with other surroundings, and one of another subject. (word:1.2) is a weight, as in "
                    "CLIP Text Encode.",
                ),
                io.String.Input("negative", multiline=True, default="", tooltip="Negative prompt of all samples."),
                *widgets(PromptOptions),
            ],
            outputs=[TrainingSamplesType.Output(display_name="samples", tooltip="For a Train node.")],
        )

    @classmethod
    def execute(cls, clip: Any, prompts: Any, negative: Any, **options: Any) -> io.NodeOutput:
        chosen = PromptOptions(**only_each(options))
        return io.NodeOutput(sample_prompts(only("clip", clip), joined(prompts), only("negative", negative), chosen))


class SampleFirstFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomSampleFirstFrames",
            display_name="Sample First Frames (SVD)",
            category="Kinoloom/training",
            description="Samples small videos of your first frames while a Stable Video Diffusion run trains. Connect "
            "it to samples of a Train node. It does not change the trained weights.",
            is_input_list=True,
            search_aliases=["preview", "validation images"],
            inputs=[
                *encoders(),
                io.Image.Input("images", tooltip="One or more first frames, also of clips that are not trained on."),
                TrackletsType.Input(
                    "tracklets",
                    optional=True,
                    tooltip="Boxes that objects follow in all samples, for Train SVD Tracklets.",
                ),
                *widgets(FirstFrameOptions),
            ],
            outputs=[TrainingSamplesType.Output(display_name="samples", tooltip="For a Train node.")],
        )

    @classmethod
    def execute(cls, vae: Any, clip_vision: Any, images: Any, tracklets: Any = None, **options: Any) -> io.NodeOutput:
        made_with = only_each({"vae": vae, "clip_vision": clip_vision, "tracklets": tracklets})
        chosen = FirstFrameOptions(**only_each(options))
        return io.NodeOutput(sample_first_frames(images=one_batch(listed(images)), options=chosen, **made_with))


class SampleI2v(PromptedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomSampleI2v",
            display_name="Sample First Frames (I2V)",
            category="Kinoloom/training",
            description="Samples small videos that begin with your images while Train CA-LoRA trains. Connect it to "
            "samples of the Train node. It does not change the trained weights.",
            is_input_list=True,
            search_aliases=["preview", "validation images", "image to video"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the model that is trained."),
                io.Clip.Input("clip", tooltip="The text encoder of the model that is trained."),
                io.Image.Input(
                    "images", tooltip="One or more first frames. Images that are not in the clips show most."
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    tooltip="The words of the motion, as in the captions: one line for all images, or one line for "
                    "each. (word:1.2) is a weight, as in CLIP Text Encode.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    tooltip="Negative prompt of all samples. A sample with cfg 1 does not use it.",
                ),
                *widgets(StartOptions),
            ],
            outputs=[TrainingSamplesType.Output(display_name="samples", tooltip="For a Train node.")],
        )

    @classmethod
    def execute(
        cls, vae: Any, clip: Any, images: Any, prompts: Any, negative: Any = "", **options: Any
    ) -> io.NodeOutput:
        given = only_each({"vae": vae, "text_encoder": clip, "negative": negative})
        chosen = StartOptions(**only_each(options))
        images = one_batch(listed(images))
        return io.NodeOutput(sample_starts(images=images, prompts=joined(prompts), options=chosen, **given))


def one_batch(images: list[Tensor]) -> Tensor:
    """The images of a list as one batch. ValueError if their sizes differ."""
    sizes = dict.fromkeys(f"{image.shape[2]}x{image.shape[1]}" for image in images)
    if len(sizes) != 1:
        raise ValueError(f"images: found the sizes {', '.join(sizes) or 'of none'}, expected one size for all")
    return torch.cat(images)


NODES = [SamplePrompts, SampleFirstFrames, SampleI2v]
