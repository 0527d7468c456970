"""The node that generates prior clips."""

from dataclasses import fields
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..lists import joined, listed, only, only_each
from ..widgets import widget
from ..wires import TrainingDataType
from .encoding.priors import PriorOptions, add_priors, read_prompts
from .encoding.sampler import Sampler

LIKE_GENERATION = "Use the same as for generation."


class PriorClips(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        options = [(option.metadata["advanced"], widget(option)) for option in fields(PriorOptions)]
        return io.Schema(
            node_id="KinoloomPriorClips",
            display_name="Generate Prior Clips",
            category="Kinoloom/data",
            description="Adds clips that the untrained model generates, in the sizes and lengths of the data. Training "
            "on them too keeps the model from forgetting other subjects. They are cached on disk.",
            is_input_list=True,
            search_aliases=["regularization", "prior preservation", "class images"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be trained, without LoRAs, with your shift."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Its VAE."),
                TrainingDataType.Input("data", tooltip="The encoded clips. Prior clips get their sizes and lengths."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    tooltip="One prompt per line: appearance, then motion, such "
                    "as 'A man in a blue shirt. He walks in a park.' Use ordinary subjects of the same "
                    "kind, without [v] and [u], in about 16 lines. (word:1.2) is a weight, as in CLIP Text Encode.",
                ),
                io.String.Input("negative", multiline=True, default="", tooltip="Negative prompt. " + LIKE_GENERATION),
                *(made for advanced, made in options if not advanced),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.SAMPLER_NAMES, default="uni_pc", tooltip=LIKE_GENERATION
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="simple", tooltip=LIKE_GENERATION
                ),
                *(made for advanced, made in options if advanced),
            ],
            outputs=[TrainingDataType.Output(display_name="data", tooltip="The data and the prior clips.")],
        )

    @classmethod
    def validate_inputs(cls, prompts: Any = None) -> bool:
        if None not in listed(prompts):  # not a connected input
            read_prompts(joined(prompts))
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        data: Any,
        prompts: Any,
        negative: Any,
        sampler_name: Any,
        scheduler: Any,
        **options: Any,
    ) -> io.NodeOutput:
        chosen, lines = PriorOptions(**only_each(options)), read_prompts(joined(prompts))
        made_with = {"text_encoder": clip, "name": sampler_name, "scheduler": scheduler, "negative": negative}
        sampler = Sampler(only("model", model), **only_each(made_with), steps=chosen.steps, cfg=chosen.cfg)
        return io.NodeOutput(add_priors(only("data", data), sampler, only("vae", vae), lines, chosen))
