"""API prompts and input files for the tests that run a real server."""

from pathlib import Path

import numpy as np

from .media import write_frames

FAST = {"learning_rate": 5e-3, "rank": 4, "validate_every": 0, "pause_when_busy": False}


def write_video(path: Path, count: int = 9, size: int = 32) -> Path:
    """A bright square that moves right over a gradient, 16 frames per second."""
    frames = np.tile(np.linspace(0, 120, size, dtype=np.uint8)[None, :, None, None], (count, 1, size, 3))
    for i, frame in enumerate(frames):
        frame[8:20, i : i + 12] = (250, 200, 40)
    return write_frames(path, list(frames), 16)


def write_clips(base: Path) -> None:
    """input/clips/square.mp4 with captions for both stages."""
    video = write_video(base / "input" / "clips" / "square.mp4")
    video.with_suffix(".static.txt").write_text("a [v] square on a grey wall")
    video.with_suffix(".motion.txt").write_text("a [v] square on a grey wall, [u] moving")


def loaders(unet: str = "tiny_wan.safetensors") -> dict:
    return {
        "unet": node("UNETLoader", unet_name=unet, weight_dtype="default"),
        "clip": node("CLIPLoader", clip_name="tiny_clip.safetensors", type="wan", device="default"),
        "vae": node("VAELoader", vae_name="tiny_wan_vae.safetensors"),
    }


def train(client, recipe: str, run_name: str, wait: bool = True, unet: str = "tiny_wan.safetensors", **options) -> dict:
    """Folder of clips -> train node, with every widget at its default but FAST and `options`; `wait` adds the result."""
    data = widgets(
        client, "KinoloomClipsFromFolder", folder="clips", frames_per_clip=9, size=32, single_frames=3, token_variants=2
    )
    chosen = widgets(client, recipe, run_name=run_name, **{**FAST, **options})
    prompt = {
        **loaders(unet),
        "data": node("KinoloomClipsFromFolder", vae=["vae", 0], clip=["clip", 0], **data),
        "train": node(recipe, model=["unet", 0], data=["data", 0], **chosen),
    }
    if wait:
        prompt["result"] = node("KinoloomTrainingResult", job=["train", 0])
        prompt["show"] = node("PreviewAny", source=["result", 1])
    return prompt


def train_motion(client, run_name: str, seed: int) -> str:
    """The name in models/i2v_adapters of an adapter that input/clips made of a narrow model in large steps."""
    data = widgets(
        client, "KinoloomClipsFromFolder", folder="clips", frames_per_clip=4, size=64, single_frames=0, token_variants=0
    )
    options = {**FAST, "learning_rate": 2e-2, "alpha": 4.0, "steps": 2, "frames": 4, "seed": seed}
    chosen = widgets(client, "KinoloomTrainCaLora", run_name=run_name, **options)
    client.run({
        **animatediff(client),
        "data": node("KinoloomClipsFromFolder", vae=["base", 2], clip=["base", 1], **data),
        "train": node("KinoloomTrainCaLora", model=["model", 0], data=["data", 0], **chosen),
        "result": node("KinoloomTrainingResult", job=["train", 0]),
        "show": node("PreviewAny", source=["result", 1]),
    })  # fmt: skip
    return f"kinoloom/{run_name}/{run_name}-adapter-000002.safetensors"


def animatediff(client) -> dict:
    """A narrow Stable Diffusion 1.5 with motion module, with its own noise schedule."""
    options = widgets(client, "KinoloomApplyMotionModule", beta_schedule="the model's own")
    return {
        "base": node("CheckpointLoaderSimple", ckpt_name="narrow_sd15.safetensors"),
        "motion": node("KinoloomLoadMotionModule", motion_module="narrow_motion.safetensors"),
        "model": node("KinoloomApplyMotionModule", model=["base", 0], motion_module=["motion", 0], **options),
    }


def animate(client, image: str, motions: dict[str, str], sampler: str = "KSampler", cfg: float = 1.0) -> dict:
    """A photo of the input folder as a video of 4 frames, 96 x 64, saved as latents as I2V Start and the sampler give
    them. motions: the prompt of each adapter, which is used with its share of the weight.
    """
    prompt = {
        **animatediff(client),
        "image": node("LoadImage", image=image),
        "apply": node("KinoloomApplyI2vAdapters", model=["model", 0], mode="residual", group_norms="as trained"),
        "text": node("CLIPTextEncode", text="a photo", clip=["base", 1]),
        "empty": node("CLIPTextEncode", text="", clip=["base", 1]),
        "sigmas": node("KinoloomI2vSigmas", model=["apply", 0], steps=2, cil_ratio=1.0),
        "start": node("KinoloomI2vStart", image=["image", 0], vae=["base", 2], sigmas=["sigmas", 0],
                      **widgets(client, "KinoloomI2vStart", width=96, height=64, frames=4)),
        "first": node("SaveLatent", samples=["start", 0], filename_prefix="first"),
        "video": node("SaveLatent", samples=["sample", 0], filename_prefix="video"),
    }  # fmt: skip
    before = {}
    for file, text in motions.items():
        share = {"weight": 1 / len(motions), "prompt": text, "clip": ["base", 1]}
        prompt[file] = node("KinoloomLoadI2vAdapter", file=file, **share, **before)
        before = {"adapters": [file, 0]}
    prompt["apply"]["inputs"] |= before
    given = {"model": ["apply", 0], "positive": ["text", 0], "negative": ["empty", 0], "cfg": cfg}
    if sampler == "KSampler":
        options = {"seed": 1, "steps": 2, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        return prompt | {"sample": node("KSampler", latent_image=["start", 0], **given, **options)}
    return prompt | {
        "guider": node("CFGGuider", **given),
        "select": node("KSamplerSelect", sampler_name="euler"),
        "sample": node("SamplerCustomAdvanced", noise=["start", 1], guider=["guider", 0], sampler=["select", 0],
                       sigmas=["sigmas", 0], latent_image=["start", 0]),
    }  # fmt: skip


def sample(lora: str | None = None, seed: int = 1, steps: int = 2, prefix: str = "sample") -> dict:
    """Text to latent with core's sampler, saved as a latent file, which keeps every bit."""
    model = ["lora", 0] if lora else ["unet", 0]
    prompt = {
        **loaders(),
        "text": node("CLIPTextEncode", text="a [v] square", clip=["clip", 0]),
        "latent": node("EmptyHunyuanLatentVideo", width=32, height=32, length=9, batch_size=1),
        "sample": node(
            "KSampler", model=model, positive=["text", 0], negative=["text", 0], latent_image=["latent", 0], seed=seed,
            steps=steps, cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix=prefix),
    }  # fmt: skip
    if lora:
        prompt["lora"] = node("LoraLoaderModelOnly", model=["unet", 0], lora_name=lora, strength_model=1.0)
    return prompt


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def widgets(client, class_type: str, **values) -> dict:
    """Every widget of a node at its default, then `values`; an unknown name is an error here, not in the server."""
    given = client.object_info()[class_type]["input"]
    specs = {**given["required"], **given.get("optional", {})}
    defaults = {name: spec[1]["default"] for name, spec in specs.items() if len(spec) > 1 and "default" in spec[1]}
    assert values.keys() <= specs.keys(), f"{class_type} has no {values.keys() - specs.keys()}"
    return {**defaults, **values}
