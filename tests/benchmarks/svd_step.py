"""One SVD LoRA step: ours, and SVD_Xtend's in a plain loop on diffusers + PEFT, on the same weights, latents and conditions.

    python tests/benchmarks/svd_step.py [--widths 64 128 256 256 --frames 14 --width 256 --height 128 --rank 16] [--json FILE]
    python tests/benchmarks/svd_step.py --cuda-sizes      # the real widths in bf16, up to 1024x576x25, on a CUDA device

COMFYUI_DIR says where ComfyUI is. A step is one clip, AdamW, no condition left out. Images are encoded before: the original
does that in every step, which is not counted. Ours trains 192 layers; the original 256, of which the queries and keys of
cross-attention, which has one token to look at, never get a gradient; in rows of 192 layers it goes without them.

The plain loop has the original's loss, weighted and on the denoised latents in fp32, and no clipping, which ours does. Its
checkpointing is diffusers': ResNet blocks and the spatial half of the transformers; ours has every block. bf16: ours keeps
the frozen matrices and activations in bf16, the plain loop the whole UNet, under autocast; fp32: everything, everywhere. LoRA
factors are fp32; the original's are so in fp16, and in bf16 they are bf16.

Before anything is timed, the loss and every layer's gradients of a small clip must agree in fp32. Times are medians; how they
are taken is in steps.py.
"""

import argparse
import json
import os
import platform
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import load_file
from steps import (
    CUDA,
    DEVICE,
    DTYPES,
    Tick,
    Trainer,
    apart,
    batches,
    enter_comfyui,
    make_recipe,
    measure,
    phases,
    register_pack,
    table,
    train,
)
from tiny.svd import CONTEXT, write_unet
from torch import Tensor, nn

CHANNELS, SCALE, HEAD_DIM = 4, 0.18215, 64
FPS_ID, MOTION_BUCKET, AUGMENTATION = 7, 127, 0.05
P_MEAN, P_STD = 0.7, 1.6
LEARNABLE = 192
TARGETS = {
    LEARNABLE: r".*transformer_blocks\.0\.(attn1\.to_(q|k|v|out\.0)|attn2\.to_(v|out\.0))",
    256: ["to_q", "to_k", "to_v", "to_out.0"],
}
TOLERANCE = 1e-3  # of the loss, and of a factor's gradient by its norm; at the default widths they are 5e-5 apart


@dataclass(frozen=True)
class Shape:
    """`widths`: channels of each level; clips of `frames` frames of `width` x `height` px."""

    widths: tuple[int, ...]
    frames: int
    width: int
    height: int
    rank: int

    def latents(self) -> Tensor:
        """As the VAE gives them."""
        return _random(1, CHANNELS, self.frames, self.height // 8, self.width // 8) / SCALE

    def image(self) -> dict[str, Tensor]:
        """The column `image`; a frame rate is told to the model less one, which here makes the original's 7."""
        first_frames = _random(2, 2, CHANNELS, self.height // 8, self.width // 8)
        return {
            "image_embeds": _random(3, CONTEXT),
            "first_frames": first_frames,
            "augmentations": torch.tensor([0.0, AUGMENTATION]),
            "fps": torch.tensor(FPS_ID + 1.0),
            "motion_bucket": torch.tensor(float(MOTION_BUCKET)),
        }


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- ours ------------------------------------------------------------------------------------------------------------


def our_recipe(shape: Shape, folder: Path, **options: Any) -> Any:
    enter_comfyui(folder)
    from toyworld.pack import video_unet

    with torch.inference_mode():
        model = video_unet.load_unet(folder / "unet.safetensors")
    return make_recipe("KinoloomTrainSvdLora", model, {}, rank=shape.rank, conditioning_dropout=0.0, **options)


def clip(recipe: Any, shape: Shape, folder: Path) -> Any:
    return batches(recipe, folder, shape.latents(), image=shape.image())


def ours(shape: Shape, folder: Path, tick: Tick, *, checkpointing: bool, precision: str) -> None:
    recipe = our_recipe(shape, folder, checkpointing="on" if checkpointing else "off", precision=precision)
    train(recipe, clip(recipe, shape, folder / f"data-{os.getpid()}"), tick)


# -- diffusers + PEFT ------------------------------------------------------------------------------------------------


def diffusers_peft(shape: Shape, folder: Path, *, layers: int, checkpointing: bool, precision: str) -> nn.Module:
    from diffusers import UNetSpatioTemporalConditionModel
    from peft import LoraConfig, get_peft_model

    register_pack()
    from kinoloom.lora_io.svd_layouts import convert_unet

    with torch.device("meta"):
        heads = tuple(width // HEAD_DIM for width in shape.widths)
        model = UNetSpatioTemporalConditionModel(block_out_channels=shape.widths, num_attention_heads=heads)
    weights = convert_unet(load_file(folder / "unet.safetensors", device=str(DEVICE)), "diffusers")
    model.load_state_dict({name: tensor.to(DTYPES[precision]) for name, tensor in weights.items()}, assign=True)
    model.requires_grad_(False).train()
    config = LoraConfig(
        r=shape.rank, lora_alpha=shape.rank, init_lora_weights="gaussian", target_modules=TARGETS[layers]
    )
    get_peft_model(model, config)  # fp32 factors, also on a bf16 model
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA's, by diffusers' layer and "down" or "up"."""
    names = {".lora_A.default.weight": " down", ".lora_B.default.weight": " up"}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        name.removesuffix(ending) + side: p
        for name, p in found.items()
        for ending, side in names.items()
        if name.endswith(ending)
    }


def plain_loss(
    model: nn.Module, latents: Tensor, first_frame: Tensor, context: Tensor, ids: Tensor, noise: Tensor, sigma: Tensor
) -> Tensor:
    """latents, noise [1 T 4 h w], first_frame [1 4 h w], context [1 1 1024], ids [1 3], sigma [1]"""
    sigmas = sigma.view(-1, 1, 1, 1, 1)
    noisy_latents = latents + noise * sigmas
    scaled = noisy_latents / (sigmas**2 + 1) ** 0.5
    conditional = first_frame.unsqueeze(1).repeat(1, noisy_latents.shape[1], 1, 1, 1)
    half = next(p.dtype for p in model.parameters() if not p.requires_grad) == torch.bfloat16
    with torch.autocast(DEVICE.type, torch.bfloat16) if half else nullcontext():
        pred = model(torch.cat([scaled, conditional], 2), 0.25 * sigma.log(), context, added_time_ids=ids).sample
    denoised = pred * (-sigmas / (sigmas**2 + 1) ** 0.5) + noisy_latents / (sigmas**2 + 1)
    weight = (1 + sigmas**2) * sigmas**-2.0
    return (weight.float() * (denoised.float() - latents.float()) ** 2).flatten(1).mean(1).mean()


def plain_loop(shape: Shape, folder: Path, tick: Tick, **options: Any) -> None:
    model = diffusers_peft(shape, folder, **options)
    optimizer = torch.optim.AdamW(factors(model).values(), lr=1e-4)
    latents = (SCALE * shape.latents()).transpose(0, 1)[None].to(DEVICE)
    image = {name: tensor.to(DEVICE) for name, tensor in shape.image().items()}
    context, first_frame = image["image_embeds"][None, None], image["first_frames"][1:]
    ids = torch.tensor([[FPS_ID, MOTION_BUCKET, AUGMENTATION]], device=DEVICE)
    while True:
        noise, sigma = torch.randn_like(latents), torch.exp(P_MEAN + P_STD * torch.randn(1, device=DEVICE))
        loss = plain_loss(model, latents, first_frame, context, ids, noise, sigma)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        tick()


# -- do they compute the same? ---------------------------------------------------------------------------------------


def our_numbers(shape: Shape, folder: Path) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """The loss and gradients by diffusers' layers of one step in fp32, and what `plain_loss` needs for the same step."""
    recipe = our_recipe(shape, folder, precision="fp32", checkpointing="off")
    from kinoloom.lora_io.svd_layouts import to_diffusers
    from kinoloom.trainers.backbones.svd.objective import drawn_conditions
    from kinoloom.trainers.core.plain_lora import GROUP
    from kinoloom.trainers.core.rng import Rng

    recipe.start(phases(recipe)[0])
    batch, rng = clip(recipe, shape, folder / "data")[0], Rng(0, "clips", 0)
    c = recipe.config
    drawn = drawn_conditions(batch, rng, c.conditioning_dropout)
    u = rng.uniform(1, c.stratified_timesteps)
    sigma = recipe.backbone.schedule.timesteps(u, c.noise_mean, c.noise_std)
    inputs = (
        batch["latents"].transpose(1, 2),
        drawn["first_frame"],
        drawn["image_embeds"].unsqueeze(1),
        torch.stack([drawn["fps"] - 1, drawn["motion_bucket"], drawn["augmentation"]], 1),
        rng.noise_like(batch["latents"]).transpose(1, 2),
        sigma,
    )
    trained = {
        f"{to_diffusers(path)} {side}": p
        for side in ("down", "up")
        for path, p in recipe.lora.factors(GROUP, side).items()
    }
    _fill(trained)
    ((_, loss),) = recipe.losses(batch, rng)
    return _numbers(loss, trained), tuple(x.cpu() for x in inputs)


def rival_numbers(shape: Shape, folder: Path, inputs: tuple[Tensor, ...], layers: int) -> dict[str, Tensor]:
    model = diffusers_peft(shape, folder, layers=layers, checkpointing=False, precision="fp32")
    trained = factors(model)
    _fill(trained)
    return _numbers(plain_loss(model, *(x.to(DEVICE) for x in inputs)), trained)


def _fill(trained: dict[str, nn.Parameter]) -> None:
    """With values that depend on a factor's name alone."""
    torch.backends.cudnn.allow_tf32 = False
    for name, p in trained.items():
        p.data = (_random(crc32(name.encode()), *p.shape) / max(p.shape) ** 0.5).to(p)


def _numbers(loss: Tensor, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    loss.backward()
    return {"loss": loss.detach().cpu(), **{name: p.grad.cpu() for name, p in trained.items()}}


def require_equal(shape: Shape, folder: Path) -> None:
    shape = replace(shape, frames=4, width=128, height=64)
    mine, inputs = apart(our_numbers, shape, folder)
    assert len(mine) == 1 + 2 * LEARNABLE
    largest = max(float(value.norm()) for name, value in mine.items() if name != "loss")
    for layers in TARGETS:
        theirs = apart(rival_numbers, shape, folder, inputs, layers)
        assert len(theirs) == 1 + 2 * layers and theirs.keys() >= mine.keys()
        error = {name: float((theirs[name] - value).norm() / value.norm()) for name, value in mine.items()}
        worst = max(error, key=error.__getitem__)
        assert error[worst] < TOLERANCE, (layers, worst, error[worst])
        idle = max((float(theirs[name].norm()) / largest for name in theirs.keys() - mine.keys()), default=0.0)
        assert idle < TOLERANCE / 100, (layers, idle)
        print(f"diffusers + PEFT, {layers} layers: loss like ours to {error['loss']:.0e}, ", end="")
        print(f"gradients to {error[worst]:.0e}; the others' at most {idle:.0e} of the largest", flush=True)


# -- the table -------------------------------------------------------------------------------------------------------


def trainers(shape: Shape, folder: Path) -> tuple[dict[str, Trainer], dict[str, str]]:
    """By the names of the table's rows; and each rival's row to the row of ours that it is compared with."""
    found: dict[str, Trainer] = {}
    pairs: dict[str, str] = {}
    for precision in ("bf16",) if CUDA else ("fp32", "bf16"):
        for checkpointing in (False, True):
            options = {"checkpointing": checkpointing, "precision": precision}
            ending = f"{precision}{', checkpointed' * checkpointing}"
            found[f"ours, {ending}"] = partial(ours, shape, folder, **options)
            for layers in sorted(TARGETS, reverse=True):
                name = f"diffusers + PEFT, {layers} layers, {ending}"
                found[name] = partial(plain_loop, shape, folder, layers=layers, **options)
                pairs[name] = f"ours, {ending}"
    return found, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs=4, default=(64, 128, 256, 256), help="multiples of 64")
    parser.add_argument("--frames", type=int, default=14)
    parser.add_argument("--width", type=int, default=256, help="pixels, a multiple of 64")
    parser.add_argument("--height", type=int, default=128, help="pixels, a multiple of 64")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps per round")
    parser.add_argument("--only", nargs="*", help="variants to run, by the names in the table")
    parser.add_argument(
        "--cuda-sizes", action="store_true", help="SVD in bf16 at 512x320x14, 512x512x25 and 1024x576x25"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cuda_sizes and not CUDA:
        parser.error("--cuda-sizes needs a CUDA device")
    shapes = [Shape(tuple(options.widths), options.frames, options.width, options.height, options.rank)]
    if options.cuda_sizes:
        sizes = [(14, 512, 320), (25, 512, 512), (25, 1024, 576)]
        shapes = [Shape((320, 640, 1280, 1280), *size, options.rank) for size in sizes]
    where = torch.cuda.get_device_name() if CUDA else f"{platform.processor() or platform.machine()} CPU"
    results = []
    with tempfile.TemporaryDirectory(prefix="kinoloom-bench-") as name:
        folder = Path(name)
        write_unet(folder / "unet.safetensors", shapes[0].widths)
        require_equal(shapes[0], folder)
        for shape in shapes:
            found, pairs = trainers(shape, folder)
            chosen = {name: found[name] for name in options.only or found}
            rows = measure(chosen, folder, options.rounds, options.steps)
            results += [{**row, "shape": asdict(shape)} for row in rows]
            print(f"\nwidths {shape.widths}, {shape.frames} frames of {shape.width}x{shape.height} px, ", end="")
            print(f"rank {shape.rank}, {where}, torch {torch.__version__}\n\n{table(rows, pairs)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"device": where, "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
