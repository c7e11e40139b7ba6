"""What the server and a client say to each other in a round: plain values, and their bytes.

Stage by stage (Bonawitz et al., CCS 2017, figure 4), from the server and back:

    advertise   Terms            -> Advertisement    the client's two public keys of this round, signed
    share       Participants     -> Shares           shares of its two secrets for each neighbour, sealed
    mask        Delivery         -> Masked           its vector under its masks
    confirm     Survivors        -> Confirmation     who was counted, signed (profile malicious only)
    unmask      UnmaskRequest    -> Unmasking        shares: of the self mask of who was counted, of the key of others
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from privacy.secagg import graph
from privacy.secagg.codec import decode, encode
from privacy.secagg.errors import MalformedError
from privacy.secagg.keys import digest

VERSION = 1
ADVERTISE, SHARE, MASK, CONFIRM, UNMASK = STAGES = ("advertise", "share", "mask", "confirm", "unmask")

_KINDS: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: isinstance(value, int),
    "str": lambda value: isinstance(value, str),
    "bytes": lambda value: isinstance(value, bytes),
    "tuple[int, ...]": lambda value: isinstance(value, tuple),
    "dict[int, bytes]": lambda value: isinstance(value, dict),
}


class Message:
    """A dataclass of ints, strings, bytes, tuples of ints and dicts from int to bytes."""

    def to_bytes(self) -> bytes:
        """Return the message as bytes, alike for equal messages."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return encode(type(self).__name__, *(getattr(self, name) for name in names))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the message that `to_bytes` wrote; raises `MalformedError` for anything else."""
        name, *values = decode(data) or [""]
        kinds = [_KINDS[str(field.type)] for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if name != cls.__name__ or len(values) != len(kinds):
            raise MalformedError(f"a message is no {cls.__name__}")
        if not all(fits(value) for fits, value in zip(kinds, values, strict=True)):
            raise MalformedError(f"a {cls.__name__} has values of other kinds than it should")
        return cls(*values)


@dataclass(frozen=True)
class Terms(Message):
    """What all clients of a round agree on before anything else: who is told other terms shares no key with them."""

    run: str
    """Names the run, and its attempt where a run is resumed: within one, rounds only go up."""
    round: int
    content: bytes
    """The hash of the global arrays and the train config (`keys.content_hash`)."""
    length: int
    """How many numbers a client's vector has."""
    bits: int
    """m: sums are modulo 2^m."""
    profile: str = graph.MALICIOUS
    minimum: int = graph.MINIMUM
    """The smallest cohort whose sum anybody may see."""
    neighbours: int = 0
    """With how many others each client masks; 0: with everybody."""
    threshold: int = 0
    """How many shares open a mask; 0 under the profile malicious, where it is floor(2n/3) + 1."""
    version: int = VERSION

    @functools.cached_property
    def hash(self) -> bytes:
        """Return the hash of all of it."""
        return digest("terms", self.to_bytes())

    @property
    def problem(self) -> str:
        """Return why no round can have these terms; empty where one can."""
        malicious = self.profile == graph.MALICIOUS
        if self.version != VERSION:
            return f"the protocol's version is {self.version}, not {VERSION}"
        if self.profile not in graph.PROFILES:
            return f"there is no profile '{self.profile}'"
        if self.minimum < graph.MINIMUM:
            return f"a cohort of {self.minimum} is smaller than {graph.MINIMUM}"
        if malicious and (self.neighbours or self.threshold):
            return "under the profile malicious everybody masks with everybody, and the threshold is 2/3 of them"
        if not malicious and (self.threshold < 2 or self.neighbours % 2 or 0 < self.neighbours < self.threshold):
            return f"{self.threshold} shares of {self.neighbours} neighbours are no threshold"
        if not (self.length > 0 and 1 <= self.bits <= 32 and len(self.content) == 32):
            return f"{self.length} numbers of {self.bits} bits and a hash of {len(self.content)} bytes make no round"
        return ""

    def needed(self, clients: int) -> int:
        """Return t, how many shares open a mask, where so many clients have advertised keys."""
        return self.threshold or graph.malicious_threshold(clients)

    def smallest(self, clients: int) -> int:
        """Return how many clients must be left at every stage, where so many have advertised keys."""
        return max(self.minimum, self.needed(clients))

    def graph(self, ids: tuple[int, ...], digests: bytes) -> graph.Graph:
        """Return who masks with whom: a function of everybody's keys, which nobody knew before choosing theirs."""
        return graph.graph(len(ids), self.neighbours, digest("graph", self.hash, ids, digests))

    def context(self, ids: tuple[int, ...], digests: bytes) -> bytes:
        """Return what every key of the round is bound to: version, run, round, content, and everybody's keys."""
        return digest("context", self.hash, ids, digests)


@dataclass(frozen=True)
class Advertisement(Message):
    """A client's public keys of a round."""

    round: int
    client: int
    channel: bytes
    mask: bytes
    signature: bytes

    @staticmethod
    def signed_part(terms: bytes, client: int, channel: bytes, mask: bytes) -> bytes:
        """Return what the signature is of; `terms` is their hash."""
        return encode("advertisement", terms, client, channel, mask)

    def digest(self, identity: bytes) -> bytes:
        """Return the hash of client, identity and keys that everybody's context contains."""
        return digest("keys", self.client, identity, self.channel, self.mask)


@dataclass(frozen=True)
class Participants(Message):
    """Who has advertised keys, with the keys of a client's neighbours."""

    round: int
    ids: tuple[int, ...]
    """Ascending."""
    digests: bytes
    """32 bytes each: the hashes of everybody's identity and keys, in the order of `ids`."""
    advertisements: dict[int, bytes]
    """Those of the client's neighbours."""


@dataclass(frozen=True)
class Shares(Message):
    """A client's sealed shares, and the hash of its self mask's seed, which tells a wrong reconstruction."""

    round: int
    client: int
    sealed: dict[int, bytes]
    commitment: bytes


@dataclass(frozen=True)
class Delivery(Message):
    """What a client's neighbours have sealed for it. With those from whom there is nothing it does not mask."""

    round: int
    sealed: dict[int, bytes]


@dataclass(frozen=True)
class Masked(Message):
    """A client's vector under its masks."""

    round: int
    client: int
    vector: bytes


@dataclass(frozen=True)
class Survivors(Message):
    """Whose vectors are in the sum."""

    round: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Confirmation(Message):
    """A client's signature under the survivors it was told of."""

    round: int
    client: int
    signature: bytes

    @staticmethod
    def signed_part(context: bytes, ids: tuple[int, ...]) -> bytes:
        """Return what the signature is of."""
        return encode("survivors", context, ids)


@dataclass(frozen=True)
class UnmaskRequest(Message):
    """The survivors again, and who has signed that it was told the same."""

    round: int
    ids: tuple[int, ...]
    signatures: dict[int, bytes]


@dataclass(frozen=True)
class Unmasking(Message):
    """A client's shares by whose secret they are of: the self mask of a survivor, the mask key of anybody else."""

    round: int
    client: int
    shares: dict[int, bytes]
