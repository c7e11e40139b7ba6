"""Canaries: contributions that nobody makes, of the largest length that clipping lets through, each along a direction
of its own; and what an observer makes of each from the noisy sums.

Andrew et al. (2023) and Nasr et al. (USENIX Security 2023: Dirac gradients) take random directions, which are nearly
orthogonal in many dimensions. These are exactly orthogonal in any number: rows of a Hadamard matrix with random signs
on random places of the vector. No direction is ever stored, the sum of any of them and the products of a vector with
all of them are one transform, n log n additions; and rows that no canary has are a control group with the same noise.

If a canary that is in takes part in a sum with probability q, and along its direction the noise is N(0, z^2) in units
of the clipping norm, then what is seen along it, x, has the likelihood ratio

    1 - q + q exp((x - 1/2) / z^2)

of being in against being out: the observer's score is the sum of its logarithm over all sums (Neyman and Pearson).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core import hadamard
from core.config import RunConfig
from core.seeding import rng

# A covariance over T sums needs a few times as many controls.
CONTROLS_A_SUM = 3


def most(size: int) -> int:
    """Return how many canaries a vector of `size` numbers has room for: as many again are controls."""
    return hadamard.power_of_two(size + 1) // 4


class Directions:
    """Orthonormal directions in vectors of `size` numbers: `count` of canaries, and as many that nobody has."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        if count > most(size):
            raise ValueError(f"{count} canaries in vectors of {size} numbers, which have room for {most(size)}")
        # The largest power of two that fits: on all places the rows would have to be cut, and would not be orthogonal.
        width = hadamard.power_of_two(size + 1) // 2
        self._places = torch.from_numpy(np.sort(rng(seed, "canaries", "places").permutation(size)[:width]))
        self._signs = hadamard.signs(width, seed, "canaries")
        self._size, self.count, self.rows = size, count, min(2 * count, width)

    def together(self, amounts: Tensor) -> Tensor:
        """Return sums (C, size) of the canaries' directions, each `amounts` (C, count) times."""
        width = len(self._signs)
        filled = torch.nn.functional.pad(amounts.double(), (0, width - self.count))
        out = amounts.new_zeros(len(amounts), self._size, dtype=torch.float64)
        out[:, self._places] = hadamard.rotated_back(filled, self._signs, width)
        return out

    def along(self, vectors: Tensor) -> Tensor:
        """Return the products (C, rows) of vectors (C, size) with all directions, canaries first, then controls."""
        return hadamard.rotated(vectors[:, self._places].double(), self._signs)[:, : self.rows]


@functools.lru_cache(maxsize=2)
def directions(count: int, size: int, seed: int) -> Directions:
    """Return the directions, made once in a process."""
    return Directions(count, size, seed)


def in_each_client(config: RunConfig) -> int:
    """Return how many canary examples a client gets, so that all clients together have audit.canaries or more."""
    return math.ceil(config.audit.canaries / config.clients)


def coins(count: int, seed: int, *path: int | str) -> np.ndarray:
    """Return which canaries are in, (count,) bool: each with probability 1/2."""
    return rng(seed, "canaries", "coins", *path).random(count) < 0.5


def log_likelihood(seen: np.ndarray, rate: float, noise_multiplier: float) -> np.ndarray:
    """Return log(1 - q + q exp((x - 1/2) / z^2)) for what is seen, x of any shape."""
    with np.errstate(divide="ignore"):
        absent, present = np.log1p(-rate), np.log(rate)
    found: np.ndarray = np.logaddexp(absent, present + (seen - 0.5) / noise_multiplier**2)
    return found


@dataclass
class Noise:
    """How large the noise of a run really was: what is released less all that is in it."""

    squares: float = 0.0
    """Of the noise, in units of what the ledger counts with."""
    numbers: int = 0

    def add(self, noise: Tensor, deviation: float) -> None:
        """Take in noise whose standard deviation ought to be this."""
        self.squares += float(noise.double().square().sum()) / deviation**2
        self.numbers += noise.numel()

    def ratio(self, confidence: float = 0.99) -> tuple[float, float, float] | None:
        """Return the standard deviation over what it ought to be and its confidence limits; None before any noise."""
        # Only an audit needs it: clients start without, and it takes half a second.
        from scipy.stats import chi2

        if not self.numbers:
            return None
        tail = (1 - confidence) / 2
        low, high = chi2.ppf([1 - tail, tail], self.numbers)
        found = (self.squares / at for at in (self.numbers, low, high))
        return tuple(float(np.sqrt(value)) for value in found)  # type: ignore[return-value]


def without_drift(seen: np.ndarray, count: int, noise_multiplier: float) -> np.ndarray | None:
    """Return what is seen along the canaries, (T, count), without what honest clients do in all T sums alike.

    `seen` (T, rows) has the controls behind the canaries: there stands drift, and noise, and nothing else. Along random
    directions drift is a normal number with a covariance G over the sums, the same along all; of the controls we know
    S = G + z^2 I. What remains of x is z^2 S^-1 x: as it was where there is no drift, nothing where it is strong. None
    where there are too few controls to tell.
    """
    controls = seen[:, count:]
    sums, found = controls.shape
    if found < CONTROLS_A_SUM * sums:
        return None
    covariance = controls @ controls.T / found
    remains: np.ndarray = noise_multiplier**2 * np.linalg.solve(covariance, seen[:, :count])
    return remains
