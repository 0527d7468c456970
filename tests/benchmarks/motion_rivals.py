"""MotionDirector's joint step in a plain loop, on the UNets and LoRA layers of others: rivals of animatediff_step.py."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from steps import DEVICE, DTYPES, Tick
from torch import Tensor, nn

CHANNELS, TEXT_TOKENS, TEXT_DIM, POSITIONS = 4, 77, 768, 32
BLOCK = r"transformer_blocks\.0\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
PEFT_TARGETS = rf".*\.(attentions\.\d\.(proj_in|proj_out|{BLOCK})|motion_modules\.\d\.{BLOCK})"
DROPOUT = 0.1


@dataclass(frozen=True)
class Shape:
    """`widths`: channels of each level; clips of `frames` frames of `size` px."""

    widths: tuple[int, ...]
    frames: int
    size: int
    rank: int

    def latents(self) -> Tensor:
        side = self.size // 8
        return torch.randn(CHANNELS, self.frames, side, side, generator=torch.Generator().manual_seed(1))

    def prompt_embeds(self) -> Tensor:
        return torch.randn(TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Rival:
    """`predict(noisy_latents [1 C F h w], t [1], prompt_embeds [1 n D])`, and the LoRA factors of each kind."""

    model: nn.Module
    predict: Callable[[Tensor, Tensor, Tensor], Tensor]
    factors: dict[str, list[nn.Parameter]]


def diffusers_peft(shape: Shape, folder: Path, *, checkpointing: bool, precision: str) -> Rival:
    from diffusers import UNetMotionModel
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
    from peft import LoraConfig, get_peft_model

    model = UNetMotionModel(
        block_out_channels=shape.widths,
        cross_attention_dim=TEXT_DIM,
        motion_max_seq_length=POSITIONS,
        use_motion_mid_block=False,
    )
    motion = convert_animatediff_checkpoint_to_diffusers(load_file(folder / "motion.safetensors"))
    _fill(model, {**load_file(folder / "diffusers.safetensors"), **motion})
    model.to(DEVICE, DTYPES[precision]).requires_grad_(False).train()
    for module in model.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            module.forward = partial(_unless_single, module.forward)
    config = LoraConfig(r=shape.rank, lora_alpha=shape.rank, lora_dropout=DROPOUT, target_modules=PEFT_TARGETS)
    get_peft_model(model, config)  # fp32 factors, also on a bf16 model
    if checkpointing:
        model.enable_gradient_checkpointing()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    autocast = torch.autocast(DEVICE.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def predict(noisy_latents: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        with autocast:
            context = prompt_embeds.repeat_interleave(noisy_latents.shape[2], 0)
            return model(noisy_latents, t, context, return_dict=False)[0]

    places = {"spatial": ".attentions.", "temporal": ".motion_modules."}
    factors = {kind: [p for name, p in trained.items() if place in name] for kind, place in places.items()}
    return Rival(model, predict, factors)


def _unless_single(forward: Callable, x: Tensor, *args: Any, num_frames: int, **kwargs: Any) -> Tensor:
    return x if num_frames == 1 else forward(x, *args, num_frames=num_frames, **kwargs)


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all(name.endswith(".pe") for name in missing), (missing, unexpected)


def reference(shape: Shape, folder: Path, *, checkpointing: bool, checkout: Path) -> Rival:
    sys.path[:0] = [str(checkout), str(checkout / "site")]
    from animatediff.models.unet import UNet3DConditionModel
    from animatediff.utils.lora_handler import LoraHandler

    model = UNet3DConditionModel(
        block_out_channels=shape.widths,
        cross_attention_dim=TEXT_DIM,
        use_inflated_groupnorm=True,
        use_motion_module=True,
        motion_module_type="Vanilla",
        motion_module_kwargs={
            "num_transformer_block": 1,
            "temporal_position_encoding": True,
            "temporal_position_encoding_max_len": POSITIONS,
        },
    )
    _fill(model, {**load_file(folder / "diffusers.safetensors"), **load_file(folder / "motion.safetensors")})
    model.to(DEVICE).requires_grad_(False).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    factors = {}
    for kind, place in {"temporal": "TemporalTransformerBlock", "spatial": "Transformer3DModel"}.items():
        handler = LoraHandler(use_unet_lora=True, unet_replace_modules=[place])
        found = handler.add_lora_to_model(True, model, [place], DROPOUT, str(folder / "none"), r=shape.rank)[0]
        factors[kind] = [p for layer in found for p in layer]
    autocast = torch.autocast("cuda", torch.float16) if DEVICE.type == "cuda" else nullcontext()

    def predict(noisy_latents: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        with autocast:
            return model(noisy_latents, t, prompt_embeds).sample

    return Rival(model, predict, factors)


def plain_losses(
    rival: Rival, latents: Tensor, prompt: Tensor, draws: Iterable[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    noise, t, frame, anchor = draws
    kept = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64), 0).float().to(t.device)[t]
    noisy_latents = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    pred = rival.predict(noisy_latents[:, :, frame], t, prompt)
    yield "spatial", (pred.float() - noise[:, :, frame]).square().mean()
    for factor in rival.factors["spatial"]:
        factor.requires_grad_(False)
    error = rival.predict(noisy_latents, t, prompt).float() - noise
    yield "temporal", error.square().mean() + (2**0.5 * error - error[:, :, anchor]).square().mean()
    for factor in rival.factors["spatial"]:
        factor.requires_grad_(True)


def plain_loop(make: Callable[..., Rival], shape: Shape, folder: Path, tick: Tick, **options: Any) -> None:
    rival = make(shape, folder, **options)
    rates = {"spatial": 1e-4, "temporal": 5e-4}
    optimizer = torch.optim.AdamW([{"params": rival.factors[kind], "lr": rate} for kind, rate in rates.items()])
    latents, prompt = shape.latents()[None].to(DEVICE), shape.prompt_embeds()[None].to(DEVICE)
    while True:
        noise, t = torch.randn_like(latents), torch.randint(1000, (1,), device=DEVICE)
        frame, anchor = torch.randint(shape.frames, (2, 1), device=DEVICE)
        losses = []
        for _, loss in plain_losses(rival, latents, prompt, (noise, t, frame, anchor)):
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).tolist()
        tick()
