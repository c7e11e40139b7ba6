"""Correlated noise for clients that take part in turn: the banded square-root matrix mechanism.

A model after t rounds is a sum of t noisy sums, so what harms is the noise in A G, A the lower-triangular matrix of
ones and G (n, D) the rounds' clipped sums. A matrix mechanism releases A C^-1 (C G + Z), Z independent normal: to each
round's sum a row of C^-1 Z is added, of which much cancels in the rounds that follow, and for privacy it is one
Gaussian mechanism on C G, also where rounds depend on earlier ones (Denisov et al., NeurIPS 2022).

C is lower-triangular and Toeplitz, its first column c_0, c_1, ... the square root of A's, that is the coefficients of
(1 - x)^(-1/2): c_0 = 1, c_j = c_{j-1} (2 j - 1) / (2 j), and zero from c_b on (Kalinin and Lampert, NeurIPS 2024,
"Banded square root matrix factorization for differentially private model training"). Who takes part b rounds apart or
more touches rows of C G that do not overlap, so that k participations of norm 1 change it by sqrt(k) |c|_2 at most
(Choquette-Choo et al., NeurIPS 2023, "(Amplified) banded matrix factorization"): b fixed groups of clients
take their turns, k times. b = 1 is independent noise.

There is no amplification by sampling here: compare with Gaussian noise that every round is accounted for in full. With
small epsilon, few rounds or a small sampling rate, Poisson sampling and independent noise can be better.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from core.errors import InputError


class BandedNoise:
    """Rows of C^-1 Z one after the other.

    It keeps the last b - 1 of them, (b - 1, D) float32, in memory alone: who reads them knows the noise.
    """

    def __init__(self, bands: int) -> None:
        if bands < 1:
            raise InputError(f"noise of {bands} bands does not exist; choose how many groups take turns, 1 or more.")
        steps = np.arange(1, bands)
        self.column = np.cumprod(np.concatenate([[1.0], (2 * steps - 1) / (2 * steps)]))
        """c_0 .. c_{b-1}, (b,) float64."""
        self._rounds = 0
        self._rows = torch.empty(0)

    @property
    def bands(self) -> int:
        """Return b, the rounds from one participation of a client to its next."""
        return len(self.column)

    def sensitivity(self, participations: int) -> float:
        """Return the greatest change of C G, in clipping norms, by a client that takes part so often, b rounds apart
        or more.
        """
        return math.sqrt(participations) * float(np.linalg.norm(self.column))

    def participations(self, rounds: int) -> int:
        """Return how often a client takes part at most in so many rounds."""
        return math.ceil(rounds / self.bands)

    def noise(self, z: Tensor) -> Tensor:
        """Return the round's row y_t of C^-1 Z, in z's dtype, for its independent normals z (D,).

        By back substitution: y_t = z_t - sum_{j=1}^{b-1} c_j y_{t-j}, c_0 being 1.
        """
        kept = self.bands - 1
        if not kept:
            return z
        if not self._rounds:
            self._rows = torch.zeros(kept, len(z), device=z.device)
        # Row r was last written 1 to b - 1 rounds ago; all are zero at first.
        ages = (self._rounds - 1 - torch.arange(kept)) % kept + 1
        weights = torch.from_numpy(self.column)[ages].float().to(z.device)
        row = z - weights @ self._rows
        self._rows[self._rounds % kept] = row
        self._rounds += 1
        return row
