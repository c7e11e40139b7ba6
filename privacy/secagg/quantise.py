"""Updates as integers whose sums fit the ring: a clipped L2 norm, stochastic rounding, and what the sum means again.

A client's update (everything that travels, as one vector) is clipped to the norm c, multiplied by w / w_max, and each
number rounded up or down to one of 2^b steps of 2c / (2^b - 1), so that its mean is right to 2^-17 of a step; zero is a
step. Metrics, each within a bound of its own, are numbers of the vector like others, with weight w. Weights, whether a
client was clipped, and other counts are added as they are. So that no sum wraps, n (2^b - 1) < 2^m, and n times the
largest of each count is below 2^m too: the weight is in the numbers before they are rounded and takes no bits of its
own, and b can be 28 for 10 clients and 22 for 1000 in 32 bits.

The weighted mean of n clients is wrong by less than n step / sum(w / w_max), whatever is rounded how; by half of that
but with probability 2 exp(-n / 2) (Hoeffding), and its standard deviation is at most sqrt(n) step / (2 sum(w / w_max)).
Numbers that are zero at all clients are exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import InputError
from privacy.secagg.masking import CHUNK, Stream, buffer_of

# Codes are cast through int32, and may be one too large before they are cut off.
MOST_BITS = 30
_DITHER_BITS = 16


@dataclass(frozen=True)
class Layout:
    """Arrays by name as one vector and back, in their shapes and dtypes."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray]) -> Layout:
        """Return the layout of these arrays; raises `ValueError` for others than real numbers."""
        found = {name: np.asarray(array) for name, array in arrays.items()}
        for name, array in found.items():
            if array.dtype.kind not in "fiu":
                raise ValueError(f"'{name}' of type {array.dtype} cannot be added up")
        return Layout({name: a.shape for name, a in found.items()}, {name: a.dtype for name, a in found.items()})

    @property
    def size(self) -> int:
        """Return how many numbers there are."""
        return sum(map(math.prod, self.shapes.values()))

    def flatten(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the arrays as one vector (size,), float32 where that holds all of them, else float64."""
        if {name: np.shape(array) for name, array in arrays.items()} != dict(self.shapes):
            raise ValueError("arrays have other names or shapes than were agreed on")
        wide = any(dtype.kind != "f" or dtype.itemsize > 4 for dtype in self.dtypes.values())
        flat = [np.ravel(arrays[name]).astype(np.float64 if wide else np.float32, copy=False) for name in self.shapes]
        return flat[0] if len(flat) == 1 else np.concatenate(flat)

    def restore(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Return a vector's arrays; integers are rounded to the nearest that their type has."""
        parts = np.split(flat, np.cumsum([math.prod(shape) for shape in self.shapes.values()])[:-1])
        return {
            name: _typed(part.reshape(shape), self.dtypes[name])
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


def _typed(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values), limits.min, limits.max).astype(dtype)


@dataclass(frozen=True)
class Mean:
    """What a sum says about those who are in it."""

    update: np.ndarray
    """The mean of their clipped updates by weight, (size,) float64."""
    metrics: tuple[float, ...]
    """The means by weight."""
    weight: float
    counts: tuple[int, ...]
    clipped: float
    """Which fraction of the clients were clipped."""
    worst_error: float
    """More than any number of `update` can be wrong by, because of rounding."""
    deviation: float
    """The standard deviation of that error at most."""


@dataclass(frozen=True)
class Quantiser:
    """How clients of one round make vectors for the ring. Raises `InputError` where a sum could leave it.

    Weights are whole multiples of `weight_unit` up to `largest_weight`.
    """

    size: int
    clients: int
    """The most that may be added up."""
    clipping_norm: float
    largest_weight: float = 1.0
    weight_unit: float = 1.0
    bounds: tuple[float, ...] = ()
    """The largest absolute value of each metric; one that is larger counts as that."""
    counts: tuple[int, ...] = ()
    """The largest value of each count of a client."""
    ring_bits: int = 32
    bits: int = 0
    """b; 0: as many as fit."""

    def __post_init__(self) -> None:
        for name in ("clipping_norm", "largest_weight", "weight_unit"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)} cannot be used; choose a positive number.")
        if any(not 0 < bound < math.inf for bound in self.bounds):
            raise InputError(f"bounds {self.bounds} of metrics cannot be used; choose positive numbers.")
        if not 2 <= self.ring_bits <= 32 or self.clients < 1 or self.size < 1 or not 0 <= self.bits <= MOST_BITS:
            raise InputError(
                f"{self.size} numbers of {self.bits} bits of {self.clients} clients in a ring of {self.ring_bits} bits "
                f"cannot be added up; choose a ring of 2 to 32 bits and numbers of 2 to {MOST_BITS} (0: what fits)."
            )
        room = (1 << self.ring_bits) - 1
        if self.code_bits < 2 or self.clients * ((1 << self.code_bits) - 1) > room:
            raise InputError(
                f"the sum of {self.clients} clients' numbers of {self.code_bits} bits can leave a ring of "
                f"{self.ring_bits} bits; choose {max(2, self._most_bits)} bits or fewer, or fewer clients."
            )
        for largest in self._largest:
            if self.clients * largest > room:
                raise InputError(
                    f"counts or weights of up to {largest} of {self.clients} clients add up to more than a ring of "
                    f"{self.ring_bits} bits holds; cap them at {room // self.clients}."
                )

    @property
    def code_bits(self) -> int:
        """Return b, how many bits a number is rounded to."""
        return self.bits or self._most_bits

    @property
    def _most_bits(self) -> int:
        # The largest b with 2^b - 1 <= (2^m - 1) / n.
        return min(MOST_BITS, (((1 << self.ring_bits) - 1) // self.clients + 1).bit_length() - 1)

    @property
    def _largest(self) -> tuple[int, ...]:
        return (round(self.largest_weight / self.weight_unit), 1, *self.counts)

    @property
    def length(self) -> int:
        """Return how many numbers a client's vector has: update, metrics, weight, whether clipped, counts."""
        return self.size + len(self.bounds) + len(self._largest)

    @property
    def step(self) -> float:
        """Return the distance between two numbers of an update."""
        return 2 * self.clipping_norm / ((1 << self.code_bits) - 1)

    def encode(
        self, update: np.ndarray, weight: float, seed: bytes, metrics: Sequence[float] = (), counts: Sequence[int] = ()
    ) -> np.ndarray:
        """Return a client's vector for the ring, (length,) uint32, from its update (size,) float32 or float64.

        `seed`, 32 bytes, decides the roundings. Raises `ValueError` for what is not finite, and for weights and counts
        that were not agreed on.
        """
        units = self._units(weight)
        if update.shape != (self.size,) or len(metrics) != len(self.bounds):
            raise ValueError(f"{update.shape} numbers and {len(metrics)} metrics are not what was agreed on")
        norm = math.sqrt(_sum_of_squares(update))
        if not (math.isfinite(norm) and all(map(math.isfinite, metrics))):
            raise ValueError("an update or a metric is not finite and cannot be added up")
        share = units * self.weight_unit / self.largest_weight
        vector = np.empty(self.length, dtype=np.uint32)
        scale = share / self.step * min(1.0, self.clipping_norm / max(norm, 1e-300))
        stream = Stream(seed)
        self._round(update, scale, stream, vector[: self.size])
        beside = [np.clip(metric / bound, -1, 1) for metric, bound in zip(metrics, self.bounds, strict=True)]
        self._round(
            np.array(beside, dtype=np.float64), share * self.clipping_norm / self.step, stream,
            vector[self.size : self.size + len(beside)],
        )  # fmt: skip
        vector[self.size + len(beside) :] = self._counted(units, norm > self.clipping_norm, counts)
        return vector

    def decode(self, total: np.ndarray, clients: int) -> Mean:
        """Return the mean that a sum (length,) uint32 of the vectors of `clients` clients stands for.

        Raises `ValueError` if nobody has any weight.
        """
        numbers, counted = np.split(total.astype(np.int64), [self.size + len(self.bounds)])
        shares = float(counted[0]) * self.weight_unit / self.largest_weight
        if not shares > 0:
            raise ValueError(f"the weights of {clients} clients add up to nothing")
        means = (numbers - clients * self._zero) * (self.step / shares)
        return Mean(
            update=means[: self.size],
            metrics=tuple((means[self.size :] / self.clipping_norm * self.bounds).tolist()),
            weight=float(counted[0]) * self.weight_unit,
            counts=tuple(counted[2:].tolist()),
            clipped=float(counted[1]) / clients,
            worst_error=clients * self.step / shares,
            deviation=math.sqrt(clients) * self.step / (2 * shares),
        )

    @property
    def _zero(self) -> int:
        return 1 << (self.code_bits - 1)

    def _units(self, weight: float) -> int:
        if not 0 <= weight <= self.largest_weight:
            # The weight itself is not for the server to read.
            raise ValueError(f"a weight is not from 0 to the {self.largest_weight:g} agreed on")
        return round(weight / self.weight_unit)

    def _counted(self, units: int, clipped: bool, counts: Sequence[int]) -> list[int]:
        if len(counts) != len(self.counts) or any(not 0 <= c <= most for c, most in zip(counts, self.counts)):  # noqa: B905
            raise ValueError(f"counts are not from 0 to the {self.counts} agreed on")
        return [units, int(clipped), *counts]

    def _round(self, values: np.ndarray, scale: float, stream: Stream, out: np.ndarray) -> None:
        """Write floor(values * scale + u) + 2^(b-1) into `out` (n,) uint32, u uniform in the middles of 2^-16."""
        codes, words = out.view(np.int32), buffer_of(CHUNK // 2)
        scaled, dither = np.empty((2, min(len(values), CHUNK)))
        offset = self._zero + 2.0 ** -(_DITHER_BITS + 1)
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK]
            stream.fill(words, (len(part) + 1) // 2)
            here, drawn = scaled[: len(part)], dither[: len(part)]
            # A copy that widens and a product in place are faster than a product of two types.
            here[:], drawn[:] = part, words.view(np.uint16)[: len(part)]
            here *= scale
            drawn *= 2.0**-_DITHER_BITS
            here += drawn
            here += offset
            # A cast of what is positive rounds down.
            codes[start : start + CHUNK] = here
        last = (1 << self.code_bits) - 1
        # A number that is as large as the norm allows lies half a step below the last code.
        if out.max(initial=0) > last:
            np.minimum(out, last, out=out)


def _sum_of_squares(values: np.ndarray) -> float:
    """Return the sum of squares in float64; not `dot`, which would wake all of BLAS's threads for it."""
    wide = np.empty(min(len(values), CHUNK))
    total = 0.0
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        here = wide[: len(part)]
        here[:] = part
        total += float(np.einsum("i,i->", here, here))
    return total
