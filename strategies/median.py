"""Coordinate-wise median and trimmed mean. Yin et al., ICML 2018, definitions 1 and 2.

Running statistics pass through the rules like everything else.

The median is taken by a sorting network (Batcher, 1968) on chunks that stay in the cache: minimum and maximum of whole
rows, no branch, several times as fast as NumPy's partition along the first axis, with the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from flwr.serverapp import strategy

from strategies.robust import Robust, Rule

CHUNK = 32768


class FedMedian(Rule):
    """Flower's FedMedian with the faster median; what is added to all moves a median by as much, centred or not."""

    centred = False

    def combine(self, updates: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Return each coordinate's median."""
        return median(updates)


class FedTrimmedAvg(Robust, strategy.FedTrimmedAvg):
    """Flower's FedTrimmedAvg on centred updates; `beta` is the share that is cut off on either side."""

    def __init__(self, *, beta: float = 0.2, **options: Any) -> None:
        super().__init__(beta=beta, **options)


def median(values: np.ndarray) -> np.ndarray:
    """Return the median (d,) of values (n, d) along the first axis, as `np.median` does; n in the tens."""
    n, d = values.shape
    out = np.empty(d, values.dtype)
    pairs = _network(n)
    for start in range(0, d, CHUNK):
        rows = [values[i, start : start + CHUNK].copy() for i in range(n)]
        spare = np.empty_like(rows[0])
        for low, high in pairs:
            np.minimum(rows[low], rows[high], out=spare)
            np.maximum(rows[low], rows[high], out=rows[high])
            rows[low], spare = spare, rows[low]
        middle = rows[n // 2] if n % 2 else (rows[n // 2 - 1] + rows[n // 2]) / 2
        out[start : start + CHUNK] = middle
    return out


@functools.lru_cache(maxsize=32)
def _network(n: int) -> list[tuple[int, int]]:
    """Return Batcher's odd-even merge sort of n rows as comparators, without those the middle does not depend on."""
    pairs: list[tuple[int, int]] = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                for i in range(min(k, n - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    needed = {n // 2} if n % 2 else {n // 2 - 1, n // 2}
    kept = []
    for low, high in reversed(pairs):
        if low in needed or high in needed:
            needed |= {low, high}
            kept.append((low, high))
    return kept[::-1]
