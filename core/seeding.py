"""Randomness as a function of names: rng(seed, "batches", round, client) is the same stream on every machine.

Nothing of ours draws from a global generator, and those are seeded anew for each round, so results cannot depend on
how many workers there are, on the order in which replies arrive, or on where a run was interrupted.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

import numpy as np


def _sequence(seed: int, path: tuple[int | str, ...]) -> np.random.SeedSequence:
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in path]
    return np.random.SeedSequence([int(seed), *words])


def rng(seed: int, *path: int | str) -> np.random.Generator:
    """Return the NumPy generator that belongs to (seed, path); integers in `path` must not be negative."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, path)))


def derive(seed: int, *path: int | str) -> int:
    """Return an int in [0, 2**63) that belongs to (seed, path), for libraries that take a seed of their own."""
    return int(_sequence(seed, path).generate_state(1, np.uint64)[0] >> np.uint64(1))


def permutations(
    seed: int, *path: int | str, clients: Sequence[int] | np.ndarray, size: int, times: int = 1
) -> np.ndarray:
    """Return `times` permutations of range(size) for each client, (clients, times, size) int64.

    They belong to (seed, path, client) alone: each sorts the client's own stream of 64-bit keys, drawn for all clients
    together by SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), whose n-th number needs none of those before it.
    """
    own = _split_mix(np.uint64(derive(seed, *path)), np.asarray(clients, dtype=np.uint64))
    keys = _split_mix(own[:, None], np.arange(times * size, dtype=np.uint64))
    return keys.reshape(len(own), times, size).argsort(axis=2)


def seeds(seed: int, *path: int | str, clients: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    """Return an int in [0, 2**63) for each client that belongs to (seed, path, client) alone."""
    own = _split_mix(np.uint64(derive(seed, *path)), np.asarray(clients, dtype=np.uint64))
    return tuple((own >> np.uint64(1)).tolist())


def uniforms(seed: int, *path: int | str, clients: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return a number in [0, 1) for each client, (clients,) float64, that belongs to (seed, path, client) alone."""
    own = _split_mix(np.uint64(derive(seed, *path)), np.asarray(clients, dtype=np.uint64))
    return (own >> np.uint64(11)) / 2.0**53


def _split_mix(start: np.ndarray | np.uint64, places: np.ndarray) -> np.ndarray:
    """Return the numbers at these places (from 0) of SplitMix64's stream from `start`, uint64."""
    z = start + (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def seed_globals(seed: int, *path: int | str) -> None:
    """Seed Python's and NumPy's global generators, which Flower's `sample_nodes` and foreign strategies draw from.

    They stay seeded: a program that draws from them after a run must seed them itself.
    """
    random.seed(derive(seed, "python", *path))
    np.random.seed(derive(seed, "numpy", *path) % 2**32)
