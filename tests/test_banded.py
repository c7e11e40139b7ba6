"""Banded noise: what it adds is C^-1 Z, what a client can change is sqrt(k) |c|, and sums come out less noisy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from core.errors import InputError
from privacy.banded import BandedNoise
from privacy.noise import Simulated


def _dense(bands: int, rounds: int) -> np.ndarray:
    """Return C, (rounds, rounds)."""
    column = np.zeros(rounds)
    column[:bands] = BandedNoise(bands).column[:rounds]
    return np.array([[column[i - j] if i >= j else 0 for j in range(rounds)] for i in range(rounds)])


def test_the_column_is_the_square_root_of_ones() -> None:
    # (1 - x)^(-1/2) = 1 + x / 2 + 3 x^2 / 8 + 5 x^3 / 16 + ..., and its square is 1 + x + x^2 + ...
    assert BandedNoise(4).column.tolist() == [1, 1 / 2, 3 / 8, 5 / 16]
    assert np.convolve(BandedNoise(50).column, BandedNoise(50).column)[:50] == pytest.approx(np.ones(50))


@pytest.mark.parametrize(("bands", "rounds"), [(2, 5), (3, 9), (4, 3), (8, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_rows_are_those_of_the_dense_product(bands: int, rounds: int, dtype: torch.dtype) -> None:
    z = Simulated(0).normal(rounds, 6, dtype=dtype)
    banded = BandedNoise(bands)
    rows = torch.stack([banded.noise(row) for row in z])
    assert rows.dtype == dtype
    assert np.allclose(rows, np.linalg.solve(_dense(bands, rounds), z.double()), atol=2e-6)


def test_one_band_is_independent_noise() -> None:
    banded, z = BandedNoise(1), Simulated(0).normal(3, 4)
    assert torch.equal(torch.stack([banded.noise(row) for row in z]), z)
    # k Gaussian mechanisms are one with the noise multiplier over sqrt(k).
    assert banded.sensitivity(banded.participations(25)) == 5


@pytest.mark.parametrize(("bands", "times"), [(1, 3), (2, 2), (2, 4), (3, 2), (3, 3), (4, 2)])
def test_no_client_changes_more_than_the_sensitivity(bands: int, times: int) -> None:
    rounds = bands * times
    dense, banded = _dense(bands, rounds), BandedNoise(bands)
    assert banded.participations(rounds) == times

    def largest(apart: int) -> float:
        found = 0.0
        for count in range(times + 1):
            for pattern in itertools.combinations(range(rounds), count):
                if all(b - a >= apart for a, b in itertools.pairwise(pattern)):
                    # Of one coordinate: a norm is convex, so the worst updates are of length 1.
                    for signs in itertools.product((-1, 1), repeat=count):
                        found = max(found, float(np.linalg.norm(dense[:, pattern] @ np.array(signs))))
        return found

    assert largest(bands) == pytest.approx(banded.sensitivity(times))
    # Who comes back sooner changes more: the groups must keep to their turns.
    assert bands == 1 or largest(bands - 1) > 1.01 * banded.sensitivity(times)


def test_updates_that_point_anywhere_change_no_more() -> None:
    bands, times = 4, 3
    generator = np.random.default_rng(0)
    dense = _dense(bands, bands * times)
    for first in range(bands):
        for _ in range(50):
            sums = np.zeros((bands * times, 5))
            given = generator.normal(size=(times, 5))
            sums[first::bands] = given / np.linalg.norm(given, axis=1, keepdims=True)
            assert np.linalg.norm(dense @ sums) <= BandedNoise(bands).sensitivity(times) + 1e-12


@pytest.mark.parametrize(
    ("bands", "times", "better"), [(8, 4, 1.89), (16, 4, 2.41), (16, 16, 2.94), (64, 1, 2.56), (64, 4, 4.05)]
)
def test_prefix_sums_are_less_noisy_at_the_same_privacy(bands: int, times: int, better: float) -> None:
    rounds, size = bands * times, 400
    z = Simulated(1, bands, times).normal(rounds, size)
    errors = []
    for banded in (BandedNoise(1), BandedNoise(bands)):
        # The same equivalent Gaussian mechanism for clients that take part `times` times.
        rows = torch.stack([banded.noise(row) for row in z]) * banded.sensitivity(times)
        errors.append(float(rows.cumsum(0).square().mean().sqrt()))
    assert errors[0] / errors[1] == pytest.approx(better, rel=0.05)


def test_the_sensitivity_in_figures() -> None:
    # 1 + 1/4 + 9/64 = 1.390625.
    banded = BandedNoise(3)
    assert banded.sensitivity(4) == pytest.approx(2 * math.sqrt(1.390625))
    assert [banded.participations(rounds) for rounds in (1, 3, 4, 12)] == [1, 1, 2, 4]


def test_no_bands_are_refused() -> None:
    with pytest.raises(InputError, match="noise of 0 bands does not exist"):
        BandedNoise(0)
