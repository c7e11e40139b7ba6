"""Secret sharing (Shamir, CACM 1979) over p = 2^31 - 1, for many words at once as products of matrices.

A secret is cut into limbs of 16 bits, each the constant term of a polynomial of degree t - 1 whose other coefficients
are uniform below p. The share of holder x = 1, 2, ... is every limb's polynomial at x. t shares determine the limbs,
any t - 1 say nothing about them.

Products are exact: one factor below p is cut into parts of 11 bits, and a sum of 2^11 products of 31 and 11 bits has 53
bits, all of which a float64 holds. So BLAS does the work, with powers and Lagrange coefficients that are kept.

Where there are more than t shares they must lie on one polynomial: with u_i = prod_{l != i} 1 / (x_i - x_l) over all r
points, sum_i u_i f(x_i) y_i is zero for every f of degree below r - t if they do, and for a random f with probability
1/p at most if they do not (the dual of a Reed-Solomon code). Which share is wrong this does not say.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import numpy as np

from privacy.secagg.errors import ForgedError, TooFewError
from privacy.secagg.keys import Entropy
from privacy.secagg.masking import SEED_BYTES, expand

P = (1 << 31) - 1
LIMB_BYTES = 2
MOST_HOLDERS = 1 << 11
_PART_BITS = 11
# Of 2^31 words one is no element of the field; a share of a secret draws fewer than 2^20.
_SPARE = 16


def split(secret: bytes, holders: int, threshold: int, entropy: Entropy = os.urandom) -> np.ndarray:
    """Return the shares of a secret of an even number of bytes, (holders, limbs) uint32: row i belongs to x = i + 1.

    Raises `ValueError` unless 1 <= threshold <= holders <= 2048.
    """
    if not 1 <= threshold <= holders <= MOST_HOLDERS or len(secret) % LIMB_BYTES:
        raise ValueError(f"{len(secret)} bytes cannot be shared among {holders} holders so that {threshold} are needed")
    limbs = np.frombuffer(secret, "<u2").astype(np.uint32)
    drawn = _uniform(entropy(SEED_BYTES), (threshold - 1) * len(limbs)).reshape(threshold - 1, len(limbs))
    return _product(_powers(holders, threshold), np.concatenate([limbs[None], drawn])).astype(np.uint32)


def combine(holders: Sequence[int], shares: np.ndarray, threshold: int) -> bytes:
    """Return the secret of which `holders` (their x) have these shares, (r, limbs) uint32.

    Secrets with the same holders may stand side by side. Raises `TooFewError` below the threshold, and `ForgedError`
    where shares contradict each other or make no secret.
    """
    points = tuple(holders)
    if len(points) < threshold:
        raise TooFewError(f"{len(points)} shares of a secret are there, and {threshold} are needed")
    if len(set(points)) < len(points) or shares.shape[0] != len(points) or int(shares.max(initial=0)) >= P:
        raise ForgedError("shares have two of one holder, or numbers outside the field")
    rows = _lagrange(points[:threshold])[None]
    if len(points) > threshold:
        rows = np.concatenate([np.pad(rows, ((0, 0), (0, len(points) - threshold))), _check(points, threshold)])
    limbs, *rest = _product(rows.astype(np.float64), shares)
    if any(row.any() for row in rest):
        raise ForgedError(f"{len(points)} shares of a secret contradict each other: one at least is corrupted")
    if int(limbs.max(initial=0)) >> (8 * LIMB_BYTES):
        raise ForgedError("the shares of a secret make none: one at least is corrupted")
    return limbs.astype("<u2").tobytes()


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the product modulo p of matrices below p: (n, t) float64 and (t, k) uint32 -> (n, k) uint64."""
    mask = (1 << _PART_BITS) - 1
    parts = [(right >> shift) & mask for shift in (0, _PART_BITS, 2 * _PART_BITS)]
    low, middle, high = np.split((left @ np.concatenate(parts, axis=1)).astype(np.uint64) % P, 3, axis=1)
    return (low + ((middle + ((high << _PART_BITS) % P)) << _PART_BITS)) % P


def _uniform(seed: bytes, count: int) -> np.ndarray:
    """Return independent elements of the field from a seed of 32 bytes, (count,) uint32."""
    words = expand(seed, count + _SPARE) & P
    found = words[words < P][:count]
    assert len(found) == count
    return found


@functools.lru_cache(maxsize=16)
def _powers(holders: int, threshold: int) -> np.ndarray:
    """Return x^j mod p of x = 1..holders and j < threshold, (holders, threshold) float64."""
    x = np.arange(1, holders + 1, dtype=np.uint64)
    out = np.ones((holders, threshold), dtype=np.uint64)
    for j in range(1, threshold):
        out[:, j] = out[:, j - 1] * x % P
    return out.astype(np.float64)


@functools.lru_cache(maxsize=2048)
def _lagrange(points: tuple[int, ...]) -> np.ndarray:
    """Return l_i with f(0) = sum_i l_i f(x_i): prod_{l != i} x_l / (x_l - x_i), (t,) uint64."""
    x = np.array(points, dtype=np.uint64)
    # The product over all x is the same for all, and each takes its own out again.
    everything = int(_product_along(x[None])[0])
    return _inverse(_differences(points) * x % P) * np.uint64(everything) % P


@functools.lru_cache(maxsize=2048)
def _dual(points: tuple[int, ...]) -> np.ndarray:
    """Return prod_{l != i} 1 / (x_i - x_l) up to a common sign, (r,) uint64."""
    return _inverse(_differences(points))


def _check(points: tuple[int, ...], threshold: int) -> np.ndarray:
    """Return two random words of the dual code, (2, r) uint64: what passes both by chance does so with 2^-62."""
    x = np.array(points, dtype=np.uint64)
    coefficients = _uniform(os.urandom(SEED_BYTES), 2 * (len(points) - threshold)).reshape(-1, 2, 1).astype(np.uint64)
    values = np.zeros((2, len(points)), dtype=np.uint64)
    for coefficient in coefficients:
        values = (values * x + coefficient) % P
    return values * _dual(points) % P


def _differences(points: tuple[int, ...]) -> np.ndarray:
    """Return prod_{l != i} (x_l - x_i) mod p, (t,) uint64."""
    x = np.array(points, dtype=np.int64)
    apart = (x[None, :] - x[:, None]) % P
    np.fill_diagonal(apart, 1)
    return _product_along(apart.astype(np.uint64))


def _product_along(rows: np.ndarray) -> np.ndarray:
    """Return the product modulo p of each row (n, t) uint64, (n,)."""
    while rows.shape[1] > 1:
        half, odd = divmod(rows.shape[1], 2)
        halved = rows[:, :half] * rows[:, half : 2 * half] % P
        if odd:
            halved[:, 0] = halved[:, 0] * rows[:, -1] % P
        rows = halved
    return rows[:, 0]


def _inverse(values: np.ndarray) -> np.ndarray:
    return np.array([pow(value, -1, P) for value in values.tolist()], dtype=np.uint64)
