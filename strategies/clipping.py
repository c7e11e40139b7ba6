"""Rules by the length of updates: norm clipping, centred clipping and the geometric median.

- Norm clipping (Sun et al., 2019): updates longer than `radius` are scaled down to it, then averaged by examples.
- Centred clipping (Karimireddy, He and Jaggi, ICML 2021): v <- v + mean_i((u_i - v) min(1, tau / |u_i - v|)),
  `iterations` times, from the last round's v.
- The geometric median (RFA; Pillutla, Kakade and Harchaoui, IEEE TSP 2022): the point with the least sum of distances
  weighted by examples, by the smoothed Weiszfeld algorithm. All its steps are taken on the n x n matrix of scalar
  products, so that updates are read once.

A radius of 0 is the median of the lengths (of u_i, or of u_i - v) in the round. Running statistics pass through the
rules like everything else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from strategies.robust import Rule

SMALLEST = 1e-12


class NormClipping(Rule):
    """FedAvg of updates no longer than `radius`."""

    def __init__(self, *, radius: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.radius = radius

    def combine(self, updates: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Return the mean of the clipped updates, weighted by examples."""
        weights = examples / examples.sum() * _scales(np.linalg.norm(updates, axis=1), self.radius)
        self.shares = weights.tolist()
        mean: np.ndarray = weights.astype(np.float32) @ updates
        return mean


class CentredClipping(Rule):
    """Mean of what differs little from the last round's update."""

    def __init__(self, *, radius: float = 0.0, iterations: int = 3, **options: Any) -> None:
        if iterations < 1:
            raise ValueError("iterations must be at least 1")
        super().__init__(**options)
        self.radius, self.iterations = radius, int(iterations)
        self.last = np.zeros(1, np.float32)

    def combine(self, updates: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Return v after the iterations; every client counts the same."""
        v = np.broadcast_to(self.last, updates.shape[1:])
        for _ in range(self.iterations):
            away = updates - v
            scales = _scales(np.linalg.norm(away, axis=1), self.radius)
            v = v + (scales / len(updates)).astype(np.float32) @ away
        self.last, self.shares = v, (scales / len(updates)).tolist()
        return v


class RFA(Rule):
    """Geometric median of the updates."""

    def __init__(self, *, iterations: int = 10, smoothing: float = 1e-6, **options: Any) -> None:
        super().__init__(**options)
        self.iterations, self.smoothing = int(iterations), smoothing

    def combine(self, updates: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Return the point with the least weighted sum of distances to the updates."""
        weights = geometric_median_weights(updates, examples / examples.sum(), self.iterations, self.smoothing)
        self.shares = weights.tolist()
        point: np.ndarray = weights.astype(np.float32) @ updates
        return point


def geometric_median_weights(updates: np.ndarray, alpha: np.ndarray, iterations: int, smoothing: float) -> np.ndarray:
    """Return weights (n,) that add up to 1, with which the rows of updates (n, d) give their geometric median.

    alpha (n,) are the rows' own weights. The point z = sum_i w_i u_i is
    |u_i - z|^2 = G_ii - 2 (G w)_i + w G w away from u_i.
    """
    gram = (updates @ updates.T).astype(np.float64)
    squares, weights = np.diag(gram), alpha
    floor = smoothing * np.sqrt(max(float(squares.max()), SMALLEST))
    for _ in range(iterations):
        product = gram @ weights
        away = np.sqrt(np.maximum(squares - 2 * product + weights @ product, 0))
        beta = alpha / np.maximum(away, floor)
        weights = beta / beta.sum()
    return weights


def _scales(lengths: np.ndarray, radius: float) -> np.ndarray:
    """Return min(1, radius / length) for each length (n,); a radius of 0 is their median."""
    limit = radius or float(np.median(lengths))
    scales: np.ndarray = np.minimum(1, limit / np.maximum(lengths, SMALLEST))
    return scales
