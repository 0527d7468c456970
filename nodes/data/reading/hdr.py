"""Converts high dynamic range video (HLG, PQ) to standard dynamic range."""

import numpy as np
import torch
from torch import Tensor

TRANSFERS = {16: "PQ", 18: "HLG"}  # as FFmpeg numbers them
WHITE = 203.0  # reference white in nits (ITU-R BT.2408), which becomes 1 in the standard range
HLG_WHITE = 0.265  # the same as a share of HLG's peak; 75 % of the signal
KNEE, PEAK = 0.8, 1000 / WHITE  # light up to KNEE is unchanged; KNEE to PEAK is compressed to KNEE to 1

BT2020_TO_SRGB = torch.tensor(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=torch.float32
)


def to_standard(pixels: np.ndarray, transfer: int) -> Tensor:
    """16-bit pixels [H, W, 3] in BT.2020 to sRGB in 0..1. Colours within the standard range keep their values."""
    levels = _hlg() if TRANSFERS[transfer] == "HLG" else _pq()
    light = levels[torch.from_numpy(pixels.astype(np.int32))] @ BT2020_TO_SRGB.T
    light = light.clamp_min(0)
    brightest = light.amax(-1, keepdim=True)
    light = (light * (_squeezed(brightest) / brightest.clamp_min(1e-6))).clamp(0, 1)
    return torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _squeezed(light: Tensor) -> Tensor:
    over, most = (light - KNEE) / (1 - KNEE), (PEAK - KNEE) / (1 - KNEE)
    return torch.where(light <= KNEE, light, KNEE + (1 - KNEE) * over * (1 + over / most**2) / (1 + over))


def _hlg() -> Tensor:
    """Linear light of each of the 65536 signal levels (ITU-R BT.2100), with reference white as 1."""
    signal = torch.linspace(0, 1, 65536, dtype=torch.float64)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    light = torch.where(signal <= 0.5, signal**2 / 3, (torch.exp((signal - c) / a) + b) / 12)
    return (light / HLG_WHITE).float()


def _pq() -> Tensor:
    signal = torch.linspace(0, 1, 65536, dtype=torch.float64) ** (32 / 2523)
    light = ((signal - 0.8359375).clamp_min(0) / (18.8515625 - 18.6875 * signal)) ** (8192 / 1305)
    return (10000 / WHITE * light).float()
