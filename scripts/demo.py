"""Trains a LoRA on a generated clip through a real ComfyUI server, and shows what it learned, in demo_output/."""

import argparse
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import matplotlib
import numpy as np
from matplotlib import pyplot
from PIL import Image, ImageDraw

import tiny
from comfy_client import Client, Server, make_base
from comfy_workflow import Json, find_node, set_widget, upstream

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "demo_output"
BASE = ROOT / ".runtime" / "base"
COMFYUI = Path(os.environ.get("COMFYUI_DIR") or ROOT / ".runtime" / "ComfyUI").resolve()

SIZE, FRAMES, FPS = 96, 17, 16
CLIP = "demo_swing.mp4"
LOOK = "A [v] chequered square on a blue sky above green grass."
MOTION = f"{LOOK} It [u] swings from left to right."


@dataclass(frozen=True)
class Settings:
    """Sizes of the run; the defaults take a few minutes on two cores."""

    set_steps: int
    sequence_steps: int
    sampler_steps: int = 20
    learning_rate: float = 3e-3
    rank: int = 64


def main() -> None:
    settings = parse_arguments()
    OUTPUT.mkdir(exist_ok=True)
    make_base(BASE, ROOT)
    tiny.write_all(BASE / "models")
    clip = write_clip(BASE / "input" / CLIP)
    shutil.copy(clip, OUTPUT / "clip.mp4")

    with Server(COMFYUI, BASE, log=OUTPUT / "server.log") as server, server.client() as client:
        job = train(client, settings)
        videos = {
            "base": generate(client, settings, job["files"], 0.0, OUTPUT / "base.mp4"),
            "LoRA": generate(client, settings, job["files"], 1.0, OUTPUT / "lora.mp4"),
        }
    plot_loss(job["history"], OUTPUT / "loss.png")
    rows = {"clip": read_video(clip)} | {name: read_video(path) for name, path in videos.items()}
    side_by_side(rows, OUTPUT / "side_by_side.png")
    report(rows, job["files"])


def parse_arguments() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set-steps", type=int, default=300, help="steps on single frames (default 300)")
    parser.add_argument("--sequence-steps", type=int, default=300, help="steps on the whole clip (default 300)")
    return Settings(**vars(parser.parse_args()))


def write_clip(path: Path) -> Path:
    """A chequered square that swings over a landscape."""
    writer = imageio_ffmpeg.write_frames(
        str(path), (SIZE, SIZE), fps=FPS, codec="libx264", quality=9, macro_block_size=8, ffmpeg_log_level="error"
    )
    writer.send(None)
    for frame in draw_clip():
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path


def draw_clip() -> np.ndarray:
    """T H W C, 8 bits."""
    frames = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
    frames[:, : SIZE * 2 // 3] = np.linspace((40, 90, 200), (150, 190, 250), SIZE * 2 // 3)[:, None]
    frames[:, SIZE * 2 // 3 :] = (50, 140, 60)
    cells = np.indices((4, 4)).sum(0) % 2
    square = np.where(cells[..., None], (230, 60, 30), (250, 210, 60)).repeat(8, 0).repeat(8, 1)
    side = len(square)
    for t in range(FRAMES):
        phase = 2 * np.pi * t / (FRAMES - 1)
        left = round((SIZE - side) / 2 * (1 - np.cos(phase)))
        top = round(SIZE * 0.28 - 12 * np.sin(phase))
        frames[t, top : top + side, left : left + side] = square
    return frames


def train(client: Client, settings: Settings) -> Json:
    """Run the shipped training workflow; returns the finished job as the pack's own route shows it."""
    workflow, info = load("set_and_sequence_train.json"), client.object_info()
    choose_models(workflow, info)
    run_name = time.strftime("demo-%Y%m%d-%H%M%S")
    data = {
        "caption": LOOK,
        "motion_caption": MOTION,
        "frames_per_clip": FRAMES,
        "fps": FPS,
        "size": SIZE,
        "single_frames": FRAMES,
    }
    options = {
        "run_name": run_name,
        "set_steps": settings.set_steps,
        "sequence_steps": settings.sequence_steps,
        "rank": settings.rank,
        "learning_rate": settings.learning_rate,
        "set_dropout": 0.1,
        "sequence_dropout": 0.1,
        "gradient_accumulation": 1,
        "batch_size": 1,
        "max_grad_norm": 1.0,
    }
    widgets = {"LoadVideo": {"file": CLIP}, "KinoloomEncodeClips": data, "KinoloomTrainSetAndSequence": options}
    for node, values in widgets.items():
        for name, value in values.items():
            set_widget(workflow, info, node, name, value)
    started = time.monotonic()
    print(f"training {run_name} ...", flush=True)
    client.run_workflow(workflow, timeout=3600)
    print(f"trained in {time.monotonic() - started:.0f} s")
    jobs = client.get("/kinoloom/jobs")
    return client.get(f"/kinoloom/jobs/{next(job['id'] for job in jobs if job['run_name'] == run_name)}")


def generate(client: Client, settings: Settings, loras: dict[str, str], strength: float, target: Path) -> Path:
    """Run the shipped generation workflow with both LoRAs at this strength and keep its video."""
    workflow, info = load("set_and_sequence_generate.json"), client.object_info()
    choose_models(workflow, info)
    for export in ("identity", "motion"):
        name = Path(loras[export]).relative_to(BASE / "models" / "loras")
        set_widget(workflow, info, f"Load LoRA: {export}", "lora_name", str(name))
        set_widget(workflow, info, f"Load LoRA: {export}", "strength_model", strength)
    sampler = find_node(workflow, "KSampler")
    for name, value in {"steps": settings.sampler_steps, "cfg": 1.0, "seed": 1}.items():
        set_widget(workflow, info, sampler, name, value)
    set_widget(workflow, info, upstream(workflow, sampler, "positive"), "text", MOTION)
    for name, value in {"width": SIZE, "height": SIZE, "length": FRAMES}.items():
        set_widget(workflow, info, upstream(workflow, sampler, "latent_image"), name, value)
    (video,) = client.files(client.run_workflow(workflow, timeout=600))
    shutil.copy(BASE / video, target)
    return target


def load(name: str) -> Json:
    return json.loads((ROOT / "workflows" / name).read_text())


def choose_models(workflow: Json, info: Json) -> None:
    set_widget(workflow, info, "UNETLoader", "unet_name", "tiny_wan.safetensors")
    set_widget(workflow, info, "VAELoader", "vae_name", "tiny_wan_vae.safetensors")
    set_widget(workflow, info, "CLIPLoader", "clip_name", "tiny_clip.safetensors")


def read_video(path: Path) -> np.ndarray:
    """T H W C, 8 bits."""
    frames = imageio_ffmpeg.read_frames(str(path))
    width, height = next(frames)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames])


def plot_loss(history: list[Json], target: Path) -> None:
    steps = [event for event in history if event["event"] == "step"]
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for phase in dict.fromkeys(step["phase"] for step in steps):
        own = [step for step in steps if step["phase"] == phase]
        done, losses = [s["done"] for s in own], np.array([sum(s["losses"].values()) for s in own])
        (line,) = axes.plot(done, losses, alpha=0.25)
        axes.plot(done, running_mean(losses), color=line.get_color(), label=phase)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(target, dpi=150)


def running_mean(values: np.ndarray, width: int = 25) -> np.ndarray:
    padded = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (padded[ends] - padded[starts]) / (ends - starts)


def side_by_side(rows: dict[str, np.ndarray], target: Path, columns: int = 6, scale: int = 2) -> None:
    """One labelled row per video, evenly spaced frames as columns."""
    cell, margin, header = SIZE * scale, 60, 20
    sheet = Image.new("RGB", (margin + columns * (cell + 4), header + len(rows) * (cell + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    picks = np.linspace(0, FRAMES - 1, columns).round().astype(int)
    for column, frame in enumerate(picks):
        draw.text((margin + column * (cell + 4) + cell // 2 - 20, 4), f"frame {frame}", fill="black")
    for row, (name, video) in enumerate(rows.items()):
        top = header + row * (cell + 4)
        draw.text((8, top + cell // 2), name, fill="black", font_size=16)
        for column, frame in enumerate(picks):
            picture = Image.fromarray(video[frame]).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + column * (cell + 4), top))
    sheet.save(target)


def report(rows: dict[str, np.ndarray], loras: dict[str, str]) -> None:
    clip = rows["clip"].astype(float)
    for name in ("base", "LoRA"):
        print(f"mean difference from the clip, {name}: {np.abs(rows[name] - clip).mean():.1f} of 255")
    for path in [*sorted(OUTPUT.iterdir()), *loras.values()]:
        print(path)


if __name__ == "__main__":
    main()
