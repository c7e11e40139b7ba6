"""Where the noise of differential privacy comes from, and the coin flips of sampling: a cryptographic generator, or,
for runs that must repeat, a seed.

Words of 64 bits become normals by Box and Muller (1958) in float64: sqrt(-2 ln u) cos(2 pi v) and its sine, u and v of
63 and 64 bits. They reach 9.3 standard deviations. With uniforms of 32 bits they would end at 6.7, which one vector of
10^6 true normals in 37,000 does not: more than a delta of 1e-5 allows.

What that defends against. Mironov (CCS 2012): only some floating-point numbers come out of a sampler, so which bits
the released number has tells what was added to the noise. Holohan and Braghin (ESORICS 2021): from a normal in full
precision the uniforms, and so the next normals, can be found. Haney et al. (2022): a sum is rounded to the steps of its
larger term, so a number near zero with finer steps than that cannot have come from a large value. Adding float32 noise
to a float32 sum has the last of these in full: the rounding hides nothing where the two cancel. `noised` therefore adds
in float64 and rounds to multiples of about 2^-20 standard deviations: every multiple within reach comes out of every
value in some 2^30 ways, and says nothing about the words drawn.

What it does not defend against. Floating-point sums of many updates do not have exactly the sensitivity that real ones
have (Casacuberta et al., CCS 2022). Here a cohort of n answers with a mean of models in float32, which may be off by
2^-24 of the model's norm: n times that must be small beside the clipping norm. `privacy.skellam` sums integers. How
long drawing takes is not constant. Whoever reads the process's memory, or restores a snapshot of it, knows its noise;
a key is written nowhere.
"""

from __future__ import annotations

import math
import os
import threading
from abc import ABC, abstractmethod
from typing import ClassVar, NoReturn, SupportsIndex

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from core.errors import InputError
from core.seeding import rng

# What is in use at a time then fits a core's cache.
_CHUNK = 1 << 15
_POSITIVE = (1 << 63) - 1


class Source(ABC):
    """Independent random numbers on the CPU; no two calls return numbers of the same words."""

    guaranteed: ClassVar[bool]
    """Whether nobody can know the numbers: without that an epsilon is a simulation's, not a guarantee."""

    @abstractmethod
    def at(self, *path: int | str) -> Source:
        """Return the source for what these names (say "noise", round, client) stand for."""

    @abstractmethod
    def _words(self, count: int) -> Tensor:
        """Return `count` <= _CHUNK words of 64 random bits, (count,) int64."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return standard normal numbers of this shape, computed in float64 and rounded to `dtype`."""
        out = torch.empty(math.prod(shape), dtype=dtype)
        for part in out.split(_CHUNK):
            half = (len(part) + 1) // 2
            first, second = self._words(2 * half).view(2, half)
            # u in (0, 1], and signed words are angles in [-pi, pi].
            radius = (first & _POSITIVE).double().add_(1).mul_(2.0**-63).log_().mul_(-2).sqrt_()
            angle = second.double().mul_(math.pi * 2.0**-63)
            part[:half] = radius * angle.cos()
            part[half:] = (radius * angle.sin_())[: len(part) - half]
        return out.view(shape)

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1) of this shape, float64, multiples of 2^-53."""
        out = torch.empty(math.prod(shape), dtype=torch.float64)
        for part in out.split(_CHUNK):
            # The shift keeps the sign, and the mask drops what it copied.
            part[:] = (self._words(len(part)) >> 11) & (1 << 53) - 1
        return out.mul_(2.0**-53).view(shape)

    def sampled(self, rate: float, count: int) -> Tensor:
        """Return which of `count` clients or examples take part, (count,) bool: each does with probability `rate`,
        independently of all others (Poisson sampling; none at all is possible).

        Raises `InputError` if `rate` is not in [0, 1].
        """
        if not 0 <= rate <= 1:
            raise InputError(f"a sampling rate of {rate} is not a probability; choose a number from 0 to 1.")
        return self.uniform(count) < rate


class Secret(Source):
    """The keystream of AES-256 in counter mode under a key from the operating system, which this process alone knows.

    As long as AES is a random permutation, b blocks of 16 bytes differ from random ones with an advantage of at most
    b^2 / 2^129: 2^-67 after 4 billion numbers. A child process draws under a key of its own, and the object cannot be
    copied or pickled: both would repeat its numbers.
    """

    guaranteed = True

    def __init__(self) -> None:
        self._zeros = memoryview(bytes(8 * _CHUNK))
        self._new_key()

    def at(self, *path: int | str) -> Source:
        """Return this source: what it draws is independent of everything, whatever the names."""
        return self

    def _new_key(self) -> None:
        self._process = os.getpid()
        # A thread that held the old lock may not exist in this process.
        self._lock = threading.Lock()
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()

    def _words(self, count: int) -> Tensor:
        if os.getpid() != self._process:
            self._new_key()
        # Threads may share the source, so each call has a buffer of its own. The cipher asks for a block more.
        words = np.empty(count + 2, dtype=np.int64)
        with self._lock:
            self._stream.update_into(self._zeros[: 8 * count], words.data.cast("B"))
        return torch.from_numpy(words[:count])

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a secret source of noise cannot be copied or pickled: its numbers would be drawn twice")


class Simulated(Source):
    """Numbers that belong to (seed, path), the same on every machine: for runs that must repeat, not a guarantee.

    `at("noise", round, client)` is a client's own stream, so that what it draws does not depend on its cohort.
    """

    guaranteed = False

    def __init__(self, seed: int, *path: int | str) -> None:
        self._seed, self._path = seed, path
        self._bits = rng(seed, *path).bit_generator

    def at(self, *path: int | str) -> Simulated:
        """Return the source that belongs to this one's path and these names, from its first number on."""
        return Simulated(self._seed, *self._path, *path)

    def _words(self, count: int) -> Tensor:
        return torch.from_numpy(self._bits.random_raw(count).view(np.int64))


def noised(values: Tensor, noise: Tensor, deviation: float | Tensor) -> Tensor:
    """Return values + deviation noise, float32, added and rounded as explained above.

    `noise` has a standard deviation of about 1 and must be float64, or its own steps would show. A deviation may be a
    tensor that broadcasts; where it is 0 nothing changes. Raises `InputError` if one is negative or not finite,
    `TypeError` for noise of another dtype.
    """
    each = torch.as_tensor(deviation, dtype=torch.float64, device=values.device)
    if not bool(((each >= 0) & each.isfinite()).all()):
        raise InputError(f"noise of standard deviation {deviation} does not exist; choose a finite number from 0 on.")
    if noise.dtype != torch.float64:
        raise TypeError(f"noise must be float64, not {noise.dtype}")
    step = torch.exp2(each.log2().floor() - 20)
    # A deviation of 0 has steps of 0.
    rounded = noise.mul(each).add_(values).div_(step).round_().mul_(step).float()
    return torch.where(each > 0, rounded, values.float())


def source(seed: int) -> Source:
    """Return a run's source of noise: secret, or of `privacy.noise-seed` where that is 0 or more."""
    return Secret() if seed < 0 else Simulated(seed, "privacy")
