"""Scenes of two sprites: what is drawn, what the oracle reads back, and what the models of them have learned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toyworld import animate, deltas, pair_oracle, pairs, world
from toyworld.install import MODELS, MOTION, PAIRS_MOTION, PAIRS_UNET, UNET, unpacked
from toyworld.lessons import CONCEPTS
from toyworld.studio import PairStudio


@pytest.fixture(scope="module")
def studio() -> PairStudio:
    return PairStudio()


@pytest.mark.parametrize("count", [1, 2])
def test_oracle_reads_each_sprite_of_drawn_stages(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(60):
        clip = pairs.draw(pairs.choose(rng, count), rng)
        seen = pair_oracle.read(clip.video, clip.scene)
        assert [(s.shape, s.motion) for s in seen] == [(actor.shape, actor.motion) for actor in clip.scene.actors]
        assert all(np.abs(s.track - track).max() < 1 for s, track in zip(seen, clip.tracks, strict=True))


@pytest.mark.parametrize(("ours", "theirs"), [("zigzag", "swing"), ("bounce", "eight"), ("swing", "eight")])
def test_each_sprite_of_a_pair_follows_its_own_new_motion_and_not_the_other(ours: str, theirs: str) -> None:
    actors = (pairs.Actor("square", "red", ours, "left"), pairs.Actor("disc", "green", theirs, "right"))
    clip = pairs.draw(pairs.Stage(actors, "snow"), np.random.default_rng(0))
    first, second = pair_oracle.read(clip.video, clip.scene)
    assert (first.motion, second.motion) == (ours, theirs)
    assert min(pair_oracle.correlation(first.track, ours), pair_oracle.correlation(second.track, theirs)) > 0.98
    assert max(abs(pair_oracle.correlation(s.track, m)) for s, m in ((first, theirs), (second, ours))) < 0.1


def test_a_sprite_that_is_not_there_is_not_read() -> None:
    stage = pairs.Stage((pairs.Actor("square", "red", "left"), pairs.Actor("disc", "blue", "up")), "meadow")
    alone = pairs.draw(pairs.Stage(stage.actors[:1], "meadow"), np.random.default_rng(0))
    first, second = pair_oracle.read(alone.video, stage)
    assert (first.shape, first.motion, first.seen) == ("square", "left", 1.0)
    assert (second.shape, second.motion, second.seen) == ("none", "none", 0.0)
    assert pair_oracle.correlation(second.track, "up") == 0


def test_sprites_of_a_pair_never_meet_and_stay_in_the_picture() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        masks = np.stack(pairs.draw(pairs.choose(rng, 2), rng).masks)
        assert (masks > 0).sum(0).max() == 1
        assert masks.sum((2, 3)).min() > 50


def test_base_training_of_stages_sees_nothing_that_is_held_out() -> None:
    rng = np.random.default_rng(0)
    actors = [actor for _ in range(1000) for actor in pairs.choose(rng, 2).actors]
    assert {actor.motion for actor in actors} == {"still", *pairs.PATHS}
    assert not {pair for a in actors for pair in ((a.shape, a.motion), (a.shape, a.colour))} & world.NEW_COMBINATIONS


def test_captions_name_each_sprite_and_its_motion() -> None:
    actors = (pairs.Actor("square", "red", "left", "left"), pairs.Actor("disc", "green", "still", "right"))
    whole = "a red square and a green disc in the snow. the square moves to the left. the disc stands still."
    stage = pairs.Stage(actors, "snow")
    assert stage.caption == whole
    rng = np.random.default_rng(0)
    said = [pairs.describe(stage, rng) for _ in range(200)]
    assert whole in said and any("the thing" in text for text in said) and any("moving" in text for text in said)
    assert not any(word in text for text in said for word in ("[u]", "[v]"))
    assert pairs.Stage(actors[:1], "snow").caption == "a red square in the snow. it moves to the left."


def test_unpacked_models_are_their_bases_plus_the_kept_differences(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    before = {"unet.weight": torch.randn(8, 3, 3, 3, generator=generator), "unet.bias": torch.zeros(5)}
    after = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in before.items()}
    save_file({name.removeprefix("unet."): value for name, value in before.items()}, tmp_path / "base.safetensors")
    deltas.write(tmp_path / "kept.npz", before, after)
    deltas.unpack(tmp_path / "kept.npz", "unet", tmp_path / "base.safetensors", tmp_path / "made.safetensors")
    for name, value in load_file(tmp_path / "made.safetensors").items():
        asked = after[f"unet.{name}"]
        assert value.dtype == torch.float16
        assert (value - asked).abs().max() < 0.02 * (asked - before[f"unet.{name}"]).abs().max() + 1e-3


@pytest.mark.parametrize("name", [PAIRS_UNET, PAIRS_MOTION])
def test_models_of_pairs_are_ordinary_files(name: str) -> None:
    made, base = load_file(unpacked() / name), load_file(MODELS / {PAIRS_UNET: UNET, PAIRS_MOTION: MOTION}[name])
    assert {key: value.shape for key, value in made.items()} == {key: value.shape for key, value in base.items()}
    assert any(not torch.equal(value, base[key]) for key, value in made.items())


def test_model_of_pairs_draws_the_sprites_of_a_caption(studio: PairStudio) -> None:
    rng = np.random.default_rng(51)
    stages = [pairs.choose(rng, count) for count in (1, 1, 1, 1, 2, 2, 2, 2)]
    videos = studio.generate(studio.model, [stage.caption for stage in stages], range(len(stages)))
    seen = [sight.seen for stage, video in zip(stages, videos, strict=True) for sight in pair_oracle.read(video, stage)]
    assert np.mean(seen) > 0.7


def test_model_of_pairs_goes_on_from_a_picture_of_two_sprites(studio: PairStudio) -> None:
    lessons = CONCEPTS["square and disc"]
    model, looks = studio.with_adapters([], "residual"), []
    for picture in animate.pictures(lessons, 0, 3):
        video, kept = studio.animate(model, picture.image, picture.look, 0, 1.0)
        assert kept
        looks += [one.look for one in animate.score(video, picture, lessons)]
    assert np.mean(looks) > 0.4


def test_a_clip_of_a_lesson_scores_as_its_motion_and_a_still_picture_as_none() -> None:
    lessons = CONCEPTS["square and disc"]
    (picture,) = animate.pictures(lessons, 0, 1)
    actors = tuple(replace(a, motion=b.motion) for a, b in zip(picture.stage.actors, lessons, strict=True))
    moving = pairs.draw(replace(picture.stage, actors=actors), np.random.default_rng(0)).video
    for one in animate.score(moving, picture, lessons):
        assert one.own > 0.98 and abs(one.other) < 0.1 and one.look > 0.75
    for one in animate.score(picture.image[None].repeat(world.FRAMES, 0), picture, lessons):
        assert (one.own, one.other, one.look) == (0, 0, 1)
    gone = picture.image[None].repeat(world.FRAMES, 0)
    gone[1:] = gone[1:, :1, :1]
    assert all(one.look < 0.1 for one in animate.score(gone, picture, lessons))
