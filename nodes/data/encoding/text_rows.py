"""Encodes rows for models that take text: latents, prompts and masks."""

from typing import Any

from ....trainers.core.data import Row, TrainingData
from ..reading.captions import serves_both, warn_serves_both
from ..reading.cutting import ClipPlan, Options, assign_roles, frames_by_role, log_sizes, row_name, with_mirrored
from . import model_keys
from .columns import open_columns
from .vae import frame_step


def encode(
    plans: list[ClipPlan], role: str, options: Options, vae: Any, text_encoder: Any, *, flip: bool = False
) -> TrainingData:
    """Encode the columns that are not cached: text first, so that the two encoders do not unload each other.

    With `flip` there is also a mirrored copy of each clip that is not for validation.
    """
    plans = assign_roles(plans, role, options.hold_out)
    warn_serves_both(
        [
            p.clip.source.name
            for p in plans
            if serves_both(p.clip.captions, photo=p.clip.source.photo, with_frames=options.single_frames > 0)
        ]
    )
    captions = {
        text: f"{clip.source.name}: caption"
        for clip in (planned.clip for planned in plans)
        for text in (clip.captions.motion, clip.captions.static)
    }
    log_sizes(plans)
    plans = with_mirrored(plans) if flip else plans
    samples = [(planned, _samples(planned, options.single_frames)) for planned in plans]
    files = sum(len(taken) * (2 if p.clip.mask else 1) for p, groups in samples for _, _, taken in groups)
    columns = open_columns(len(captions) + files)
    text_encoder_id, vae_id = model_keys.of_text_encoder(text_encoder), model_keys.of_vae(vae)
    prompts = columns.prompts(text_encoder, text_encoder_id, captions, options.token_variants, literal=True)
    rows = []
    for planned, groups in samples:
        source, mask, size = planned.clip.source, planned.clip.mask, (planned.width, planned.height)
        for unit, row_role, taken in groups:
            text = planned.clip.captions.motion if unit == "clips" else planned.clip.captions.static
            latents = columns.latents(vae, vae_id, source, taken, *size)
            shape = columns.shape(latents[0])
            named = [{"latents": stem, "prompt_embeds": prompts[text]} for stem in latents]
            if mask:
                masks = columns.masks(mask, taken, *size, frame_step(vae), shape[-2:])
                named = [{**row, "mask": stem} for row, stem in zip(named, masks, strict=True)]
            for window, row in zip(taken, named, strict=True):
                rows.append(Row(row_name(source, window), unit, row_role, shape, row))
    return TrainingData(str(columns.folder), tuple(rows))


def _samples(planned: ClipPlan, single_frames: int) -> list[tuple[str, str, list[list[int]]]]:
    """(unit, role, windows of source frames) of a clip's rows; rows of an entry have one shape."""
    clips = [("clips", role, [list(window)]) for window, role in zip(planned.windows, planned.roles, strict=True)]
    stills = frames_by_role(planned, single_frames).items()
    return clips + [("frames", role, [[index] for index in chosen]) for role, chosen in stills if chosen]
