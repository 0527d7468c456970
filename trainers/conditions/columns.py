"""The columns of training data and previews, how they become batches, and draws from them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.data import Batch, Column, stacked
from ..core.rng import Rng
from ..core.transfer import to_device

TEXT_NODES = "Encode Training Clips, or Training Clips from Folder"
SVD_NODES = "Encode Training Clips (SVD), or Training Clips from Folder (SVD)"


def masks(values: list[Batch], shape: tuple[int, ...]) -> Batch:
    """Masks [B, 1, T, h, w]. If only some rows have a mask, the others get a mask of ones."""
    return {"mask": torch.stack([value.get("mask", torch.ones(1, *shape[1:])) for value in values])}


def padded_prompts(values: list[Batch], shape: tuple[int, ...]) -> Batch:
    """Encodings [1 + K, n, D] of a caption and K variants, extended to the largest n and K."""
    own = {"prompt_embeds": pad_prompts([value["prompt_embeds"] for value in values])}
    if "prompt_tokens" in values[0]:
        own["prompt_tokens"] = repeat_variants([value["prompt_tokens"] for value in values])
    return stacked([{**value, **{name: own[name][place] for name in own}} for place, value in enumerate(values)], shape)


def clean_prompts(values: list[Batch], shape: tuple[int, ...]) -> Batch:
    """Encodings [B, n, D] of the captions without variants."""
    batch = padded_prompts(values, shape)
    return {**batch, "prompt_embeds": batch["prompt_embeds"][:, 0]}


LATENTS = Column("latents", "an Encode Training Clips node", version=2)
MASK = Column("mask", TEXT_NODES, optional=True, version=2, collate=masks)
PROMPT = Column("prompt_embeds", TEXT_NODES, version=2, collate=padded_prompts)
IMAGE = Column("image", SVD_NODES, version=3)
TRACKLETS = Column("tracklets", f"{SVD_NODES}, with tracklets", version=2)
# Columns of previews.
PREVIEW_PROMPT = replace(PROMPT, made_by="Sample Prompts", collate=clean_prompts)
PREVIEW_FRAME = Column("sample", "Sample First Frames (SVD)", version=3)
PREVIEW_BOXES = Column("boxes", "Sample First Frames (SVD)")
PREVIEW_START = Column("start", made_by="Sample First Frames (I2V)")  # start [4, h, w], the VAE's unscaled latent


def pad_prompts(prompts: list[Tensor]) -> list[Tensor]:
    """Prompts padded with zeros to the longest one. The backbone pads further, to `prompt_length`, if it needs to."""
    longest = max(prompt.shape[1] for prompt in prompts)
    return repeat_variants([nn.functional.pad(p, (0, 0, 0, longest - p.shape[1])) for p in prompts])


def repeat_variants(prompts: list[Tensor]) -> list[Tensor]:
    """Repeat variants [1 + K, ...] to the largest K. The clean one stays first and is repeated only if it is alone."""
    count = max(len(prompt) for prompt in prompts)
    if all(len(prompt) == count for prompt in prompts):
        return prompts
    first = [min(1, len(prompt) - 1) for prompt in prompts]
    places = [torch.arange(count - 1) % max(len(prompt) - 1, 1) for prompt in prompts]
    return [torch.cat([p[:1], p[start + place]]) for p, start, place in zip(prompts, first, places, strict=True)]


def prompts(batch: dict[str, Any], width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`prompt_embeds` [B, n, D], with padding zeros that were cut off added again if the text encoder uses them."""
    prompt_embeds = batch["prompt_embeds"]
    if prompt_embeds.shape[-1] != width:
        raise ValueError(
            f"prompt_embeds: width {prompt_embeds.shape[-1]}, expected {width}. Was the data "
            "encoded with another model's text encoder?"
        )
    padding = int(batch["prompt_length"].max()) - prompt_embeds.shape[1] if "prompt_length" in batch else 0
    return nn.functional.pad(to_device(prompt_embeds, device, dtype), (0, 0, 0, padding))


def choose_prompts(batch: Batch, rng: Rng, probability: float) -> Tensor:
    """Mask prompt tokens with `probability`: one encoding [B, L, D] of each caption's [B, K+1, L, D].

    Uses the stored encodings of captions with dropped tokens if the data has them at that probability. Otherwise sets
    rows of the clean encoding to zero, which looks like padding. The end token is kept.
    """
    prompts = batch["prompt_embeds"]
    if not probability:
        return prompts[:, 0]
    chosen = []
    for i, prompt in enumerate(prompts):
        generator = rng.generator("prompt", rng.sample + i)
        if abs(float(batch["token_mask_prob"][i]) - probability) < 1e-6:
            chosen.append(prompt[1 + torch.randint(len(prompt) - 1, (), generator=generator)])
        else:
            hidden = torch.rand(prompt.shape[1], generator=generator) < probability
            hidden[int(batch["prompt_tokens"][i, 0]) - 1 :] = False
            chosen.append(prompt[0].masked_fill(hidden.to(prompt.device)[:, None], 0))
    return torch.stack(chosen)
