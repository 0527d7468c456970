"""The node that puts image-to-video adapters into a MODEL with a motion module, for any sampler."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ...trainers.backbones.animatediff.model import check_model, text_width
from ...trainers.backbones.animatediff.motion_module import PART, norms_over_frames
from ...trainers.conditions.adapter_cross import MODES, RESIDUAL
from ...trainers.conditions.adapters_at_work import Adapted, Playing
from ..folders import I2V_ADAPTERS
from ..hooked import Forward, hooked
from ..wires import I2vAdaptersType
from .loading import Loaded
from .start import LEVELS, keep_frames

AS_TRAINED, ALL_FRAMES, EACH_FRAME = "as trained", "over all frames", "of each frame"
FRAMES = "kinoloom.first_frame"
TOLERANCE = 1e-3  # of the sum of weights and of noise levels
LARGEST = float(LEVELS[-1])


class ApplyI2vAdapters(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KinoloomApplyI2vAdapters",
            display_name="Apply I2V Adapters",
            category="Kinoloom/adapters",
            description="Animates a still image with one or several motion adapters, each with its own prompt. Sample "
            "the latent of I2V Start with it. The image model runs once, however many adapters there are.",
            search_aliases=["ca-lora", "i2v-adapter", "motion adapter", "image to video"],
            inputs=[
                io.Model.Input("model", tooltip="A model from Apply Motion Module."),
                I2vAdaptersType.Input("adapters", tooltip="From Load I2V Adapter."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=RESIDUAL,
                    tooltip="residual: each adapter attends to its own prompt, and the results are averaged by weight. "
                    "weights: the LoRAs of all adapters are added, and attention sees all prompts at once.",
                ),
                io.Combo.Input(
                    "group_norms",
                    options=[AS_TRAINED, ALL_FRAMES, EACH_FRAME],
                    default=AS_TRAINED,
                    advanced=True,
                    tooltip="Whether the image model's group norms run over all frames of a video or over each frame. "
                    "as trained takes what the adapters' files say; files of other programs mean over all frames.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For samplers.")],
        )

    @classmethod
    def execute(
        cls, model: Any, adapters: tuple[Loaded, ...], mode: str = RESIDUAL, group_norms: str = AS_TRAINED
    ) -> io.NodeOutput:
        check_model(model.model)
        carried = model.get_additional_models_with_key(PART)
        if not carried:
            raise ValueError("model: has no motion module. Put Apply Motion Module before the adapters")
        motion = carried[0].model
        for one in adapters:
            try:
                one.patcher.model.require_motion_fit(motion)
                one.patcher.model.require_fit(model.model.diffusion_model)
                require_width(one.prompt, text_width(model.model))
            except ValueError as error:
                raise ValueError(f"adapters: {one.name}: {error}") from error
        pooled = norms_pooled(adapters, group_norms) and not motion.layout.norm_over_frames
        run = Run(adapters, motion, mode, pooled)
        Adapted(None, None, run.playing, mode)  # ValueError for adapters that do not go together
        patchers = [one.patcher for one in with_weight(adapters)]
        applied = hooked(model, I2V_ADAPTERS, patchers, "adapters", run.at_work)
        applied = first_frame_kept(applied, run)
        applied.set_attachments(I2V_ADAPTERS, adapters)
        said = [*replacing(model), *findings(adapters), *keep_schedule(applied)]
        for text in said:
            logging.warning("Kinoloom: %s", text)
        return io.NodeOutput(applied, ui={"text": tuple(said)} if said else None)


@dataclass
class Run:
    """The adapters in a sampler's model. For one run of the sampler: `first`, the first frame [1, C, h, w] in the
    model's latent space, `positive`, ComfyUI's ids of the positive prompt, and `cache`, the keys and values of prompts.

    The number of a prompt does not say which it is: samplers with three prompts count from the negative one.
    """

    adapters: tuple[Loaded, ...]
    motion: Any
    mode: str
    pooled: bool
    first: Tensor | None = None
    positive: frozenset = frozenset()
    cache: dict | None = None

    @property
    def playing(self) -> list[Playing]:
        return [Playing(one.patcher.model, one.weight, one.prompt) for one in self.adapters]

    @contextmanager
    def sampling(self, guider: Any, latent: Tensor, mask: Tensor | None) -> Iterator[None]:
        """One run of a sampler. ValueError if its model or its latents do not suit the adapters."""
        patcher = guider.model_patcher
        if [own.model for own in patcher.get_additional_models_with_key(PART)] != [self.motion]:
            raise ValueError("model: Apply Motion Module is after Apply I2V Adapters, expected it before the adapters")
        self.first = first_of(patcher.model, latent, mask)
        self.positive = frozenset(cond["uuid"] for cond in guider.conds.get("positive", ()))
        self.cache = None if patcher.hook_patches else {}  # hooks may change the projections from step to step
        for text in unreached(guider, self.adapters):
            logging.warning("Kinoloom: %s", text)
        try:
            yield
        finally:
            self.first, self.positive, self.cache = None, frozenset(), None

    @contextmanager
    def at_work(self, forward: Forward) -> Iterator[dict[str, Any]]:
        pools = norms_over_frames(forward.unet, lambda: forward.frames) if self.pooled else []
        try:
            with Adapted(forward.unet, self.motion, self.playing, self.mode, self.cache) as adapted:
                adapted.frames = forward.frames
                adapted.positive = [prompt in self.positive for prompt in forward.options["uuids"]]
                yield {}
        finally:
            for handle in pools:
                handle.remove()


def require_width(prompt: Tensor | None, width: int) -> None:
    """ValueError if a prompt was encoded by the text encoder of another kind of model."""
    if prompt is not None and prompt.shape[-1] != width:
        raise ValueError(
            f"its prompt has {prompt.shape[-1]} numbers for each token, expected {width}: connect the text encoder of "
            "this model to its loader"
        )


def first_frame_kept(model: Any, run: Run) -> Any:
    """A model whose UNet sees the clean first frame at every step. Windows without it get it as one frame more."""

    def sample(executor: Any, noise: Tensor, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with run.sampling(executor.class_obj, latent, args[2]):
            return keep_frames(executor, noise, latent, *args, **kwargs)

    def forward(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = args[4] if len(args) > 4 else kwargs.get("transformer_options", {})
        chunks, window = len(options.get("cond_or_uncond", [0])), options.get("context_window")
        places = list(range(len(x) // chunks)) if window is None else list(window.index_list)
        if run.first.shape[-2:] != x.shape[-2:]:
            raise ValueError("a prompt for an area (Conditioning Set Area) beside adapters: expected one with a mask")
        run.first = run.first.to(x)
        first = run.first.expand(chunks, -1, -1, -1)
        clips = x.unflatten(0, (chunks, -1)).clone()
        if 0 in places:
            clips[:, places.index(0)] = first
            return executor(clips.flatten(0, 1), *args, **kwargs)
        if any(args[3:4]) or kwargs.get("control"):
            raise ValueError("ControlNet beside adapters: expected a video of at most context_length frames")
        longer = torch.cat([first.unsqueeze(1), clips], dim=1).flatten(0, 1)
        more = [_longer(arg, len(x), chunks) for arg in args]
        named = {name: _longer(value, len(x), chunks) for name, value in kwargs.items()}
        return executor(longer, *more, **named).unflatten(0, (chunks, -1))[:, 1:].flatten(0, 1)

    made = model.clone()
    for kind, wrapper in {WrappersMP.OUTER_SAMPLE: sample, WrappersMP.DIFFUSION_MODEL: forward}.items():
        made.remove_wrappers_with_key(kind, FRAMES)
        made.add_wrapper_with_key(kind, FRAMES, wrapper)
        others = made.wrappers[kind]
        made.wrappers[kind] = {FRAMES: others.pop(FRAMES), **others}  # outermost: the others see the added frame
    return made


def _longer(value: Any, rows: int, chunks: int) -> Any:
    """An argument of the UNet with a row for each image, with the first row of each chunk once more."""
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows:
        return value
    parts = value.unflatten(0, (chunks, -1))
    return torch.cat([parts[:, :1], parts], dim=1).flatten(0, 1)


def first_of(model: Any, latent: Tensor, mask: Tensor | None) -> Tensor:
    """The first frame in the model's latent space. ValueError unless the mask keeps it."""
    if mask is None or mask[0].any():
        raise ValueError(
            "the latent's first frame is not kept by a noise mask, expected the latent of I2V Start, whose first frame "
            "is the image"
        )
    return model.process_latent_in(latent[:1])


def norms_pooled(adapters: tuple[Loaded, ...], choice: str) -> bool:
    """Whether group norms run over all frames. ValueError if adapters differ in that and nothing is chosen."""
    if choice != AS_TRAINED:
        return choice == ALL_FRAMES
    trained = {one.metadata.get("kinoloom.pooled_norms", "True") for one in with_weight(adapters) or adapters}
    if len(trained) > 1:
        raise ValueError(
            f"group_norms={choice!r}: these adapters were trained in both ways, expected {ALL_FRAMES!r} or "
            f"{EACH_FRAME!r}"
        )
    return trained != {"False"}


def with_weight(adapters: tuple[Loaded, ...]) -> list[Loaded]:
    """Those with a weight: the others do nothing."""
    return [one for one in adapters if one.weight]


def replacing(model: Any) -> list[str]:
    """A sentence if a model has adapters already."""
    earlier = ", ".join(one.name for one in model.get_attachment(I2V_ADAPTERS) or ())
    if not earlier:
        return []
    return [f"These adapters take the place of {earlier}. To use them together, chain their loaders into one node."]


def findings(adapters: tuple[Loaded, ...]) -> list[str]:
    """What a user should know about adapters that work together."""
    said, total = [], sum(one.weight for one in adapters)
    if abs(total - 1) > TOLERANCE:
        more = "the rest comes from the model without them" if total < 1 else "motions become stronger than trained"
        said.append(f"The weights of the adapters sum to {total:g}, not 1: {more}.")
    orthogonal = [one for one in with_weight(adapters) if one.metadata.get("kinoloom.oa_bin", "-1") != "-1"]
    bins = [(one.name, int(one.metadata["kinoloom.oa_bin"]), int(one.metadata["kinoloom.rank"])) for one in orthogonal]
    for (name, bin, rank), (other, other_bin, other_rank) in combinations(bins, 2):
        if bin * rank < (other_bin + 1) * other_rank and other_bin * other_rank < (bin + 1) * rank:
            said.append(
                f"{name} (oa_bin {bin}, rank {rank}) and {other} (oa_bin {other_bin}, rank {other_rank}) share "
                "directions, so they are not orthogonal."
            )
    return said


def unreached(guider: Any, adapters: tuple[Loaded, ...]) -> list[str]:
    """What other nodes did to a guider's model or prompts that does not reach adapters."""
    said, playing = [], with_weight(adapters)
    patches = guider.model_options.get("transformer_options", {}).get("patches", {})
    if patches.get("attn2_patch") and any(one.prompt is not None for one in playing):
        said.append(
            "Another node patches the prompts of cross-attention (attn2_patch), as a hypernetwork does. Prompts of "
            "adapters do not pass through it."
        )
    if not as_in_training(guider.model_patcher.get_model_object("model_sampling")):
        said.append("A node after Apply I2V Adapters changes the noise schedule with which adapters are trained.")
    prompts = [cond["cross_attn"] for cond in guider.conds.get("positive", ()) if cond.get("cross_attn") is not None]
    if any(len(prompt) > 1 for prompt in prompts) and any(one.prompt is None for one in playing):
        said.append("The positive prompt changes from frame to frame. Adapters without a prompt see that of the first.")
    return said


def keep_schedule(model: Any) -> list[str]:
    """Give the model its own noise schedule back, with which adapters are trained, if it has another."""
    own, used = model.model.model_sampling, model.get_model_object("model_sampling")
    if as_in_training(used):
        return []
    if not as_in_training(own):
        raise ValueError(f"model: its noise ends at sigma {float(own.sigma_max):.2f}, expected {LARGEST:.2f} of SD1.5")
    model.add_object_patch("model_sampling", own)
    return ["Sampling uses the model's own noise schedule, as adapters' training does, not the one that was set."]


def as_in_training(sampling: Any) -> bool:
    """Whether a noise schedule ends where that of the adapters' training does."""
    return abs(float(sampling.sigma_max) / LARGEST - 1) < TOLERANCE


NODES: list[type[io.ComfyNode]] = [ApplyI2vAdapters]
