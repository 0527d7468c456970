"""Orthogonal bases for adapters: LoRAs in different bins of a layer's basis write into orthogonal subspaces.

As in the original, the frozen factor is `up`, on the side of the output; Po et al. (arXiv 2312.02432) freeze the other.
The original shares random bases as files. A basis made here depends on the name and the width of its layer alone, so
adapters of different machines fit together without files.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ...lora_io.pickled import unpickled


def basis(name: str, width: int) -> Tensor:
    """An orthogonal matrix [width, width] in fp64 for the layer `name`, equal to the bit on every machine.

    A Walsh-Hadamard matrix of the power of two in `width`, times a reflection of the odd rest, with rows and columns
    shuffled and signed by a hash. Each entry is one product of correctly rounded numbers.
    """
    power = width & -width
    odd = width // power
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    reflection = torch.eye(odd, dtype=torch.float64) - 2 / odd if odd > 1 else torch.ones(1, 1, dtype=torch.float64)
    root = torch.tensor(power, dtype=torch.float64).sqrt()
    mixed = torch.kron(reflection, hadamard) / root
    for side in ("rows", "columns"):
        drawn = [hashlib.sha256(f"{name} {side} {place}".encode()).digest() for place in range(width)]
        order = sorted(range(width), key=lambda place: drawn[place])
        signs = torch.tensor([1.0 if digest[0] & 1 else -1.0 for digest in drawn], dtype=torch.float64)
        mixed = (mixed[order] * signs.unsqueeze(1)).T
    return mixed


def read_basis(folder: Path, name: str, width: int) -> Tensor:
    """The basis of a layer in a folder of the original's, `<name>.pt`. ValueError for another shape or no file."""
    path = folder / f"{name}.pt"
    if not path.is_file():
        raise ValueError(f"oa_bases={str(folder)!r}: has no {path.name}")
    try:
        found = unpickled(path)
    except ValueError as error:
        raise ValueError(f"oa_bases={str(folder)!r}: {error}") from error
    if not isinstance(found, Tensor) or found.shape != (width, width):
        shape = (*found.shape,) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"oa_bases={str(folder)!r}: {path.name} holds {shape}, expected a matrix of {(width, width)}")
    return found.double()


def columns_of(matrix: Tensor, bin: int, rank: int) -> Tensor:
    """The columns of a bin, [width, rank] in fp32. ValueError if the matrix has fewer bins."""
    require_bin(bin, rank, len(matrix))
    return matrix[:, bin * rank : (bin + 1) * rank].float().contiguous()


def require_bin(bin: int, rank: int, width: int) -> None:
    """ValueError unless the basis of a layer of this width has the bin."""
    bins = width // rank
    if not 0 <= bin < bins:
        found = f"expected 0..{bins - 1}" if bins else "there is none"
        raise ValueError(f"oa_bin={bin}: {found} for rank {rank} and a layer of {width} channels")
