"""Which rows a cohort's clients take in which step: ragged clients laid out as one table with weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from core.device import to_device


@dataclass(frozen=True)
class Batches:
    """A cohort's batches, step by step: row numbers (S, C, B) int64, weights (S, C, B) float32, steps (C,) int64.

    A weight of 0 marks a place without an example: clients and batches are of unequal size.
    """

    rows: Tensor
    weights: Tensor
    steps: Tensor
    """Stays on the CPU: Python's control flow depends on it."""

    def to(self, device: torch.device) -> Batches:
        """Return the batches with rows and weights on the device."""
        return replace(self, rows=to_device(self.rows, device), weights=to_device(self.weights, device))

    def after(self, steps: np.ndarray) -> Batches:
        """Return the batches from each client's step `steps` (C,) on; a client that has none left repeats its last."""
        first = torch.minimum(torch.from_numpy(np.asarray(steps)), self.steps - 1)
        left = self.steps - first
        places = (torch.arange(int(left.max()))[:, None] + first).clamp_max(len(self.rows) - 1)
        at = places[:, :, None].expand(-1, -1, self.rows.shape[2])
        taken = torch.arange(len(places))[:, None] < left[None]
        at, taken = at.to(self.rows.device), taken.to(self.rows.device)
        return Batches(self.rows.gather(0, at), self.weights.gather(0, at) * taken[:, :, None], left)

    def cut(self, steps: np.ndarray) -> Batches:
        """Return the batches of clients that take only their first `steps` (C,), at least one each."""
        own = torch.minimum(self.steps, torch.from_numpy(np.asarray(steps)))
        most = int(own.max())
        taken = torch.arange(most)[:, None] < own[None]
        return Batches(self.rows[:most], self.weights[:most] * taken[:, :, None].to(self.rows.device), own)


Shuffled = Callable[[np.ndarray, int], np.ndarray]
"""(positions of clients that have this size, size) -> their permutations, an epoch each: (clients, epochs, size)."""


def plan(sizes: Sequence[int], batch_size: int, shuffled: Shuffled) -> Batches:
    """Return the batches of clients with `sizes` examples, laid one after the other; an epoch's last is short."""
    own = np.asarray(sizes)
    offsets = np.cumsum(own) - own
    widest = min(batch_size, int(own.max()))
    parts = []
    # Clients of one size together: most federations have few sizes, or few clients.
    for size in np.unique(own):
        alike = np.flatnonzero(own == size)
        epochs = shuffled(alike, int(size))
        # Each epoch is cut into whole batches, the last one filled up with places that have no weight.
        filled = -(-size // batch_size) * widest
        rows = np.zeros((*epochs.shape[:2], filled), dtype=np.int64)
        rows[..., :size] = epochs
        real = np.broadcast_to(np.arange(filled) < size, rows.shape)
        parts.append((alike, rows.reshape(len(alike), -1, widest), real.reshape(len(alike), -1, widest)))
    steps = np.zeros(len(own), dtype=np.int64)
    for alike, batches, _ in parts:
        steps[alike] = batches.shape[1]
    shape = (int(steps.max()), len(own), widest)
    rows, weights = np.empty(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    rows[:] = offsets[None, :, None]
    for alike, batches, real in parts:
        rows[: batches.shape[1], alike] += batches.transpose(1, 0, 2)
        weights[: batches.shape[1], alike] = real.transpose(1, 0, 2)
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
