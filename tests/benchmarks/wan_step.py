"""One training step of Wan 2.1: ours, ComfyUI's TrainLoraNode, and diffusers + PEFT, on the same weights and latents.

    python tests/benchmarks/wan_step.py [--dim 512 --blocks 8 --tokens 800 --rank 16 --rounds 5] [--json FILE]
    python tests/benchmarks/wan_step.py --cuda-sizes      # the 1.3B shape in bf16 at two clip sizes, on a CUDA device

COMFYUI_DIR says where ComfyUI is. Everybody trains rank-r LoRA with AdamW on batches of one. Ours and diffusers + PEFT adapt
the ten linear layers of every block; TrainLoraNode adapts every layer that has a weight (embeddings, head, norms and biases
too) and cannot be told otherwise. Times are medians; how they are taken is in steps.py.
"""

import argparse
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from steps import CUDA, DEVICE, DTYPES, Tick, batches, enter_comfyui, growth, make_recipe, measure, prompt, train
from tiny import write_wan

CHANNELS, TEXT_TOKENS, TEXT_DIM, HEAD_DIM = 16, 512, 4096, 128
PEAK_TFLOPS = {"H100": 989, "H200": 989}  # dense bf16, from the data sheets
PEFT_TARGETS = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"


@dataclass(frozen=True)
class Shape:
    """`grid`: latent frames, and rows and columns of tokens; a token is 2 x 2 latents of one frame."""

    name: str
    dim: int
    ffn: int
    blocks: int
    grid: tuple[int, int, int]
    rank: int
    dtype: str

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def latents(self) -> torch.Tensor:
        frames, height, width = self.grid
        return torch.randn(CHANNELS, frames, 2 * height, 2 * width, generator=torch.Generator().manual_seed(1))

    def prompt_embeds(self) -> torch.Tensor:
        return torch.randn(TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(2))

    def step_tflop(self) -> float:
        """Multiply-adds of one step that no implementation can avoid, twice, in 10^12: backward of a frozen linear layer
        is one product, of attention and of the LoRA factors two; nothing is recomputed. Embeddings and head are left out.
        """
        n, d, f = self.tokens, self.dim, self.ffn
        linear = 2 * n * (6 * d * d + 2 * d * f) + 2 * TEXT_TOKENS * 2 * d * d
        attention = 4 * n * (n + TEXT_TOKENS) * d
        lora = 2 * self.rank * (n * (6 * 2 * d + 2 * (d + f)) + TEXT_TOKENS * 2 * 2 * d)
        return self.blocks * (2 * linear + 3 * (attention + lora)) / 1e12


def ours(shape: Shape, model_path: Path, tick: Tick, *, checkpointing: str, precision: str = "auto") -> None:
    """The pack as a job runs it: private copy, backbone, recipe, data on disk, loop."""
    enter_comfyui(model_path.parent)
    import comfy.sd

    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(model_path))
    options = {"rank": shape.rank, "checkpointing": checkpointing, "precision": precision}
    recipe = make_recipe("KinoloomTrainWanLora", model, {}, **options)
    folder = model_path.parent / f"data-{os.getpid()}"
    train(recipe, batches(recipe, folder, shape.latents(), prompt_embeds=prompt(shape.prompt_embeds())), tick)


def core(shape: Shape, model_path: Path, tick: Tick, *, sdpa: bool = False, **changed: Any) -> None:
    """ComfyUI's own node, called as the executor does; its progress bar says when a step is over."""
    enter_comfyui(model_path.parent, pytorch_attention=sdpa)
    import comfy.sd
    from comfy_extras import nodes_train

    class Bar:
        def __init__(self, total: int) -> None: ...
        def update(self, count: int) -> None:
            tick()

    nodes_train.ProgressBar = Bar
    defaults = {i.id: i.default for i in nodes_train.TrainLoraNode.define_schema().inputs if hasattr(i, "default")}
    given = {"steps": 1_000_000, "rank": shape.rank, "learning_rate": 1e-4, "existing_lora": "[None]"}
    with torch.inference_mode():
        inputs = {
            "model": comfy.sd.load_diffusion_model(str(model_path)),
            "latents": {"samples": shape.latents()[None]},
            "positive": [[shape.prompt_embeds()[None], {}]],
        }
        nodes_train.TrainLoraNode.execute(**{k: [v] for k, v in {**defaults, **inputs, **given, **changed}.items()})


def diffusers_peft(shape: Shape, model_path: Path, tick: Tick, *, checkpointing: bool) -> None:
    """WanTransformer3DModel with a PEFT LoRA in the plainest loop, flow matching and gradient clipping as ours."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_attention_heads=shape.dim // HEAD_DIM,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_DIM,
            ffn_dim=shape.ffn,
            num_layers=shape.blocks,
        )
    weights = convert_wan_transformer_to_diffusers(load_file(model_path, device=str(DEVICE)))
    transformer.load_state_dict(weights, assign=True)
    rope = type(transformer.rope)(HEAD_DIM, transformer.config.patch_size, transformer.config.rope_max_seq_len)
    transformer.rope = rope.to(DEVICE)
    transformer.requires_grad_(False).train()
    config = LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=PEFT_TARGETS)
    network = get_peft_model(transformer, config)  # fp32 factors, also on a bf16 model
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    latents = shape.latents()[None].to(DEVICE)
    prompt_embeds = shape.prompt_embeds()[None].to(DEVICE, shape.torch_dtype)
    while True:
        noise, t = torch.randn_like(latents), torch.rand(1, device=DEVICE)
        noisy_latents = ((1 - t) * latents + t * noise).to(shape.torch_dtype)
        pred = network(noisy_latents, 1000 * t, prompt_embeds, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(pred.float(), noise - latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tick()


fast_core = partial(core, gradient_checkpointing=False, bypass_mode=True)
OURS, CORE = "ours", "core, defaults"
VARIANTS: dict[str, Callable[..., None]] = {
    OURS: partial(ours, checkpointing="off"),
    "ours, checkpointed": partial(ours, checkpointing="on"),
    CORE: core,
    "core, no checkpointing": partial(core, gradient_checkpointing=False),
    "core, bypass, no checkpointing": fast_core,
    "diffusers + PEFT": partial(diffusers_peft, checkpointing=False),
    "diffusers + PEFT, checkpointed": partial(diffusers_peft, checkpointing=True),
}
# The node defaults to bf16, as we do where the CPU has instructions for it. On a CPU ComfyUI takes its chunked attention,
# which keeps the softmax for backward; the rows ending in SDPA show it with the attention it takes on CUDA.
CPU_VARIANTS = {
    "ours, fp32": partial(ours, checkpointing="off", precision="fp32"),
    "ours, fp32, checkpointed": partial(ours, checkpointing="on", precision="fp32"),
    f"{CORE}, SDPA": partial(core, sdpa=True),
    "core, bypass, no checkpointing, SDPA": partial(fast_core, sdpa=True),
    "core, fp32": partial(core, training_dtype="fp32", lora_dtype="fp32"),
    "core, fp32, bypass, no checkpointing": partial(fast_core, training_dtype="fp32", lora_dtype="fp32"),
    "core, fp32, bypass, checkpoint_depth 2": partial(
        core, training_dtype="fp32", lora_dtype="fp32", bypass_mode=True, checkpoint_depth=2
    ),
}


def measured(shape: Shape, variants: list[str], rounds: int, steps: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="kinoloom-bench-") as folder:
        path = Path(folder) / "wan.safetensors"
        heads = shape.dim // HEAD_DIM
        options = {"dim": shape.dim, "blocks": shape.blocks, "ffn": shape.ffn, "num_heads": heads}
        write_wan(path, text_dim=TEXT_DIM, dtype=shape.torch_dtype, **options)
        trainers = {name: partial({**VARIANTS, **CPU_VARIANTS}[name], shape, path) for name in variants}
        results = measure(trainers, Path(folder), rounds, steps)
    for row in results:
        row["shape"] = asdict(shape)
        if "failed" not in row:
            row["tflops"] = shape.step_tflop() / row["seconds"]
            if CUDA and (peak := _peak_tflops()):
                row["mfu"] = row["tflops"] / peak
    return results


def _peak_tflops() -> float | None:
    return next((value for name, value in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), None)


def table(results: list[dict[str, Any]]) -> str:
    """Ratios are to the first variant and to core with its defaults."""
    by_name = {row["variant"]: row for row in results if "failed" not in row}
    lines = [
        f"| variant | {'' if CUDA else 'CPU '}s/step | / core default | / ours | peak MiB over resident | / core default | TFLOP/s | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        if "failed" in row:
            lines.append(f"| {row['variant']} | {row['failed']} | | | | | | |")
            continue

        def ratio(value: Callable[[dict], float], name: str, row: dict = row) -> str:
            return f"{value(row) / value(by_name[name]):.2f}" if name in by_name else ""

        cells = [
            row["variant"],
            f"{row['seconds']:.3f}",
            ratio(lambda r: r["seconds"], CORE),
            ratio(lambda r: r["seconds"], OURS),
            f"{growth(row) / 2**20:.0f}",
            ratio(growth, CORE),
            f"{row['tflops']:.3g}",
            f"{row['mfu']:.1%}" if "mfu" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grid_of(tokens: int) -> tuple[int, int, int]:
    """Two latent frames where possible, as square as the number allows."""
    frames = 2 if tokens % 2 == 0 else 1
    area = tokens // frames
    height = max(n for n in range(1, math.isqrt(area) + 1) if area % n == 0)
    return frames, height, area // height


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=512, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=800)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps per round")
    parser.add_argument("--only", nargs="*", help="variants to run, by the names in the table")
    parser.add_argument("--cuda-sizes", action="store_true", help="Wan 1.3B in bf16 at 512x512x33 and 480x832x81")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cuda_sizes and not CUDA:
        parser.error("--cuda-sizes needs a CUDA device")
    shape = Shape("small", options.dim, 4 * options.dim, options.blocks, grid_of(options.tokens), options.rank, "fp32")
    shapes = [replace(shape, dtype="bf16") if CUDA else shape]
    if options.cuda_sizes:
        full = Shape("1.3B 512x512x33", 1536, 8960, 30, (9, 32, 32), options.rank, "bf16")
        shapes = [full, replace(full, name="1.3B 480x832x81", grid=(21, 30, 52))]
    variants = options.only or [*VARIANTS, *({} if CUDA else CPU_VARIANTS)]
    where = torch.cuda.get_device_name() if CUDA else f"{platform.processor() or platform.machine()} CPU"
    results = []
    for shape in shapes:
        results.append(measured(shape, variants, options.rounds, options.steps))
        print(f"\n{shape.name}: dim {shape.dim}, {shape.blocks} blocks, {shape.tokens} tokens, ", end="")
        print(f"rank {shape.rank}, {shape.dtype}, {where}, torch {torch.__version__}\n")
        print(table(results[-1]), flush=True)
    print("\nTrainLoraNode adapts embeddings, head, norms and biases as well; the others the blocks' ten linears.")
    if options.json:
        options.json.write_text(json.dumps({"device": where, "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
