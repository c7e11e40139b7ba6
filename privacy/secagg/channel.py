"""How a share travels from one client to another through the server: AES-256-GCM (McGrew and Viega, 2004).

Source, destination, round and context are associated data: a ciphertext that comes from, arrives at, or belongs to
anything else does not open. Two clients share one key for a round and send each other one message under it. The first
bit of a nonce is the direction, the other 95 are random, so the two never have the same, and a client that was restored
from an old copy of its state and encrypts again does not repeat one either.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from privacy.secagg.codec import encode
from privacy.secagg.errors import ForgedError
from privacy.secagg.keys import Entropy

NONCE_BYTES, TAG_BYTES = 12, 16
_FIRST_BIT = 0x80


def seal(
    key: bytes, source: int, destination: int, server_round: int, context: bytes, plain: bytes,
    entropy: Entropy = os.urandom,
) -> bytes:  # fmt: skip
    """Return nonce, ciphertext and tag: 28 bytes more than the plain ones. `key` has 32 bytes."""
    drawn = entropy(NONCE_BYTES)
    direction = _FIRST_BIT if source > destination else 0
    nonce = bytes([drawn[0] & ~_FIRST_BIT | direction]) + drawn[1:]
    return nonce + AESGCM(key).encrypt(nonce, plain, encode("share", source, destination, server_round, context))


def unseal(key: bytes, source: int, destination: int, server_round: int, context: bytes, sealed: bytes) -> bytes:
    """Return the plain bytes; raises `ForgedError` if anything differs from when they were sealed."""
    nonce, rest = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
    try:
        return AESGCM(key).decrypt(nonce, rest, encode("share", source, destination, server_round, context))
    except (InvalidTag, ValueError):
        raise ForgedError(
            f"what client {destination} got from client {source} in round {server_round} is not what was sent"
        ) from None
