"""Trains the toy world's base models from nothing, on the GPU if there is one: bash scripts/toyworld.sh

On two CPU cores that takes about two and a half hours. Steps and seeds are fixed; another processor still rounds otherwise, so it makes
other weights of the same kind. tests/learning/test_toyworld.py says how good they have to be.
"""

import argparse
import tempfile
from pathlib import Path

from .install import IMAGE_VAE, MODELS, MOTION, PAIRS, TEXT_ENCODER, UNET, VAE, VIDEO_UNET, VISION, WAN
from comfy_library import register_pack, start_comfyui


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=MODELS, help="where the files go")
    parser.add_argument("--share", type=float, default=1.0, help="share of the steps and clips, for a trial")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        start_comfyui(Path(base))
        register_pack()
        from . import train_animatediff, train_base, train_image_vae, train_pairs, train_svd, train_vae

        options.output.mkdir(parents=True, exist_ok=True)
        vae, wan, text_encoder = (options.output / name for name in (VAE, WAN, TEXT_ENCODER))
        train_vae.main(vae, options.share)
        train_base.main(vae, wan, text_encoder, options.share)
        image_vae, unet, motion = (options.output / name for name in (IMAGE_VAE, UNET, MOTION))
        train_image_vae.main(image_vae, options.share)
        train_animatediff.main(image_vae, text_encoder, unet, motion, options.share)
        train_pairs.main(image_vae, text_encoder, unet, motion, options.output / PAIRS, options.share)
        train_svd.main(image_vae, options.output / VISION, options.output / VIDEO_UNET, options.share)


if __name__ == "__main__":
    main()
