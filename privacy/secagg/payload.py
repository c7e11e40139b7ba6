"""What a client's vector holds in a round of training: its update, its numbers, its weight; nothing else leaves it.

Both sides make the same `Payload` from the configuration and from what the server tells all clients alike. A client's
weight is its number of examples, or one from 0 to 1 that its strategy gives; which of the two is a count like others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from core import records
from core.config import RunConfig
from core.errors import InputError
from privacy.noise import Source
from privacy.secagg.quantise import Quantiser

# Of a training loss; a larger one counts as this.
LARGEST_LOSS = 100.0
# Weights from 0 to 1 are rounded to 2^-16, or to what the ring has room for.
_WEIGHT_BITS = 16
# Of 8 bytes each: a seed of 32.
_SEED_NUMBERS = 4


@dataclass(frozen=True)
class Sum:
    """What the sum of a cohort says."""

    update: np.ndarray
    """The mean update by weight, (size,) float64."""
    metrics: Mapping[str, float]
    """Means by weight."""
    weight: float | None
    """The sum of weights, where they are not numbers of examples."""
    examples: int
    clipped: float
    """Which fraction of the clients were clipped."""
    worst_error: float
    """More than any number of `update` can be off by, because of rounding."""


class Payload:
    """How vectors of one round are made and read. Raises `InputError` where their sum could leave the ring.

    `size` numbers an update, at most `clients` vectors in a sum, `largest_weight` examples a client at most (more count
    as so many), and the updates' L2 norm: `clipping_norm`, that of differential privacy where that clips. `numbers` are
    those that a strategy's clients say, with the largest absolute value of each.
    """

    def __init__(
        self, config: RunConfig, size: int, clients: int, largest_weight: int, clipping_norm: float | None = None,
        numbers: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        own, private = config.secure_aggregation, config.privacy
        self._largest = largest_weight
        central = private.level == "client" and private.noise == "central"
        bounds = {records.TRAIN_LOSS: LARGEST_LOSS}
        if private.level != "client":
            # Of private clients nothing leaves that a strategy's would say beside its update.
            bounds |= numbers or {}
        if private.level == "client" and private.clipping == "adaptive":
            # Half of the inverse of a client's weight, which is 1 / weight-cap at least.
            bounds[records.WITHIN] = 0.5 * max(private.weight_cap, 1)
        self._names = tuple(bounds)
        if clients * largest_weight >= 1 << own.bits:
            raise InputError(
                f"{clients} clients of up to {largest_weight} examples add up to more than a ring of "
                f"secure-aggregation.bits={own.bits} holds; set more bits, or sample fewer clients."
            )

        def quantiser(largest: float, unit: float) -> Quantiser:
            return Quantiser(
                size, clients, (clipping_norm if central else None) or own.clip, largest, unit, tuple(bounds.values()),
                (1, largest_weight), own.bits,
            )  # fmt: skip

        self._by_examples = quantiser(float(largest_weight), 1.0)
        room = (((1 << own.bits) - 1) // clients).bit_length() - 1
        steps = private.weight_cap if central else 1 << max(0, min(_WEIGHT_BITS, room))
        self._by_weight = quantiser(1.0, 1.0 / max(steps, 1))
        # Under differential privacy a client must not change the sum by more than the norm, roundings included.
        self._room = self._by_weight.clipping_norm if central else math.inf
        self._room -= math.sqrt(size) * self._by_weight.step if central else 0.0
        if self._room <= 0:
            raise InputError(
                f"with secure-aggregation.bits={own.bits} the rounding of {size} numbers is longer than the clipping "
                "norm; set more bits."
            )
        self.length = self._by_examples.length

    @property
    def code_bits(self) -> int:
        """Return to how many bits a number of an update is rounded."""
        return self._by_examples.code_bits

    def encode(
        self, update: np.ndarray, examples: int, weight: float | None, metrics: Mapping[str, float], source: Source
    ) -> np.ndarray:
        """Return a client's vector, (length,) uint32, of its update (size,) float32.

        `weight` is None where the number of examples is the weight; `source` decides the roundings. Raises `ValueError`
        for what is not finite, and for numbers that were not agreed on.
        """
        if odd := sorted(metrics.keys() ^ set(self._names)):
            raise ValueError(f"the number {odd[0]} is not one that this run adds up")
        counted = min(examples, self._largest)
        chosen, own = (self._by_examples, float(counted)) if weight is None else (self._by_weight, float(weight))
        if self._room < math.inf:
            norm = float(np.linalg.norm(update.astype(np.float64)))
            update = update * np.float32(min(1.0, self._room / max(norm, 1e-300)))
        explicit = int(weight is not None)
        seed = source.uniform(_SEED_NUMBERS).numpy().tobytes()
        return chosen.encode(update, own, seed, [metrics[name] for name in self._names], (explicit, counted))

    def decode(self, total: np.ndarray, clients: int) -> Sum:
        """Return what the sum (length,) uint32 of the vectors of `clients` clients says.

        Raises `ValueError` if nobody has any weight, or some weigh by examples and some otherwise.
        """
        explicit, examples = (int(number) for number in total[-2:])
        if explicit not in (0, clients):
            raise ValueError(f"{explicit} of {clients} clients have weights of their own, and the others have not")
        found = (self._by_weight if explicit else self._by_examples).decode(total, clients)
        metrics = dict(zip(self._names, found.metrics, strict=True))
        weight = found.weight if explicit else None
        return Sum(found.update, metrics, weight, examples, found.clipped, found.worst_error)
