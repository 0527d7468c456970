"""Prior clips, sampled by the untrained model from ordinary prompts: training on them prevents forgetting."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ....lora_io.file import load
from ....trainers.conditions.columns import LATENTS
from ....trainers.core.config import check, knob
from ....trainers.core.data import Row, TrainingData, column_path
from ..reading.captions import MOTION_TOKEN, SUBJECT_TOKEN
from ..reading.framing import spread
from . import model_keys
from .columns import Columns, open_columns
from .sampler import Sampler
from .vae import encode_pixels, frame_step


@dataclass(frozen=True, kw_only=True)
class PriorOptions:
    """Sampler settings and numbers of prior clips."""

    seeds_per_prompt: int = knob(2, "Clips made from each prompt. Raise it if you have few prompts.", min=1, max=64)
    seed: int = knob(0, "Seed of the first clip; the others follow. Change it for other clips.", min=0, max=2**53)
    steps: int = knob(30, "Sampling steps. Use the same as for generation.", min=1, max=1000)
    cfg: float = knob(6.0, "Guidance. Use the same as for generation.", min=0.0, max=100.0, step=0.1)
    single_frames: int = knob(
        4,
        "Frames of each prior clip that are also encoded one by one. Only used if the data "
        "holds single frames. Raise it if there are few prior clips.",
        min=0,
        max=1025,
        advanced=True,
    )
    token_variants: int = knob(
        16,
        "Versions of each prompt with a tenth of the words missing. Use the same as for the encoded clips.",
        min=0,
        max=64,
        advanced=True,
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            check(option, getattr(self, option.name))


@dataclass(frozen=True)
class PriorClip:
    prompt: str
    seed: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"prior {self.prompt[:40]!r} seed {self.seed}"


def read_prompts(text: str) -> list[str]:
    """One prompt per line. ValueError for a line with a token of the trained subject or motion, or for no line."""
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    for line in prompts:
        for token in (SUBJECT_TOKEN, MOTION_TOKEN):
            if token in line:
                raise ValueError(
                    f"prior prompt {line!r} contains {token}: prior clips must not show the trained subject, so "
                    "describe other subjects"
                )
    if not prompts:
        raise ValueError("prompts is empty: write one per line, such as 'A man in a blue shirt. He walks in a park.'")
    return prompts


def appearance(prompt: str) -> str:
    """The first sentence of a prompt "appearance. motion", as the caption of single frames."""
    return prompt.split(". ", 1)[0].rstrip(".") + "."


def clip_shapes(data: TrainingData, model: Any) -> list[tuple[int, ...]]:
    """The latent shapes [C, T, h, w] of the training clips, which prior clips use in turn."""
    shapes = list(dict.fromkeys(row.shape for row in data.select("clips", "train")))
    form = model.get_model_object("latent_format")
    if not shapes:
        raise ValueError("data holds no clips to train on, so there is no size to generate prior clips at")
    if form.latent_dimensions != 3 or shapes[0][0] != form.latent_channels:
        raise ValueError(
            f"the data's latents have {shapes[0][0]} channels, but this model makes "
            f"{form.latent_dimensions}-D latents of {form.latent_channels}: expected a "
            "video model such as Wan, and data encoded with its VAE"
        )
    return shapes


def add_priors(
    data: TrainingData, sampler: Sampler, vae: Any, prompts: list[str], options: PriorOptions
) -> TrainingData:
    """`data` with prior rows added. Generated clips are cached on disk."""
    shapes = clip_shapes(data, sampler.model)
    frames = options.single_frames if data.select("frames", "train") else 0
    wanted = [prompt for prompt in prompts for _ in range(options.seeds_per_prompt)]
    clips = [PriorClip(prompt, options.seed + i, shapes[i % len(shapes)]) for i, prompt in enumerate(wanted)]
    columns = open_columns(2 * len(prompts) + len(clips) * (options.steps + 1 + frames))
    text_encoder_id = model_keys.of_text_encoder(sampler.text_encoder)
    texts = dict.fromkeys((text for prompt in prompts for text in (prompt, appearance(prompt))), "prompts")
    encoded = columns.prompts(sampler.text_encoder, text_encoder_id, texts, options.token_variants, literal=False)
    rows = []
    for clip, latents in zip(clips, generate(columns, sampler, text_encoder_id, clips), strict=True):
        named = {"latents": latents, "prompt_embeds": encoded[clip.prompt]}
        rows.append(Row(clip.name, "clips", "prior", clip.shape, named))
    for clip, row in list(zip(clips, rows, strict=True)) if frames else []:
        text = encoded[appearance(clip.prompt)]
        for index, latents in encode_frames(columns, vae, row.columns["latents"], clip.shape, frames):
            rows.append(
                Row(
                    f"{clip.name} frame {index}",
                    "frames",
                    "prior",
                    columns.shape(latents),
                    {"latents": latents, "prompt_embeds": text},
                )
            )
    return TrainingData(data.folder, (*data.rows, *rows))


def generate(columns: Columns, sampler: Sampler, text_encoder_id: str, clips: list[PriorClip]) -> list[str]:
    """Generate the clips and return their latents columns. All texts are encoded first, so each model loads once."""
    model_id = model_keys.of_model(sampler.model)
    settings = (sampler.negative, sampler.steps, sampler.cfg, sampler.name, sampler.scheduler)
    keys = {clip: ("prior", model_id, text_encoder_id, *settings, clip.prompt, clip.seed, clip.shape) for clip in clips}
    missing = [clip for clip in clips if not columns.find(LATENTS, *keys[clip])[1]]
    texts = dict.fromkeys([sampler.negative, *(clip.prompt for clip in missing)]) if missing else {}
    conditioning = {text: sampler.conditioning(text) for text in texts}
    columns.bar.update(sampler.steps * (len(clips) - len(missing)))

    def sample(clip: PriorClip) -> dict[str, Tensor]:
        positive, negative = conditioning[clip.prompt], conditioning[sampler.negative]
        return {"latents": sampler.sample(positive, negative, clip.seed, clip.shape, columns.bar)}

    return [columns.cached(LATENTS, keys[clip], clip.name, lambda clip=clip: sample(clip)) for clip in clips]


def encode_frames(
    columns: Columns, vae: Any, clip_latents: str, shape: tuple[int, ...], count: int
) -> list[tuple[int, str]]:
    """(frame number, latents column) for frames of a generated clip, each encoded as a single image.

    Slices of the clip's latents cannot be used: all but the first cover several frames.
    """
    total = 1 + (shape[1] - 1) * frame_step(vae)
    vae_id = model_keys.of_vae(vae)
    decoded: list[Tensor] = []

    def make(index: int) -> dict[str, Tensor]:
        if not decoded:
            latents = load(column_path(columns.folder, clip_latents, "latents"))[0]["latents"]
            decoded.append(vae.decode(latents.unsqueeze(0))[0])
        return {"latents": encode_pixels(vae, decoded[0][index : index + 1])}

    found = []
    for index in spread(list(range(total)), count):
        key = ("prior frame", vae_id, clip_latents, index)
        name = f"frame {index} of a prior clip"
        found.append((index, columns.cached(LATENTS, key, name, lambda index=index: make(index))))
    return found
