"""Random rotations are orthonormal, are undone, and spread one number over all."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard as dense

from core import hadamard


def test_a_rotation_is_the_dense_product() -> None:
    x, signs = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.ones(8)
    signs[::3] = -1
    expected = (x * signs) @ torch.from_numpy(dense(8)).double() / 8**0.5
    assert torch.allclose(hadamard.rotated(x, signs), expected)


@pytest.mark.parametrize(("size", "filled"), [(1, 1), (2, 2), (5, 8), (1000, 1024)])
def test_a_rotation_keeps_lengths_and_is_undone(size: int, filled: int) -> None:
    assert hadamard.power_of_two(size) == filled
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(size))
    before = x.clone()
    signs = hadamard.signs(filled, 1, "rotation", 2)
    assert set(signs.tolist()) <= {-1, 1}
    there = hadamard.rotated(x, signs)
    assert there.shape == (4, filled)
    assert torch.allclose(there.norm(dim=1), x.norm(dim=1), rtol=1e-5)
    assert torch.allclose(hadamard.rotated_back(there, signs, size), x, atol=1e-5)
    assert torch.equal(x, before)


def test_one_large_number_is_spread() -> None:
    x = torch.zeros(1, 1024)
    x[0, 7] = 32
    assert hadamard.rotated(x, hadamard.signs(1024, 0, "rotation")).abs().unique().tolist() == [1]
