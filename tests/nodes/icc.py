"""Colour profiles, written by hand, and the colours that they mean in sRGB."""

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])  # to D50
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _curve(gamma: float) -> bytes:
    """gamma 0 is sRGB's own curve."""
    if not gamma:
        return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para\0\0\0\0" + struct.pack(">HH", 0, 0) + _fixed(gamma)


def _profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"wtpt": _xyz(D50), **tags}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = struct.pack(">I", start + len(body))
    header = size + b"lcms" + bytes.fromhex("04200000") + kind + space + pcs + bytes(12) + b"acsp" + bytes(28)
    return (header + _xyz(D50)[8:]).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def rgb_profile(matrix: np.ndarray, gamma: float) -> bytes:
    columns = {name: _xyz(tuple(matrix[:, i])) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return _profile(
        b"mntr", b"RGB ", b"XYZ ", columns | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma))
    )


def grey_profile(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def ink_profile(lightness: int = 128) -> bytes:
    """CMYK in which the first ink alone is a neutral grey of this lightness, of 255, and any other ink is black."""
    ramp = bytes(range(256))
    nodes = b"".join(
        bytes([(255, lightness)[bool(node & 8)] if not node & 7 else 0, 128, 128]) for node in range(16)
    )  # of a grid of 2 x 2 x 2 x 2, cyan outermost, in Lab
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + nodes + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


def in_srgb(colour: tuple[int, ...], matrix: np.ndarray, gamma: float) -> np.ndarray:
    """The nearest colour of 8 bits in sRGB, by the definitions of the two colour spaces."""
    value = np.array(colour) / 255
    linear = value**gamma if gamma else np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    linear = (np.linalg.inv(SRGB) @ matrix @ linear).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
