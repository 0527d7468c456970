"""A photo of any size animated by two adapters, each with its own prompt, in a real server and by both kinds of sampler."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..media import write_image
from ..server_prompts import animate
from comfy_client import Client, Server


def latents(server: Server, client: Client, prompt: dict) -> tuple[Tensor, Tensor]:
    """What I2V Start and the sampler give: [4, 4, 8, 12] each."""
    outputs = client.run(prompt)
    made = [load_file(server.base / client.files({"": outputs[name]})[0]) for name in ("first", "video")]
    return made[0]["latent_tensor"], made[1]["latent_tensor"]


@pytest.mark.parametrize("sampler", ["SamplerCustomAdvanced", "KSampler"])
def test_each_motion_follows_its_prompt_with_and_without_guidance(
    server: Server, client: Client, motions: list[str], sampler: str
) -> None:
    write_image(server.base / "input" / "photo.png", 90)
    own, swapped = (dict(zip(motions, texts, strict=True)) for texts in (("water", "sky"), ("sky", "water")))

    def video(motions: dict[str, str], cfg: float) -> Tensor:
        start, made = latents(server, client, animate(client, "photo.png", motions, sampler, cfg))
        assert made.shape == start.shape == (4, 4, 8, 12) and made.isfinite().all()
        assert torch.equal(made[0], start[0]) and start[0].any() and not start[1:].any()
        return made[1:]

    plain, guided = (video(own, cfg) for cfg in (1.0, 7.5))
    assert (plain - guided).abs().max() > 1e-2
    for cfg, before in ((1.0, plain), (7.5, guided)):
        assert (video(swapped, cfg) - before).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(37, 211), (640, 64), (1, 1)])
def test_photos_of_any_size_are_cropped_to_the_video(
    server: Server, client: Client, motions: list[str], size: tuple[int, int]
) -> None:
    """Photos of one grey give one first frame, whatever their size."""
    write_image(server.base / "input" / "whole.png", 170, (96, 64))
    write_image(server.base / "input" / "sized.png", 170, size)
    texts = dict(zip(motions, ("water", "sky"), strict=True))
    (whole, _), (start, video) = (
        latents(server, client, animate(client, f"{name}.png", texts)) for name in ("whole", "sized")
    )
    torch.testing.assert_close(start, whole, rtol=1e-3, atol=1e-3)
    assert torch.equal(video[0], start[0]) and video.isfinite().all()
