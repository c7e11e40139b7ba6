"""Standardise inputs with means and deviations that were made from sums and counts: no row leaves a client for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from core.records import INPUT_COUNT, INPUT_SQUARES, INPUT_SUM

Constants = Mapping[str, Sequence[float]]


def statistics(x: np.ndarray) -> dict[str, list[float]]:
    """Return what one client reveals of x (n, d): the sum and the sum of squares of each feature, and n."""
    x = x.astype(np.float64)
    return {
        INPUT_SUM: x.sum(axis=0).tolist(),
        INPUT_SQUARES: (x * x).sum(axis=0).tolist(),
        INPUT_COUNT: [float(len(x))],
    }


def combine(replies: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Return the mean and the standard deviation (ddof 1) over all clients' rows from their summed statistics."""
    total, squares, count = (
        np.sum([np.asarray(reply[key]) for reply in replies], axis=0) for key in (INPUT_SUM, INPUT_SQUARES, INPUT_COUNT)
    )
    mean = total / count
    variance = np.maximum(squares - count * mean * mean, 0) / np.maximum(count - 1, 1)
    return {"mean": mean.tolist(), "std": np.sqrt(variance).tolist()}


def apply(x: np.ndarray, constants: Constants) -> np.ndarray:
    """Return x (n, d) float32 standardised; a constant feature becomes 0 instead of a division by zero."""
    mean, std = (np.asarray(constants[key], dtype=np.float32) for key in ("mean", "std"))
    # 1e-9 as in FLamby, whose published figures the heart preset reproduces.
    return ((x - mean) / np.where(std > 0, std + np.float32(1e-9), np.inf)).astype(np.float32)
