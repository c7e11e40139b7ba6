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
    seed: int, *path: int | str, clients: Sequence[int], sizes: Sequence[int], times: int = 1
) -> list[list[np.ndarray]]:
    """Return for each client `times` permutations of range(its size); they belong to (seed, path, client) alone.

    One Philox generator whose key is set anew for each client: making a generator costs eight times as much.
    """
    bits = np.random.Philox(key=derive(seed, *path))
    generator, state = np.random.Generator(bits), bits.state
    out = []
    for client, size in zip(clients, sizes, strict=True):
        state["state"]["key"][1] = client
        bits.state = state
        out.append([generator.permutation(size) for _ in range(times)])
    return out


def seed_globals(seed: int, *path: int | str) -> None:
    """Seed Python's and NumPy's global generators, which Flower's `sample_nodes` and foreign strategies draw from.

    They stay seeded: a program that draws from them after a run must seed them itself.
    """
    random.seed(derive(seed, "python", *path))
    np.random.seed(derive(seed, "numpy", *path) % 2**32)
