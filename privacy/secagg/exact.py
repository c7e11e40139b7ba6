"""Exact sums of whole and real numbers of any size in the ring: what clients say of their data before training.

A number is written in fixed point, 2^-40 the unit, moved up so that it is not negative, and cut into limbs of 16 bits.
The limbs of up to 2^(m-16) clients add up inside a ring of m bits, and the carries are done in whole numbers of any
size afterwards: the sum is exact to the unit, whatever its scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_FRACTION_BITS = 40
_LIMB_BITS = 16
_LIMBS = 8
# Half of the range: numbers from -2^87 to 2^87.
_OFFSET = 1 << (_LIMBS * _LIMB_BITS - 1)


def length(count: int) -> int:
    """Return how many numbers of the ring `count` numbers take."""
    return count * _LIMBS


def most_clients(bits: int) -> int:
    """Return of how many clients a ring of so many bits holds the sum; 0 where it is too small for a limb."""
    return ((1 << bits) - 1) // ((1 << _LIMB_BITS) - 1)


def least_bits(clients: int) -> int:
    """Return how many bits a ring has to have for so many clients."""
    return (clients * ((1 << _LIMB_BITS) - 1)).bit_length()


def encode(values: Sequence[float]) -> np.ndarray:
    """Return the limbs of finite numbers below 2^87, (length,) uint32; raises `ValueError` for others."""
    limbs = []
    for value in values:
        if not abs(value) < 2.0**86:
            # The number itself is not for the server to read.
            raise ValueError("a number is not finite, or is 2^86 or more, and cannot be added up exactly")
        # A float times a power of two is exact; what is finer than the unit is rounded.
        whole = round(value * 2.0**_FRACTION_BITS) + _OFFSET
        limbs.append([(whole >> (_LIMB_BITS * i)) & ((1 << _LIMB_BITS) - 1) for i in range(_LIMBS)])
    return np.array(limbs, dtype=np.uint32).ravel()


def decode(total: np.ndarray, clients: int) -> list[float]:
    """Return the sums that the sum (length,) uint32 of the limbs of `clients` clients stands for."""
    found = []
    for limbs in total.reshape(-1, _LIMBS).tolist():
        whole = sum(limb << (_LIMB_BITS * i) for i, limb in enumerate(limbs)) - clients * _OFFSET
        found.append(whole / 2**_FRACTION_BITS)
    return found
