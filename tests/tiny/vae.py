"""Writes a tiny Wan 2.1 VAE whose decode(encode(x)) is x averaged over 8x8 pixels, every frame kept.

A random VAE turns every clip into mud, so this one is built to carry pixels through core's real modules. The four
frames of a latent step lie side by side in its channels (3 colours x 4 frames = 12 of 16; the first step holds one):
- shortcuts and resamplers copy channels; residual and attention branches are random and small;
- the last channel of every level holds the constant ANCHOR, far above the colours, so RMS norm divides by a constant;
- silu(x) - silu(-x) = x: a head fed with each channel in both signs is linear.
"""

import math
from pathlib import Path

import torch

from .weights import StateDict, Weights, save

LATENT_CHANNELS = 16
COLOURS = 3
STEP_COLOURS = 12  # the colours of the four frames of one latent step
ANCHOR = 30.0
LATENT_GAIN = 4.0  # latents of ordinary clips come out near unit variance after Wan's normalisation
NOISE = 0.01


def write_wan_vae(path: Path, *, dim: int = 8, seed: int = 0) -> None:
    """Write a VAE for VAELoader."""
    if dim < 8:
        raise ValueError(
            f"dim={dim}: expected at least 8, the last level must hold a frame in both signs and the anchor"
        )
    make = Weights(seed)
    pointwise = (1, 1, 1)
    tensors = {
        **_encoder(make, dim),
        **_copy(make, "conv1", 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, pointwise, _same(2 * LATENT_CHANNELS)),
        **_copy(make, "conv2", LATENT_CHANNELS, LATENT_CHANNELS, pointwise, _same(LATENT_CHANNELS)),
        **_decoder(make, dim),
    }
    save(path, tensors)


Taps = dict[tuple[int, int], float]  # (output channel, input channel) -> weight at the current position


def _same(count: int) -> Taps:
    return {(channel, channel): 1.0 for channel in range(count)}


def _mirrored(count: int, offset: int, gain: float = 1.0) -> Taps:
    """Channels 0..count, and again with the opposite sign from `offset` on."""
    return {**{(i, i): gain for i in range(count)}, **{(offset + i, i): -gain for i in range(count)}}


def _encoder(make: Weights, dim: int) -> StateDict:
    base, wide, top = dim, 2 * dim, 4 * dim
    down = "encoder.downsamples"
    tensors = {
        **_anchored(_copy(make, "encoder.conv1", base, COLOURS, (3, 3, 3), _same(COLOURS))),
        **_residual(make, f"{down}.0", base, base),
        **_residual(make, f"{down}.1", base, base),
        **_halve(make, f"{down}.2", base, _same(3)),
        **_residual(make, f"{down}.3", base, wide),
        **_residual(make, f"{down}.4", wide, wide),
        **_halve(make, f"{down}.5", wide, _same(3)),
        **_join_frames(make, f"{down}.5.time_conv", wide, starts={0: 0}, size=3),
        **_residual(make, f"{down}.6", wide, top),
        **_residual(make, f"{down}.7", top, top),
        **_halve(make, f"{down}.8", top, _mirrored(6, STEP_COLOURS)),
        **_join_frames(make, f"{down}.8.time_conv", top, starts={0: 0, STEP_COLOURS: STEP_COLOURS}, size=6),
        **_residual(make, f"{down}.9", top, top),
        **_residual(make, f"{down}.10", top, top),
        **_middle(make, "encoder.middle", top),
    }
    return tensors | _head(make, "encoder.head", 2 * LATENT_CHANNELS, top, STEP_COLOURS, LATENT_GAIN)


def _decoder(make: Weights, dim: int) -> StateDict:
    base, wide, top = dim, 2 * dim, 4 * dim
    up = "decoder.upsamples"
    unscaled = {(i, i): 1 / LATENT_GAIN for i in range(STEP_COLOURS)}
    tensors = {
        **_anchored(_copy(make, "decoder.conv1", top, LATENT_CHANNELS, (3, 3, 3), unscaled)),
        **_middle(make, "decoder.middle", top),
    }
    for first, width_in, width in ((0, top, top), (4, wide, top), (8, wide, wide), (12, base, base)):
        for index, block_in in enumerate((width_in, width, width)):
            tensors |= _residual(make, f"{up}.{first + index}", block_in, width)
    tensors |= _split_frames(make, f"{up}.3.time_conv", top, size=6)
    tensors |= _anchor_kept(_copy(make, f"{up}.3.resample.1", wide, top, (3, 3), _same(6)))
    tensors |= _split_frames(make, f"{up}.7.time_conv", top, size=3)
    tensors |= _anchor_kept(_copy(make, f"{up}.7.resample.1", wide, top, (3, 3), _same(3)))
    tensors |= _anchor_kept(_copy(make, f"{up}.11.resample.1", base, wide, (3, 3), _mirrored(COLOURS, COLOURS)))
    return tensors | _head(make, "decoder.head", COLOURS, base, COLOURS, 1.0)


def _copy(
    make: Weights, name: str, out_width: int, in_width: int, kernel: tuple[int, ...], taps: Taps, at: int = -1
) -> StateDict:
    """A convolution: noise, plus `taps` at the centre in space and at step `at` in (causal) time."""
    weight = make.normal(out_width, in_width, *kernel, std=NOISE / math.sqrt(in_width * math.prod(kernel)))
    centre = tuple(size // 2 for size in kernel[-2:])
    position = centre if len(kernel) == 2 else (at, *centre)
    for (out_channel, in_channel), value in taps.items():
        weight[(out_channel, in_channel, *position)] = value
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(out_width)}


def _anchored(conv: StateDict) -> StateDict:
    """The convolution with its last channel made the constant anchor."""
    weight, bias = conv.values()
    weight[-1] = 0
    bias[-1] = ANCHOR
    return conv


def _anchor_kept(conv: StateDict) -> StateDict:
    """The convolution with the anchor passed on, and kept out of every other channel."""
    weight, _ = conv.values()
    weight[-1] = 0
    weight[:, -1] = 0
    now = tuple(size // 2 for size in weight.shape[-2:])
    weight[(-1, -1, *now) if weight.ndim == 4 else (-1, -1, -1, *now)] = 1
    return conv


def _residual(make: Weights, name: str, in_width: int, out_width: int) -> StateDict:
    tensors = {}
    for index, width, gain in ((2, in_width, 1.0), (6, out_width, NOISE)):
        conv = f"{name}.residual.{index}"
        tensors[f"{name}.residual.{0 if index == 2 else 3}.gamma"] = 1 + make.normal(width, 1, 1, 1, std=0.1)
        tensors[f"{conv}.weight"] = make.normal(out_width, width, 3, 3, 3, std=gain / math.sqrt(width * 27))
        tensors[f"{conv}.bias"] = torch.zeros(out_width)
    tensors[f"{name}.residual.6.weight"][-1] = 0
    if in_width != out_width:
        shortcut = _copy(make, f"{name}.shortcut", out_width, in_width, (1, 1, 1), _same(in_width - 1))
        tensors |= _anchor_kept(shortcut)
    return tensors


def _halve(make: Weights, name: str, width: int, taps: Taps) -> StateDict:
    """Average 2x2 pixels; the layer pads right and bottom, so they are the first two taps each way."""
    conv = _copy(make, f"{name}.resample.1", width, width, (3, 3), {})
    weight = conv[f"{name}.resample.1.weight"]
    weight[:, -1] = 0
    weight[-1] = 0
    for (out_channel, in_channel), value in (taps | {(-1, -1): 1.0}).items():
        weight[out_channel, in_channel, :2, :2] = value / 4
    return conv


def _join_frames(make: Weights, name: str, width: int, starts: dict[int, int], size: int) -> StateDict:
    """Stride 2 over (previous, first, second): `size` channels of the first frame, then the same of the second."""
    conv = _anchor_kept(_copy(make, name, width, width, (3, 1, 1), {}))
    for out_start, in_start in starts.items():
        for i in range(size):
            conv[f"{name}.weight"][out_start + i, in_start + i, 1] = 1
            conv[f"{name}.weight"][out_start + size + i, in_start + i, 2] = 1
    return conv


def _split_frames(make: Weights, name: str, width: int, size: int) -> StateDict:
    """One step becomes two frames: channels 0..size, then channels size..2*size moved to the same place."""
    first = _anchor_kept(_copy(make, name, width, width, (3, 1, 1), _same(size)))
    second = _anchor_kept(_copy(make, name, width, width, (3, 1, 1), {(i, size + i): 1.0 for i in range(size)}))
    return {key: torch.cat([first[key], second[key]]) for key in first}


def _middle(make: Weights, name: str, width: int) -> StateDict:
    proj = make.normal(width, width, 1, 1, std=NOISE / math.sqrt(width))
    proj[-1] = 0
    return {
        **_residual(make, f"{name}.0", width, width),
        f"{name}.1.norm.gamma": 1 + make.normal(width, 1, 1, std=0.1),
        f"{name}.1.to_qkv.weight": make.normal(3 * width, width, 1, 1, std=width**-0.5),
        f"{name}.1.to_qkv.bias": torch.zeros(3 * width),
        f"{name}.1.proj.weight": proj,
        f"{name}.1.proj.bias": torch.zeros(width),
        **_residual(make, f"{name}.2", width, width),
    }


def _head(make: Weights, name: str, out_width: int, width: int, colours: int, gain: float) -> StateDict:
    """Undo the norm's division by the anchor while joining the two signs of each channel."""
    scale = gain * ANCHOR / math.sqrt(width)
    taps = {(i, i): scale for i in range(colours)} | {(i, colours + i): -scale for i in range(colours)}
    conv = _copy(make, f"{name}.2", out_width, width, (3, 3, 3), taps)
    conv[f"{name}.2.weight"][:, -1] = 0
    return {f"{name}.0.gamma": torch.ones(width, 1, 1, 1), **conv}
