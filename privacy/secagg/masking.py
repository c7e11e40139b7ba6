"""Masks: seeds of 256 bits become uniform vectors in a ring Z_2^m by AES-256 in counter mode, added up in place.

What client i sends is x_i + PRG(b_i) + sum_{j > i} PRG(s_ij) - sum_{j < i} PRG(s_ij) mod 2^m (Bonawitz et al., CCS
2017, section 4): each pairwise mask s_ij is added by one and subtracted by the other, and the self mask b_i hides x_i
from a server that learns the s_ij of a client which was only late. The counter starts at zero, so a seed is for one
vector. Words are uint32, whose sums wrap as the ring does; a smaller m is a matter of their lowest bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

SEED_BYTES = 32
# Words of a vector that are worked on at a time: with as many of a mask they fit a core's second cache.
CHUNK = 1 << 15
_BLOCK_WORDS = 4
_ZEROS = memoryview(bytes(4 * CHUNK))


class Stream:
    """The keystream that belongs to a seed, a chunk at a time."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed of {len(seed)} bytes is not one of {SEED_BYTES}")
        self._cipher: CipherContext = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()

    def fill(self, buffer: np.ndarray, count: int) -> None:
        """Write the next `count` <= CHUNK words into the front of a uint32 buffer, which is four words longer."""
        self._cipher.update_into(_ZEROS[: 4 * count], buffer.data.cast("B"))


def buffer_of(count: int) -> np.ndarray:
    """Return a buffer for `count` words at most: the cipher asks for a block more than it writes."""
    return np.empty(min(count, CHUNK) + _BLOCK_WORDS, dtype=np.uint32)


def expand(seed: bytes, count: int) -> np.ndarray:
    """Return the mask of a seed, (count,) uint32, uniform over all values."""
    vector = np.zeros(count, dtype=np.uint32)
    add_masks(vector, [seed])
    return vector


def add_masks(vector: np.ndarray, added: Iterable[bytes], subtracted: Iterable[bytes] = ()) -> None:
    """Add the masks of some seeds to a vector (n,) uint32 and subtract those of others, in place."""
    plus, minus = [Stream(seed) for seed in added], [Stream(seed) for seed in subtracted]
    buffer = buffer_of(len(vector))
    for start in range(0, len(vector), CHUNK):
        part = vector[start : start + CHUNK]
        mask = buffer[: len(part)]
        for stream in plus:
            stream.fill(buffer, len(part))
            np.add(part, mask, out=part)
        for stream in minus:
            stream.fill(buffer, len(part))
            np.subtract(part, mask, out=part)


def in_ring(vector: np.ndarray, bits: int) -> np.ndarray:
    """Reduce a vector (n,) uint32 modulo 2^bits, in place, and return it."""
    if bits < 32:
        np.bitwise_and(vector, (1 << bits) - 1, out=vector)
    return vector


def pack(vector: np.ndarray, bits: int) -> bytes:
    """Return a vector (n,) uint32 below 2^bits as bytes: as many whole ones a number as it needs, little-endian."""
    width = word_bytes(bits)
    if width == 4:
        return vector.astype("<u4", copy=False).tobytes()
    return vector.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)[:, :width].tobytes()


def unpack(data: bytes, bits: int) -> np.ndarray:
    """Return the vector that `pack` wrote, uint32, perhaps read-only; raises `ValueError` for half a number."""
    width = word_bytes(bits)
    if width == 4:
        return np.frombuffer(data, "<u4")
    words = np.zeros((len(data) // width, 4), dtype=np.uint8)
    words[:, :width] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return words.view("<u4").ravel()


def word_bytes(bits: int) -> int:
    """Return how many bytes a number of the ring takes on its way."""
    return -(-bits // 8)
