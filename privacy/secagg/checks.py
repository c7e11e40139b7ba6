"""What a client must have seen before it answers: each check passes, or says what was not as it should be."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection

from privacy.secagg.errors import ForgedError, InconsistentError, OutOfTurnError, RefusedError, TooFewError
from privacy.secagg.graph import MALICIOUS, SEMI_HONEST
from privacy.secagg.keys import Roster, signed
from privacy.secagg.messages import Advertisement, Confirmation, Participants, Terms, UnmaskRequest


def acceptable(terms: Terms, run: str, last_round: int, profile: str, minimum: int, bits: int) -> None:
    """Raise `OutOfTurnError` for a round that has been, `RefusedError` for terms weaker than the client's own.

    A wider ring than that of `bits` (0: any), in which its noise wraps, would show how often the sum has wrapped: how
    many of the numbers in it were negative.
    """
    problem = terms.problem
    if terms.run != run:
        problem = f"they are of run '{terms.run}', not '{run}'"
    elif terms.round <= last_round:
        raise OutOfTurnError(f"round {terms.round} is not later than round {last_round}, in which it has taken part")
    elif terms.profile == SEMI_HONEST and profile == MALICIOUS:
        problem = f"the profile {terms.profile} is weaker than {profile}"
    elif terms.minimum < minimum:
        problem = f"a cohort of {terms.minimum} is smaller than {minimum}"
    elif bits and terms.bits != bits:
        problem = f"a ring of {terms.bits} bits is not the run's of {bits}"
    if problem:
        raise RefusedError(f"a client does not accept the terms: {problem}")


def neighbours(
    terms: Terms, participants: Participants, own: Advertisement, roster: Roster
) -> dict[int, Advertisement]:
    """Return the neighbours' keys: each is what its owner has signed for these very terms, and what all are told."""
    ids = participants.ids
    ascending(ids)
    enough(len(ids), terms.smallest(len(ids)), "have advertised keys")
    if own.client not in ids or len(participants.digests) != 32 * len(ids):
        raise InconsistentError("the list of participants leaves somebody out")
    digests = {client: participants.digests[32 * i : 32 * (i + 1)] for i, client in enumerate(ids)}
    if digests[own.client] != own.digest(roster[own.client]):
        raise InconsistentError(f"the list of participants has another key of client {own.client} than its own")
    near = terms.graph(ids, participants.digests).of(ids.index(own.client))
    if tuple(ids[place] for place in near) != tuple(sorted(participants.advertisements)):
        raise InconsistentError("the keys that came are not those of the neighbours")
    found: dict[int, Advertisement] = {}
    for other, data in participants.advertisements.items():
        if other not in roster:
            raise InconsistentError(f"client {other} is not on the roster")
        found[other], of_keys = _advertised(terms.hash, other, data, roster[other])
        if of_keys != digests[other]:
            raise InconsistentError(f"the key of client {other} is not the one on the list")
    every = [key for keys in (own, *found.values()) for key in (keys.channel, keys.mask)]
    if len(set(every)) < len(every):
        raise InconsistentError("two of the keys that came are equal")
    return found


@functools.lru_cache(maxsize=1 << 12)
def _advertised(terms: bytes, client: int, data: bytes, identity: bytes) -> tuple[Advertisement, bytes]:
    """Return the advertisement in some bytes, which `client` has signed for these terms, and its digest.

    It is a function of what everybody may know: clients of one process find out once.
    """
    keys = Advertisement.from_bytes(data)
    message = Advertisement.signed_part(terms, client, keys.channel, keys.mask)
    if not signed(identity, message, keys.signature):
        raise ForgedError(f"the signature is not that of client {client}")
    if keys.client != client:
        raise InconsistentError(f"the key of client {client} is not the one on the list")
    return keys, keys.digest(identity)


def survivors(terms: Terms, client: int, ids: tuple[int, ...], participants: int, known: Collection[int]) -> None:
    """Raise unless `ids` can be the survivors, of whom only these are `known` to be able to."""
    ascending(ids)
    enough(len(ids), terms.smallest(participants), "have sent their vectors")
    if client not in ids:
        raise InconsistentError(f"client {client} has sent its vector and is not among the survivors")
    if strangers := set(ids).difference(known):
        raise InconsistentError(f"client {min(strangers)} cannot survive: it has not shared its secrets")


def confirmed(terms: Terms, request: UnmaskRequest, context: bytes, participants: int, roster: Roster) -> None:
    """Raise unless enough of the survivors have signed that they were told of the same ones."""
    if strangers := request.signatures.keys() - set(request.ids):
        raise InconsistentError(f"client {min(strangers)} has confirmed the survivors and is none")
    enough(len(request.signatures), terms.needed(participants), "have confirmed the survivors")
    signed = Confirmation.signed_part(context, request.ids)
    for other, signature in request.signatures.items():
        roster.verify(other, signed, signature)


def enough(count: int, least: int, what: str) -> None:
    """Raise `TooFewError` for fewer than `least` clients."""
    if count < least:
        raise TooFewError(f"{count} clients {what}, and {least} are needed")


def ascending(ids: tuple[int, ...]) -> None:
    """Raise `InconsistentError` if somebody is named twice, or not in order."""
    if any(a >= b for a, b in itertools.pairwise(ids)):
        raise InconsistentError("a list names somebody twice, or not in order")
