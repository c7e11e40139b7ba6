"""Keys: X25519 pairs that live for one round, the secrets two clients derive from them, and Ed25519 identities.

A client has one pair for its channels and another for its masks (Bonawitz et al., CCS 2017, figure 4): the second
secret is shared out and reconstructed if its owner drops out, and must not open what was sent to it. HKDF (RFC 5869)
binds what two clients derive to the round's context and to both ends, so that secrets of different runs, rounds, models
or lists of keys have nothing in common: a server that tells two clients different things makes two that cannot talk.

Identities are pinned from outside the run (by the launcher, or by hand). A server that handed them out itself could
stand between any two clients.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from core.errors import InputError
from privacy.secagg.codec import encode
from privacy.secagg.errors import BadKeyError, ForgedError, InconsistentError

KEY_BYTES = 32
SIGNATURE_BYTES = 64

Entropy = Callable[[int], bytes]
"""Returns so many random bytes that nobody else can know; anything but `os.urandom` is for known answers."""


def digest(label: str, *values: int | bytes | str | tuple[int, ...] | Mapping[int, bytes]) -> bytes:
    """Return SHA-256 of the values, 32 bytes; equal values under two labels have different hashes."""
    return hashlib.sha256(encode(label, *values)).digest()


def content_hash(arrays: Mapping[str, bytes], config: bytes) -> bytes:
    """Return the hash of what a round trains from: the global arrays as bytes by name, in their order, and the config.

    A server that sends a model of its own making to one client, to read the answer out of the sum, has to announce it.
    """
    found = hashlib.sha256(encode("content", config, len(arrays)))
    for name, array in arrays.items():
        found.update(encode(name, len(array)))
        found.update(array)
    return found.digest()


@dataclass(frozen=True)
class KeyPair:
    """An X25519 pair, 32 bytes each."""

    secret: bytes
    public: bytes

    @staticmethod
    def generate(entropy: Entropy = os.urandom) -> KeyPair:
        """Return a new pair."""
        return KeyPair.of(entropy(KEY_BYTES))

    @staticmethod
    def of(secret: bytes) -> KeyPair:
        """Return the pair with this secret."""
        return KeyPair(secret, X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw())


Derived = dict[tuple[str, frozenset[bytes]], bytes]
"""What clients of one process have derived in a round, by label and their two public keys."""


class Agreement:
    """What one client derives with others in one round.

    Clients of one process may share `derived`: what the first of two has derived the second need not. Nobody else may
    ever hold it.
    """

    def __init__(self, label: str, client: int, pair: KeyPair, context: bytes, derived: Derived | None = None) -> None:
        self._label, self._client, self._context, self._derived = label, client, context, derived
        self._secret, self._public = X25519PrivateKey.from_private_bytes(pair.secret), pair.public

    def __call__(self, other: int, public: bytes) -> bytes:
        """Return the 32 bytes that this client and `other`, whose public key is given, derive alike.

        Raises `BadKeyError` for the client itself, its own key, and points of low order, whose secrets are all zero.
        """
        if other == self._client or public == self._public:
            raise BadKeyError(f"client {self._client} is offered its own key as that of client {other}")
        pair = (self._label, frozenset((public, self._public)))
        if self._derived and pair in self._derived:
            return self._derived[pair]
        try:
            shared = self._secret.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise BadKeyError(f"the key of client {other} is no key, or a point of low order") from None
        ends = sorted([(self._client, self._public), (other, public)])
        info = encode(self._label, *(value for end in ends for value in end))
        found = HKDF(hashes.SHA256(), KEY_BYTES, self._context, info).derive(shared)
        if self._derived is not None:
            self._derived[pair] = found
        return found


_ANYBODY = Agreement("check", 0, KeyPair.of(bytes(KEY_BYTES)), bytes(KEY_BYTES))


def check_public(public: bytes) -> None:
    """Raise `BadKeyError` for what is no X25519 public key, and for points of low order."""
    _ANYBODY(1, public)


class Identity:
    """A client's long-lived Ed25519 key. Who holds it is that client."""

    def __init__(self, secret: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(secret)
        self.public = self._key.public_key().public_bytes_raw()

    @staticmethod
    def generate(entropy: Entropy = os.urandom) -> Identity:
        """Return a new identity."""
        return Identity(entropy(KEY_BYTES))

    @property
    def secret(self) -> bytes:
        """Return the 32 bytes to keep."""
        return self._key.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Return the signature, 64 bytes, the same for the same message."""
        return self._key.sign(message)


class Roster(Mapping[int, bytes]):
    """The public keys of all clients that may ever take part, by id, pinned before the run.

    Raises `InputError` for keys that are no keys, and for one key under two ids, which would be one client twice.
    """

    def __init__(self, public_keys: Mapping[int, bytes]) -> None:
        self._public = dict(public_keys)
        if len(set(self._public.values())) < len(self._public):
            raise InputError("two clients of the roster have the same identity key; give each its own.")
        try:
            for key in self._public.values():
                Ed25519PublicKey.from_public_bytes(key)
        except ValueError as error:
            raise InputError(f"the roster holds what is no Ed25519 public key: {error}.") from None

    def __getitem__(self, client: int) -> bytes:
        return self._public[client]

    def __iter__(self) -> Iterator[int]:
        return iter(self._public)

    def __len__(self) -> int:
        return len(self._public)

    def verify(self, client: int, message: bytes, signature: bytes) -> None:
        """Raise `ForgedError` unless this client signed the message, `InconsistentError` if it is not pinned."""
        if client not in self._public:
            raise InconsistentError(f"client {client} is not on the roster")
        if not signed(self._public[client], message, signature):
            raise ForgedError(f"the signature is not that of client {client}")


@functools.lru_cache(maxsize=1 << 14)
def signed(public: bytes, message: bytes, signature: bytes) -> bool:
    """Return whether the owner of a public key has signed the message: once for all clients of one process."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except InvalidSignature:
        return False
    return True
