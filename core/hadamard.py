"""Random rotations: the Walsh-Hadamard transform after random signs spreads a few large numbers over all of them.

H D x with signs D (Suresh et al., ICML 2017): orthonormal, its own inverse but for the order, n log n additions.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from core.seeding import rng


def power_of_two(size: int) -> int:
    """Return the least power of two that is not less than `size`."""
    return 1 << max(size - 1, 0).bit_length()


def signs(size: int, seed: int, *path: int | str) -> Tensor:
    """Return numbers of -1 and 1, (size,) float32, that belong to (seed, path)."""
    drawn = rng(seed, *path).integers(0, 2, size, dtype=np.int8)
    return torch.from_numpy(drawn).float() * 2 - 1


def rotated(flat: Tensor, own_signs: Tensor) -> Tensor:
    """Return H D x of vectors x (C, n), filled up with zeros to as many numbers as there are signs."""
    filled = torch.nn.functional.pad(flat, (0, len(own_signs) - flat.shape[1]))
    return _transformed(filled * own_signs.to(flat.device))


def rotated_back(flat: Tensor, own_signs: Tensor, size: int) -> Tensor:
    """Return the vectors (C, size) whose rotation is `flat`."""
    # H is its own inverse, and so is D.
    return (_transformed(flat) * own_signs.to(flat.device))[:, :size]


def _transformed(x: Tensor) -> Tensor:
    """Return the orthonormal Walsh-Hadamard transform of vectors (C, 2^k)."""
    cohort, size = x.shape
    x, other = x.clone(), torch.empty_like(x)
    step = 1
    while step < size:
        a, b = x.view(cohort, -1, 2, step).unbind(2)
        total, difference = other.view(cohort, -1, 2, step).unbind(2)
        torch.add(a, b, out=total)
        torch.sub(a, b, out=difference)
        x, other = other, x
        step *= 2
    return x / math.sqrt(size)
