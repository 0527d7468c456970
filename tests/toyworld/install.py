"""The toy world's files, how its model is sampled, and putting it into a ComfyUI base directory."""

import hashlib
import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODELS, UNPACKED = HERE / "models", HERE.parents[1] / ".runtime" / "toyworld"
WAN, VAE, TEXT_ENCODER = "toy_wan.safetensors", "toy_wan_vae.safetensors", "toy_text_encoder.safetensors"
SAMPLER, STEPS, CFG, SHIFT = "euler", 20, 4.0, 3.0
# AnimateDiff
UNET, MOTION, IMAGE_VAE = "toy_sd.safetensors", "toy_motion.safetensors", "toy_sd_vae.safetensors"
STRIDE = 2  # AnimateDiff's clips are at half the frame rate, as its real ones are at 8 per second
# AnimateDiff on pairs of sprites: kept as differences from the two above, see `unpacked`
PAIRS, PAIRS_UNET, PAIRS_MOTION = "toy_pairs.npz", "toy_pairs.safetensors", "toy_pairs_motion.safetensors"
# Stable Video Diffusion, on AnimateDiff's VAE and frame rate
VIDEO_UNET, VISION = "toy_svd.safetensors", "toy_vision.safetensors"
BUCKET, VIDEO_CFG = 127, 2.0  # motion bucket of every clip


def install(base: Path) -> None:
    """Link the models, and the node pack that loads the text encoder, into `base`."""
    links = {"custom_nodes/toyworld": HERE / "pack"}
    files = {
        "diffusion_models": (WAN, UNET, VIDEO_UNET),
        "vae": (VAE, IMAGE_VAE),
        "text_encoders": (TEXT_ENCODER,),
        "clip_vision": (VISION,),
        "animatediff_models": (MOTION,),
    }
    for folder, name in ((folder, name) for folder, names in files.items() for name in names):
        links[f"models/{folder}/{name}"] = MODELS / name
    for folder, name in (("diffusion_models", PAIRS_UNET), ("animatediff_models", PAIRS_MOTION)):
        links[f"models/{folder}/{name}"] = unpacked() / name
    for name, target in links.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).unlink(missing_ok=True)
        (base / name).symlink_to(target)


def unpacked() -> Path:
    """A folder with the two models of pairs as ordinary files, made when first asked for."""
    from . import deltas

    source, bases = MODELS / PAIRS, {PAIRS_UNET: ("unet", MODELS / UNET), PAIRS_MOTION: ("motion", MODELS / MOTION)}
    made_of = hashlib.sha256(b"".join(path.read_bytes() for path in (source, *(path for _, path in bases.values()))))
    folder = UNPACKED / made_of.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name, (part, base) in bases.items():
        if not (folder / name).is_file():
            ours = folder / f"{os.getpid()}-{name}"  # several processes may be here at once
            deltas.unpack(source, part, base, ours)
            ours.replace(folder / name)
    return folder
