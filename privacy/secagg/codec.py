"""Values to bytes and back: one way to write each value, so that equal values have equal hashes and signatures.

An int is 8 bytes (0 to 2^64 - 1, as Flower's node ids are), everything else has its length before it; integers are
little-endian. Nothing that is read is executed.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping

import numpy as np

from privacy.secagg.errors import MalformedError

Value = int | bytes | str | tuple[int, ...] | Mapping[int, bytes]

_NUMBER = struct.Struct("<Q")
_LENGTH = struct.Struct("<cQ")


def encode(*values: Value) -> bytes:
    """Return the values as bytes, in their order."""
    return b"".join(part for value in values for part in _parts(value))


def _parts(value: Value) -> list[bytes]:
    if isinstance(value, bytes):
        return [_LENGTH.pack(b"b", len(value)), value]
    if isinstance(value, int):
        return [b"i", _NUMBER.pack(value)]
    if isinstance(value, str):
        text = value.encode()
        return [_LENGTH.pack(b"s", len(text)), text]
    if isinstance(value, tuple):
        return [_LENGTH.pack(b"t", len(value)), _packed(value)]
    keys = sorted(value)
    found = [value[key] for key in keys]
    return [_LENGTH.pack(b"d", len(keys)), _packed(keys), _packed([len(entry) for entry in found]), *found]


def _packed(numbers: tuple[int, ...] | list[int]) -> bytes:
    return np.array(numbers, dtype="<u8").tobytes()


def decode(data: bytes) -> list[Value]:
    """Return the values that `encode` wrote; raises `MalformedError` for other bytes."""
    reader, values = _Reader(data), []
    try:
        while reader.left:
            values.append(reader.value())
    except (struct.error, UnicodeDecodeError) as error:
        raise MalformedError(f"a message cannot be read: {error}") from None
    return values


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> bool:
        return self._at < len(self._data)

    def _take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise MalformedError(f"a message ends {count - len(part)} bytes too early")
        self._at += count
        return part

    def _numbers(self, count: int) -> list[int]:
        found: list[int] = np.frombuffer(self._take(8 * count), "<u8").tolist()
        return found

    def value(self) -> Value:
        kind = self._take(1)
        [count] = self._numbers(1)
        if kind == b"i":
            return count
        if kind == b"b":
            return self._take(count)
        if kind == b"s":
            return self._take(count).decode()
        if kind == b"t":
            return tuple(self._numbers(count))
        if kind != b"d":
            raise MalformedError(f"a message has a value of the unknown kind {kind!r}")
        keys, lengths = self._numbers(count), self._numbers(count)
        if any(a >= b for a, b in itertools.pairwise(keys)):
            raise MalformedError("a message names somebody twice, or not in order")
        return {key: self._take(length) for key, length in zip(keys, lengths, strict=True)}
