"""The toy world draws what it says, the oracle reads it back, and the base models have learned it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from toyworld import oracle, score, steer, studio, world
from toyworld.install import IMAGE_VAE, MODELS, MOTION, PAIRS, STRIDE, TEXT_ENCODER, UNET, VAE, VIDEO_UNET, VISION, WAN
from toyworld.pack import text_encoder

import nodes

from comfy_client import Client, Server

CAPTIONS = 48
SHUFFLED = np.array([0, 8, 2, 14, 6, 16, 4, 12, 10])  # the frames of a clip at half the rate, apart
FILES = (WAN, VAE, TEXT_ENCODER, UNET, MOTION, IMAGE_VAE, VIDEO_UNET, VISION, PAIRS)


@pytest.fixture(scope="module")
def base() -> studio.Studio:
    return studio.Studio()


@pytest.fixture(scope="module")
def images() -> studio.AnimateDiffStudio:
    return studio.AnimateDiffStudio()


def scenes(count: int, seed: int) -> Iterator[tuple[world.Scene, np.random.Generator]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield world.choose(rng), rng


def test_a_seed_draws_one_clip() -> None:
    first, again, other = (world.sample(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first.scene == again.scene and np.array_equal(first.video, again.video)
    assert first.scene != other.scene and not np.array_equal(first.video, other.video)


def test_base_training_sees_nothing_that_is_held_out() -> None:
    seen = {name for scene, rng in scenes(3000, 0) for name in (scene.shape, scene.texture, scene.motion)}
    assert seen == {*world.SHAPES, *world.TEXTURES, *world.MOTIONS}
    pairs = {
        pair for scene, _ in scenes(3000, 0) for pair in ((scene.shape, scene.motion), (scene.shape, scene.colour))
    }
    assert not pairs & world.NEW_COMBINATIONS
    captions = " ".join(world.describe(scene, rng) for scene, rng in scenes(3000, 1))
    assert "[w]" in captions and "[u]" not in captions and "[v]" not in captions
    assert all(concept.is_held_out for concept in world.CONCEPTS.values())


@pytest.mark.parametrize("motion", [*world.MOTIONS, *world.NEW_MOTIONS])
@pytest.mark.parametrize("shape", [*world.SHAPES, *world.NEW_SHAPES])
def test_the_whole_sprite_stays_in_the_picture(shape: str, motion: str) -> None:
    scene = world.Scene(shape, "red", "plain", "big", motion, "night")
    mask = world.draw(scene, np.random.default_rng(0)).mask
    edges = (mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1])
    assert mask.sum((1, 2)).min() > 30 and max(edge.max() for edge in edges) == 0


def test_oracle_reads_drawn_clips() -> None:
    for scene, rng in scenes(200, 5):
        clip = world.draw(scene, rng)
        reading = oracle.read(clip.video)
        assert answers(reading) == answers(scene)
        assert np.abs(reading.track - clip.track).max() < 1


def answers(seen: world.Scene | oracle.Reading) -> tuple[str, ...]:
    return seen.shape, seen.colour, seen.motion, seen.background


def test_oracle_gives_no_answer_where_there_is_none() -> None:
    black = np.zeros((world.FRAMES, world.SIZE, world.SIZE, 3), np.uint8)
    red, seldom = black.copy(), world.sample(np.random.default_rng(0)).video.copy()
    red[..., 0] = 255
    seldom[4:] = seldom[4:, :1, :1]
    assert answers(oracle.read(black))[:3] == answers(oracle.read(seldom))[:3] == ("none", "none", "none")
    assert oracle.read(red).background == "none"


@pytest.mark.parametrize("new", world.NEW_MOTIONS)
def test_motion_score_tells_new_motions_from_what_the_base_knows(new: str) -> None:
    known = {motion: np.stack(world.path(motion), 1) for motion in world.MOTIONS}
    assert max(oracle.path_correlation(path, new) for path in known.values()) < 0.6
    assert min(oracle.path_error(path, new) for path in known.values()) > 4
    drift = known["right"] / 12  # a pixel or two over the whole clip
    assert oracle.path_correlation(drift, "zigzag") == 0


@pytest.mark.parametrize("name", world.CONCEPTS)
def test_identity_and_path_tell_the_concepts_apart(name: str) -> None:
    scene = world.CONCEPTS[name]
    for other in world.CONCEPTS:
        video = world.concept_clip(other).video
        track = oracle.read(video).track
        assert (oracle.identity(video, scene) > 0.8) == (other == name)
        assert (oracle.path_correlation(track, scene.motion) > 0.98) == (other == name)
        assert (oracle.path_error(track, scene.motion) < 1) == (other == name)
    repainted = replace(scene, colour=scene.second, second=scene.colour)
    assert oracle.identity(world.draw(repainted, np.random.default_rng(1)).video, scene) < 0.5


def test_score_sheet_of_the_concept_itself_and_of_a_still_sprite() -> None:
    scene = world.CONCEPTS["star"]
    clip = world.concept_clip("star").video
    still = world.sprite(scene).video
    black = np.zeros_like(clip)
    sheets = {}
    for name, video in (("clip", clip), ("still", still), ("black", black)):
        videos = {prompt.text: [video, video] for prompt in score.prompts(scene)}
        sheets[name] = score.score(scene, videos, {text: [clip, clip] for text in videos})
    assert sheets["clip"].identity > 0.95 and sheets["clip"].motion > 0.99 and sheets["clip"].motion_error < 0.5
    assert sheets["clip"].leak == sheets["clip"].diversity == 0
    assert sheets["clip"].adherence == 0  # the same video whatever the prompt asks
    assert sheets["still"].identity > 0.95 and sheets["still"].motion == 0 and sheets["still"].motion_error > 5
    assert sheets["black"].identity == sheets["black"].motion == 0 and sheets["black"].leak > 50


def test_models_fit_in_50_megabytes() -> None:
    assert sum((MODELS / name).stat().st_size for name in FILES) < 50e6


@torch.inference_mode()
def test_vae_reconstructs_at_30_db_what_the_oracle_still_reads(base: studio.Studio) -> None:
    errors, right = [], []
    for scene, rng in scenes(16, 1000):
        video = torch.from_numpy(world.draw(scene, rng).video).float() / 255
        latents = base.vae.encode(video)
        assert latents.shape == (1, 16, 5, 8, 8)
        decoded = base.vae.decode(latents)[0].cpu()
        errors.append((decoded - video).square().mean())
        right.append(answers(oracle.read((decoded.clamp(0, 1) * 255).byte().numpy())) == answers(scene))
    assert 10 * torch.log10(1 / torch.stack(errors).mean()) > 30
    assert sum(right) >= 15


@torch.inference_mode()
def test_text_encoder_pads_with_zeros_and_knows_the_tokens(base: studio.Studio) -> None:
    texts = ("a [v] thing on a meadow. it is [u] moving.", "a thing on a meadow. it is moving.", "a xylophone.")
    tokens = [base.clip.tokenize(text)["toyworld"][0] for text in texts]
    numbers = [[token for token, _ in row] for row in tokens]
    assert numbers == text_encoder.tokenize(list(texts))[0]
    assert numbers[0][1] == text_encoder.VOCABULARY["[v]"] and numbers[2][1] == text_encoder.UNKNOWN
    encoded = base.clip.encode_from_tokens(base.clip.tokenize(texts[2]))
    assert encoded.shape == (1, text_encoder.LENGTH, text_encoder.WIDTH)
    assert (encoded[0, 4:] == 0).all() and (encoded[0, :4] != 0).any(-1).all()


def test_base_follows_captions(base: studio.Studio) -> None:
    asked = [scene for scene, _ in scenes(CAPTIONS, 77)]
    videos = base.generate(base.model, [scene.caption for scene in asked], range(CAPTIONS))
    read = [oracle.read(video) for video in videos]
    right = {
        name: np.mean([getattr(r, name) == getattr(s, name) for r, s in zip(read, asked, strict=True)])
        for name in ("shape", "colour", "motion", "background")
    }
    assert min(right.values()) >= 0.85, right


@torch.inference_mode()
def test_generate_is_the_ksampler_node(base: studio.Studio) -> None:
    prompts, seeds = ["a big red square at night. it moves up.", "a small cyan disc in the snow. it spins."], [3, 4]
    ours = base.generate(base.model, prompts, seeds)
    for video, prompt, seed in zip(ours, prompts, seeds, strict=True):
        positive, negative = (nodes.CLIPTextEncode().encode(base.clip, text)[0] for text in (prompt, studio.NEGATIVE))
        empty = {"samples": torch.zeros(1, 16, 5, 8, 8)}
        (latent,) = nodes.KSampler().sample(
            base.model, seed, studio.STEPS, studio.CFG, "euler", "simple", positive, negative, empty
        )
        theirs = nodes.VAEDecode().decode(base.vae, latent)[0].mul(255)
        assert np.abs(video - theirs.cpu().numpy()).max() < 3


@torch.inference_mode()
def test_image_vae_reconstructs_at_30_db(images: studio.AnimateDiffStudio) -> None:
    drawn = np.stack([world.draw(scene, rng).video[0] for scene, rng in scenes(32, 1000)])
    frames = torch.from_numpy(drawn).float() / 255
    latents = images.vae.encode(frames)
    assert latents.shape == (32, 4, 8, 8)
    decoded = images.vae.decode(latents).cpu()
    assert 10 * torch.log10(1 / (decoded - frames).square().mean()) > 30


def test_image_model_shows_the_sprite_and_the_motion_that_are_asked_for(images: studio.AnimateDiffStudio) -> None:
    asked = [scene for scene, _ in scenes(16, 77)]
    videos = images.generate(images.model, [scene.caption for scene in asked], range(16))
    read = [oracle.read(video) for video in videos]
    for name, share in (("shape", 0.6), ("motion", 0.7), ("colour", 0.9), ("background", 0.9)):
        assert np.mean([getattr(r, name) == getattr(s, name) for r, s in zip(read, asked, strict=True)]) >= share, name
    steps = [np.linalg.norm(np.diff(reading.track[::STRIDE], axis=0), axis=1).mean() for reading in read]
    shuffled = [np.linalg.norm(np.diff(reading.track[SHUFFLED], axis=0), axis=1).mean() for reading in read]
    assert np.mean(steps) < 0.8 * np.mean(shuffled), "neighbouring frames are nearer than others"


def test_image_to_video_model_goes_on_from_the_first_frame() -> None:
    shown = studio.SvdStudio()
    drawn = [world.draw(scene, rng) for scene, rng in scenes(8, 500)]
    videos = [shown.animate(shown.model, clip.video[0], seed) for seed, clip in enumerate(drawn)]
    read = [oracle.read(video) for video in videos]
    for name in ("colour", "background"):
        assert np.mean([getattr(r, name) == getattr(c.scene, name) for r, c in zip(read, drawn, strict=True)]) >= 0.85
    first = [np.abs(video[0].astype(float) - clip.video[0]).mean() for video, clip in zip(videos, drawn, strict=True)]
    others = [
        np.abs(video[0].astype(float) - clip.video[0]).mean() for video, clip in zip(videos, drawn[::-1], strict=True)
    ]
    assert np.mean(first) < 0.3 * np.mean(others)
    assert len({reading.motion for reading in read} & set(world.MOTIONS)) >= 3


def test_following_is_1_for_the_clip_itself_and_less_for_another() -> None:
    clip, other = (steer.on_path("zigzag", seed) for seed in (1, 2))
    itself, apart = steer.follow(clip, clip.video), steer.follow(clip, other.video)
    assert itself.iou > 0.9 and itself.motion > 0.99 and itself.sprite == 1
    assert apart.iou < 0.6
    assert steer.follow(clip, np.zeros_like(clip.video)).iou == 0
    assert steer.overlap(np.array([0.0, 0, 2, 2]), np.array([1.0, 0, 3, 2])) == pytest.approx(1 / 3)


def test_a_server_generates_with_the_toy_image_model(server: Server, client: Client) -> None:
    prompt = {
        "model": node("ToyWorldImageModel", unet_name=UNET),
        "module": node("KinoloomLoadMotionModule", motion_module=MOTION),
        "video": node(
            "KinoloomApplyMotionModule", model=["model", 0], motion_module=["module", 0], context_length=9,
            context_overlap=4, beta_schedule="linear (AnimateDiff)",
        ),
        "vae": node("VAELoader", vae_name=IMAGE_VAE),
        "clip": node("ToyWorldTextEncoder", clip_name=TEXT_ENCODER),
        "positive": node("CLIPTextEncode", clip=["clip", 0], text="a big red square on a meadow. it stands still."),
        "negative": node("CLIPTextEncode", clip=["clip", 0], text=studio.NEGATIVE),
        "empty": node("EmptyLatentImage", width=world.SIZE, height=world.SIZE, batch_size=world.FRAMES),
        "latent": node(
            "KSampler", model=["video", 0], positive=["positive", 0], negative=["negative", 0], latent_image=["empty", 0],
            seed=1, steps=studio.STEPS, cfg=studio.CFG, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "frames": node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
        "saved": node("SaveImage", images=["frames", 0], filename_prefix="toy-images"),
    }  # fmt: skip
    frames = [np.asarray(Image.open(server.base / file)) for file in client.files(client.run(prompt))]
    assert len(frames) == world.FRAMES, "a clip of 17 frames in windows of 9"
    reading = oracle.read(np.stack(frames))
    assert (reading.colour, reading.background) == ("red", "meadow")


def test_a_server_generates_with_the_toy_models(server: Server, client: Client) -> None:
    prompt = {
        "model": node("UNETLoader", unet_name=WAN, weight_dtype="default"),
        "shifted": node("ModelSamplingSD3", model=["model", 0], shift=studio.SHIFT),
        "vae": node("VAELoader", vae_name=VAE),
        "clip": node("ToyWorldTextEncoder", clip_name=TEXT_ENCODER),
        "positive": node("CLIPTextEncode", clip=["clip", 0], text="a big red square at night. it moves down."),
        "negative": node("CLIPTextEncode", clip=["clip", 0], text=studio.NEGATIVE),
        "empty": node("EmptyHunyuanLatentVideo", width=world.SIZE, height=world.SIZE, length=world.FRAMES, batch_size=1),
        "latent": node(
            "KSampler", model=["shifted", 0], positive=["positive", 0], negative=["negative", 0], latent_image=["empty", 0],
            seed=1, steps=studio.STEPS, cfg=studio.CFG, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "frames": node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
        "saved": node("SaveImage", images=["frames", 0], filename_prefix="toy"),
    }  # fmt: skip
    frames = [np.asarray(Image.open(server.base / file)) for file in client.files(client.run(prompt))]
    reading = oracle.read(np.stack(frames))
    assert (reading.shape, reading.colour, reading.motion, reading.background) == ("square", "red", "down", "night")


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def contents(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    with np.load(path) as kept:
        return {key: torch.from_numpy(value) for key, value in kept.items()}


def test_training_script_makes_files_of_the_same_kind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "toyworld.train", "--share", "0.0005", "--output", str(tmp_path)]
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    subprocess.run(command, cwd=scripts.parent / "tests", env=os.environ | {"PYTHONPATH": str(scripts)}, check=True)
    for name in FILES:
        ours, shipped = (contents(folder / name) for folder in (tmp_path, MODELS))
        assert {key: (v.shape, v.dtype) for key, v in ours.items()} == {
            key: (v.shape, v.dtype) for key, v in shipped.items()
        }
        assert all(value.isfinite().all() for value in ours.values())
