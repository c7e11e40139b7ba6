"""Example-level privacy: whoever sees a client's model cannot tell whether one of its examples was there.

Every client trains by DP-SGD (Abadi et al., CCS 2016): a step takes each of its n examples with probability q =
batch-size / n, clips their gradients to the norm S, adds N(0, (z S)^2 I) to the sum and divides by q n, the expected
batch. A step is a Gaussian mechanism on a Poisson sample. Each client has a ledger of its own; the run's epsilon is the
worst of them. Numbers of examples are taken as known, as everywhere in practice: q and an epoch's steps follow from
them.

Where only a budget is given every client's noise is its own, so that all of them end at that epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from core.batches import Batches
from core.config import RunConfig
from privacy.accounting import Event, calibrate
from privacy.client_level import planned
from privacy.noise import Source


class ExampleLevel:
    """What a run does to hide examples, as a function of how many a client has."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def steps(self, size: int) -> int:
        """Return the local steps of a round."""
        config = self._config
        return config.local_steps or config.local_epochs * math.ceil(size / config.batch_size)

    def rate(self, size: int) -> float:
        """Return q."""
        return min(1.0, self._config.batch_size / size)

    def noise_multiplier(self, size: int) -> float:
        """Return z: as configured, or what brings the planned rounds to the budget."""
        own, config = self._config.privacy, self._config
        if own.noise_multiplier:
            return own.noise_multiplier
        rounds = planned(config.rounds, config.count(config.sampled) / config.clients)
        return calibrate(self.rate(size), rounds * self.steps(size), own.epsilon, own.delta)

    def event(self, size: int) -> Event:
        """Return what one local step of a client costs it."""
        return Event(self.rate(size), self.noise_multiplier(size))

    def cost(self, size: int) -> dict[Event, int]:
        """Return what a round costs a client."""
        return {self.event(size): self.steps(size)}

    def round_costs(self, sizes: np.ndarray) -> list[dict[Event, int]]:
        """Return what a round costs clients of each size among `sizes` (clients,)."""
        return [self.cost(size) for size in np.unique(sizes[sizes > 0]).tolist()]


def poisson_batches(level: ExampleLevel, sizes: Sequence[int], sources: Sequence[Source]) -> Batches:
    """Return a round's batches of clients with `sizes` examples, laid one after the other, drawn from their sources.

    A batch may be empty: its step is noise alone, and is taken.
    """
    import torch

    steps = [level.steps(size) for size in sizes]
    drawn: list[Tensor] = [
        source.sampled(level.rate(size), count * size).view(count, size)
        for size, count, source in zip(sizes, steps, sources, strict=True)
    ]
    widest = max(1, max(int(taken.sum(1).max()) for taken in drawn))
    shape = (max(steps), len(sizes), widest)
    rows, weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for i, (taken, offset) in enumerate(zip(drawn, np.cumsum(sizes) - np.asarray(sizes), strict=True)):
        rows[:, i] = int(offset)
        step, example = taken.nonzero(as_tuple=True)
        # Places in a batch count from 0 in every step.
        place = (taken.cumsum(1) - 1)[step, example]
        rows[step, i, place] = example + int(offset)
        weights[step, i, place] = 1.0
    return Batches(rows, weights, torch.tensor(steps))
