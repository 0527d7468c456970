"""Attention maps of sampler runs, against maps made from the inputs of every cross-attention, one frame at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.sample
import pytest
import torch
from kinoloom.nodes.adapters.apply import ApplyI2vAdapters
from kinoloom.nodes.adapters.loading import Loaded
from kinoloom.nodes.adapters.maps import RecordAttentionMaps, ShowAttentionMaps
from kinoloom.nodes.animatediff import modules as motion
from kinoloom.nodes.hooked import patcher_of
from kinoloom.trainers.conditions.adapter import Query, spatial_blocks
from torch import Tensor

from ..plain_positions import before_queries, of_queries, of_tokens
from ..rows import TEXT_WIDTH, random
from ..runs import load_animatediff
from .test_adapters import backbone, heads, make_adapter, update  # noqa: F401

SIZE = (8, 16)
LEVELS = {
    "high": ("down_blocks.0", "up_blocks.3"),
    "middle": ("down_blocks.1", "up_blocks.2"),
    "low": ("down_blocks.2", "up_blocks.1"),
}
PLACES = {"a": ("", "water", "fall", "water", ""), "b": ("", "clouds", "", "", "", "slow", "")}


@pytest.fixture(scope="module")
def applied(tiny_models: Path) -> Any:
    return load_animatediff(tiny_models, beta_schedule=motion.KEEP)


def make_loaded(backbone: Any, name: str, weight: float, query: Query) -> Loaded:  # noqa: F811
    prompt = random(1, len(PLACES[name]), TEXT_WIDTH, name=name)
    return Loaded(name, patcher_of(make_adapter(backbone, name, query)), weight, prompt, PLACES[name])


def record(model: Any, adapters: tuple[Loaded, ...], mode: str = "residual") -> tuple[Any, Any]:
    with torch.inference_mode():
        return RecordAttentionMaps.execute(ApplyI2vAdapters.execute(model, adapters, mode).args[0]).args


def sample(model: Any, frames: int = 3, cfg: float = 1.0, seed: str = "noise", positive: Any = None) -> dict[str, Tensor]:
    samples, mask = torch.zeros(frames, 4, *SIZE), torch.ones(frames, *SIZE)
    samples[0], mask[0] = random(4, *SIZE, name="picture"), 0
    plain, negative = ([[random(1, 7, TEXT_WIDTH, name=name), {}]] for name in ("positive", "negative"))
    with torch.inference_mode():
        return {"samples": comfy.sample.sample(
            model, random(*samples.shape, name=seed), 2, cfg, "euler", "normal", positive or plain, negative, samples, seed=1,
            noise_mask=mask, disable_pbar=True,
        )}  # fmt: skip


class Calls:
    """The input of every cross-attention of a model, with its place and the sampler's options."""

    def __init__(self, model: Any) -> None:
        self.calls: list[tuple[str, Tensor, dict]] = []
        unet = model.model.diffusion_model
        self.handles = [block.attn2.register_forward_hook(self.hook(place), with_kwargs=True) for place, block in spatial_blocks(unet).items()]

    def hook(self, place: str) -> Any:
        return lambda layer, inputs, given, output: self.calls.append((place, inputs[0], dict(given["transformer_options"])))

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def small(x: Tensor, stride: int) -> Tensor:
    """x [B, F, h, w, C] at every stride-th row and column."""
    return x if stride == 1 else x[:, :, ::stride, ::stride]


def plain_maps(
    calls: Calls, unet: Any, adapters: tuple[Loaded, ...], mode: str, frames: int, size: tuple[int, int]
) -> dict[tuple[int, str, str], Tensor]:
    """The map [F, h, w] of each adapter's words by number, word and level."""
    blocks, sums, counts = spatial_blocks(unet), {}, {}
    parts = [one.patcher.model for one in adapters]
    for place, x, options in calls.calls:
        level = next((name for name, own in LEVELS.items() if place.startswith(own)), None)
        if level is None:
            continue
        attn2, chunks = blocks[place].attn2, options["cond_or_uncond"]
        halved = list(LEVELS).index(level)
        height, width = size[0] >> halved, size[1] >> halved
        clip = x.double().view(len(chunks), -1, height, width, x.shape[-1])[chunks.index(0)][None]
        window = options.get("context_window")
        own = list(range(clip.shape[1])) if window is None else window.index_list
        own = [0] * (clip.shape[1] - len(own)) + own
        keys, query = [], parts[0].query
        x_in = before_queries(query.positions, small(clip, query.stride))
        q = x_in @ attn2.to_q.weight.double().T
        for one, adapter in zip(adapters, parts, strict=True):
            cross = adapter.part("cross", place).double()
            q = q + one.weight * update(cross, "to_q_lora", x_in, 1.0)
            e, factor = one.prompt.double(), one.weight if mode == "weights" else 1.0
            k = e @ attn2.to_k.weight.double().T + factor * update(cross, "to_k_lora", e, 1.0)
            keys.append(of_tokens(query.positions, "k", k, clip.shape[1]))
            cross.float()
        q = of_queries(query.positions, q)
        for group in [[0, 1][: len(adapters)]] if mode == "weights" else [[n] for n in range(len(adapters))]:
            for local, frame in enumerate(own):
                scores = heads(q[0, local].flatten(0, 1)) @ heads(torch.cat([keys[n][0] for n in group])).transpose(-1, -2)
                share = (scores / (q.shape[-1] / 8) ** 0.5).softmax(-1).mean(0)
                for n, part in zip(group, share.split([keys[n].shape[1] for n in group], dim=1), strict=True):
                    words = adapters[n].places
                    for column in range(part.shape[1]):
                        key = n, words[column % len(words)], level
                        kept = sums.setdefault(key, torch.zeros(frames, *q.shape[2:4], dtype=torch.float64))
                        kept[frame] += part[:, column].view(*q.shape[2:4])
                    count = counts.setdefault((n, level), torch.zeros(frames))
                    count[frame] += 1
    return {key: value / counts[key[0], key[2]].view(-1, 1, 1) for key, value in sums.items() if key[1]}


CASES: dict[str, dict[str, Any]] = {
    "residual, two adapters": {"weights": (0.3, 0.7), "cfg": 7.5},
    "weights, two adapters": {"weights": (0.3, 0.7), "mode": "weights"},
    "coarse queries with places": {"weights": (1.0,), "query": Query("rope_3d", 2), "cfg": 7.5},
    "keys of every frame": {"weights": (1.0,), "query": Query("ropeQK_1d", 2)},
    "windows": {"weights": (0.8,), "query": Query("none", 1), "cfg": 7.5, "frames": 7},
}


@pytest.mark.parametrize("case", CASES)
def test_maps_are_the_mean_softmax_of_the_positive_prompts_queries(backbone: Any, tiny_models: Path, applied: Any, case: str) -> None:  # noqa: F811
    options = {"mode": "residual", "query": Query(), "cfg": 1.0, "frames": 3, **CASES[case]}
    base = load_animatediff(tiny_models, context_length=4, context_overlap=1, beta_schedule=motion.KEEP) if case == "windows" else applied
    adapters = tuple(make_loaded(backbone, name, weight, options["query"]) for name, weight in zip("ab", options["weights"], strict=False))
    model, maps = record(base, adapters, options["mode"])
    with Calls(model) as calls:
        sample(model, options["frames"], options["cfg"])
    unet = model.model.diffusion_model
    expected = plain_maps(calls, unet, adapters, options["mode"], options["frames"], SIZE)
    chunks = {tuple(sorted(given["cond_or_uncond"])) for _, _, given in calls.calls}
    assert chunks == ({(0,)} if options["cfg"] == 1.0 else {(0, 1)} if len(chunks) == 1 else {(0,), (1,)})
    assert any("context_window" in given for *_, given in calls.calls) == (case == "windows")
    assert {level for *_, level in expected} == {*LEVELS} and len({word for _, word, _ in expected}) == 2 * len(adapters)
    for (number, word, level), own in expected.items():
        found = maps.of_word(number, word, level, tuple(own.shape[1:]))
        torch.testing.assert_close(found, own.float(), rtol=1e-3, atol=1e-5)
    spread = [own.amax() - own.amin() for own in expected.values()]
    assert min(spread) > 1e-3, "the maps show something"


def test_recording_changes_nothing_and_forgets_the_run_before(backbone: Any, applied: Any) -> None:  # noqa: F811
    adapters = (make_loaded(backbone, "a", 1.0, Query()),)
    model, maps = record(applied, adapters)
    with torch.inference_mode():
        plain = ApplyI2vAdapters.execute(applied, adapters).args[0]
    first = sample(model)
    assert torch.equal(first["samples"], sample(plain)["samples"])
    once = maps.of_word(0, "water", "high", SIZE)
    sample(model, frames=2, seed="other")
    assert maps.frames == 2 and maps.of_word(0, "water", "high", SIZE).shape == (2, *SIZE)
    sample(model)
    assert torch.equal(maps.of_word(0, "water", "high", SIZE), once)


def show(maps: Any, samples: dict[str, Tensor], **options: Any) -> tuple[Tensor, str]:
    given = {"adapter": 1, "words": "", "resolution": "middle", "scale": "global", "frame_height": 16, **options}
    return ShowAttentionMaps.execute(maps, samples, **given).args


@pytest.fixture(scope="module")
def recorded(backbone: Any, applied: Any) -> Iterator[tuple[Any, dict[str, Tensor]]]:  # noqa: F811
    adapters = tuple(make_loaded(backbone, name, weight, Query()) for name, weight in (("a", 1.0), ("b", 0.0)))
    wordless = Loaded("c", adapters[0].patcher, 0.1, None)
    model, maps = record(applied, (*adapters, wordless))
    yield maps, sample(model)


def test_strips_show_words_in_the_order_of_their_labels(recorded: tuple[Any, dict[str, Tensor]]) -> None:
    maps, samples = recorded
    strips, labels = show(maps, samples, resolution="all")
    assert labels.split("\n") == [f"{word}, {level}" for word in ("water", "fall") for level in ("low", "middle", "high")]
    assert strips.shape == (6, 16, 3 * 32, 3) and strips.dtype == torch.float32
    for strip, label in zip(strips, labels.split("\n"), strict=True):
        own = maps.of_word(0, *label.split(", "), (16, 32))
        frames = torch.stack(strip[..., 1].split(32, dim=1))
        torch.testing.assert_close(frames, own / own.max())
    only, label = show(maps, samples, words=" FALL,", resolution="high", scale="per_frame")
    assert label == "fall, high" and only.shape == (1, 16, 96, 3)
    assert all(frame.max() == 1 for frame in only[0].split(32, dim=1))
    assert len(show(maps, samples, words="water fall water")[0]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": "water, fire"}, "words='water, fire': 'fire' is not in the prompt, expected some of water, fall"),
        ({"adapter": 4}, "adapter=4: expected 1..3, as many as Apply I2V Adapters has"),
        ({"adapter": 3}, "adapter=3: has no prompt of its own. Write it into prompt of Load I2V Adapter"),
        ({"adapter": 2}, "adapter=2: nothing was recorded for it. Its weight must not be 0"),
    ],
)
def test_what_no_map_can_show_is_said(recorded: tuple[Any, dict[str, Tensor]], options: dict[str, Any], message: str) -> None:
    maps, samples = recorded
    with pytest.raises(ValueError) as raised:
        show(maps, samples, **options)
    assert str(raised.value).startswith(message)


def test_samples_of_another_video_and_models_without_adapters_are_refused(recorded: tuple[Any, dict[str, Tensor]], applied: Any) -> None:
    maps, samples = recorded
    with pytest.raises(ValueError, match="^samples: 2 frames, expected the 3 of the sampler that was recorded last$"):
        show(maps, {"samples": samples["samples"][:2]})
    with pytest.raises(ValueError, match="^model: has no adapters, of whose prompts maps show the words"):
        RecordAttentionMaps.execute(applied)
