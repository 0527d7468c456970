"""The tiny models behave like real ones in ComfyUI's loaders, and setup explains its errors."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import pytest
import tiny
import torch
from kinoloom.trainers.host.private import load_private
from safetensors import safe_open
from tiny import svd as tiny_svd
from toyworld.pack import video_unet

from ..runs import random

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@torch.inference_mode()
def test_tiny_vae_keeps_every_frame_and_the_mean_of_8x8_pixels(tiny_models: Path) -> None:
    weights = comfy.utils.load_torch_file(str(tiny_models / "vae" / "tiny_wan_vae.safetensors"))
    vae = comfy.sd.VAE(sd=weights)
    cells = torch.rand(9, 6, 4, 3, generator=torch.Generator().manual_seed(0))
    clip = cells.repeat_interleave(8, 1).repeat_interleave(8, 2)
    latents = vae.encode(clip)
    assert latents.shape == (1, 16, 3, 6, 4)
    assert (vae.decode(latents)[0].cpu() - clip).abs().mean() < 0.02  # other frames or places would be 0.3 away


@pytest.mark.parametrize("i2v", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_wan_is_a_wan_that_core_loads_whole(tmp_path: Path, dtype: torch.dtype, i2v: bool) -> None:
    path = tmp_path / "wan.safetensors"
    tiny.write_wan(path, dim=96, num_heads=3, text_dim=32, dtype=dtype, i2v=i2v)
    model = comfy.sd.load_diffusion_model(str(path)).model
    network = model.diffusion_model
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(network.state_dict())
        assert file.get_tensor("blocks.0.ffn.0.weight").dtype == dtype
    assert (network.num_heads, network.text_dim) == (3, 32)
    assert type(model).__name__ == "WAN21" and (network.img_emb is not None) == i2v


@torch.inference_mode()
def test_tiny_clip_depends_on_the_prompt(tiny_models: Path) -> None:
    file = str(tiny_models / "text_encoders" / "tiny_clip.safetensors")
    clip = comfy.sd.load_clip([file], clip_type=comfy.sd.CLIPType.WAN)
    one, other = (clip.encode_from_tokens(clip.tokenize(text)) for text in ("a red square", "a blue disc"))
    assert one.shape == (1, 77, tiny.CLIP_WIDTH) and one.isfinite().all()
    assert (one - other).abs().mean() > 0.1 * one.std()


@pytest.fixture(scope="module")
def svd(tiny_models: Path) -> Any:
    """A MODEL of the tiny SVD."""
    return video_unet.load_unet(tiny_models / "diffusion_models" / "tiny_svd.safetensors")


def test_every_weight_of_tiny_svd_has_an_effect(svd: Any, tiny_models: Path) -> None:
    network = load_private(svd, torch.device("cpu")).diffusion_model
    network.requires_grad_(True)
    with safe_open(tiny_models / "diffusion_models" / "tiny_svd.safetensors", "pt") as file:
        assert set(file.keys()) == set(network.state_dict())
    frames = 3
    x, context, ids = (random(frames, *shape, name=str(shape)) for shape in ((8, 8, 16), (2, 1024), (768,)))
    out = network(x, timesteps=torch.full((frames,), 0.5), context=context, y=ids, num_video_frames=frames)
    assert 0.1 < float(out.detach().std()) < 10
    out.square().mean().backward()
    assert [name for name, weight in network.named_parameters() if not weight.grad.any()] == []


@pytest.mark.slow
def test_narrow_svd_is_one_to_core(tmp_path: Path) -> None:
    tiny_svd.write_unet(tmp_path / "unet.safetensors", tiny_svd.NARROW, dtype=torch.float16)
    assert type(comfy.sd.load_diffusion_model(str(tmp_path / "unet.safetensors")).model).__name__ == "SVD_img2vid"
    path = tmp_path / "checkpoint.safetensors"
    tiny_svd.write_checkpoint(path)
    model, _, vae, vision = comfy.sd.load_checkpoint_guess_config(str(path), output_clip=False, output_clipvision=True)
    assert type(model.model).__name__ == "SVD_img2vid"
    with safe_open(path, "pt") as file:
        prefix = "model.diffusion_model."
        keys = {key.removeprefix(prefix) for key in file.keys() if key.startswith(prefix)}
    assert keys == set(model.model.diffusion_model.state_dict())
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert vae.decode(vae.encode(image)).shape == image.shape
        assert vision.encode_image(image)["image_embeds"].isfinite().all()


def test_setup_names_a_wrong_comfyui_dir(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts" / "setup.sh")]
    done = subprocess.run(command, env=os.environ | {"COMFYUI_DIR": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"setup: COMFYUI_DIR={tmp_path} holds no main.py: point it at a ComfyUI checkout\n"


def test_tests_of_the_pure_tier_may_be_named_before_others() -> None:
    files = ["tests/pure/test_noise.py", "tests/nodes/test_lists.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
