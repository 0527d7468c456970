"""Orthogonal bases that every machine makes alike, and their bins."""

import hashlib
from pathlib import Path

import pytest
import torch
from kinoloom.trainers.conditions.adapter_bases import basis, columns_of, read_basis
from torch import Tensor

from ..rows import random

NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora"
# The first digits of the SHA-256 of a basis's bytes. Adapters of other machines were made with them.
RECORDED = {
    320: "1da8caaffa4e21ff",
    640: "1af84c984e63e009",
    1280: "b80251b9d170ad9d",
    64: "2b68dec1de0c5837",
    24: "c598f6f1b168a266",
    7: "bd39388aa4c82777",
}


@pytest.mark.parametrize("width", RECORDED)
def test_a_basis_is_orthogonal_and_the_same_to_the_bit_on_every_machine(width: int) -> None:
    made = basis(NAME, width)
    assert made.shape == (width, width) and made.dtype == torch.float64
    assert (made.T @ made - torch.eye(width, dtype=torch.float64)).abs().max() < 2e-14
    assert (made @ made.T - torch.eye(width, dtype=torch.float64)).abs().max() < 2e-14
    assert hashlib.sha256(made.contiguous().numpy().tobytes()).hexdigest()[:16] == RECORDED[width]


def test_every_layer_has_its_own_basis() -> None:
    assert not torch.equal(basis(NAME, 64), basis(NAME.replace("out", "q"), 64))


@pytest.mark.parametrize(("width", "rank"), [(320, 32), (64, 8), (40, 12)])
def test_adapters_of_different_bins_write_into_orthogonal_subspaces(width: int, rank: int) -> None:
    """dW_1^T dW_2 = A_1^T B_1^T B_2 A_2 = 0 for every A, where an adapter of the same bin overlaps."""
    bins = [columns_of(basis(NAME, width), number, rank) for number in range(width // rank)]
    updates = [up.double() @ random(rank, 16, name=f"down {number}").double() for number, up in enumerate(bins)]
    for number, one in enumerate(updates):
        for other in updates[number + 1 :]:
            assert (one.T @ other).norm() < 1e-6 * one.norm() * other.norm()
    again = bins[0].double() @ random(rank, 16, name="another down").double()
    assert (updates[0].T @ again).norm() > 0.01 * updates[0].norm() * again.norm()
    assert all(up.shape == (width, rank) and up.dtype == torch.float32 for up in bins)


def test_bins_are_neighbouring_columns() -> None:
    matrix = torch.arange(36.0).view(6, 6).double()
    assert torch.equal(columns_of(matrix, 2, 2), matrix[:, 4:6].float())


@pytest.mark.parametrize(("bin", "bins"), [(10, 10), (-1, 10), (400, 10)])
def test_a_bin_that_a_layer_lacks_is_named(bin: int, bins: int) -> None:
    """The original reduces the number, so that two motions share a bin without a word."""
    with pytest.raises(ValueError, match=rf"^oa_bin={bin}: expected 0\.\.{bins - 1} for rank 32 and a layer of 320 channels$"):
        columns_of(torch.eye(320), bin, 32)


def test_a_rank_above_the_width_has_no_bins() -> None:
    with pytest.raises(ValueError, match="^oa_bin=0: "):
        columns_of(torch.eye(16), 0, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_folder_of_bases_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = torch.linalg.qr(random(8, 8, name="basis"))[0].to(dtype)
    torch.save(matrix, tmp_path / f"{NAME}.pt")
    assert torch.equal(read_basis(tmp_path, NAME, 8), matrix.double())


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (None, f"has no {NAME}.pt"),
        (torch.eye(4), r"holds \(4, 4\), expected a matrix of \(8, 8\)"),
        (b"damaged", "not a readable torch file"),
        ({"a": torch.eye(8)}, r"holds dict, expected a matrix of \(8, 8\)"),
    ],
)
def test_another_file_in_a_folder_of_bases_is_named(
    tmp_path: Path, held: Tensor | dict | bytes | None, message: str
) -> None:
    if isinstance(held, bytes):
        (tmp_path / f"{NAME}.pt").write_bytes(held)
    elif held is not None:
        torch.save(held, tmp_path / f"{NAME}.pt")
    with pytest.raises(ValueError, match=rf"^oa_bases=.*: .*{message}"):
        read_basis(tmp_path, NAME, 8)
