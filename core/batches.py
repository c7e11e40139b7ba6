"""Which rows a cohort's clients take in which step: ragged clients laid out as one table with weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batches:
    """A cohort's batches, step by step: row numbers (S, C, B) int64, weights (S, C, B) float32, steps (C,) int64.

    A weight of 0 marks a place without an example: clients and batches are of unequal size.
    """

    rows: Tensor
    weights: Tensor
    steps: Tensor


def plan(sizes: Sequence[int], batch_size: int, epochs: Sequence[Sequence[np.ndarray]]) -> Batches:
    """Return the batches of clients with `sizes` examples, laid one after the other, from each client's epochs.

    `epochs[i]` holds permutations of range(sizes[i]); each is cut into batches, the last short one kept.
    """
    passes, widest = len(epochs[0]), min(batch_size, max(sizes))
    own = np.asarray(sizes)
    # Each pass is cut into whole batches, the last one filled up with places that have no weight.
    per_pass = -(-own // batch_size)
    steps = per_pass * passes
    shape = (int(steps.max()), len(sizes), widest)
    offsets = np.cumsum(own) - own
    rows = np.broadcast_to(offsets[None, :, None], shape).copy()
    weights = np.zeros(shape, dtype=np.float32)
    for size in np.unique(own):
        # Clients of one size together: most federations have few sizes, or few clients.
        alike = np.flatnonzero(own == size)
        count = -(-size // batch_size)
        padded = np.zeros((len(alike), passes, count * widest), dtype=np.int64)
        padded[..., :size] = np.stack([np.stack(epochs[int(client)]) for client in alike])
        real = np.zeros((passes, count * widest), dtype=np.float32)
        real[:, :size] = 1
        batches = padded.reshape(len(alike), -1, widest).transpose(1, 0, 2)
        rows[: passes * count, alike] += batches
        weights[: passes * count, alike] = real.reshape(-1, 1, widest)
    return Batches(torch.from_numpy(rows), torch.from_numpy(weights), torch.from_numpy(steps))


def stream(
    sizes: Sequence[int],
    batch_size: int,
    start: Sequence[int],
    steps: int,
    shuffles: Sequence[Callable[[int], np.ndarray]],
) -> Batches:
    """Return `steps` batches per client from a shuffled iterator that carries on where `start` batches were drawn.

    `shuffles[i](epoch)` is client i's permutation of its examples for that pass.
    """
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    per_client = []
    for size, begin, shuffle in zip(sizes, start, shuffles, strict=True):
        in_epoch = math.ceil(size / batch_size)
        passes = {epoch: shuffle(epoch) for epoch in range(begin // in_epoch, (begin + steps - 1) // in_epoch + 1)}
        per_client.append(
            [passes[b // in_epoch][b % in_epoch * batch_size :][:batch_size] for b in range(begin, begin + steps)]
        )
    return _pad(offsets, per_client, batch_size)


def _pad(offsets: np.ndarray, per_client: Sequence[Sequence[np.ndarray]], batch_size: int) -> Batches:
    steps = np.array([len(batches) for batches in per_client], dtype=np.int64)
    widest = min(batch_size, max(len(batch) for batches in per_client for batch in batches))
    shape = (int(steps.max()), len(per_client), widest)
    rows, weights = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    for client, batches in enumerate(per_client):
        rows[:, client] = offsets[client]
        for s, batch in enumerate(batches):
            rows[s, client, : len(batch)] = batch + offsets[client]
            weights[s, client, : len(batch)] = 1
    return Batches(torch.from_numpy(rows), torch.from_numpy(weights), torch.from_numpy(steps))
