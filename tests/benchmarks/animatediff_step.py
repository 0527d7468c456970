"""One MotionDirector step on AnimateDiff: ours, and a plain loop on diffusers + PEFT, on the same weights and latents.

    python tests/benchmarks/animatediff_step.py [--widths 64 128 256 256 --frames 16 --size 192 --rank 64] [--json FILE]
    python tests/benchmarks/animatediff_step.py --cuda-sizes      # SD1.5's widths in bf16 at 384 and 512 px, on a CUDA device
    python tests/benchmarks/animatediff_step.py --reference FOLDER

COMFYUI_DIR says where ComfyUI is. A step is the method's joint one: the spatial LoRA on one frame, which passes the motion
modules by, then the temporal LoRA on the clip with the spatial one at work and frozen; AdamW, dropout 0.1, no clipping.
Everybody has LoRAs on the same 192 + 200 layers, with fp32 factors. diffusers' motion modules know no passing by and are
told to; its checkpointing covers the ResNet blocks alone, ours every block.

bf16: ours keeps the frozen matrices and activations in bf16; diffusers + PEFT has a bf16 model under autocast, as diffusers'
own LoRA scripts do. fp32: everything, everywhere.

--reference FOLDER is a checkout of ExponentialML/AnimateDiff-MotionDirector with the packages it requires in FOLDER/site. Its
UNet and LoRA layers are run by the same plain loop, without what its script does beside (text encoder, two optimizers, one
graph kept for both losses), under fp16 autocast on a GPU and checkpointed, as it trains.

Before anything is timed, losses and gradients of a small clip must agree in fp32. diffusers' motion modules take their norm over
all frames where AnimateDiff takes it over each; they do it AnimateDiff's way for that comparison alone.
Times are medians; how they are taken is in steps.py.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from motion_rivals import (
    DROPOUT,
    POSITIONS,
    TEXT_DIM,
    Rival,
    Shape,
    diffusers_peft,
    plain_loop,
    plain_losses,
    reference,
)
from safetensors.torch import load_file, save_file
from steps import (
    CUDA,
    DEVICE,
    Tick,
    Trainer,
    apart,
    batches,
    enter_comfyui,
    make_recipe,
    measure,
    phases,
    prompt,
    table,
    train,
)
from tiny.sd import write_motion_module, write_unet
from torch import Tensor, nn

LAYERS = {"spatial": 192, "temporal": 200}


# -- ours ------------------------------------------------------------------------------------------------------------


def our_recipe(shape: Shape, folder: Path, **options: Any) -> Any:
    enter_comfyui(folder)
    from kinoloom.trainers.backbones.animatediff.motion_module import PART
    from kinoloom.trainers.host.source import Carried
    from toyworld.pack import unet

    with torch.inference_mode():
        model = unet.load(folder / "unet.safetensors")
    parts = {PART: Carried(str(folder / "motion.safetensors"), {})}
    options = {"preset": "custom", "rank": shape.rank, "spatial_off_prob": 0.0, "dropout": DROPOUT, **options}
    return make_recipe("KinoloomTrainMotionDirector", model, parts, **options)


def ours(shape: Shape, folder: Path, tick: Tick, *, checkpointing: bool, precision: str) -> None:
    recipe = our_recipe(shape, folder, checkpointing="on" if checkpointing else "off", precision=precision)
    train(recipe, clip(recipe, shape, folder / f"data-{os.getpid()}"), tick)


def clip(recipe: Any, shape: Shape, folder: Path) -> Any:
    return batches(recipe, folder, shape.latents(), prompt_embeds=prompt(shape.prompt_embeds()))


# -- do they compute the same? ---------------------------------------------------------------------------------------


def our_numbers(shape: Shape, folder: Path) -> tuple[dict[str, float], Any]:
    """Losses and gradient norms of one step in fp32 with every LoRA factor 0.01, and what they were computed from."""
    recipe = our_recipe(shape, folder, precision="fp32", checkpointing="off", dropout=0.0)
    from kinoloom.trainers import motion_director
    from kinoloom.trainers.core.rng import Rng

    recipe.start(phases(recipe)[0])
    batch, rng = clip(recipe, shape, folder / "data")[0], Rng(0, "clips", 0)
    latents = batch["latents"]
    t = recipe.backbone.schedule.timesteps(rng.uniform(1, recipe.config.stratified_timesteps))
    picked = [motion_director.pick_frames(rng, purpose, 1, shape.frames) for purpose in ("frame", "anchor")]
    draws = (rng.noise_like(latents), t, *picked)
    factors = {
        kind: [p for name in ("down", "up") for p in recipe.lora.factors(kind, name).values()] for kind in LAYERS
    }
    numbers = _numbers(recipe.losses(batch, rng), factors)
    return numbers, [x.cpu() for x in (latents, batch["prompt_embeds"][:, 0], *draws)]


def rival_numbers(
    make: Callable[..., Rival], shape: Shape, folder: Path, inputs: Any, **options: Any
) -> dict[str, float]:
    rival = make(shape, folder, checkpointing=False, **options)
    for name, module in rival.model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.GroupNorm) and make is diffusers_peft and ".motion_modules." in name:
            module.forward = partial(_each_frame, module.forward)
    latents, prompt, *draws = (x.to(DEVICE) for x in inputs)
    return _numbers(plain_losses(rival, latents, prompt, draws), rival.factors)


def _each_frame(norm: Callable, x: Tensor) -> Tensor:
    """The norm of [B C F H W] over every frame by itself."""
    return norm(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


def _numbers(losses: Iterator[tuple[str, Tensor]], factors: dict[str, list[nn.Parameter]]) -> dict[str, float]:
    assert {kind: len(found) for kind, found in factors.items()} == {kind: 2 * count for kind, count in LAYERS.items()}
    torch.backends.cudnn.allow_tf32 = False
    for factor in [p for found in factors.values() for p in found]:
        factor.data.fill_(0.01)
    numbers = {}
    for name, loss in losses:
        loss.backward()
        numbers[name] = loss.item()
    for kind, found in factors.items():
        numbers[f"{kind} gradient"] = float(torch.stack([p.grad.norm() for p in found]).norm())
    return numbers


def require_equal(shape: Shape, folder: Path, checkout: Path | None) -> None:
    shape = replace(shape, frames=4, size=128)
    mine, inputs = apart(our_numbers, shape, folder)
    theirs = {"diffusers + PEFT": apart(rival_numbers, diffusers_peft, shape, folder, inputs, precision="fp32")}
    if checkout:
        theirs["reference"] = apart(rival_numbers, reference, shape, folder, inputs, checkout=checkout)
    for rival, numbers in theirs.items():
        error = {name: abs(value / mine[name] - 1) for name, value in numbers.items()}
        assert max(error.values()) < 1e-3, (rival, mine, numbers)
        print(f"{rival}: losses and gradients like ours to {max(error.values()):.0e}", flush=True)


# -- the table -------------------------------------------------------------------------------------------------------


def write_models(shape: Shape, folder: Path) -> None:
    """Random weights: the UNet by ComfyUI's and by diffusers' names, the motion modules by AnimateDiff's."""
    write_unet(folder / "unet.safetensors", shape.widths, context=TEXT_DIM)
    write_motion_module(folder / "motion.safetensors", shape.widths, positions=POSITIONS)
    enter_comfyui(folder)
    import comfy.model_detection
    import comfy.utils

    unet = load_file(folder / "unet.safetensors")
    names = comfy.utils.unet_to_diffusers(comfy.model_detection.detect_unet_config(unet, ""))
    save_file({name: unet[key] for name, key in names.items() if key in unet}, folder / "diffusers.safetensors")


def trainers(shape: Shape, folder: Path, checkout: Path | None) -> tuple[dict[str, Trainer], dict[str, str]]:
    """By the names of the table's rows; and each rival's row to the row of ours that it is compared with."""
    found: dict[str, Trainer] = {}
    pairs: dict[str, str] = {}
    for precision in ("bf16",) if CUDA else ("fp32", "bf16"):
        for checkpointing in (False, True):
            options = {"checkpointing": checkpointing, "precision": precision}
            ending = f", {precision}{', checkpointed' * checkpointing}"
            found |= {
                f"ours{ending}": partial(ours, shape, folder, **options),
                f"diffusers + PEFT{ending}": partial(plain_loop, diffusers_peft, shape, folder, **options),
            }
            pairs[f"diffusers + PEFT{ending}"] = f"ours{ending}"
    if checkout:
        name = f"reference, {'fp16' if CUDA else 'fp32'}, checkpointed"
        found[name] = partial(plain_loop, reference, shape, folder, checkpointing=True, checkout=checkout)
        pairs[name] = f"ours, {'bf16' if CUDA else 'fp32'}, checkpointed"
    return found, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs=4, default=(64, 128, 256, 256), help="multiples of the first")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=192, help="pixels; the latents' sides are an eighth")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps per round")
    parser.add_argument("--only", nargs="*", help="variants to run, by the names in the table")
    parser.add_argument("--reference", type=Path, help="a checkout of AnimateDiff-MotionDirector")
    parser.add_argument("--cuda-sizes", action="store_true", help="SD1.5 in bf16, 16 frames at 384 and 512 px")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cuda_sizes and not CUDA:
        parser.error("--cuda-sizes needs a CUDA device")
    shapes = [Shape(tuple(options.widths), options.frames, options.size, options.rank)]
    if options.cuda_sizes:
        shapes = [Shape((320, 640, 1280, 1280), 16, size, 64) for size in (384, 512)]
    where = torch.cuda.get_device_name() if CUDA else f"{platform.processor() or platform.machine()} CPU"
    results = []
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="kinoloom-bench-") as name:
            folder = Path(name)
            apart(write_models, shape, folder)
            require_equal(shape, folder, options.reference)
            found, pairs = trainers(shape, folder, options.reference)
            chosen = {name: found[name] for name in options.only or found}
            rows = measure(chosen, folder, options.rounds, options.steps)
        results += [{**row, "shape": asdict(shape)} for row in rows]
        print(f"\nwidths {shape.widths}, {shape.frames} frames of {shape.size} px, rank {shape.rank}, ", end="")
        print(f"{where}, torch {torch.__version__}\n\n{table(rows, pairs)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"device": where, "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
