"""What adapters cost: one forward of a sampler with 1, 2 and 4 of them, and a step of Train CA-LoRA beside diffusers + PEFT.

    python tests/benchmarks/ca_lora_step.py [--widths 64 128 256 256 --frames 16 --size 192 --rank 32] [--json FILE]

COMFYUI_DIR says where ComfyUI is. Forwards: a UNet with motion modules of random weights, in fp32, cfg 1; each adapter has
an I2V-Adapter, a CA-LoRA with a prompt of 77 tokens and a motion LoRA. A row's ratio is its time by that of one adapter.

Steps: ours, and a plain loop on diffusers' UNetMotionModel. PEFT has the LoRAs on the same 40 temporal attentions (q, k, v,
out) and the keys, values and outputs of 16 cross-attentions; a processor on the 16 self-attentions is the I2V-Adapter. PEFT
adds the output LoRA to the layer's weight, which costs the same as ours after it. AdamW, no dropout, no clipping. Before
anything is timed the losses of untrained adapters must agree.
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from animatediff_step import _each_frame, write_models
from motion_rivals import POSITIONS, TEXT_DIM, Shape, _fill
from safetensors.torch import load_file
from steps import (
    CUDA,
    DEVICE,
    DTYPES,
    Tick,
    apart,
    batches,
    enter_comfyui,
    growth,
    make_recipe,
    measure,
    prompt,
    table,
    train,
)  # fmt: skip
from torch import Tensor, nn

NAME, RANK = "KinoloomTrainCaLora", 32
MODES = ("residual", "weights")


def our_recipe(shape: Shape, folder: Path, **options: Any) -> Any:
    enter_comfyui(folder)
    from kinoloom.trainers.backbones.animatediff.motion_module import PART
    from kinoloom.trainers.host.source import Carried
    from toyworld.pack import unet

    with torch.inference_mode():
        model = unet.load(folder / "unet.safetensors")
    parts = {PART: Carried(str(folder / "motion.safetensors"), {})}
    return make_recipe(NAME, model, parts, rank=shape.rank, max_grad_norm=0.0, **options)


# -- forwards --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward(shape: Shape, folder: Path, tick: Tick, *, count: int, mode: str) -> None:
    """One prediction after another with `count` adapters, as a sampler's step calls the UNet."""
    recipe = our_recipe(shape, folder, precision="fp32", checkpointing="off")
    from kinoloom.trainers.conditions.adapter import Adapter
    from kinoloom.trainers.conditions.adapters_at_work import Adapted, Playing

    recipe.adapted.__exit__()
    shapes = {key: tuple(value.shape) for key, value in recipe.adapter.tensors().items()}
    generator = torch.Generator().manual_seed(0)
    playing = []
    for _ in range(count):
        adapter = Adapter(shapes, recipe.adapter.alpha)
        for value in adapter.tensors().values():
            value.data = torch.randn(value.shape, generator=generator) * 0.02
        playing.append(Playing(adapter.to(DEVICE), 1 / count, shape.prompt_embeds()[None].to(DEVICE)))
    backbone, cache = recipe.backbone, {}
    latents = shape.latents()[None].to(DEVICE)
    batch = {"prompt_embeds": shape.prompt_embeds()[None], "first_frame": latents[:, :, 0]}
    while True:
        adapted = Adapted(backbone.unet, backbone.module.get_submodule("motion"), playing, mode, cache)
        with adapted if count else nullcontext():
            adapted.frames = shape.frames
            backbone.predict(latents, torch.tensor([500], device=DEVICE), batch)
        tick()


def forwards(shape: Shape, folder: Path) -> dict[str, Any]:
    found = {"no adapter": partial(forward, shape, folder, count=0, mode="residual")}
    for mode in MODES:
        for count in (1, 2, 4):
            found[f"{count} {mode}"] = partial(forward, shape, folder, count=count, mode=mode)
    return found


def against_one(rows: list[dict[str, Any]]) -> str:
    """Each row by that with one adapter of its mode, in the same round."""
    by_name = {row["variant"]: row for row in rows}
    lines = ["| adapters | s/forward | by one adapter (least-most) | peak MiB | by one |", "|---|---|---|---|---|"]
    for row in rows:
        mode = row["variant"].partition(" ")[2]
        one = by_name.get(f"1 {mode}", by_name["1 residual"])
        ratios = [mine / other for mine, other in zip(row["times"], one["times"], strict=True)]
        lines.append(
            f"| {row['variant']} | {row['seconds']:.3f} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-"
            f"{max(ratios):.2f}) | {growth(row) / 2**20:.0f} | {growth(row) / growth(one):.2f} |"
        )
    return "\n".join(lines)


# -- steps -----------------------------------------------------------------------------------------------------------


def ours(shape: Shape, folder: Path, tick: Tick, *, checkpointing: bool, precision: str) -> None:
    recipe = our_recipe(shape, folder, checkpointing="on" if checkpointing else "off", precision=precision)
    columns = {"prompt_embeds": prompt(shape.prompt_embeds())}
    train(recipe, batches(recipe, folder / f"data-{precision}-{checkpointing}", shape.latents(), **columns), tick)


class FirstFrame(nn.Module):
    """diffusers' attention processor for self-attention with an I2V-Adapter beside it."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames, self.to_out = frames, nn.Linear(width, width)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        clips = hidden_states.unflatten(0, (-1, self.frames))
        first = clips[:, 0]
        q = attn.to_q(hidden_states)
        own = self._attend(attn, q, attn.to_k(hidden_states), attn.to_v(hidden_states))
        seen = self._attend(attn, q.view(clips.shape).flatten(1, 2), attn.to_k(first), attn.to_v(first))
        return attn.to_out[0](own) + self.to_out(seen).view(own.shape)

    def _attend(self, attn: Any, *parts: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def diffusers_peft(shape: Shape, folder: Path, *, checkpointing: bool, precision: str) -> nn.Module:
    from diffusers import UNetMotionModel
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
    from peft import LoraConfig, get_peft_model

    model = UNetMotionModel(
        block_out_channels=shape.widths, cross_attention_dim=TEXT_DIM, motion_max_seq_length=POSITIONS,
        use_motion_mid_block=False,
    )  # fmt: skip
    motion = convert_animatediff_checkpoint_to_diffusers(load_file(folder / "motion.safetensors"))
    _fill(model, {**load_file(folder / "diffusers.safetensors"), **motion})
    model.to(DEVICE, DTYPES[precision]).requires_grad_(False).train()
    targets = r".*\.(attentions\.\d\.transformer_blocks\.0\.attn2\.to_(k|v|out\.0)"
    targets += r"|motion_modules\.\d\.transformer_blocks\.0\.attn[12]\.to_(q|k|v|out\.0))"
    get_peft_model(model, LoraConfig(r=shape.rank, lora_alpha=1, target_modules=targets))
    for name, attention in model.named_modules():
        if name.endswith(".attn1") and ".attentions." in name:
            attention.set_processor(FirstFrame(attention.to_q.weight.shape[0], shape.frames).to(DEVICE))
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def loss_of(model: nn.Module, latents: Tensor, prompt: Tensor, noise: Tensor, t: Tensor, precision: str) -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0).float().to(t.device)[t].view(-1, 1, 1, 1, 1)
    noisy = torch.cat([latents[:, :, :1], (kept.sqrt() * latents + (1 - kept).sqrt() * noise)[:, :, 1:]], dim=2)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    with autocast:
        pred = model(noisy, t, prompt.repeat_interleave(latents.shape[2], 0), return_dict=False)[0]
    return (pred.float() - noise)[:, :, 1:].square().mean()


def plain_loop(shape: Shape, folder: Path, tick: Tick, *, checkpointing: bool, precision: str) -> None:
    model = diffusers_peft(shape, folder, checkpointing=checkpointing, precision=precision)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    latents, text = shape.latents()[None].to(DEVICE), shape.prompt_embeds()[None].to(DEVICE)
    while True:
        noise, t = torch.randn_like(latents), torch.randint(1000, (1,), device=DEVICE)
        loss = loss_of(model, latents, text, noise, t, precision)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        tick()


def our_loss(shape: Shape, folder: Path) -> tuple[float, int, list[Tensor]]:
    recipe = our_recipe(shape, folder, precision="fp32", checkpointing="off", pooled_norms=False)
    from kinoloom.trainers.core.rng import Rng

    recipe.start(recipe.phases(recipe.config, None)[0])
    columns = {"prompt_embeds": prompt(shape.prompt_embeds())}
    batch, rng = batches(recipe, folder / "equal", shape.latents(), **columns)[0], Rng(0, "clips", 0)
    [(_, loss)] = recipe.losses(batch, rng)
    t = recipe.backbone.schedule.timesteps(rng.uniform(1, recipe.config.stratified_timesteps))
    trained = sum(p.numel() for p in recipe.adapter.parameters())
    latents = batch["latents"]
    return loss.item(), trained, [latents.cpu(), shape.prompt_embeds()[None], rng.noise_like(latents).cpu(), t]


def their_loss(shape: Shape, folder: Path, inputs: Iterable[Tensor]) -> tuple[float, int]:
    model = diffusers_peft(shape, folder, checkpointing=False, precision="fp32")
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm) and ".motion_modules." in name:
            module.forward = partial(_each_frame, module.forward)
    loss = loss_of(model, *(x.to(DEVICE) for x in inputs), "fp32")
    return loss.item(), sum(p.numel() for p in model.parameters() if p.requires_grad)


def require_equal(shape: Shape, folder: Path) -> None:
    shape = replace(shape, frames=4, size=128)
    mine, trained, inputs = apart(our_loss, shape, folder)
    theirs, also = apart(their_loss, shape, folder, inputs)
    assert trained == also and abs(mine / theirs - 1) < 1e-3, (mine, theirs, trained, also)
    print(f"diffusers + PEFT: the loss like ours to {abs(mine / theirs - 1):.0e}, {trained} trained numbers", flush=True)


def steps_of(shape: Shape, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    found, pairs = {}, {}
    for checkpointing in (False, True):
        options = {"checkpointing": checkpointing, "precision": "fp32"}
        ending = ", checkpointed" * checkpointing
        found |= {
            f"ours{ending}": partial(ours, shape, folder, **options),
            f"diffusers + PEFT{ending}": partial(plain_loop, shape, folder, **options),
        }
        pairs[f"diffusers + PEFT{ending}"] = f"ours{ending}"
    return found, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs=4, default=(64, 128, 256, 256), help="multiples of the first")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=192, help="pixels; the latents' sides are an eighth")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=("forwards", "steps"), default=("forwards", "steps"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = Shape(tuple(options.widths), options.frames, options.size, options.rank)
    where = torch.cuda.get_device_name() if CUDA else f"{platform.processor() or platform.machine()} CPU"
    results: dict[str, Any] = {"device": where, "torch": torch.__version__, "shape": asdict(shape)}
    with tempfile.TemporaryDirectory(prefix="kinoloom-bench-") as name:
        folder = Path(name)
        apart(write_models, shape, folder)
        print(f"widths {shape.widths}, {shape.frames} frames of {shape.size} px, rank {shape.rank}, {where}\n")
        if "forwards" in options.only:
            results["forwards"] = measure(forwards(shape, folder), folder, options.rounds, 1)
            print(against_one(results["forwards"]), flush=True)
        if "steps" in options.only:
            require_equal(shape, folder)
            trainers, pairs = steps_of(shape, folder)
            results["steps"] = measure(trainers, folder, options.rounds, 1)
            print(table(results["steps"], pairs), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
