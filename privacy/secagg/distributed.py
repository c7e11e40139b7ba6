"""Noise inside the sum: each client's vector carries its share, and no number leaves that noise does not cover.

The strategy gets what central noise would give it, (sum_k w_k clip_S(update_k) + noise) / (q N), and nobody has ever
held the sum without the noise. A client that takes part in a round pays for one Gaussian mechanism on everything: the
server knows whom it has drawn, so that sampling hides nobody from it.

Skellam noise is not Gaussian. Its multiplier is raised until its Renyi moments at all orders of the ledger are those of
the Gaussian that the ledger counts, or less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from core.config import RunConfig
from core.errors import InputError
from core.seeding import derive
from privacy import skellam
from privacy.accounting import ORDERS
from privacy.client_level import ClientLevel
from privacy.noise import Source
from privacy.secagg.payload import Sum
from privacy.skellam import Skellam

# The raised multiplier is found in a few steps, or the ring is too small for it.
_STEPS = 20
_RAISED_AT_MOST = 2.0


class NoisyPayload:
    """How vectors of one round with noise are made and read: `Payload` has the same methods.

    `clients` are asked, `survivors` at least are in the sum, and `honest` of them keep their noise to themselves: the
    noise of so many is enough. Raises `InputError` where the ring is too small.
    """

    def __init__(
        self, config: RunConfig, size: int, clients: int, survivors: int, honest: int, server_round: int,
        clipping_norm: float,
    ) -> None:  # fmt: skip
        self._level = ClientLevel.of(config)
        self._mechanism = covering(
            self._level.noise_multiplier, clipping_norm, size, clients, honest, config.secure_aggregation.bits
        )
        self._rotation = derive(config.seed, "secure rotation", server_round)
        self.survivors = survivors
        self.length = self._mechanism.padded

    @property
    def code_bits(self) -> int:
        """Return about how many bits of a number lie within the clipping norm."""
        return math.floor(math.log2(2 * self._mechanism.radius))

    def encode(
        self, update: np.ndarray, examples: int, weight: float | None, metrics: Mapping[str, float], source: Source
    ) -> np.ndarray:
        """Return a client's vector, (length,) uint32, of its update (size,) float32 and its weight from 0 to 1."""
        share = 1.0 if weight is None else min(max(weight, 0.0), 1.0)
        return self._mechanism.encode(torch.from_numpy(update).double() * share, self._rotation, source)

    def decode(self, total: np.ndarray, clients: int) -> Sum:
        """Return the noisy mean that the sum (length,) uint32 of `clients` clients stands for.

        Raises `ValueError` for fewer than `survivors`, whose noise would be too little: nothing may be released.
        """
        if clients < self.survivors:
            raise ValueError(f"{clients} clients are left, and {self.survivors} are needed for noise enough")
        expected = self._level.expected
        noisy = self._mechanism.decode(total, self._rotation).double().numpy() / expected
        step = self._mechanism.clipping_norm / self._mechanism.radius
        return Sum(noisy, {}, expected, max(1, round(expected)), math.nan, clients * step / expected)


def covering(
    noise_multiplier: float, clipping_norm: float, size: int, clients: int, survivors: int, bits: int
) -> Skellam:
    """Return the mechanism whose moments are at most those of a Gaussian with this noise multiplier at all `ORDERS`."""
    raised = noise_multiplier
    for _ in range(_STEPS):
        try:
            found = Skellam(clipping_norm, raised, size, clients, survivors, bits)
        except InputError:
            break
        reached = gaussian_of(found)
        if reached >= noise_multiplier:
            return found
        raised *= (1 + 1e-12) * noise_multiplier / reached
        if raised > _RAISED_AT_MOST * noise_multiplier:
            break
    raise InputError(
        f"secure-aggregation.bits={bits} are too few for noise of multiplier {noise_multiplier:g} on {size} numbers of "
        f"{clients} clients: rounding would take more of it than half; set more bits."
    )


def gaussian_of(mechanism: Skellam) -> float:
    """Return the noise multiplier of the Gaussian whose moments at `ORDERS` are just not smaller."""
    orders = np.array(ORDERS)
    moments = mechanism.rdp[np.searchsorted(skellam.ORDERS, orders)]
    return float(np.sqrt(orders / (2 * moments)).min())
