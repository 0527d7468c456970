"""Trains the toy world's base models from nothing, on the GPU if there is one: bash scripts/toyworld.sh

The files in models/ came from the default minutes on two CPU cores; seeds are fixed, but a time limit
is not, so another machine makes other weights of the same kind. tests/test_toyworld.py says how good they have to be.
"""

import argparse
import tempfile
from pathlib import Path

from .install import MODELS, TEXT_ENCODER, VAE, WAN
from comfy_library import register_pack, start_comfyui


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("vae", "base"), help="train one of the two")
    parser.add_argument("--vae-minutes", type=float, default=25)
    parser.add_argument("--base-minutes", type=float, default=45)
    parser.add_argument("--clips", type=int, default=8000, help="clips that the base model is trained on")
    options = parser.parse_args()
    start_comfyui(Path(tempfile.mkdtemp()))
    register_pack()
    from . import train_base, train_vae

    MODELS.mkdir(exist_ok=True)
    if options.only != "base":
        train_vae.main(MODELS / VAE, options.vae_minutes)
    if options.only != "vae":
        train_base.main(
            MODELS / VAE, MODELS / WAN, MODELS / TEXT_ENCODER, clips=options.clips, minutes=options.base_minutes
        )


if __name__ == "__main__":
    main()
