"""Trains a LoRA on a toy clip through a real ComfyUI server, and shows what it learned, in demo_output/."""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import matplotlib
import numpy as np
from matplotlib import pyplot

from comfy_client import Client, Server, make_base
from comfy_library import COMFYUI, PACK
from comfy_workflow import Json, find_node, set_widget, upstream

sys.path.append(str(PACK / "tests"))
from toyworld import oracle, world
from toyworld.install import CFG, SAMPLER, SHIFT, STEPS, TEXT_ENCODER, VAE, WAN, install
from toyworld.sheet import contact_sheet

matplotlib.use("Agg")

OUTPUT = PACK / "demo_output"
BASE = PACK / ".runtime" / "base"

CONCEPT = "heart"
SCENE = world.CONCEPTS[CONCEPT]
EDITED = f"{world.SUBJECT} in a desert. {world.UNKNOWN_MOTION}"


def main() -> None:
    options = parse_arguments()
    OUTPUT.mkdir(exist_ok=True)
    make_base(BASE, PACK)
    install(BASE)
    clip = world.concept_clip(CONCEPT).video
    write_video(clip, BASE / "input" / "demo.mp4")
    shutil.copy(BASE / "input" / "demo.mp4", OUTPUT / "clip.mp4")

    with Server(COMFYUI, BASE, log=OUTPUT / "server.log") as server, server.client() as client:
        job = train(client, options)
        rows = {
            "the clip": clip,
            "base model": generate(client, job["files"], 0.0, SCENE.concept_caption, OUTPUT / "base.mp4"),
            "with the LoRA": generate(client, job["files"], 1.0, SCENE.concept_caption, OUTPUT / "lora.mp4"),
            "... and “in a desert”": generate(client, job["files"], 1.0, EDITED, OUTPUT / "edited.mp4"),
        }
    plot_loss(job["history"], OUTPUT / "loss.png")
    contact_sheet({name: [video] for name, video in rows.items()}, frames=6, scale=2).save(OUTPUT / "side_by_side.png")
    for name, video in rows.items():
        motion = oracle.path_correlation(oracle.read(video).track, SCENE.motion)
        print(f"{name:20} look {oracle.identity(video, SCENE):.2f}, motion {motion:.2f} of 1")
    for path in [*sorted(OUTPUT.iterdir()), *job["files"].values()]:
        print(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set-steps", type=int, default=200, help="steps on single frames (default 200)")
    parser.add_argument("--sequence-steps", type=int, default=300, help="steps on the whole clip (default 300)")
    return parser.parse_args()


def write_video(video: np.ndarray, path: Path) -> None:
    """T H W C, 8 bits, without loss but for the colours' resolution."""
    writer = imageio_ffmpeg.write_frames(
        str(path), (world.SIZE, world.SIZE), fps=world.FPS, codec="libx264", quality=10, macro_block_size=8,
        ffmpeg_log_level="error",
    )  # fmt: skip
    writer.send(None)
    for frame in video:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def train(client: Client, options: argparse.Namespace) -> Json:
    """Run the shipped training workflow; returns the finished job as the pack's own route shows it."""
    workflow, info = load("set_and_sequence_train.json"), client.object_info()
    choose_models(workflow, info)
    run_name = time.strftime("demo-%Y%m%d-%H%M%S")
    widgets = {
        "LoadVideo": {"file": "demo.mp4"},
        "KinoloomEncodeClips": {
            "caption": SCENE.concept_look,
            "motion_caption": SCENE.concept_caption,
            "frames_per_clip": world.FRAMES,
            "fps": world.FPS,
            "size": world.SIZE,
            "single_frames": world.FRAMES,
        },
        "KinoloomTrainSetAndSequence": {
            "run_name": run_name,
            "set_steps": options.set_steps,
            "sequence_steps": options.sequence_steps,
            "learning_rate": 2e-3,
            "batch_size": 4,
            "gradient_accumulation": 1,
        },
    }
    for node, values in widgets.items():
        for name, value in values.items():
            set_widget(workflow, info, node, name, value)
    started = time.monotonic()
    print(f"training {run_name} ...", flush=True)
    client.run_workflow(workflow, timeout=3600)
    print(f"trained in {time.monotonic() - started:.0f} s")
    return client.get(f"/kinoloom/jobs/{next(job['id'] for job in client.jobs() if job['run_name'] == run_name)}")


def generate(client: Client, loras: dict[str, str], strength: float, prompt: str, target: Path) -> np.ndarray:
    """Run the shipped generation workflow with both LoRAs at this strength and keep its video."""
    workflow, info = load("set_and_sequence_generate.json"), client.object_info()
    choose_models(workflow, info)
    for export in ("identity", "motion"):
        name = Path(loras[export]).relative_to(BASE / "models" / "loras")
        set_widget(workflow, info, f"Load LoRA: {export}", "lora_name", str(name))
        set_widget(workflow, info, f"Load LoRA: {export}", "strength_model", strength)
    sampler = find_node(workflow, "KSampler")
    for name, value in {"steps": STEPS, "cfg": CFG, "seed": 1, "sampler_name": SAMPLER}.items():
        set_widget(workflow, info, sampler, name, value)
    set_widget(workflow, info, "ModelSamplingSD3", "shift", SHIFT)
    set_widget(workflow, info, upstream(workflow, sampler, "positive"), "text", prompt)
    set_widget(workflow, info, upstream(workflow, sampler, "negative"), "text", "")
    for name, value in {"width": world.SIZE, "height": world.SIZE, "length": world.FRAMES}.items():
        set_widget(workflow, info, upstream(workflow, sampler, "latent_image"), name, value)
    (video,) = client.files(client.run_workflow(workflow, timeout=600))
    shutil.copy(BASE / video, target)
    return read_video(target)


def load(name: str) -> Json:
    return json.loads((PACK / "workflows" / name).read_text())


def choose_models(workflow: Json, info: Json) -> None:
    set_widget(workflow, info, "UNETLoader", "unet_name", WAN)
    set_widget(workflow, info, "VAELoader", "vae_name", VAE)
    loader = find_node(workflow, "CLIPLoader")  # the toy's text encoder has a loader of its own
    loader |= {"type": "ToyWorldTextEncoder", "inputs": [], "widgets_values": [TEXT_ENCODER]}


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


if __name__ == "__main__":
    main()
